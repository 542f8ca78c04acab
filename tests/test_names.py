"""Names that users bring from other trainers are answered with ours."""

from __future__ import annotations

import pytest

from accum_trainer.config import OPTIONS, nearest_name

THEIRS = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "gradient_clip_val": "max_grad_norm",
    "evaluation_strategy": "eval_every",
    "save_strategy": "checkpoint_every",
    "load_best_model_at_end": "keep_best",
    "deepspeed": "zero_stage",
    "no_cuda": "cpu",
    "precision": "mixed_precision",
    "logging_dir": "log_file",
    "output_dir": "output_dir",
    "lora_rank": "lora_r",
    "batchsize": "batch_size",
}


@pytest.mark.parametrize("written", THEIRS)
@pytest.mark.parametrize("form", ["{}", "--{}", "dashes"])
def test_the_nearest_name(written, form):
    name = f"--{written.replace('_', '-')}" if form == "dashes" else form.format(written)
    assert nearest_name(name, OPTIONS) == THEIRS[written]
