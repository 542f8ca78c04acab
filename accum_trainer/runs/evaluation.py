"""Evaluate merged models and their inputs: mean loss per target on the same rows, in float32.

Knows folders that `from_pretrained` loads and the runs' configuration; nothing of averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from accum_trainer.config import TrainConfig
from accum_trainer.data.files import check_file
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.lm.model import load_model
from accum_trainer.runs.origin import Origin
from accum_trainer.runs.saved_model import ADAPTER_CONFIG
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.train.evaluation import micro_batch_losses
from accum_trainer.train.rows import load_rows
from accum_trainer.window_plan import Cut

_EMBEDDED = "evaluation rows of the embedded corpus"


def choose_rows(config: TrainConfig, eval_file: str | Path | None) -> tuple[str | None, str]:
    """(the rows to evaluate on, "") or (None, why nothing can be evaluated)."""
    if eval_file is not None:
        return str(check_file(eval_file)), ""
    if config.eval_file is not None:
        if Path(config.eval_file).is_file():
            return config.eval_file, ""
        return None, f"the runs' eval_file={config.eval_file} is not here; name it with --eval-file"
    if config.dataset_file is None and config.dataset is None:
        return _EMBEDDED, ""
    return None, "the runs had no eval_file; name one with --eval-file"


def load_evaluation_rows(origin: Origin, chosen: str) -> TokenizedRows:
    """The rows that `choose_rows` chose, tokenized."""
    if chosen == _EMBEDDED:
        rows = load_rows(replace(origin.config, eval_every=1), origin.tokenizer)[1]
        assert rows is not None
        return rows
    only = replace(
        origin.config, dataset_file=chosen, dataset=None, eval_file=None, eval_every=None
    )
    return load_rows(only, origin.tokenizer)[0]


def evaluate(folder: Path, rows: TokenizedRows, origin: Origin) -> float:
    """Mean loss per target of the model or adapter in `folder`, in float32."""
    if (folder / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(origin.load(), str(folder))
    else:
        model = load_model(origin.config.without_peft().of_folder(folder), origin.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() and not origin.config.cpu else "cpu")
    micro_batches = _cut(origin.config).assign_to_ranks(rows.lengths, 1)[0]
    pad = PaddingCollator(origin.tokenizer.pad_token_id or 0)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for micro_batch in micro_batches:
            yield {
                key: value.to(device)
                for key, value in pad([rows[int(i)] for i in micro_batch]).items()
            }

    return sum(micro_batch_losses(model.to(device), batches())) / int(rows.num_targets.sum())


def _cut(config: TrainConfig) -> Cut:
    """The run's own micro-batches; 4 samples if it had its batch size found by trial."""
    if isinstance(config.batch_size, int):
        return Cut(config.batch_size, config.max_tokens_per_micro_batch)
    max_tokens = config.max_tokens_per_micro_batch
    return Cut(None if max_tokens else 4, max_tokens)
