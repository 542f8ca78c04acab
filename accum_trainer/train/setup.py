"""From a configuration to a training, in four steps: engine, data, schedule, model.

Every fault of a configuration is found here, before the first file is written. `loop` runs a
training; it makes none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accum_trainer.accumulator import Accumulator
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.engine.build import choose_precision
from accum_trainer.engine.lost_processes import note_on_lost_processes
from accum_trainer.lm.model import stored_dtype
from accum_trainer.seeds import seed_of
from accum_trainer.speed.noise_every import affordable_noise_every
from accum_trainer.train.model import PreparedModel, prepare_model
from accum_trainer.train.rows import Data, load_data
from accum_trainer.train.schedule import Schedule, make_schedule
from accum_trainer.window_plan import Cut
from accum_trainer.windows import Windows

# These options decide, beside the base model, which function adapters compute and which are
# trained.
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
# Tokens of a micro-batch below which a GPU may mostly wait (benchmarks/results/gpu-h100.md).
_FEW_TOKENS = 4096


@dataclass(frozen=True)
class Training:
    """A training that can run.

    Attributes:
        prepared: the model, its optimizer and scheduler, and the choices made for them.
        windows: the epochs of windows to train on; they hold the position.
        identity: all that decides the windows and the objective; a run is continued only if these
            agree.
        notes: for people, before training starts.
        noise_every: the noise of the gradient is measured in every N-th window; 0 for none.
    """

    config: TrainConfig
    accumulator: Accumulator
    data: Data
    schedule: Schedule
    prepared: PreparedModel
    windows: Windows
    identity: dict[str, Any]
    notes: list[str]
    noise_every: int

    @property
    def model(self) -> Any:
        return self.prepared.model

    @property
    def optimizer(self) -> Any:
        return self.prepared.optimizer

    @property
    def scheduler(self) -> Any:
        return self.prepared.scheduler

    @property
    def tokenizer(self) -> Any:
        return self.data.tokenizer

    @property
    def rows(self) -> TokenizedRows:
        return self.data.train

    @property
    def epochs_done(self) -> float:
        """Epochs trained on so far, with the share of the current one."""
        position = self.windows.state_dict()
        return position["epoch"] + position["samples_consumed"] / self._samples_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether all of `steps` or `epochs` are trained."""
        if self.config.steps is not None:
            return self.accumulator.num_updates >= self.config.steps
        position = self.windows.state_dict()
        ended = position["epoch"] + (position["samples_consumed"] >= self._samples_per_epoch)
        return ended >= (self.config.epochs or 1)

    @property
    def _samples_per_epoch(self) -> int:
        assert self.schedule.plan.num_samples is not None
        return self.schedule.plan.num_samples


def make_accumulator(config: TrainConfig) -> Accumulator:
    """The accumulator that `config` asks for; it connects the processes.

    Raises:
        ConfigError, EngineError: sizes or settings that contradict each other.
    """
    # Options that are not asked for are left to the launcher.
    asked: dict[str, Any] = {"cpu": True} if config.cpu else {}
    if config.engine is not None:
        asked["engine"] = config.engine
    if config.cpu_offload:
        asked["cpu_offload"] = True
    if config.shard_size is not None:
        asked["shard_size"] = config.shard_size
    return Accumulator(
        micro_batch_size=None if isinstance(config.batch_size, str) else config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        global_batch_size=config.global_batch_size,
        max_grad_norm=config.max_grad_norm,
        grad_sync=config.grad_sync,
        weight_sync=config.weight_sync,
        accumulation_dtype=config.accumulation_dtype,
        recover_from_oom=config.recover_from_oom,
        mixed_precision=choose_precision(config.mixed_precision, config.amp, config.cpu),
        **asked,
    )


def assemble(config: TrainConfig, accumulator: Accumulator | None = None) -> Training:
    """Make the training that `config` describes. Collective: every process calls it.

    Args:
        accumulator: the result of `make_accumulator(config)`, if it was called before.

    Raises:
        ConfigError, DataError, EngineError: a fault on any process, raised on all of them, before
            anything is written to the run directory.
    """
    accumulator = accumulator or make_accumulator(config)
    data = load_data(config, accumulator.engine)
    schedule = make_schedule(config, accumulator.plan, len(data.train))
    prepared = prepare_model(config, accumulator, data, schedule)
    # From here on the generators serve dropout, which must differ between processes and between
    # runs on shares of the data.
    torch.manual_seed(
        seed_of("dropout", config.seed, rank=accumulator.engine.rank, shard=schedule.shard[0])
    )
    noise_every = _noise_every(config, accumulator, prepared, data.train)
    return Training(
        config=config,
        accumulator=accumulator,
        data=data,
        schedule=schedule,
        prepared=prepared,
        windows=accumulator.windows(
            data.train,
            collate_fn=prepared.collate,
            seed=config.seed,
            shard=schedule.shard,
            cut=prepared.cutting.cut,
            prefetch=True,
            noise_every=noise_every,
        ),
        noise_every=noise_every,
        identity=_identity(config, schedule, data.train, prepared),
        notes=[
            *_notes(config, accumulator, data.train, schedule, prepared),
            *_evaluation_notes(config, data),
        ],
    )


