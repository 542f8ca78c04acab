"""The data of a training: tokenised rows, the same on every process. Knows no model."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from accum_trainer.config import TrainConfig
from accum_trainer.data import embedded, files
from accum_trainer.data.skipped import Skipped
from accum_trainer.data.tokenizing import TokenizedRows, take_columns, tokenize
from accum_trainer.errors import DataError
from accum_trainer.lm.model import load_tokenizer


@dataclass(frozen=True)
class Data:
    """Tokenised samples.

    Attributes:
        train: samples to train on.
        evaluation: samples to evaluate on, or None.
        pad_token_id: the token that fills padded rows.
    """

    tokenizer: Any
    train: TokenizedRows
    evaluation: TokenizedRows | None
    pad_token_id: int


def load_data(config: TrainConfig, engine: Any) -> Data:
    """Read and tokenise the rows of `config`, first on the main process, then, from its cache, on
    the others. Collective.

    Raises:
        ConfigError, DataError: on all processes if one cannot read the rows, or reads others.
    """
    engine.together(_check_files, config)
    tokenizer = engine.main_first(load_tokenizer, config)
    rows, evaluation = engine.main_first(load_rows, config, tokenizer)
    _check_same_rows(engine, "training", rows)
    _check_same_rows(engine, "evaluation", evaluation)
    pad = tokenizer.pad_token_id
    return Data(
        tokenizer,
        rows,
        evaluation,
        pad_token_id=pad if pad is not None else tokenizer.eos_token_id or 0,
    )


def load_rows(config: TrainConfig, tokenizer: Any) -> tuple[TokenizedRows, TokenizedRows | None]:
    """The rows to train on, and those to evaluate on if `config` asks for any. Not collective."""
    columns = (config.prompt_column, config.completion_column, config.text_column)
    skips = config.on_bad_row == "skip"

    def from_table(
        table: Any,
        name: str,
        digest: str,
        columns: tuple[str | None, ...] = columns,
        skipped: Skipped | None = None,
    ) -> TokenizedRows:
        if any(columns):  # the chosen columns are part of the data's identity
            table, digest = take_columns(table, name, *columns), f"{digest} {columns}"
        return tokenize(table, name, digest, tokenizer, config.max_seq_len, skipped)

    def from_file(path: Any, name: str) -> TokenizedRows:
        skipped = Skipped() if skips else None
        if skipped is not None:
            with files.unchanged(path):
                path = files.without_bad_lines(path, skipped)
        with files.unchanged(path) as digest:
            table = files.read_file(path, [c for c in columns if c], digest)
        return from_table(table, name, digest, skipped=skipped)

    def embedded_rows(path: Any, name: str) -> TokenizedRows:
        digest = files.digest(path)
        return from_table(files.read_file(path, content=digest), name, digest, ())

    if config.dataset_file is not None:
        rows = from_file(config.dataset_file, config.dataset_file)
    elif config.dataset is not None:
        table = files.read_hub(config.dataset)
        # `datasets` names a table's content by this fingerprint and offers no public name for it.
        digest = table._fingerprint  # noqa: SLF001
        rows = from_table(table, config.dataset, digest, skipped=Skipped() if skips else None)
    else:
        rows = embedded_rows(embedded.corpus_files()[0], "embedded corpus")
    if config.eval_file is not None:
        return rows, from_file(config.eval_file, config.eval_file)
    if config.eval_every is not None:
        return rows, embedded_rows(embedded.corpus_files()[1], "embedded evaluation rows")
    return rows, None


def _check_files(config: TrainConfig) -> None:
    for path in (config.dataset_file, config.eval_file):
        if path is not None:
            files.check_file(path)


def _check_same_rows(engine: Any, kind: str, rows: TokenizedRows | None) -> None:
    everyones = engine.gather_objects(
        (rows.identity if rows is not None else None, socket.gethostname())
    )
    for rank, (identity, host) in enumerate(everyones):
        if identity != everyones[0][0]:
            raise DataError(
                f"process {rank} ({host}) reads other {kind} rows than process 0 "
                f"({everyones[0][1]}); give all processes the same data files and tokenizer"
            )
