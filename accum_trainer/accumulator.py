"""`Accumulator`: gradient accumulation whose update does not depend on how the batch was cut.

The gradient of a window is, by definition, g = sum over micro-batches of grad(L) / N, where L is a
micro-batch's summed loss and N the number of targets in the window over all ranks and steps. Before
the first backward of a window its targets are counted and exchanged, so each micro-batch's loss is
multiplied by one weight:

    weight = gradient_divisor / N

`gradient_divisor` is whatever the engine will divide by by itself. Nothing else in this package
divides a loss.
"""

from __future__ import annotations

import contextlib
import logging
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from accum_trainer.batch import num_positions, num_samples
from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.base import Settings
from accum_trainer.engine.build import build_engine
from accum_trainer.errors import AccumTrainerError, ConfigError, DataError, EngineError
from accum_trainer.losses.contract import LossContract, Passed
from accum_trainer.losses.objective import MEAN, SUM
from accum_trainer.losses.targets import CountTargets
from accum_trainer.prepared import PreparedOptimizer, PreparedScheduler
from accum_trainer.sources.build import as_source
from accum_trainer.sources.dataset import Collate
from accum_trainer.sources.progress import Progress, Remembered
from accum_trainer.window import MicroBatch, Update, Window
from accum_trainer.window_plan import Cut
from accum_trainer.windows import Batches, Windows

ACCUMULATION_DTYPES = ("float32", "bfloat16")
OOM_RECOVERIES = ("auto", "always", "never")

logger = logging.getLogger(__name__)


