"""Rows to token ids and labels, computed once and cached on disk.

The label of a target is the token itself, and IGNORE (-100) otherwise. Labels are at their token's
own position; the loss shifts them. No row is dropped: a `text` row that is too long becomes several
samples, a completion that is too long is truncated, and a row without a target stays with weight 0.
The last two are counted in the notes. Knows no model and no window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accum_trainer.batch import IGNORE
from accum_trainer.data.files import private_cache
from accum_trainer.data.rows import Span, format_of, spans_of
from accum_trainer.data.skipped import Skipped
from accum_trainer.errors import DataError
from accum_trainer.sources.dataset import CountedRows

if TYPE_CHECKING:
    import datasets

# Increment when the same rows would give other tokens.
_VERSION = 3
_COLUMNS = ("input_ids", "labels", "length", "num_targets", "cut", "silent")
# Rows that are checked before all are tokenised: most errors already show in the first row.
_FIRST_ROWS = 100


@dataclass(frozen=True)
class TokenizedRows(CountedRows):
    """Samples ready to collate: {"input_ids": [int], "labels": [int]}, both of `lengths[i]` tokens.

    Attributes:
        table: the samples as columns, with their counts.
        lengths: tokens of each sample, shape (samples,), int64.
        num_targets: labels of each sample that the shifted loss counts, shape (samples,), int64.
        identity: hexadecimal digest of the data, tokenizer and sequence length; equal for equal
            samples.
        notes: lines for the user, such as the number of truncated completions.
        num_skipped: rows that were left out because they cannot be trained on.
    """

    table: datasets.Dataset
    lengths: np.ndarray
    num_targets: np.ndarray
    identity: str
    notes: tuple[str, ...]
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.table[int(index)]
        return {"input_ids": row["input_ids"], "labels": row["labels"]}


def take_columns(
    rows: datasets.Dataset,
    source: str,
    prompt: str | None,
    completion: str | None,
    text: str | None,
) -> datasets.Dataset:
    """Keep the named columns only, as `prompt`, `completion` or `text`; all if none is named.

    Args:
        rows: of `read_file` or `read_hub`.
        source: the data's name in errors.
        prompt, completion, text: a column of `rows`, or None.

    Raises:
        DataError: a column does not exist.
    """
    wanted = {
        column: name
        for name, column in (("prompt", prompt), ("completion", completion), ("text", text))
        if column
    }
    for column, name in wanted.items():
        if column not in rows.column_names:
            raise DataError(
                f"{source} has no column {column} ({name}_column={column}); it has "
                f"{', '.join(rows.column_names)}"
            )
    return rows.select_columns(list(wanted)).rename_columns(wanted) if wanted else rows


def tokenize(
    rows: datasets.Dataset,
    source: str,
    data_digest: str,
    tokenizer: Any,
    max_seq_len: int,
    skipped: Skipped | None = None,
) -> TokenizedRows:
    """Tokenise all rows, or load them from the cache of an earlier run.

    The tokenizer gets whole batches and spreads them over the cores; `datasets` shows the progress.

    Args:
        rows: of `read_file` or `read_hub`.
        source: the data's name in errors.
        data_digest: digest of the data's content; part of the cache key, like the two below.
        tokenizer: a tokenizer of transformers.
        max_seq_len: most tokens in one sample.
        skipped: rows that were left out already; those without a known format are left out too.
            None: such a row is an error.

    Raises:
        DataError: a row has no known format, or no row has a target.
    """
    if skipped is not None:
        data_digest += " skip"  # the same rows may be other samples
    identity = _identity(data_digest, tokenizer, max_seq_len)
    path = private_cache("tokenized") / f"{identity}.arrow"
    noted = path.with_suffix(".skipped.json")
    if path.exists() and not (_is_whole(path) and (skipped is None or Skipped.read(noted))):
        path.unlink()
    encoder = _Encoder(tokenizer, max_seq_len, source, skips=skipped is not None)
    encoder.check(rows)
    table = rows.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_features(),  # not those of the first batch, which may have no sample
        cache_file_name=str(path),
        new_fingerprint=identity[:32],
        desc=f"Tokenising {source}",
    )
    if skipped is not None:
        if encoder.was_used:
            encoder.skipped.write(noted)
        skipped = skipped.plus(Skipped.read(noted) or Skipped())
        if len(table) == 0:
            raise DataError(
                f"{source} has no row that can be trained on; {skipped.count} were skipped "
                f"(on_bad_row=skip), the first because {skipped.first}"
            )
    lengths = np.asarray(table.data.column("length").to_numpy(), dtype=np.int64)
    num_targets = np.asarray(table.data.column("num_targets").to_numpy(), dtype=np.int64)
    if not num_targets.any():
        raise DataError(
            f"{source} has no target in any of its {len(table)} samples, so there is nothing to "
            "learn; are the completions empty, or the prompts longer than "
            f"max_seq_len={max_seq_len}?"
        )
    notes = list(_notes(table, num_targets, max_seq_len))
    num_skipped = skipped.count if skipped is not None else 0
    if skipped is not None and num_skipped:
        notes.append(
            f"rows of {source} that were skipped (on_bad_row=skip): {num_skipped}, the first "
            f"because {skipped.first}"
        )
    return TokenizedRows(table, lengths, num_targets, identity, tuple(notes), num_skipped)


def _features() -> datasets.Features:
    import datasets

    number, flag = datasets.Value("int64"), datasets.Value("bool")
    ids = datasets.List(datasets.Value("int32"))  # as `datasets` chooses for this name
    kinds = (ids, datasets.List(number), number, number, flag, flag)
    return datasets.Features(dict(zip(_COLUMNS, kinds, strict=True)))


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache is a table of samples, and not one that a disk or another program
    damaged."""
    import datasets

    try:
        table = datasets.Dataset.from_file(str(path))
        table.data.validate()
    except Exception:  # pyarrow and datasets raise many types
        return False
    return table.features == _features() and len(table) > 0


