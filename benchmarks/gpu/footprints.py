"""What `accum-trainer plan` estimates for one process against what torch's allocator handed out at
most.

On a CPU there is the estimate only: `benchmarks/footprint.py` measures there, with a profiler.
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import SIZES, llama
from benchmarks.gpu.part import Result, Setting, Table

K, BATCH = 2, 4
# Estimate over measured. Blocks are rounded up to 512 bytes and kernels take workspaces, which is
# not estimated.
LEAST, MOST = 0.85, 1.15


def footprint(setting: Setting) -> Result:
    header = [
        "model",
        "trained",
        "parameters",
        "estimated MB",
        "measured MB",
        "estimated / measured",
    ]
    result = Result(Table(header, []))
    sizes, tokens = (("1M", "9M"), 64) if setting.small else (("60M", "0.5B"), 512)
    for size in sizes:
        folder = _files(setting, size, tokens)
        for lora in (False, True):
            estimated, parameters = _estimate(setting, folder, tokens, lora)
            kind = "LoRA" if lora else "all"
            row = [size, kind, f"{parameters / 1e6:.1f}M", f"{estimated / 1e6:.1f}"]
            if setting.cpu:
                result.table.rows.append([*row, "not measured", "-"])
                continue
            measured = _measure(setting, folder, tokens, lora)
            ratio = estimated / measured
            result.table.rows.append([*row, f"{measured / 1e6:.1f}", f"{ratio:.2f}"])
            words = f"{ratio:.3f}, from {LEAST} to {MOST}"
            result.check(f"{size}, {kind}: the estimate is near", LEAST <= ratio <= MOST, words)
        shutil.rmtree(folder)  # gigabytes
    result.check(
        "everything was estimated", len(result.table.rows) == 4, f"{len(result.table.rows)} of 4"
    )
    precision = "float32" if setting.cpu else "bf16"
    result.notes.append(
        f"{precision}, B={BATCH}, {tokens} tokens, K={K}, one process; the largest of the third "
        "update."
    )
    return result


def _files(setting: Setting, size: str, tokens: int) -> Path:
    """The model as a user's folder, with the embedded tokenizer, and one row."""
    from accum_trainer.data.embedded import corpus_tokenizer

    folder = setting.place(f"model-{size}")
    tokenizer = corpus_tokenizer()
    vocabulary = max(len(tokenizer), SIZES[size][-1])
    model = llama(size, tokens, vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text(json.dumps({"text": "one row"}) + "\n")
    return folder


def _config(setting: Setting, folder: Path, tokens: int, lora: bool) -> Any:
    from accum_trainer import TrainConfig

    return TrainConfig(
        model=str(folder),
        dataset_file=str(folder / "rows.jsonl"),
        max_seq_len=tokens,
        batch_size=BATCH,
        gradient_accumulation_steps=K,
        cpu=setting.cpu,
        mixed_precision="no" if setting.cpu else "bf16",
        use_peft=lora,
    )


def _estimate(setting: Setting, folder: Path, tokens: int, lora: bool) -> tuple[int, int]:
    """Bytes at the peak, and parameters.

    Raises:
        RuntimeError: the activations of this model cannot be traced.
    """
    from accum_trainer import BatchPlan
    from accum_trainer.plan.footprint import footprints

    found = footprints(_config(setting, folder, tokens, lora), BatchPlan(BATCH, K, 1))
    total = next(row.total for row in found.rows if row.engine == "single")
    if total is None:
        raise RuntimeError(f"nothing is known of {folder.name}'s activations: {found.unknown}")
    return total, found.shapes.parameters


def _measure(setting: Setting, folder: Path, tokens: int, lora: bool) -> int:
    """torch.cuda.max_memory_allocated of the third update, of rows as long as they get."""
    from accelerate.state import AcceleratorState, GradientState

    from accum_trainer import causal_lm_loss
    from accum_trainer.train.setup import assemble

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    parts = assemble(_config(setting, folder, tokens, lora))
    acc, ids = (
        parts.accumulator,
        torch.randint(0, 500, (BATCH, tokens), generator=torch.Generator().manual_seed(0)),
    )
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0  # one token of padding: what makes the attention take a mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for window in acc.windows(dict(batch) for _ in range(3 * K)):
        torch.cuda.reset_peak_memory_stats()
        for micro_batch in window:
            with acc.accumulate(parts.model):
                acc.backward(causal_lm_loss(parts.model, micro_batch))
        acc.step(parts.optimizer, parts.scheduler)
    return torch.cuda.max_memory_allocated() - before