class Accumulator:
    """Exact gradient accumulation around one `accelerate.Accelerator`.

    Args:
        micro_batch_size: B, most samples in one forward/backward on this process.
        gradient_accumulation_steps: K, micro-batches per update on one process. Default: the K of
            the `accelerator` passed in, else 1.
        global_batch_size: B_eff, samples per update over all processes; K follows. Give this or K.
        max_grad_norm: clip the averaged gradient to this 2-norm, once per update; None for no
            clipping.
        grad_sync: `once-per-window`, `every-microbatch` or `auto`: when processes exchange
            gradients.
        accumulation_dtype: the dtype gradients accumulate in, whatever the weights' dtype:
            `float32`, or `bfloat16` to save memory at the price of exactness.
        recover_from_oom: cut a micro-batch that runs out of memory in two and run it again, in the
            same window and with the same gradient (dropout draws anew). `auto` does so where it
            costs nothing while nothing fails: under DDP and ZeRO-1 not in a window's last
            micro-batch, whose backward exchanges gradients, until one has failed. `always`
            exchanges after that backward. `never` lets the error through.
        allow_batch_norm: BatchNorm in train mode takes statistics over each micro-batch, so that
            its update depends on the cut. By default a window of several micro-batches is refused
            for such a model; True accepts it.
        accelerator: an Accelerator to use; otherwise one is made from `accelerator_kwargs`, which
            may also name `zero_stage` (0 to 3) and `cpu_offload` for DeepSpeed, or `fsdp=True` for
            FSDP2.

    Attributes:
        accelerator: the `accelerate.Accelerator`.
        plan: the `BatchPlan` in force.
        engine: what moves the gradients.
        num_updates: optimizer updates made.
        num_micro_batches: micro-batches this process has run.
        last_update: what the last finished window did.
        losses: what the model's own loss was found to be (`losses.objective`).

    Raises:
        ConfigError: sizes that contradict each other or another source of K.
        EngineError: the engine in force is not the one asked for.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        global_batch_size: int | None = None,
        max_grad_norm: float | None = None,
        grad_sync: str = "auto",
        accumulation_dtype: str = "float32",
        recover_from_oom: str = "auto",
        allow_batch_norm: bool = False,
        accelerator: Any = None,
        **accelerator_kwargs: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm={max_grad_norm} must be above 0; give None for no clipping"
            )
        if accumulation_dtype not in ACCUMULATION_DTYPES:
            raise ConfigError(
                f"accumulation_dtype={accumulation_dtype!r} is not known; give one of "
                f"{', '.join(ACCUMULATION_DTYPES)}"
            )
        if recover_from_oom not in OOM_RECOVERIES:
            raise ConfigError(
                f"recover_from_oom={recover_from_oom!r} is not known; give one of "
                f"{', '.join(OOM_RECOVERIES)}"
            )
        # A wrong K is told before accelerate starts.
        BatchPlan(
            micro_batch_size,
            gradient_accumulation_steps,
            None,
            None if micro_batch_size else global_batch_size,
        )
        if (
            accelerator is not None
            and gradient_accumulation_steps is None
            and global_batch_size is None
        ):
            gradient_accumulation_steps = accelerator.gradient_accumulation_steps
        self.engine = build_engine(
            gradient_accumulation_steps=gradient_accumulation_steps,
            grad_sync=grad_sync,
            accelerator=accelerator,
            **accelerator_kwargs,
        )
        self.plan = BatchPlan(
            micro_batch_size, gradient_accumulation_steps, self.engine.world_size, global_batch_size
        )
        self.engine.configure(self.plan, Settings(max_grad_norm, accumulation_dtype))
        self.engine.defer_grad_reduction = recover_from_oom == "always"
        self.max_grad_norm = max_grad_norm
        self.recover_from_oom = recover_from_oom
        self.num_updates = 0
        self.num_micro_batches = 0
        self.last_update: Update | None = None
        self._optimizers: list[PreparedOptimizer] = []
        self._window: Window | None = None
        self._windows: Windows | None = None
        self._sources = Remembered()
        self._microbatch: MicroBatch | None = None
        self._accumulated = 0
        self._inside = False
        self._loss_sum: torch.Tensor | float = 0.0
        self._stop = False
        self._models: set[torch.nn.Module] = set()
        self.losses = LossContract(self.engine, allow_batch_norm)
        self._too_many_positions = math.inf  # micro-batches of so many ran out of memory

    @property
    def accelerator(self) -> Any:
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        return self.engine.device

    # --- set-up ---

    def prepare(self, *objects: Any) -> Any:
        """Prepare a model, optimizer and learning-rate scheduler for this engine; returned in the
        order given.

        The prepared optimizer's `step()` and `zero_grad()` and the prepared scheduler's `step()`
        act once per window, wherever they are called. A DataLoader is returned as it is: `windows`
        and `batches` deal it to the processes.

        Raises:
            EngineError: an object this engine cannot prepare (DataParallel, another type).
        """
        models = [thing for thing in objects if isinstance(thing, torch.nn.Module)]
        own = [
            t
            for t in objects
            if isinstance(t, torch.optim.Optimizer) and not isinstance(t, PreparedOptimizer)
        ]
        ready_models, ready_optimizers = self.engine.prepare(models, own)
        ready: dict[int, Any] = dict(zip(map(id, models), ready_models, strict=True))
        self.losses.watch(ready_models)
        for plain, accelerated in zip(own, ready_optimizers, strict=True):
            ready[id(plain)] = PreparedOptimizer(self, accelerated)
            self._optimizers.append(ready[id(plain)])
        prepared = [
            ready[id(thing)] if id(thing) in ready else self._prepare_other(thing)
            for thing in objects
        ]
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _prepare_other(self, thing: Any) -> Any:
        if isinstance(thing, (PreparedOptimizer, PreparedScheduler, DataLoader)):
            return thing
        if hasattr(thing, "step") and hasattr(thing, "state_dict"):
            return PreparedScheduler(self, thing)
        raise EngineError(
            f"prepare() got a {type(thing).__name__}; it takes a model, an optimizer, a scheduler "
            "or a DataLoader"
        )

    # --- the loop ---

    def windows(
        self,
        source: Any,
        *,
        collate_fn: Collate | None = None,
        count_targets: CountTargets | None = None,
        lengths: np.ndarray | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        cut: Cut | None = None,
        prefetch: bool = False,
    ) -> Windows:
        """The windows of a data set, DataLoader or stream; each is one optimizer update.

        Args:
            source: a map-style data set (windows in the global order from `seed` and epoch); a
                DataLoader (its batches in its order, dealt to the processes in turn, each sample
                once; one that is sharded already is taken as it is); or any iterable of this
                process's batches.
            collate_fn: samples to a batch, for a data set; torch's default otherwise.
            count_targets: how many terms the loss of a batch sums (or averages) over; the sum of
                their weights where it weighs them. Default: what the model's own loss averages
                over, found and proven on the first batch (`losses.objective`).
            lengths: tokens of each sample of a data set, shape (samples,); lets the cut avoid
                padding.
            seed: of the global order; also of a DataLoader's RandomSampler that has no generator.
            shuffle: False keeps a data set's own order.
            num_workers: processes that load samples of a data set. What they read, as with
                `prefetch` and the workers of a DataLoader, is asked for before the update of the
                window in hand, so that nothing waits and, on several processes, the counts of both
                take one exchange.
            shard: (i, n) trains on every n-th sample of a data set's global order, from the i-th: a
                share of the data for a training of its own, not this process's part of a window.
            cut: how the windows of a data set become micro-batches, where it shall not be by B
                alone.
            prefetch: make each window of a data set in a thread while the one before it is trained
                on; for data whose `__getitem__` draws no random numbers.

        Returns:
            `Windows`: iterate once per epoch; `len()` where known; `state_dict()` and
            `load_state_dict()` for the position. The position belongs to the source: called again
            with the same one (and seed, shuffle and shard), this goes on with the next epoch.

        Raises:
            DataError: no source of windows, or an empty one.
        """
        share = (seed, shuffle, shard)
        progress = Progress() if hasattr(source, "__next__") else self._sources.of(source, share)
        return Windows(
            self,
            as_source(
                source,
                self.plan,
                self.engine.rank,
                collate_fn=collate_fn,
                lengths=lengths,
                seed=seed,
                shuffle=shuffle,
                num_workers=num_workers,
                pin_memory=self.device.type == "cuda",
                already_sharded=self.engine.gives_this_ranks_batches(source),
                read_together=self.engine.reads_with_the_others(source),
                shard=shard,
                cut=cut,
                prefetch=prefetch,
                progress=progress,
            ),
            count_targets,
            progress,
        )

    def batches(self, source: Any, **options: Any) -> Batches:
        """This process's micro-batches, one after another, for a loop that has no windows; each
        `for` is one epoch.

        Takes what `windows` takes. The loop calls `optimizer.step()` after each micro-batch, as
        with Accelerate; it acts after the last of a window.
        """
        return Batches(source if isinstance(source, Windows) else self.windows(source, **options))

    @contextlib.contextmanager
    def accumulate(self, *models: torch.nn.Module) -> Iterator[None]:
        """Run one micro-batch's forward and backward inside: gradients stay local until the
        window's last one.

        Where they run out of memory, the error goes no further: the window gives the same samples
        again, fewer at a time.

        Raises:
            AccumTrainerError: there is no micro-batch to accumulate, or `backward` was not called
                inside.
            EngineError: out of memory, and the micro-batch cannot be cut in two, or not be run
                again on this engine.
        """
        microbatch = self._microbatch
        if microbatch is None or self._window is None:
            raise AccumTrainerError(
                "accumulate() outside a window; take micro-batches from windows() or batches()"
            )
        if not models:
            raise AccumTrainerError("accumulate() needs the model, as in accumulate(model)")
        for optimizer in self._optimizers:
            optimizer.watch_schedule(microbatch.is_first)
        self.losses.begin_micro_batch(microbatch.is_first)
        before = self._accumulated
        self._models.update(models)
        try:
            with self.engine.microbatch(models, microbatch.is_first, microbatch.is_last):
                self._inside = True
                yield
                self._inside = (
                    False  # what fails now is the engine's, in an exchange with the other ranks
                )
        except Exception as error:
            if not (self._inside and self._runs_again(microbatch, error)):
                raise
            return
        finally:
            self._inside = False
            self.losses.forget_outputs()
        if self._accumulated == before:
            raise AccumTrainerError(
                "no backward() of the Accumulator ran inside accumulate(); call acc.backward(loss) "
                "there, not "
                "loss.backward() or accelerator.backward(loss), or this micro-batch has the wrong "
                "weight"
            )
        if microbatch.is_last and not self._optimizers:
            self._finish_unowned()

    def backward(
        self,
        loss: torch.Tensor,
        reduction: str | None = None,
        auxiliary: torch.Tensor | None = None,
    ) -> None:
        """Accumulate the gradient of a micro-batch's loss, with the weight that makes the window's
        gradient exact.

        Args:
            loss: shape (); the sum over this micro-batch's targets, or their mean.
            reduction: `sum` or `mean`, what `loss` is. It may be left out for `causal_lm_loss` and
                for the loss that the model itself returned, whose reduction was proven. A mean of
                your own needs `count_targets`.
            auxiliary: shape (); a second term that is a mean over micro-batches by definition, such
                as a router's load-balancing loss with its coefficient: the window's gradient holds
                its mean over all micro-batches. Not part of `Update.loss`. The router's loss that a
                model of transformers adds to its own is found and weighted so without being passed.

        Raises:
            AccumTrainerError: called outside `accumulate(model)`; an unknown reduction, or one that
                is not what the loss was proven to be; a mean of which nobody knows what it averages
                over.
        """
        if not self._inside or self._microbatch is None:
            raise AccumTrainerError(
                "backward() outside accumulate(); write `with acc.accumulate(model): "
                "acc.backward(loss)`"
            )
        if reduction not in (None, SUM, MEAN):
            raise AccumTrainerError(
                f"reduction={reduction!r} is not known; say whether the loss is a `sum` or a `mean`"
            )
        microbatch, planned = self._microbatch, self._microbatch.planned
        assert self._windows is not None
        of = Passed(
            loss, reduction, microbatch, self._windows.objective, self._windows.counts_given
        )
        reduction, loss, router = self.losses.split(of, auxiliary is not None)
        if auxiliary is None:
            auxiliary = router
        terms = planned.num_targets if reduction == MEAN else 1
        self._accumulated = self._window._started  # type: ignore[union-attr]
        if planned.weight and terms:
            seen = loss.detach()
            self._loss_sum = (
                self._loss_sum + (seen if seen.device.type == "mps" else seen.double()) * terms
            )
        elif auxiliary is None and not microbatch.is_last and not self.engine.equal_micro_batches:
            # nothing to add and nobody waits: a mean over no target is nan, and must not touch the
            # gradient
            return
        total = loss * (planned.weight * terms)
        if auxiliary is not None:
            total = total + auxiliary * planned.auxiliary_weight
        try:
            self.engine.backward(total)
        except Exception:
            # The caller's variable would keep what is left of the graph, and its memory, through
            # the next forward.
            for term in (loss, auxiliary):
                if term is not None and term.grad_fn is not None and not term._is_view():
                    term.detach_()
            raise

    def step(self, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Update:
        """Finish the window: clip, decide on all ranks together whether the gradient is finite,
        step or skip, zero.

        Args:
            optimizer: as `prepare` returned it.
            scheduler: stepped once if the optimizer stepped.

        Raises:
            AccumTrainerError: the window is not complete, or was finished before.
            EngineError: the optimizer was not prepared here.
        """
        if not isinstance(optimizer, PreparedOptimizer):
            raise EngineError(
                f"step() got a {type(optimizer).__name__}; pass the optimizer that acc.prepare() "
                "returned"
            )
        window = self._window
        if window is None:
            raise AccumTrainerError(
                "step() without a window to finish; call it once after each window's micro-batches"
            )
        self._check_accumulated(len(window))
        update = self._finish(window, optimizer)
        if scheduler is not None and not update.skipped:
            scheduler.step()
        return update

    def request_stop(self) -> None:
        """Ask all ranks to stop: the next update of every rank has `stop_requested`."""
        self._stop = True

    # --- the life of a window ---

    def _check_schedulers(self) -> None:
        """Refuse a scheduler that accelerate prepared and steps once per process."""
        for scheduler in self.accelerator._schedulers:
            if (
                self.engine.world_size > 1
                and scheduler.step_with_optimizer
                and not scheduler.split_batches
            ):
                raise ConfigError(
                    f"accelerate steps the scheduler it prepared {self.engine.world_size} times "
                    "per update, once per process; "
                    "prepare the scheduler with acc.prepare(), or leave it unprepared and step it "
                    "after each update"
                )

    def _begin(self, window: Window, windows: Windows) -> None:
        if self._window is not None:
            raise AccumTrainerError(
                "a new window began before the last was finished; finish each before the next"
            )
        self._check_schedulers()
        self._window, self._windows = window, windows
        self._microbatch, self._accumulated, self._loss_sum = None, 0, 0.0

    def _runs_again(self, microbatch: MicroBatch, error: Exception) -> bool:
        """Whether `error` is that memory ran out and the window goes on; then it gives the
        micro-batch again in halves.

        In a forward nothing was added to the gradient. A backward may have added some of it: the
        window starts anew.
        """
        if self.recover_from_oom == "never" or not self.engine.is_out_of_memory(error):
            return False
        window, batch = self._window, microbatch.planned.batch
        assert window is not None
        what = (
            f"a micro-batch of {num_samples(batch)} sample(s), {num_positions(batch)} "
            "positions, ran out of memory"
        )
        obstacle = self.engine.retry_blocker(microbatch.is_last)
        if obstacle:
            raise EngineError(f"{what} and cannot be run again in parts: {obstacle}") from error
        from_start = self._accumulated == window._started
        try:
            window._run_again(from_start)
        except DataError as reason:
            raise EngineError(
                f"{what} and cannot be cut in two: {reason}; shorten the samples, or use gradient "
                "checkpointing, a 16-bit "
                "precision or an engine that shards"
            ) from error
        self.engine.abort_micro_batch(error)
        if from_start:
            self.engine.discard_local_grads(self._models)
            self._loss_sum = 0.0
        self._accumulated = window._started
        self._microbatch = None
        redone = "and the window so far is run again" if from_start else "and run again"
        logger.warning("process %d: %s; it is cut in two, %s", self.engine.rank, what, redone)
        return True

    def _check_accumulated(self, started: int) -> None:
        """Every micro-batch handed out so far went through accumulate() and backward()."""
        if self._accumulated != started:
            raise AccumTrainerError(
                f"{started} of this window's micro-batches are due, but {self._accumulated} went "
                "through accumulate() and "
                "backward(); a micro-batch that is left out would be missing from the gradient"
            )

    def _check_finished(self) -> None:
        if self._window is not None:
            raise AccumTrainerError(
                "the window's gradient was not used: call acc.step(optimizer) after the window's "
                "micro-batches, or "
                "optimizer.step() after each micro-batch with the optimizer that acc.prepare() "
                "returned"
            )

    def _at_window_end(self) -> bool:
        return self._window is not None and self._accumulated == len(self._window)

    def _numbers(self, window: Window) -> list[float]:
        """What all ranks share in the one small exchange at the end of a window, the next one's
        counts included."""
        assert self._windows is not None and self._windows._reader is not None
        ended = [
            float(self._loss_sum),
            float(self._stop),
            float(window._num_splits),
            float(len(window)),
        ]
        which = zlib.crc32(repr(self._place(window)).encode()) if window._fingerprint else 0
        return [*ended, float(which), *self._windows._reader.numbers_ahead()]

    def _place(self, window: Window) -> tuple[int, ...]:
        """What says which window it is: equal on all ranks, or they have parted ways."""
        assert self._windows is not None
        return self.num_updates, self._windows.epoch, window._consumed, window._fingerprint

    def _check_same_window(self, window: Window, which: np.ndarray) -> None:
        """Raise an EngineError on all ranks where one was in another window than rank 0."""
        others = np.flatnonzero(which != which[0])
        if not len(others):
            return
        assert self._windows is not None
        places = self.engine.gather_objects(self._place(window))
        said = [
            f"process {i}: {updates} updates, epoch {epoch}, {consumed} consumed, window "
            f"{fingerprint:08x}"
            for i, (updates, epoch, consumed, fingerprint) in enumerate(places)
        ]
        raise EngineError(
            f"process {others[0]} trained on another window than process 0 ({'; '.join(said)}), so "
            "this update would belong "
            "to no batch; give all processes the same data, seed and position"
        )

    def _finish(self, window: Window, optimizer: PreparedOptimizer) -> Update:
        if window.num_targets > 0:
            grad_norm, stepped, table = self.engine.finish(
                optimizer.accelerated, self._numbers(window)
            )
            return self._close(window, table, grad_norm, stepped, "" if stepped else "non-finite")
        self.engine.discard_window_grads(optimizer.accelerated)
        return self._close(
            window, self.engine.all_gather_floats(self._numbers(window)), math.nan, False, "empty"
        )

    def _finish_unowned(self) -> None:
        """End a window whose optimizer accelerate prepared: it steps by itself, and this class
        cannot clip for it."""
        if self.max_grad_norm is not None:
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm} is applied by acc.step() or an optimizer that "
                "acc.prepare() returned; "
                "prepare the optimizer with acc.prepare(), or leave max_grad_norm out and clip "
                "yourself"
            )
        assert self._window is not None
        self._close(
            self._window, self.engine.end_window(self._numbers(self._window)), math.nan, True, ""
        )

    def _close(
        self, window: Window, table: np.ndarray, grad_norm: float, stepped: bool, reason: str
    ) -> Update:
        """End the window; `table[rank]` holds each rank's `_numbers`."""
        assert self._windows is not None and self._windows._reader is not None
        loss_sum, stops, splits = table[:, :3].sum(axis=0).tolist()
        self._check_same_window(window, table[:, 4])
        self._windows._reader.learn_ahead(table[:, 5:])
        if splits:
            self.engine.defer_grad_reduction = (
                True  # a second failure may come in a last micro-batch
            )
        self.num_updates += stepped
        self.num_micro_batches += len(window)
        self._windows._finished(window)
        self._window = self._windows = None
        self.last_update = Update(
            step=self.num_updates,
            loss=loss_sum / window.num_targets if window.num_targets > 0 else math.nan,
            grad_norm=grad_norm,
            num_targets=window.num_targets,
            num_samples=window.num_samples,
            num_tokens=window.num_tokens,
            num_positions=window.num_positions,
            num_micro_batches=window.num_micro_batches + int(splits),
            gradient_accumulation_steps=int(table[:, 3].max()),
            skipped=not stepped,
            reason=reason,
            stop_requested=bool(stops),
            num_splits=int(splits),
        )
        return self.last_update

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Counters and the loss scaler."""
        return {
            "num_updates": self.num_updates,
            "num_micro_batches": self.num_micro_batches,
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.num_updates = int(state["num_updates"])
        self.num_micro_batches = int(state["num_micro_batches"])
        self.engine.load_state_dict(state["engine"])