def _notes(table: datasets.Dataset, num_targets: np.ndarray, max_seq_len: int) -> Iterator[str]:
    cut = int(np.asarray(table.data.column("cut").to_numpy()).sum())
    if cut:
        yield f"{cut} of {len(table)} samples were cut at max_seq_len={max_seq_len} tokens"
    empty = int((num_targets == 0).sum())
    if empty:
        yield f"{empty} of {len(table)} samples have no target; they are kept and weigh nothing"
    silent = int(np.asarray(table.data.column("silent").to_numpy()).sum())
    if silent:
        yield (
            f"{silent} of {len(table)} samples have an empty completion; they train the model to "
            "end at once"
        )


def _identity(data_digest: str, tokenizer: Any, max_seq_len: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    key = [
        _VERSION,
        data_digest,
        vocabulary,
        tokenizer.chat_template,
        tokenizer.eos_token,
        max_seq_len,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


class _Encoder:
    """Converts a batch of rows to columns of samples; called by `datasets.map`."""

    def __init__(self, tokenizer: Any, max_seq_len: int, source: str, skips: bool = False) -> None:
        self.tokenizer = tokenizer
        self.skips, self.skipped, self.was_used = skips, Skipped(), False
        self.max_seq_len = max_seq_len
        self.source = source
        self.template = (
            tokenizer.apply_chat_template if getattr(tokenizer, "chat_template", None) else None
        )
        # Some tokenizers put a BOS token first; samples then start with it, as in pre-training.
        opening = tokenizer("a").input_ids[:1]
        self.opening = opening if opening and opening[0] == tokenizer.bos_token_id else []

    def check(self, rows: datasets.Dataset) -> None:
        """Raise a DataError if one of the first rows has no known format; if rows are skipped, only
        if the columns make none."""
        if self.skips and format_of(rows.column_names) is not None:
            return
        for index in range(min(_FIRST_ROWS, len(rows))):
            spans_of(rows[index], f"{self.source} row {index + 1}", self.template)

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        self.was_used = True
        rows, spans = [], []
        for values, index in zip(zip(*batch.values(), strict=True), indices, strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                spans.append(spans_of(row, f"{self.source} row {index + 1}", self.template))
            except DataError as error:
                if not self.skips:
                    raise
                self.skipped.add(str(error))
            else:
                rows.append(row)
        texts = [text for row_spans in spans for text, _ in row_spans]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for row, row_spans in zip(rows, spans, strict=True):
            for ids, labels, cut in self._samples(row, row_spans, encoded):
                columns["input_ids"].append(ids)
                columns["labels"].append(labels)
                columns["length"].append(len(ids))
                columns["num_targets"].append(sum(label != IGNORE for label in labels[1:]))
                columns["cut"].append(cut)
                columns["silent"].append(row_spans[1:] == [("", True)])
        return columns

    def _samples(
        self, row: Mapping[str, Any], spans: list[Span], encoded: Iterator[list[int]]
    ) -> Iterator[tuple[list[int], list[int], bool]]:
        """Yield (input_ids, labels, whether truncated) of each sample of one row."""
        from_template = any(row.get(column) is not None for column in ("messages", "conversations"))
        ids: list[int] = [] if from_template else list(self.opening)
        labels = [IGNORE] * len(ids)
        for _, is_target in spans:
            tokens = next(encoded)
            ids += tokens
            labels += tokens if is_target else [IGNORE] * len(tokens)
        if not from_template and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        limit = self.max_seq_len
        whole_text = len(spans) == 1 and spans[0][1]
        if len(ids) <= limit or not whole_text:
            yield ids[:limit], labels[:limit], len(ids) > limit
            return
        # Pieces overlap by one token. The first token of a piece is never a target, so each target
        # is trained once.
        for begin in range(0, len(ids) - 1, limit - 1):
            yield ids[begin : begin + limit], labels[begin : begin + limit], False
