"""`Accumulator`: gradient accumulation whose update does not depend on how the batch was cut.

It owns one engine, one window in hand and the counters. The windows come from `windows`, a window's
weights and state are in `window`, the exchange that ends it in `update`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.build import build_engine, check_arguments
from accum_trainer.engine.loaders import gives_this_ranks_batches, reads_with_the_others
from accum_trainer.engine.settings import Settings
from accum_trainer.errors import AccumTrainerError, EngineError
from accum_trainer.guards import LoopGuard, refuse_unprepared
from accum_trainer.losses.contract import LossContract, Passed
from accum_trainer.losses.counter import Counter
from accum_trainer.losses.objective import MEAN, SUM
from accum_trainer.losses.targets import CountTargets
from accum_trainer.oom import OomRecovery, releasing_graph_on_failure
from accum_trainer.prepared import PreparedOptimizer, Waiting, prepare_all, run_all
from accum_trainer.sources.build import as_source
from accum_trainer.sources.options import Collate, SourceOptions
from accum_trainer.sources.progress import Progress, Remembered
from accum_trainer.update import Update, conclude, end_row
from accum_trainer.window import Window
from accum_trainer.window_plan import Cut
from accum_trainer.window_reader import CountedWindow, WindowReader
from accum_trainer.windows import Batches, Windows


class Accumulator:
    """Exact gradient accumulation around one `accelerate.Accelerator`.

    Args:
        micro_batch_size: B, most samples in one forward/backward on this process.
        gradient_accumulation_steps: K, micro-batches per update on one process. Default: the K of
            `accelerator`, else 1.
        global_batch_size: B_eff, samples per update over all processes; K follows. Give this or K.
        max_grad_norm: clip the averaged gradient to this 2-norm, once per update.
        grad_sync: when processes reduce gradients: `once-per-window`, `every-microbatch`, `auto`.
        weight_sync: when FSDP2 and ZeRO-3 gather weights: the same words. Once per window keeps
            them whole through it; `auto` does so if K > 1 and memory allows.
        accumulation_dtype: `float32`, whatever the weights' dtype, or `bfloat16` to save memory at
            the price of exactness.
        recover_from_oom: cut a micro-batch that runs out of memory in two and run it again, with
            the same gradient (dropout draws anew). `auto` does so unless it would cost time while
            nothing fails: under DDP and ZeRO-1 not in a window's last micro-batch, whose backward
            reduces gradients, until one has failed. `always` reduces after that backward. `never`
            lets the error through.
        allow_batch_norm: in train mode BatchNorm takes statistics over each micro-batch, and
            spectral norm moves with each, so the cut changes the update: refused unless True.
        accelerator: the Accelerator to use; otherwise one is made from `accelerator_kwargs`, which
            may also name the `engine` that must be in force (`single`, `ddp`, `fsdp2`, `zero0` to
            `zero3`); or `zero_stage` (0 to 3) for DeepSpeed, `fsdp=True` for FSDP2, with
            `shard_size` for groups that each hold the model; `cpu_offload` for both.

    Attributes:
        accelerator: the `accelerate.Accelerator`.
        plan: the `BatchPlan` in force.
        engine: moves the gradients.
        losses: knows what the model's own loss sums over (`losses.objective`).
        window: the one in hand; None between windows, unless a loop broke out of it.
        num_updates: optimizer updates made.
        num_micro_batches: micro-batches that this process has run.
        last_update: the record of the last finished window.
        last_optimizer: the one that finished it.
        waiting: calls of the loop that wait for the end of a micro-batch or window.

    Raises:
        ConfigError: an unknown argument; sizes that contradict each other or another source of K.
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
        weight_sync: str = "auto",
        accumulation_dtype: str = "float32",
        recover_from_oom: str = "auto",
        allow_batch_norm: bool = False,
        accelerator: Any = None,
        **accelerator_kwargs: Any,
    ) -> None:
        check_arguments(accelerator_kwargs, Accumulator)
        settings = Settings(max_grad_norm, accumulation_dtype)
        k = gradient_accumulation_steps
        # Refuse a wrong K before accelerate starts.
        BatchPlan(micro_batch_size, k, None, None if micro_batch_size else global_batch_size)
        if accelerator is not None and k is None and global_batch_size is None:
            k = accelerator.gradient_accumulation_steps
        self.engine = build_engine(
            gradient_accumulation_steps=k,
            grad_sync=grad_sync,
            weight_sync=weight_sync,
            accelerator=accelerator,
            **accelerator_kwargs,
        )
        self.plan = BatchPlan(micro_batch_size, k, self.engine.world_size, global_batch_size)
        self.engine.configure(self.plan, settings)
        self.losses = LossContract(self.engine, allow_batch_norm)
        self.window: Window | None = None
        self.max_grad_norm = max_grad_norm
        self.num_updates = self.num_micro_batches = 0
        self.last_update: Update | None = None
        self.last_optimizer: PreparedOptimizer | None = None
        self._oom = OomRecovery(self.engine, recover_from_oom)
        self._optimizers: list[PreparedOptimizer] = []
        self._models: set[torch.nn.Module] = set()
        self.waiting = Waiting()
        self._sources = Remembered()
        self._guard = LoopGuard(self.engine)
        self._stop_requested = self._save_requested = False

    @property
    def accelerator(self) -> Any:
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        return self.engine.device

    # --- set-up ---

    def prepare(self, *objects: Any) -> Any:
        """Prepare models, optimizers and schedulers for this engine; returned in the order given.

        The prepared optimizer's `step()` and `zero_grad()` and the prepared scheduler's `step()`
        act once per window, wherever they are called. A DataLoader is returned as it is: `windows`
        and `batches` deal it to the processes.

        Raises:
            EngineError: an object this engine cannot prepare (DataParallel, another type).
        """
        ready, optimizers, models = prepare_all(self, objects)
        self.losses.watch(models)
        self._guard.watch(models, optimizers)
        self._models.update(models)
        self._optimizers += optimizers
        return ready[0] if len(ready) == 1 else ready

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
        noise_every: int = 0,
    ) -> Windows:
        """The windows of a data set, DataLoader or stream; each is one optimizer update.

        Args:
            source: a map-style data set (windows in the global order from `seed` and epoch); a
                DataLoader (its batches in its order, dealt to the processes in turn; one that is
                sharded already is taken as it is); or an iterable of this process's batches.
            collate_fn: samples to a batch, for a data set; torch's default otherwise.
            count_targets: terms that a batch's loss sums or averages over, or the sum of their
                weights. Default: found and proven on the first batch (`losses.objective`).
            lengths: tokens of each sample, to save padding; default: found (`sources.lengths`).
            seed: of the global order, and of a DataLoader's sampler without a generator.
            shuffle: False keeps a data set's own order.
            num_workers: processes that load samples of a data set ahead of training.
            shard: (i, n) trains on every n-th sample of the global order, from the i-th: a share
                of the data for an independent run, not this process's part of a window.
            cut: how windows of a data set become micro-batches; default: by B.
            prefetch: make the next window of a data set in a thread; its `__getitem__` must not
                use the global random generators.
            noise_every: measure the noise of the gradient (`Windows.noise`) in every N-th window:
                it is cut at random, with the same update. 0 measures none.

        Returns:
            `Windows`: iterate once per epoch; `len()` where known; `state_dict()` and
            `load_state_dict()` for the position. The position belongs to the source: called again
            with the same one (and seed, shuffle and shard), this goes on with the next epoch.

        Raises:
            DataError: no source of windows, an empty one, or one whose noise cannot be measured.
        """
        share = (seed, shuffle, shard)
        progress = Progress() if hasattr(source, "__next__") else self._sources.of(source, share)
        options = SourceOptions(
            collate_fn=collate_fn,
            lengths=lengths,
            shuffle=shuffle,
            seed=seed,
            shard=shard,
            cut=cut,
            num_workers=num_workers,
            prefetch=prefetch,
            noise_every=noise_every,
            pin_memory=self.device.type == "cuda",
            already_sharded=gives_this_ranks_batches(source),
            read_together=reads_with_the_others(source),
        )
        found = as_source(source, self.plan, self.engine.rank, options, progress)
        counter = Counter(self.losses, count_targets)
        return Windows(self._begin, self.engine, found, counter, progress)

    def batches(self, source: Any, **options: Any) -> Batches:
        """This process's micro-batches, one after another, for a loop that has no windows; each
        `for` is one epoch.

        Takes what `windows` takes. The loop calls `optimizer.step()` after each micro-batch, as
        with Accelerate; it acts after the last of a window.
        """
        return Batches(source if isinstance(source, Windows) else self.windows(source, **options))

    @contextlib.contextmanager
    def accumulate(self, *models: torch.nn.Module) -> Iterator[None]:
        """Run one micro-batch's forward and backward inside; gradients stay local until the
        window's last one.

        If they run out of memory, the error goes no further: the window gives the same samples
        again, fewer at a time.

        Raises:
            AccumTrainerError: there is no micro-batch to accumulate, or `backward` was not called
                inside.
            EngineError: out of memory, and the micro-batch cannot be cut in two, or not be run
                again on this engine.
        """
        window = self.window
        micro_batch = None if window is None else window.micro_batch
        if window is None or micro_batch is None:
            raise AccumTrainerError(
                "accumulate() outside a window; take micro-batches from windows() or batches()"
            )
        if not models:
            raise AccumTrainerError("accumulate() needs the model, as in accumulate(model)")
        if window.has_run_backward:
            raise AccumTrainerError(
                "accumulate() ran before for this micro-batch, whose gradient would count twice"
            )
        self._guard.before_micro_batch(window, models)
        has_targets = micro_batch.planned.num_targets > 0
        self.losses.begin_micro_batch(micro_batch.is_first, has_targets)
        self._models.update(models)
        if micro_batch.is_first:
            self.engine.begin_window(self._models)
        try:
            with self.engine.microbatch(models, micro_batch.is_first, micro_batch.is_last):
                window.is_running = True
                yield
                window.is_running = False  # a later error is the engine's, in a collective
        except Exception as error:
            if not (window.is_running and self._oom.goes_on(window, error, self._models)):
                raise
            self._guard.after_failure()
            return
        finally:
            window.is_running = False
            self.losses.forget_outputs()
            calls = self.waiting.end_micro_batch()
        if not window.has_run_backward:
            raise AccumTrainerError(
                "no backward() of the Accumulator ran inside accumulate(); call acc.backward(loss) "
                "there, not loss.backward() or accelerator.backward(loss), or this micro-batch has "
                "the wrong weight"
            )
        self._guard.after_micro_batch(window, models)
        window.norms.take(self.engine, models)
        if micro_batch.is_last and not self._optimizers:
            self._finish_for_accelerate(window)
        run_all(calls)

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
            reduction: `sum` or `mean`. Leave it out for `causal_lm_loss` and for the loss that the
                model itself returned, whose reduction is proven. A mean of your own needs
                `count_targets`.
            auxiliary: shape (); a second term, by definition a mean over micro-batches, such as a
                router's load-balancing loss with its coefficient. Not part of `Update.loss`. The
                router's loss inside a transformers model's own loss is found without being passed.

        Raises:
            AccumTrainerError: called outside `accumulate(model)`; an unknown reduction, or one that
                contradicts what the loss was proven to be; a mean over nobody knows what.
        """
        window = self.window
        if window is None or not window.is_running or window.micro_batch is None:
            raise AccumTrainerError(
                "backward() outside accumulate(); write `with acc.accumulate(model): "
                "acc.backward(loss)`"
            )
        if not isinstance(loss, torch.Tensor):
            raise AccumTrainerError(
                f"backward() got {loss!r}, no loss; a model returns one only if it gets labels"
            )
        if reduction not in (None, SUM, MEAN):
            raise AccumTrainerError(
                f"reduction={reduction!r} is not known; say whether the loss is a `sum` or a `mean`"
            )
        counter = window.reader.counter
        passed = Passed(
            loss, reduction, window.micro_batch, counter.objective, counter.given is not None
        )
        reduction, loss, router = self.losses.split(passed, auxiliary is not None)
        auxiliary = router if auxiliary is None else auxiliary
        is_zero = reduction == SUM or loss is self.losses.made_zero
        weighted = window.weigh(loss, reduction == MEAN, auxiliary, is_zero)
        if weighted is not None:
            with releasing_graph_on_failure(loss, auxiliary):
                self.engine.backward(weighted)
        if window.num_targets == 0 and window.micro_batch.is_last and not self._optimizers:
            self._discard()  # accelerate's optimizer steps on its own, on nothing then

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
        window = self.window
        if window is None:
            raise AccumTrainerError(
                "step() without a window to finish; call it once after each window's micro-batches"
            )
        if window.is_running:
            raise AccumTrainerError("step() inside accumulate(); call it after the `with` block")
        window.check_accumulated()
        if window.num_targets > 0:
            row = self._end_row(window)
            grad_norm, stepped, table = self.engine.finish(optimizer.accelerated, row)
            reason = "" if stepped else "non-finite"
        else:
            self.engine.discard_window_grads(optimizer.accelerated)
            table = self.engine.all_gather_floats(self._end_row(window))
            grad_norm, stepped, reason = math.nan, False, "empty"
        update = self._conclude(window, table, grad_norm, stepped, reason)
        self.last_optimizer = optimizer
        if scheduler is not None and stepped:
            scheduler.step()
        return update

    def request_stop(self) -> None:
        """Ask all ranks to stop: the next update of every rank has `stop_requested`."""
        self._stop_requested = True

    def request_save(self) -> None:
        """Ask all ranks to save: the next update of every rank has `save_requested`."""
        self._save_requested = True

    # --- the life of a window ---

    def _begin(self, counted: CountedWindow, reader: WindowReader, progress: Progress) -> Window:
        if self.window is not None and not self.window.was_left:
            raise AccumTrainerError(
                "a new window began before the last was finished; finish each before the next"
            )
        if self.window is not None:  # the loop broke out of it
            self._discard()
        self._guard.before_window()
        self.waiting.end_window()
        self.window = Window(counted, reader, progress, self.engine, self._oom, self.num_updates)
        return self.window

    def _finish_for_accelerate(self, window: Window) -> None:
        """End a window whose optimizer accelerate prepared, and steps."""
        refuse_unprepared(self.engine, self.max_grad_norm)
        table = self.engine.end_window(self._end_row(window))
        reason = "" if window.num_targets > 0 else "empty"
        self._conclude(window, table, math.nan, not reason, reason)

    def _discard(self) -> None:
        """Drop the gradient of the window in hand."""
        for optimizer in self.engine.prepared_optimizers():
            self.engine.discard_window_grads(optimizer)

    def _end_row(self, window: Window) -> list[float | torch.Tensor]:
        row = end_row(window, self._stop_requested, self._save_requested)
        self._save_requested = False  # one request, one update; a stop stays asked for
        return row

    def _conclude(
        self, window: Window, table: np.ndarray, grad_norm: float, stepped: bool, reason: str
    ) -> Update:
        update = conclude(self.engine, window, table, grad_norm, stepped, reason)
        self._oom.after(update.num_splits)
        self.num_updates += stepped
        self.num_micro_batches += len(window)
        window.finish()
        self.window, self.last_update = None, update
        run_all(self.waiting.end_window(stepped))
        return update

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
