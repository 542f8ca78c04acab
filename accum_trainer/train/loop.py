"""The training loop: one record per optimizer update."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accum_trainer.config import TrainConfig
from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak
from accum_trainer.errors import AccumTrainerError
from accum_trainer.lm.model import checksum, load_model, stored_dtype
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.train import agreement, continuing, signals
from accum_trainer.train import checkpoint as checkpoints
from accum_trainer.train import records as files
from accum_trainer.train.plan_record import describe, plan_record
from accum_trainer.train.records import Record, RecordWriter
from accum_trainer.train.setup import assemble, make_accumulator
from accum_trainer.update import Update

# So many windows in a row without an update mean that training has diverged; fp16 needs about 16 to
# find its scale.
MOST_SKIPPED_IN_A_ROW = 50


def updates(config: TrainConfig) -> Iterator[Record]:
    """Train and yield one record per window, on every process the same.

    Logging, evaluation and early stopping are code in the caller's loop. A caller that breaks out
    must do so on all processes at the same record; the run is then saved as it stands.

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
        accumulator = make_accumulator(config)
        self.engine = engine = accumulator.engine
        agreement.check_same_options(engine, config)
        engine.together(_check_places, config)
        given = Path(config.output_dir) if config.output_dir else None
        self.folder = given or Path(
            engine.gather_objects(str(files.new_run_folder(config.model)))[0]
        )
        agreement.check_shared(engine, self.folder)
        self._resumed_from = agreement.choose_checkpoint(engine, config.resume, given)
        self.parts = assemble(config, accumulator)
        self.config = dataclasses.replace(
            config,
            output_dir=str(self.folder),
            amp=False,
            mixed_precision=self.engine.mixed_precision,
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
        with signals.shutdown_on_signal(self._on_signal), self._open():
            last_ended = time.perf_counter()
            while not self._is_done():
                for window in parts.windows:
                    wait = time.perf_counter() - last_ended
                    for batch in window:
                        with acc.accumulate(parts.model):
                            acc.backward(causal_lm_loss(parts.model, batch))
                    lr = parts.scheduler.get_last_lr()[0]
                    update = acc.step(parts.optimizer, parts.scheduler)
                    record = self._record(update, lr, time.perf_counter() - last_ended, wait)
                    if (
                        self._is_due(self.config.eval_every or sys.maxsize, update)
                        and parts.eval_rows is not None
                    ):
                        record["eval_loss"] = self.evaluate()
                    self._write(record)
                    if self._is_due(self.config.checkpoint_every, update) and not self._is_done():
                        self.save()
                    yield record
                    if update.stop_requested:
                        self.stopped_by = (
                            self.engine.gather_objects(self.stopped_by)[0]
                            or "a signal to another process"
                        )
                        return
                    if self._is_done():
                        return
                    last_ended = (
                        time.perf_counter()
                    )  # evaluation, saving and the caller's own code are no step

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

    def _is_due(self, every: int, update: Update) -> bool:
        """Every so many updates, and at the end."""
        return not update.skipped and (update.step % every == 0 or self._is_done())

    def evaluate(self) -> float:
        """Mean loss per target over the evaluation rows, over all processes. No gradient: K is 1
        and means nothing."""
        rows, engine = self.parts.eval_rows, self.engine
        assert rows is not None
        dealt = self.parts.cutting.cut.assign_to_ranks(rows.lengths, engine.world_size)
        mine = dealt[engine.rank]
        # All ranks run as many forwards: an engine that shards weights gathers them in each.
        idle = [np.array([0])] * (max(map(len, dealt)) - len(mine))
        batches = (
            engine.to_device(self.parts.collate([rows[int(i)] for i in chosen]))
            for chosen in [*mine, *idle]
        )
        # DDP's own forward would exchange buffers.
        losses = micro_batch_losses(engine.unwrap(self.parts.model), batches)
        return float(
            engine.all_gather_floats([sum(losses[: len(mine)])]).sum() / rows.num_targets.sum()
        )

    # --- records ---

    def describe(self) -> str:
        """The lines that are shown before training."""
        return (
            f"{describe(plan_record(self.parts, self._resumed_from), self.parts)}\nrun "
            f"directory: {self.folder}"
        )

    def _record(self, update: Update, lr: float, seconds: float, wait: float) -> Record:
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
            "physical_batch_size": self.parts.cutting.cut.micro_batch_size,
            "world_size": plan.world_size,
            "effective_batch_size": update.num_samples,
            "num_micro_batches": update.num_micro_batches,
            "num_targets": update.num_targets,
            "num_tokens": update.num_tokens,
            "tokens_per_sec": update.num_tokens / seconds,
            "samples_per_sec": update.num_samples / seconds,
            "padding_efficiency": update.num_tokens / max(1, update.num_positions),
            "step_time_sec": seconds,
            "data_wait_sec": wait,
            "memory_gb": memory_gb(device),
            "peak_gb": peak_gb(device),
        }

    def _write(self, record: Record) -> None:
        self.num_records += 1
        if self._writer is not None:
            self._writer.write(record)

    def _check_diverged(self, update: Update) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if update.skipped else 0
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise AccumTrainerError(
                f"{self._skipped_in_a_row} windows in a row gave no update (last reason: "
                f"{update.reason}); "
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
        if (
            spent + 3 * self._longest_window + 2 * self._save_time + 1.0
            > self.config.max_hours * 3600
        ):
            self._on_signal("time limit")

    # --- the run directory ---

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Start the run's files; at the end, whether done, stopped or broken out of, save what
        there is."""
        self.engine.on_main(self._start_files)
        reset_peak(self.engine.device)
        try:
            yield
            self._finish()
        except GeneratorExit:  # the caller broke out of its loop
            self._finish()
            raise
        finally:
            if self._writer is not None:
                self._writer.close()

    def _start_files(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / files.RESULT).unlink(missing_ok=True)  # it is under way again
        (self.folder / files.CONFIG).write_text(self.config.to_yaml())
        files.write_json(self.folder / files.PLAN, plan_record(self.parts, self._resumed_from))
        copy = Path(self.config.log_file) if self.config.log_file else None
        self._writer = RecordWriter(
            self.folder / files.METRICS, copy, self.num_records, self._earlier_records
        )

    def _finish(self) -> None:
        self.save()
        # An adapter needs no more than what was trained: the base model stays where it is, unless
        # it is merged.
        only_adapter = self.config.use_peft and not self.config.merge_adapter
        weights = self.engine.full_weights(self.parts.model, trained_only=only_adapter)
        self.engine.on_main(self._write_results, weights)

    def _write_results(self, weights: dict[str, torch.Tensor]) -> None:
        assert self.folder is not None and self._writer is not None
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

    def _result(self, records: list[Record]) -> dict[str, Any]:
        """How the run ended; `num_samples` counts the samples of every update, each as often as it
        was trained on."""
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
        is_adapter = name == files.MODEL and self.config.use_peft
        dtype = torch.float32 if is_adapter else self._saved_dtype()
        model.save_pretrained(partial, state_dict=files.cast_weights(weights, dtype))
        if not is_adapter:
            files.state_dtype(partial / "config.json", dtype)
        self.parts.tokenizer.save_pretrained(partial)
        partial.rename(target)

    def _saved_dtype(self) -> torch.dtype:
        if self.config.save_dtype != "auto":
            return getattr(torch, self.config.save_dtype)
        return torch.float32 if self.config.shard is not None else stored_dtype(self.config)

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint of the last finished window; all processes wait for it."""
        assert self.folder is not None
        started = time.perf_counter()
        parts, acc = self.parts, self.parts.accumulator
        rng = self.engine.gather_objects(self.engine.rng_state())
        weights = self.engine.full_weights(parts.model, trained_only=True)
        optimizer_state = self.engine.full_optimizer_state(parts.model, parts.optimizer.accelerated)
        checkpoint = checkpoints.Checkpoint(
            model=weights,
            optimizer=optimizer_state,
            rng=rng,
            state={
                "identity": parts.identity,
                "options": continuing.options_of(parts),
                "accumulator": acc.state_dict(),
                "windows": parts.windows.state_dict(),
                "scheduler": parts.scheduler.state_dict(),
                "num_records": self.num_records,
                "world_size": self.engine.world_size,
            },
        )
        folder, keep = self.folder / files.CHECKPOINTS, self.config.keep_checkpoints
        self.engine.on_main(checkpoints.save_checkpoint, folder, acc.num_updates, checkpoint, keep)
        self._save_time = max(self._save_time, time.perf_counter() - started)

    def _restore(self, path: Path) -> None:
        parts, acc = self.parts, self.parts.accumulator
        saved = self.engine.together(checkpoints.load_checkpoint, path)
        notes = (
            self.engine.on_main(
                checkpoints.check_same_run, saved.state["identity"], parts.identity, path
            )
            or []
        )
        weights = self.engine.full_weights(parts.model, trained_only=True)
        self.engine.together(checkpoints.check_same_weights, saved.model, weights)
        parts = self.parts = continuing.in_force(
            parts, saved.state["options"], saved.optimizer["groups"][0]
        )
        parts.notes.extend(notes)
        kept = {name: getattr(parts.config, name) for name in continuing.KEPT}
        self.config = dataclasses.replace(self.config, **kept)
        self.engine.load_full_weights(parts.model, saved.model)
        self.engine.load_full_optimizer_state(
            parts.model, parts.optimizer.accelerated, saved.optimizer
        )
        acc.load_state_dict(saved.state["accumulator"])
        parts.scheduler.load_state_dict(saved.state["scheduler"])
        parts.windows.load_state_dict(saved.state["windows"])
        self.num_records = saved.state["num_records"]
        self._check_same_start()
        run = path.parent.parent
        if run != self.folder:
            self._earlier_records = run / files.METRICS
        if len(saved.rng) == self.engine.world_size:
            self.engine.set_rng_state(saved.rng[self.engine.rank])
        else:
            parts.notes.append(
                f"continued on {self.engine.world_size} processes from "
                f"{saved.state['world_size']}: the same windows; "
                "dropout, if any, draws anew"
            )
        parts.notes.append(f"continued from {path} after {acc.num_updates} updates")

    def _check_same_start(self) -> None:
        parts, engine = self.parts, self.engine
        optimizer = engine.full_optimizer_state(parts.model, parts.optimizer.accelerated)["state"]
        moments = {
            f"{name} {key}": value
            for name, state in optimizer.items()
            for key, value in state.items()
        }
        agreement.check_same_start(
            engine,
            {
                "updates": parts.accumulator.num_updates,
                **parts.windows.state_dict(),
                "lr": parts.scheduler.get_last_lr()[0],
                "records": self.num_records,
                "weights": checksum(engine.full_weights(parts.model, trained_only=True)),
                "optimizer state": checksum(moments),
            },
        )


def _check_places(config: TrainConfig) -> None:
    """Raise a ConfigError where the run directory or the log cannot be what is asked."""
    if config.output_dir is not None:
        files.check_output_dir(Path(config.output_dir), config.resume)
    if config.log_file is not None:
        files.check_log_file(Path(config.log_file))


@torch.no_grad()
def micro_batch_losses(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> list[float]:
    """Summed loss of each micro-batch, dropout off; `model` is in train mode afterwards."""
    model.eval()
    losses = [causal_lm_loss(model, batch).double().item() for batch in batches]
    model.train()
    return losses
