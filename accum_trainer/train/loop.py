"""The training loop: one record per optimizer update."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from accum_trainer.accumulator import Accumulator
from accum_trainer.config import TrainConfig
from accum_trainer.engine.memory import memory_gb, peak_gb, reset_peak
from accum_trainer.engine.ranks import StoreLostError
from accum_trainer.errors import AccumTrainerError, ConfigError, DivergedError
from accum_trainer.launch.rank import end_at_once
from accum_trainer.losses.causal_lm import causal_lm_loss
from accum_trainer.plan.advice import advice_of_run
from accum_trainer.train.best_checkpoint import Best, BestCheckpoint
from accum_trainer.train.branch import branch
from accum_trainer.train.checkpoint_folder import folder_name
from accum_trainer.train.checkpoint_writer import CheckpointWriter
from accum_trainer.train.diagnosis import describe_window
from accum_trainer.train.evaluation import Evaluation
from accum_trainer.train.gathered_weights import gathered_weights
from accum_trainer.train.hang_watch import HangWatch
from accum_trainer.train.leaving import LoopPlaces
from accum_trainer.train.lost_peer import naming_lost_processes
from accum_trainer.train.model_origin import ModelOrigin, identity_of, read_origin
from accum_trainer.train.rank_agreement import agree_on_checkpoint, agree_on_folder, agree_on_origin
from accum_trainer.train.records import Record
from accum_trainer.train.rescue import Rescue, describe, ran_out_of_memory, release
from accum_trainer.train.resume import capture, restore
from accum_trainer.train.run_folder import CHECKPOINTS, METRICS, MODEL, PICTURE, RunFolder
from accum_trainer.train.run_plan import describe_plan, describe_split, run_plan
from accum_trainer.train.save_times import SaveTimes
from accum_trainer.train.saved_model import needs_only_trained_weights, save_model, saved_dtype
from accum_trainer.train.setup import Training, assemble, make_accumulator
from accum_trainer.train.stopping import StoppingPolicy
from accum_trainer.train.trackers import Trackers, check_installed
from accum_trainer.train.utilisation import Utilisation
from accum_trainer.update import Update
from accum_trainer.window import Window

logger = logging.getLogger(__name__)

LAUNCHER_GONE = "its launcher is gone"


def updates(config: TrainConfig) -> Iterator[Record]:
    """Train and yield one record per window, on every process the same.

    Logging, evaluation and early stopping are code in the caller's loop. A caller that breaks out
    must do so on all processes at the same record; the run is then saved as it stands, with its
    model. If only some processes leave the loop, by an error or a break, those save nothing: a
    warning says so, and the last checkpoint stays. A signal or the time limit ends the loop after a
    checkpoint, without a model: a warning says how to go on.

    Raises:
        ConfigError, DataError, EngineError, CheckpointError: before the first file is written.
        AccumTrainerError: training diverged.
    """
    run = Run(config)
    yield from run.updates()
    if run.stopped_by and run.engine.is_main:
        logger.warning("%s", run.describe_stop())


class Run:
    """A training that was checked and can start: `updates()` runs it.

    Attributes:
        training: the training.
        folder: the run directory's path.
        stopping: when to end early, and why the run did.
    """

    def __init__(self, config: TrainConfig) -> None:
        started = time.monotonic()
        check_installed(config)
        accumulator = make_accumulator(config)
        self.engine = accumulator.engine
        self.stopping = StoppingPolicy(accumulator, config, started)
        with naming_lost_processes(self.engine, lambda: 0, lambda: None):
            self._prepare(config, accumulator)

    def _prepare(self, config: TrainConfig, accumulator: Accumulator) -> None:
        """All that comes before the first window. Collective."""
        self.folder, lock = agree_on_folder(self.engine, config)
        self._files = RunFolder(self.folder, lock)
        self._hangs = HangWatch(self.engine, config.timeout, self._end_at_once)
        self._writer = CheckpointWriter(
            self.engine, self.folder, config.keep_checkpoints, self._files.check_lock
        )
        try:
            self._resumed_from = agree_on_checkpoint(self.engine, config)
            self.training = assemble(config, accumulator)
            if self._resumed_from is not None:
                self.training, tally = restore(self.training, self._resumed_from)
                self._files.continue_from(self._resumed_from, tally)
            elif (origin := agree_on_origin(self.engine, config)) is not None:
                self.training = branch(self.training, origin)
            self._best = self._best_checkpoint(config)
        except BaseException:
            self._files.close()
            raise
        self.config = dataclasses.replace(
            self.training.config,
            output_dir=str(self.folder),
            amp=False,
            mixed_precision=self.engine.mixed_precision,
        )
        self._save_times = SaveTimes(
            self.training.accumulator, config.checkpoint_every, config.checkpoint_minutes
        )
        self._trackers = Trackers(self.folder, self.config)
        self._utilisation = Utilisation.of_training(self.training)
        self._plan = run_plan(self.training, self._resumed_from)

    def _naming_lost_processes(self) -> contextlib.AbstractContextManager[None]:
        return naming_lost_processes(
            self.engine, lambda: self._files.tally.records, lambda: self.folder
        )

    def _best_checkpoint(self, config: TrainConfig) -> BestCheckpoint:
        evaluation = self.training.data.evaluation
        rows = evaluation.identity[:12] if config.keep_best and evaluation is not None else None
        best = BestCheckpoint(self.engine, self._writer, rows)
        if self._resumed_from is not None:
            self.training.notes.extend(best.continue_from(self._resumed_from, self.folder))
        return best

    @property
    def best(self) -> Best | None:
        """The best evaluation with `keep_best`, once the run has ended."""
        return self._best.best

    @property
    def stopped_by(self) -> str:
        """Why the run ended early ("SIGTERM", "time limit", ...), else ""."""
        return self.stopping.reason

    def _end_at_once(self, status: int) -> None:
        self._files.close()
        end_at_once(status)

    def describe(self) -> str:
        """The lines that are shown before training."""
        return f"{describe_plan(self._plan, self.training)}\nrun directory: {self.folder}"

    def describe_split(self) -> str:
        """How the effective batch is cut and spread, in one line."""
        return describe_split(self._plan, self.training)

    def describe_noise(self) -> str | None:
        """Advice on the effective batch from the measured noise of the gradient, or why it was not
        measured; None if nothing is known yet."""
        noise = self.training.windows.noise
        if noise.obstacle and not noise.num_windows:
            return f"the noise of the gradient was not measured: {noise.obstacle}"
        return advice_of_run(self._plan, _noise_scale(self.training))

    def describe_stop(self) -> str:
        """Name the commands that continue the stopped run and that export its model."""
        done = self.training.accumulator.num_updates
        text = (
            f"stopped by {self.stopped_by} after {done} updates, saved; the same command with "
            f"--output-dir {self.folder} continues"
        )
        if self.training.is_done:
            return text
        export = f"accum-trainer checkpoint export {self.folder} -o DIR"
        text += f", and `{export}` writes the model so far"
        if (earlier := read_origin(self.folder / MODEL)) is not None:
            text += f" ({self.folder / MODEL} is still that of update {earlier.updates})"
        return text

    def updates(self) -> Iterator[Record]:
        """Train to the end, to a signal or to the time limit; see `updates`."""
        training, acc = self.training, self.training.accumulator
        evaluation = Evaluation(training)
        # Signals outermost: one more that comes while the run is saved must not end it there.
        places = LoopPlaces(self.engine, self._files.tally.records)
        with (
            self.stopping.on_signals(),
            self._naming_lost_processes(),
            self._open_files(places),
            self._saving_if_memory_runs_out(),
        ):
            last_ended = time.perf_counter()
            for window in self._windows():
                self._hangs.progress(window=acc.num_updates + 1)
                waited = time.perf_counter() - last_ended
                for batch in window:
                    with acc.accumulate(training.model):
                        acc.backward(causal_lm_loss(training.model, batch))
                lr = training.scheduler.get_last_lr()[0]
                self._is_whole = False
                update = acc.step(training.optimizer, training.scheduler)
                seconds = time.perf_counter() - last_ended
                record = self._record(update, lr, seconds, waited)
                is_best = False
                if not update.skipped and evaluation.is_due(update.step):
                    began = time.perf_counter()
                    try:
                        loss = record["eval_loss"] = evaluation.mean_loss(self._hangs.progress)
                    except Exception:  # the update is made, and may be saved
                        self._files.write(record)
                        self._is_whole = True
                        raise
                    self.stopping.note_evaluation(time.perf_counter() - began)
                    with self._hangs.paused():  # it waits for the checkpoint before
                        is_best = self._best.is_beaten_by(update.step, loss)
                self._files.write(record)
                self._is_whole = True
                self.stopping.note_save(self._writer.longest_sec)
                self.stopping.check(
                    update,
                    seconds,
                    partial(describe_window, training, window, update),
                    any(evaluation.is_due(update.step + ahead) for ahead in (1, 2)),
                )
                with self._hangs.paused():
                    self._trackers.log(record)
                    if self._is_save_due(update, is_best):
                        self.save()
                    yield record
                try:
                    places.goes_on_after(self._files.tally.records)
                except StoreLostError:  # nobody watches over this job any more
                    if not training.is_done:
                        self.stopping.request(LAUNCHER_GONE)
                if update.stop_requested:
                    self.stopping.agree_on_reason()
                    return
                # Evaluation, saving and the caller's own code are not part of a step.
                last_ended = time.perf_counter()

    @contextlib.contextmanager
    def _saving_if_memory_runs_out(self) -> Iterator[None]:
        """Save the last finished update if a window cannot go on, and say so in the error."""
        self._is_whole = True  # weights and optimizer are those of the last record
        try:
            yield
            return
        except Exception as error:
            if not ran_out_of_memory(self.engine, error):
                raise
            said = release(error)
        self.engine.free_memory()
        rescue = Rescue(
            *(self.training, self.folder, self._writer, self._best, self._files.tally),
            keep=self.config.keep_checkpoints,
        )
        with self._hangs.paused():
            outcome = rescue.save() if self._is_whole else ""
        raise describe(said, self._is_whole, outcome, self.folder)

    def _windows(self) -> Iterator[Window]:
        """Windows of epoch after epoch, until the training is done."""
        while not self.training.is_done:
            for window in self.training.windows:
                yield window
                if self.training.is_done:
                    return

    def _record(self, update: Update, lr: float, seconds: float, waited: float) -> Record:
        """A window's results; docs/records.md describes the keys."""
        training, device = self.training, self.engine.device
        return {
            "step": update.step,
            "epoch": training.epochs_done,
            "batch_idx": training.accumulator.num_micro_batches,
            "loss": update.loss,
            "lr": lr,
            "grad_norm": update.grad_norm,
            **_noise_scale(training),
            "skipped": update.skipped,
            "skip_reason": update.reason,
            "nonfinite_parameter": update.nonfinite_parameter,
            "oom_splits": update.num_splits,
            "gradient_accumulation_steps": update.gradient_accumulation_steps,
            "physical_batch_size": training.prepared.cutting.cut.micro_batch_size,
            "world_size": training.schedule.plan.world_size,
            "effective_batch_size": update.num_samples,
            "num_micro_batches": update.num_micro_batches,
            "num_targets": update.num_targets,
            "num_tokens": update.num_tokens,
            "tokens_per_sec": update.num_tokens / seconds,
            "samples_per_sec": update.num_samples / seconds,
            "padding_efficiency": update.num_tokens / max(1, update.num_positions),
            "step_time_sec": seconds,
            "data_wait_sec": waited,
            "memory_gb": memory_gb(device),
            "peak_gb": peak_gb(device),
            "mfu": self._utilisation.of(update, seconds),
        }

    def _is_save_due(self, update: Update, is_best: bool) -> bool:
        is_due = self._save_times.is_due(update) or is_best
        return is_due and not update.skipped and not self.training.is_done

    def save(self, is_last: bool = False) -> None:
        """Begin to write a checkpoint of the last finished window. Collective; training waits for
        the copy into host memory only, and for the checkpoint before. If it cannot be written, a
        warning says so, and training goes on to the next one.
        """
        started = time.perf_counter()
        step = self.training.accumulator.num_updates
        noted = self._best.begin_save()
        kept = folder_name(noted["updates"]) if noted is not None else ""
        self._writer.finish()  # else there would be two copies
        snapshot = capture(self.training, self._files.tally, noted)
        self._writer.save(step, snapshot, is_last, kept)
        self._save_times.saved()
        self.stopping.note_save(max(self._writer.longest_sec, time.perf_counter() - started))

    @contextlib.contextmanager
    def _open_files(self, places: LoopPlaces) -> Iterator[None]:
        """Start the run's files; save the run at the end, even if it was stopped or all processes
        left the caller's loop."""
        self.engine.on_main(self._start_files)
        reset_peak(self.engine.device)
        self._hangs.start()
        try:
            try:
                yield
            finally:
                self._hangs.stop()  # what follows may take longer than a window
            # Of a large model, writing it whole takes longer than the notice before a preemption.
            self._finish(writes_model=self.training.is_done)
        except DivergedError:
            # The last update may have ruined the weights: they must not take a checkpoint's place.
            self._best.finish()
            self.engine.on_main(self._write_ending)
            raise
        except GeneratorExit:  # the caller broke out of its loop, or raised in it
            self._finish_if_all_left(places)
            raise
        finally:
            self._writer.give_up()
            self._trackers.close()
            self._files.close()

    def _start_files(self) -> None:
        kept = self._files.tally.records
        start_trackers = partial(self._trackers.start, self._plan, kept, self.folder / METRICS)
        self._files.take()
        if not kept:
            try:
                start_trackers()
            except ConfigError:  # nothing was made, and a run to be replaced is still there
                self._files.leave()
                raise
        self._files.start(self.config, self._plan)
        if kept:
            start_trackers()

    def _finish_if_all_left(self, places: LoopPlaces) -> None:
        try:
            other = places.process_that_did_not_leave(self._files.tally.records)
        except StoreLostError as error:
            logger.warning(
                "the loop was left, and nothing is saved here: whether all processes left it is "
                "not known, because %s; the last checkpoint stays",
                error,
            )
            return
        if other is None:
            self._finish(writes_model=True)
            return
        logger.warning(
            "process %d left its loop after update %d and process %d did not, so nothing is saved "
            "here and the last checkpoint stays; break out on all processes at the same record",
            *(self.engine.rank, self.training.accumulator.num_updates, other),
        )

    def _finish(self, writes_model: bool) -> None:
        self.save(is_last=True)
        gathered: contextlib.AbstractContextManager[tuple[dict[str, torch.Tensor] | None, str]]
        gathered = contextlib.nullcontext((None, ""))
        if writes_model:
            model, config = self.training.model, self.config
            only_trained, dtype = needs_only_trained_weights(config), saved_dtype(config)
            gathered = gathered_weights(self.engine, model, self.folder, only_trained, dtype)
        with gathered as (weights, not_gathered):
            failed = [one for one in (self._writer.wait(), not_gathered) if one]
            self.engine.on_main(self._write_results, weights, failed)

    def _write_results(self, weights: dict[str, torch.Tensor] | None, failed: list[str]) -> None:
        """Write the model and result.json, each that can be.

        Args:
            weights: of the model; None leaves model/ as it is.
            failed: what could not be written before.
        """
        training, model = self.training, self.engine.unwrap(self.training.model)
        try:
            if weights is not None:
                origin = self._origin(is_saved=not failed)
                plan, tokenizer = self._plan, training.tokenizer
                save_model(self.folder, self.config, plan, model, tokenizer, weights, origin)
            if not failed:
                self._write_ending()
        except OSError as error:
            failed.append(str(error))
        if failed:
            raise AccumTrainerError(
                f"the run ended after {training.accumulator.num_updates} updates, and not all of "
                f"it could be saved: {'; '.join(failed)}. Make room and give the same command with "
                f"--output-dir {self.folder}: it continues from the last whole checkpoint"
            )

    def _origin(self, is_saved: bool) -> ModelOrigin:
        """Of the weights as they are, which the last checkpoint holds if it `is_saved`."""
        updates = self.training.accumulator.num_updates
        last = self.folder / CHECKPOINTS / folder_name(updates)
        return ModelOrigin(
            updates, self._files.tally.num_samples, identity_of(last) if is_saved else ""
        )

    def _write_ending(self) -> None:
        """Write result.json and the picture."""
        model = read_origin(self.folder / MODEL)
        training = self.training
        title = f"{self.folder.name}: {self.describe_split()}"
        ending: dict[str, Any] = {
            "done": training.is_done,
            "stopped_by": self.stopped_by,
            "updates": training.accumulator.num_updates,
            "model_updates": model.updates if model is not None else None,
        }
        if self._best.is_wanted:
            ending["best"] = self.best.as_result() if self.best is not None else None
        self._files.finish(title, ending)
        self._trackers.finish(self.folder / PICTURE)


def _noise_scale(training: Training) -> Record:
    """The part of a record that the noise of the gradient fills."""
    noise = training.windows.noise.estimate
    return {
        "noise_scale": noise.samples,
        "noise_scale_low": noise.low,
        "noise_scale_high": noise.high,
    }
