"""The contract between the accumulator and an engine: the life of one window.

    prepare(models, optimizers)                                   once
    begin_window(models)
    microbatch(models, is_first, is_last): backward(loss)         K times on each rank
    finish(optimizer, numbers)  or  discard_window_grads(optimizer)

Abstract methods are what an engine must provide. It declares its abilities as named capabilities;
its name decides only whether it is the one that was asked for. An engine knows no windows, targets
or data. Beside this module: `ranks` (talk between processes), `full_state` (whole tensors by name),
`memory`, `sync` (the policies), and `single`: the contract with a torch optimizer, to build on.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine import memory
from accum_trainer.engine.full_state import FullState
from accum_trainer.engine.request import Request
from accum_trainer.engine.retry import retry_blocker
from accum_trainer.engine.settings import Settings
from accum_trainer.engine.sync import AUTO, ONCE, Syncs


class Engine(FullState, abc.ABC):
    """One process's view of training: its place among the ranks, and the life of its gradients.

    Attributes:
        name: in plan.json and in messages, and how `Accumulator(engine=)` asks for it.
        options: arguments of `Accumulator` that ask for this engine.
        asked_for_as: names for `Accumulator(engine=)`, each with the options that it stands for.
        library: whose plugin or launcher variable asks for this engine; "" if none does.
        grad_sync: the policy in force, `once-per-window` or `every-microbatch`.
        weight_sync: the same for gathering sharded weights; None if every process has them whole.
        grad_sync_reason, weight_sync_reason: why it is this one.
        shard_size: processes of a group that shards the model; None without such groups.
        offloaded: in words, what lies elsewhere than on the device; "" for nothing.
        defer_grad_reduction: reduce after a window's last backward, not in it, so that a rank that
            runs out of memory there strands no other. Set between windows, on all ranks together.

    Capabilities:
        runs_alone: one process can run the model without the others: no collective in a forward.
        deals_weights: `prepare` fills models on the meta device with what rank 0 has loaded.
        can_compile: torch.compile sees through what the engine does in a forward.
        equal_micro_batches: all ranks must run the same number, because each has a collective.
        reduces_in_last_backward: gradients are exchanged during the last backward, not after it.
        can_change_trained: parameters may be frozen and unfrozen after `prepare`.
        shards_optimizer: each rank steps its own part of the weights.
        autocasts: mixed precision is autocast over float32 weights; else the weights are cast.
        rounds_reduced_gradients: in mixed precision, the ranks' gradients add up in 16 bits.
        runs_plain_loops: a loop written for accelerate alone trains on it unchanged.
    """

    name: str
    options: ClassVar[tuple[str, ...]] = ()
    asked_for_as: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    library: ClassVar[str] = ""
    grad_sync: str
    grad_sync_reason: str = "asked for"
    weight_sync: str | None = None
    weight_sync_reason: str = "every process has the whole weights"
    shard_size: int | None = None
    offloaded: str = ""
    defer_grad_reduction: bool = False

    runs_alone: bool = True
    deals_weights: bool = False
    can_compile: bool = True
    equal_micro_batches: bool = False
    can_change_trained: bool = True
    shards_optimizer: bool = False
    autocasts: bool = True
    rounds_reduced_gradients: bool = False
    runs_plain_loops: bool = False

    @property
    def reduces_in_last_backward(self) -> bool:
        return False

    # --- from a request to an engine: `build` asks each in turn ---

    @classmethod
    def is_asked_for(cls, request: Request) -> bool:
        """Whether the request names this engine; False for one that runs without a request."""
        return False

    @classmethod
    def refusal(cls, processes: int) -> str:
        """Why this engine cannot be in force on this number of processes, as a clause with the
        remedy; "" if it can."""
        return ""

    @classmethod
    def accelerator_kwargs(cls, request: Request) -> dict[str, Any]:
        """Arguments for `Accelerator(...)`: the request's, completed for this engine."""
        kwargs = dict(request.accelerator_kwargs)
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            # Without a GPU, processes find each other over gloo only if accelerate gets cpu=True.
            kwargs.setdefault("cpu", True)
        return kwargs

    @classmethod
    @abc.abstractmethod
    def drives(cls, accelerator: Accelerator, request: Request) -> bool:
        """Whether this engine drives what `accelerator` runs."""

    @classmethod
    def on(cls, accelerator: Accelerator, asked: Syncs, request: Request) -> Engine:
        """The engine around an Accelerator that it `drives`."""
        return cls(accelerator, asked)

    # --- set-up ---

    def __init__(self, accelerator: Accelerator, asked: Syncs) -> None:
        self.accelerator = accelerator
        self._asked = asked
        self.grad_sync = asked.grad_sync
        if asked.grad_sync == AUTO:
            self.grad_sync, self.grad_sync_reason = ONCE, "it costs no memory"

    @property
    def mixed_precision(self) -> str:
        return str(self.accelerator.mixed_precision)

    @property
    def gradient_divisor(self) -> float:
        """The factor by which the engine itself divides the sum of all backwards.

        The mean over ranks divides by W, and Accelerator.backward by the K that it was configured
        with: 1 unless the user passed an Accelerator.
        """
        return float(self.world_size * self.accelerator.gradient_accumulation_steps)

    def configure(self, plan: BatchPlan, settings: Settings) -> None:
        """Take the sizes and settings in force, once, before `prepare`.

        Raises:
            ConfigError: another source, such as a DeepSpeed file, contradicts them.
        """
        self.plan, self.settings = plan, settings

    @abc.abstractmethod
    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        """Place and wrap models, together with the optimizers of their parameters; have gradients
        accumulate in `settings.gradient_dtype`.

        Raises:
            EngineError: a model is wrapped already, or the engine cannot take these together.
        """

    # --- one window ---

    def begin_window(self, models: Iterable[torch.nn.Module]) -> None:
        """Drop gradients that belong to no window, as of a backward between two; not collective."""
        self.discard_local_grads(models)

    @abc.abstractmethod
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> AbstractContextManager[None]:
        """Run one forward and backward of a window inside: gradients stay local, or are exchanged
        now, as the policy says."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of an already weighted loss, shape ()."""

    def local_gradients(self, models: Sequence[torch.nn.Module]) -> dict[Any, torch.Tensor]:
        """This rank's gradient of the window so far, of each parameter that the optimizer steps,
        before its last micro-batch; empty if the engine has exchanged it, or has scaled it by a
        number that it keeps, or if several optimizers step these models."""
        return {}

    @abc.abstractmethod
    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float | torch.Tensor]
    ) -> tuple[float, bool, np.ndarray]:
        """End a window that had targets: unscale, clip, decide with all ranks, step or skip, zero.

        Args:
            optimizer: as `prepare` returned it.
            numbers: gathered in the same exchange that decides.

        Returns:
            (norm, stepped, table): the norm before clipping, inf or nan if any gradient is;
            whether the optimizer stepped; every rank's `numbers`, shape (world_size, len(numbers)).
        """

    def end_window(self, numbers: Sequence[float | torch.Tensor]) -> np.ndarray:
        """The one small exchange at a window's end: every rank's `numbers`."""
        return self.all_gather_floats(numbers)

    @abc.abstractmethod
    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        """Drop this window's gradient, on all ranks."""

    # --- a micro-batch that ran out of memory ---

    def is_out_of_memory(self, error: Exception) -> bool:
        return memory.is_out_of_memory(error)

    def retry_blocker(self, is_last: bool) -> str:
        """Why this rank alone cannot run a failed micro-batch again in the same window; "" if it
        can."""
        return retry_blocker(self, is_last)

    def abort_micro_batch(self, error: Exception) -> None:
        """Be ready for another micro-batch after `error` ended one."""
        self.accelerator.sync_gradients = False

    @abc.abstractmethod
    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        """Drop this rank's gradient of the window so far, none of it exchanged yet."""

    def free_memory(self) -> None:
        memory.free_memory(self.device)

    def optimizer_bytes(self, optimizer: AcceleratedOptimizer) -> int:
        """Memory of this device that the state of AdamW's first step will take; 0 after it."""
        return memory.adam_state_bytes(self._without_state(optimizer), self.device)

    # --- objects of accelerate ---

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on this device; pinned ones are copied without waiting."""
        return send_to_device(batch, self.device, non_blocking=True)

    def prepared_models(self) -> list[torch.nn.Module]:
        """Models that accelerate itself prepared, in a loop that asked it to."""
        return list(self.accelerator._models)  # noqa: SLF001 - accelerate has no public name

    def prepared_optimizers(self) -> list[AcceleratedOptimizer]:
        """The same of optimizers."""
        return list(self.accelerator._optimizers)  # noqa: SLF001 - accelerate has no public name