def _noise_every(
    config: TrainConfig, accumulator: Accumulator, prepared: PreparedModel, rows: TokenizedRows
) -> int:
    """Windows of which one is measured: as asked for, or what costs little here."""
    if not isinstance(config.noise_every, str):
        return config.noise_every
    engine, plan = accumulator.engine, accumulator.plan
    if engine.mixed_precision == "fp16":  # a loss scaler's gradients are not measured
        return 0
    return affordable_noise_every(
        prepared.cutting.cut, rows.lengths, plan.global_batch_size, engine.world_size
    )


def _identity(
    config: TrainConfig, schedule: Schedule, rows: TokenizedRows, prepared: PreparedModel
) -> dict[str, Any]:
    content = rows.identity[:12]
    return {
        "global_batch_size": schedule.plan.global_batch_size,
        "use_peft": config.use_peft,
        **{name: getattr(config, name) if config.use_peft else None for name in _LORA},
        "model": config.model,
        "max_seq_len": config.max_seq_len,
        "seed": config.seed,
        "num_samples": len(rows),
        "shard": config.shard,
        "data": f"{config.dataset_file or config.dataset or 'embedded'} (content {content})",
        "data_content": content,
        "initial_weights": prepared.initial_weights,
        "model_config": prepared.function,
    }


def _notes(
    config: TrainConfig,
    accumulator: Accumulator,
    rows: TokenizedRows,
    schedule: Schedule,
    prepared: PreparedModel,
) -> list[str]:
    notes, engine, plan = list(rows.notes), accumulator.engine, schedule.plan
    if prepared.cutting.found_batch_size is not None:
        notes.append(prepared.cutting.found_batch_size.describe())
    if config.use_peft and engine.mixed_precision == "no" and stored_dtype(config).itemsize < 4:
        notes.append(
            "mixed_precision=no computes in float32, so the frozen weights take twice the "
            "checkpoint's memory; --amp keeps them in 16 bits"
        )
    if prepared.loss_path.note is not None and config.loss_on_targets == "auto":
        notes.append(prepared.loss_path.note)
    if config.shard is not None:
        notes.append(
            f"shard {config.shard}: {plan.num_samples} of the {len(rows)} samples of an epoch"
        )
    if accumulator.device.type == "cpu" and not config.cpu:
        notes.append("no GPU was found: training on the CPU")
    if accumulator.device.type == "cpu" and config.activation_offload:
        notes.append("activation_offload changes nothing on a CPU, whose memory is the host's")
    if (lost := note_on_lost_processes()) is not None:
        notes.append(lost)
    visible = torch.cuda.device_count() if accumulator.device.type == "cuda" else 0
    if visible > 1 and engine.world_size == 1:
        notes.append(
            f"{visible} GPUs are visible and this one process uses one; use all with accelerate "
            f"launch --multi_gpu --num_processes {visible} -m accum_trainer.train"
        )
    small = note_on_small_micro_batches(
        accumulator.device, plan, prepared.cutting.cut, rows.lengths
    )
    if small is not None:
        notes.append(small)
    if (plan.num_samples or 0) < plan.global_batch_size:
        notes.append(
            f"the effective batch of {plan.global_batch_size} is more than the {plan.num_samples} "
            "samples: every update sees all of them"
        )
    return notes


def note_on_small_micro_batches(
    device: torch.device, plan: BatchPlan, cut: Cut, lengths: np.ndarray
) -> str | None:
    """What to do about micro-batches that leave a GPU waiting for its host; None if they do not.

    Args:
        lengths: tokens of each sample, shape (samples,).
    """
    if device.type != "cuda" or cut.max_tokens is not None or plan.gradient_accumulation_steps == 1:
        return None
    # Packed, of the longest samples of a window, which has K W times as many.
    share = plan.gradient_accumulation_steps * plan.world_size if cut.packed else 1
    longest = np.sort(lengths)[-max(1, len(lengths) // share) :]
    tokens = plan.micro_batch_size * float(longest.mean())
    if tokens >= _FEW_TOKENS:
        return None
    of = "in the memory of" if cut.packed else "of"
    return (
        f"a micro-batch {of} {plan.micro_batch_size} samples has about {tokens:,.0f} tokens, with "
        "which a GPU may wait more than it computes; --batch-size auto --global-batch-size "
        f"{plan.global_batch_size} cuts the same effective batch into as few as its memory allows"
    )


def _evaluation_notes(config: TrainConfig, data: Data) -> list[str]:
    if config.eval_file is None or data.evaluation is None:
        return []
    return [f"evaluation: {note}" for note in data.evaluation.notes]
