"""Training: one record per optimizer update.

    from accum_trainer.train import updates

    for record in updates(TrainConfig(model="tiny", steps=100)):
        print(record["step"], record["loss"])

The same loop runs under `accum-trainer train`, `accelerate launch -m accum_trainer.train`, `torchrun -m` and `python -m`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from accum_trainer import __version__
from accum_trainer import checkpoint as checkpoints
from accum_trainer import records as files
from accum_trainer.assemble import assemble
from accum_trainer.config import TrainConfig
from accum_trainer.errors import AccumTrainerError, CheckpointError
from accum_trainer.loss import causal_lm_loss
from accum_trainer.model import count_parameters, load_model
from accum_trainer.records import Record, RecordWriter
from accum_trainer.window import Update

# So many windows in a row without an update mean that training has diverged; fp16 needs about 16 to find its scale.
MOST_SKIPPED_IN_A_ROW = 50


def updates(config: TrainConfig) -> Iterator[Record]:
    """Train and yield one record per window, on every process the same.

    Logging, evaluation and early stopping are code in the caller's loop. A caller that breaks out must do so on all
    processes at the same record; the run is then saved as it stands.

    Raises:
        ConfigError, DataError, EngineError, CheckpointError: before the first file is written.
        AccumTrainerError: training diverged.
    """
    yield from Run(config).updates()


class Run:
    """A training that was checked and can start: `updates()` runs it.

    Attributes:
        parts: what it is made of.
        folder: the run directory.
        stopped_by: why it ended early ("SIGTERM", "time limit", ...), else "".
    """

    def __init__(self, config: TrainConfig) -> None:
        self._begun = time.monotonic()
        self.folder = Path(config.output_dir) if config.output_dir else None
        if self.folder is not None:
            files.check_output_dir(self.folder, config.resume)
        if config.log_file is not None:
            files.check_log_file(Path(config.log_file))
        self._resumed_from = self._find_checkpoint(config)
        self.parts = parts = assemble(config)
        self.engine = parts.accumulator.engine
        if self.folder is None:
            self.folder = Path(self.engine.gather_objects(str(files.new_run_folder(config.model)))[0])
        self.config = dataclasses.replace(
            config, output_dir=str(self.folder), amp=False, mixed_precision=self.engine.mixed_precision
        )
        self.stopped_by = ""
        self.num_records = 0
        self._earlier_records: Path | None = None
        self._skipped_in_a_row = 0
        self._writer: RecordWriter | None = None
        self._longest_window = self._save_time = 0.0
        if self._resumed_from is not None:
            self._restore(self._resumed_from)

    # --- the loop ---

    def updates(self) -> Iterator[Record]:
        """Train to the end, or to a signal, or to the time limit; see `updates`."""
        parts, acc = self.parts, self.parts.accumulator
        # Signals outside: another one that comes while the run is saved must not end it there.
        with _signals(self._on_signal), self._open():
            while not self._is_done():
                for window in parts.windows:
                    started = time.perf_counter()
                    for batch in window:
                        with acc.accumulate(parts.model):
                            acc.backward(causal_lm_loss(parts.model, batch))
                    lr = parts.scheduler.get_last_lr()[0]
                    update = acc.step(parts.optimizer, parts.scheduler)
                    record = self._record(update, lr, time.perf_counter() - started)
                    if self._is_due(self.config.eval_every, update) and parts.eval_rows is not None:
                        record["eval_loss"] = self.evaluate()
                    self._write(record)
                    if self._is_due(self.config.checkpoint_every, update) and not self._is_done():
                        self.save()
                    yield record
                    if update.stop_requested:
                        self.stopped_by = (
                            self.engine.gather_objects(self.stopped_by)[0] or "a signal to another process"
                        )
                        return
                    if self._is_done():
                        return

    def _is_done(self) -> bool:
        if self.config.steps is not None:
            return self.parts.accumulator.num_updates >= self.config.steps
        position = self.parts.windows.state_dict()
        ended = position["epoch"] + (position["samples_consumed"] >= self._samples_per_epoch)
        return ended >= (self.config.epochs or 1)

    @property
    def _samples_per_epoch(self) -> int:
        assert self.parts.plan.num_samples is not None
        return self.parts.plan.num_samples

    def _is_due(self, every: int | None, update: Update) -> bool:
        return every is not None and not update.skipped and (update.step % every == 0 or self._is_done())

    def evaluate(self) -> float:
        """Mean loss per target over the evaluation rows, over all processes. No gradient: K is 1 and means nothing."""
        rows, engine = self.parts.eval_rows, self.engine
        assert rows is not None
        dealt = self.parts.cut.deal(rows.lengths, engine.world_size)
        mine = dealt[engine.rank]
        # All ranks run as many forwards: an engine that shards weights gathers them in each.
        idle = [np.array([0])] * (max(map(len, dealt)) - len(mine))
        batches = (engine.to_device(self.parts.collate([rows[int(i)] for i in chosen])) for chosen in [*mine, *idle])
        # DDP's own forward would exchange buffers.
        losses = micro_batch_losses(engine.unwrap(self.parts.model), batches)
        return float(engine.gather([sum(losses[: len(mine)])]).sum() / rows.num_targets.sum())

    # --- records ---

    def _record(self, update: Update, lr: float, seconds: float) -> Record:
        """What one window did; the keys are described in docs/records.md."""
        self._longest_window = max(self._longest_window, seconds)
        self._check_diverged(update)
        self._check_time()
        plan, device = self.parts.plan, self.engine.device
        position = self.parts.windows.state_dict()
        return {
            "step": update.step,
            "epoch": position["epoch"] + position["samples_consumed"] / self._samples_per_epoch,
            "batch_idx": self.parts.accumulator.num_micro_batches,
            "loss": update.loss,
            "lr": lr,
            "grad_norm": update.grad_norm,
            "skipped": update.skipped,
            "skip_reason": update.reason,
            "oom_splits": update.num_splits,
            "gradient_accumulation_steps": update.gradient_accumulation_steps,
            "physical_batch_size": self.parts.cut.micro_batch_size,
            "world_size": plan.world_size,
            "effective_batch_size": update.num_samples,
            "num_micro_batches": update.num_micro_batches,
            "num_targets": update.num_targets,
            "num_tokens": update.num_tokens,
            "tokens_per_sec": update.num_tokens / seconds,
            "samples_per_sec": update.num_samples / seconds,
            "padding_efficiency": update.num_tokens / max(1, update.num_positions),
            "step_time_sec": seconds,
            "memory_gb": files.memory_gb(device),
            "peak_gb": files.peak_gb(device),
        }

    def _write(self, record: Record) -> None:
        self.num_records += 1
        if self._writer is not None:
            self._writer.write(record)

    def _check_diverged(self, update: Update) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if update.skipped else 0
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise AccumTrainerError(
                f"{self._skipped_in_a_row} windows in a row gave no update (last reason: {update.reason}); "
                "lower lr, set max_grad_norm, or look at the data"
            )

    # --- stopping ---

    def _on_signal(self, name: str) -> None:
        self.stopped_by = self.stopped_by or name
        self.parts.accumulator.request_stop()

    def _check_time(self) -> None:
        """Ask to stop while two windows and the last save still fit into --max-hours."""
        if self.config.max_hours is None:
            return
        spent = time.monotonic() - self._begun
        if spent + 3 * self._longest_window + 2 * self._save_time + 1.0 > self.config.max_hours * 3600:
            self._on_signal("time limit")

    # --- the run directory ---

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Start the run's files; at the end, whether done, stopped or broken out of, save what there is."""
        assert self.folder is not None
        if self.engine.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / files.RESULT).unlink(missing_ok=True)  # it is under way again
            (self.folder / files.CONFIG).write_text(self.config.to_yaml())
            files.write_json(self.folder / files.PLAN, self.plan())
            copy = Path(self.config.log_file) if self.config.log_file else None
            self._writer = RecordWriter(self.folder / files.METRICS, copy, self.num_records, self._earlier_records)
        files.reset_peak(self.engine.device)
        try:
            yield
            self._finish()
        except GeneratorExit:  # the caller broke out of its loop
            self._finish()
            raise
        finally:
            if self._writer is not None:
                self._writer.close()

    def _finish(self) -> None:
        self.save()
        weights = self.engine.full_weights(self.parts.model)
        if self.engine.is_main and self._writer is not None and self.folder is not None:
            self._write_model(files.MODEL, self.engine.unwrap(self.parts.model), weights)
            if self.config.merge_adapter:
                # Made anew, so that it is whole however the trained one is sharded.
                fresh = load_model(self.config, self.parts.tokenizer)
                fresh.load_state_dict(weights, strict=False)
                merged = fresh.merge_and_unload()
                self._write_model(files.MERGED, merged, merged.state_dict())
            if self._writer.records:
                title = f"{self.folder.name}: {self.parts.plan.describe()}"
                files.draw_loss({"training": self._writer.records}, self.folder / files.PICTURE, title)
            files.write_json(self.folder / files.RESULT, self._result(self._writer.records))
        self.engine.barrier()

    def _result(self, records: list[Record]) -> dict[str, Any]:
        """How the run ended; `num_samples` counts the samples of every update, each as often as it was trained on."""
        made = [record for record in records if not record["skipped"]]
        evaluated = [record["eval_loss"] for record in made if record.get("eval_loss") is not None]
        return {
            "done": self._is_done(),
            "stopped_by": self.stopped_by,
            "updates": self.parts.accumulator.num_updates,
            "skipped": len(records) - len(made),
            "num_samples": sum(record["effective_batch_size"] for record in made),
            "num_targets": sum(record["num_targets"] for record in made),
            "loss": made[-1]["loss"] if made else None,
            "eval_loss": evaluated[-1] if evaluated else None,
        }

    def _write_model(self, name: str, model: Any, weights: dict[str, torch.Tensor]) -> None:
        """What `from_pretrained` loads, written beside and renamed into place."""
        assert self.folder is not None
        partial, target = self.folder / f".{name}.partial", self.folder / name
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(partial, state_dict=weights)
        self.parts.tokenizer.save_pretrained(partial)
        partial.rename(target)

    def plan(self) -> dict[str, Any]:
        """What is decided before training, as plan.json has it."""
        parts, plan, cut = self.parts, self.parts.plan, self.parts.cut
        all_parameters, trained = count_parameters(self.engine.unwrap(parts.model))
        return {
            "physical_batch_size": cut.micro_batch_size,
            "max_tokens_per_micro_batch": cut.max_tokens,
            "batch_size_found": parts.fit.as_record() if parts.fit is not None else None,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps if cut.max_tokens is None else None,
            "world_size": plan.world_size,
            "effective_batch_size": plan.global_batch_size,
            # No gradient is made in evaluation; recorded so that a reader of the records need not guess.
            "eval_gradient_accumulation_steps": 1,
            "num_samples": plan.num_samples,
            "updates_per_epoch": plan.updates_per_epoch,
            "tail_samples": plan.tail_samples,
            "total_updates": parts.total_updates,
            "warmup_updates": parts.warmup,
            "lr": parts.peak_lr,
            "layout": "packed" if cut.packed else "padded",
            "layout_reason": parts.layout_reason,
            "pad_to_multiple_of": cut.multiple,
            "loss_path": dataclasses.asdict(parts.loss_path),
            "attention": getattr(self.engine.unwrap(parts.model).config, "_attn_implementation", None),
            "compiled_blocks": parts.compiled_blocks,
            "cost": dataclasses.asdict(cut.cost),
            "rank_weights": cut.rank_weights,
            "engine": self.engine.name,
            "grad_sync": self.engine.grad_sync,
            "grad_sync_reason": self.engine.grad_sync_reason,
            "accumulation_dtype": self.config.accumulation_dtype,
            "mixed_precision": self.engine.mixed_precision,
            "device": str(self.engine.device.type),
            "parameters": all_parameters,
            "trained_parameters": trained,
            "initial_weights": parts.initial_weights,
            "seed": self.config.seed,
            "data": parts.identity["data"],
            "shard": self.config.shard,
            "resumed_from": str(self._resumed_from) if self._resumed_from else None,
            "versions": {
                "accum_trainer": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint of the last finished window; all processes wait for it."""
        assert self.folder is not None
        started = time.perf_counter()
        parts, acc = self.parts, self.parts.accumulator
        rng = self.engine.gather_objects(self.engine.rng_state())
        weights = self.engine.full_weights(parts.model, trained_only=True)
        optimizer_state = self.engine.full_optimizer_state(parts.model, parts.optimizer.accelerated)
        if self.engine.is_main:
            checkpoints.save_checkpoint(
                self.folder / files.CHECKPOINTS,
                acc.num_updates,
                checkpoints.Checkpoint(
                    model=weights,
                    optimizer=optimizer_state,
                    rng=rng,
                    state={
                        "identity": parts.identity,
                        "accumulator": acc.state_dict(),
                        "windows": parts.windows.state_dict(),
                        "scheduler": parts.scheduler.state_dict(),
                        "num_records": self.num_records,
                        "world_size": self.engine.world_size,
                    },
                ),
                keep=self.config.keep_checkpoints,
            )
        self.engine.barrier()
        self._save_time = max(self._save_time, time.perf_counter() - started)

    def _find_checkpoint(self, config: TrainConfig) -> Path | None:
        """The checkpoint to continue from, or None to start anew."""
        if config.resume == "never":
            return None
        if config.resume == "auto":
            return checkpoints.newest_whole(self.folder / files.CHECKPOINTS) if self.folder else None
        named = Path(config.resume)
        if not named.is_dir():
            raise CheckpointError(
                f"resume={named} is no folder; give a run directory, a checkpoint in it, `auto` or `never`"
            )
        if (named / files.CHECKPOINTS).is_dir():
            newest = checkpoints.newest_whole(named / files.CHECKPOINTS)
            if newest is None:
                raise CheckpointError(
                    f"resume={named} is a run without a whole checkpoint; start anew with resume=never"
                )
            return newest
        checkpoints.check_manifest(named)
        return named

    def _restore(self, path: Path) -> None:
        parts, acc = self.parts, self.parts.accumulator
        saved = checkpoints.load_checkpoint(path)
        checkpoints.check_same_run(saved.state["identity"], parts.identity, path)
        checkpoints.check_same_weights(saved.model, self.engine.full_weights(parts.model, trained_only=True))
        self.engine.load_full_weights(parts.model, saved.model)
        self.engine.load_full_optimizer_state(parts.model, parts.optimizer.accelerated, saved.optimizer)
        acc.load_state_dict(saved.state["accumulator"])
        parts.scheduler.load_state_dict(saved.state["scheduler"])
        parts.windows.load_state_dict(saved.state["windows"])
        self.num_records = saved.state["num_records"]
        run = path.parent.parent
        if run != self.folder:
            self._earlier_records = run / files.METRICS
        if len(saved.rng) == self.engine.world_size:
            self.engine.set_rng_state(saved.rng[self.engine.rank])
        else:
            parts.notes.append(
                f"continued on {self.engine.world_size} processes from {saved.state['world_size']}: the same windows; "
                "dropout, if any, draws anew"
            )
        parts.notes.append(f"continued from {path} after {acc.num_updates} updates")


@torch.no_grad()
def micro_batch_losses(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> list[float]:
    """Summed loss of each micro-batch, dropout off; `model` is in train mode afterwards."""
    model.eval()
    losses = [causal_lm_loss(model, batch).double().item() for batch in batches]
    model.train()
    return losses


@contextlib.contextmanager
def _signals(handle: Any) -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into `handle(name)`; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    wanted = [s for s in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, s)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in wanted}

    def handler(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        handle(name)
        if name == "SIGINT":
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in wanted:
        signal.signal(getattr(signal, name), handler)
    try:
        yield
    finally:
        for name in wanted:
            signal.signal(getattr(signal, name), before[name])


def describe(run: Run) -> str:
    """The plan of a run in the lines that are shown before training."""
    plan, parts = run.plan(), run.parts
    sized = f"{plan['updates_per_epoch']} updates per epoch of {plan['num_samples']} samples"
    tail = f", the last of {plan['tail_samples']} samples" if plan["tail_samples"] else ""
    batch = parts.plan.describe()
    if plan["max_tokens_per_micro_batch"] is not None:
        limit = f"at most {plan['max_tokens_per_micro_batch']:,} tokens per micro-batch"
        batch = f"{limit}, W {plan['world_size']}, effective batch {plan['effective_batch_size']}"
    if plan["rank_weights"] is not None:
        batch += f"; shares of the processes {', '.join(f'{weight:g}' for weight in plan['rank_weights'])}"
    lines = [
        batch,
        f"{sized}{tail}; {plan['total_updates']} updates in all, {plan['warmup_updates']} of them warm-up, lr {plan['lr']:g}",
        f"engine {plan['engine']}, grad_sync {plan['grad_sync']}, {plan['device']}, precision {plan['mixed_precision']}; "
        f"{plan['trained_parameters']:,} of {plan['parameters']:,} parameters trained",
        *(f"note: {note}" for note in parts.notes),
        f"run directory: {run.folder}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    from accum_trainer.cli import main

    main(["train", *sys.argv[1:]])
