"""The contract between the accumulator and whatever moves the gradients.

An engine says what it will divide by (`gradient_divisor`), holds gradients local or exchanges them (`microbatch`),
runs a backward, and finishes a window: unscale, norm, clip, step or not, zero. It knows nothing of windows, targets or
data. What is here is right for one process; an engine overrides what differs.
"""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device

from accum_trainer.errors import EngineError


class Engine(ABC):
    """One process's view of training: its place among the ranks, and the life of its gradients.

    Attributes:
        name: of the engine, as it stands in plan.json.
        grad_sync: the policy in force, `once-per-window` or `every-microbatch`.
        equal_micro_batches: every rank must run the same number of micro-batches, because each exchanges something.
    """

    name: str
    grad_sync: str
    equal_micro_batches: bool = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._models: list[torch.nn.Module] = []

    # --- place among the ranks ---

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def mixed_precision(self) -> str:
        return self.accelerator.mixed_precision

    @property
    @abstractmethod
    def gradient_divisor(self) -> float:
        """What will divide the sum of all backwards by itself: ranks averaged over, times K where `backward` divides by it."""

    # --- set-up ---

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Place and wrap a model.

        Raises:
            EngineError: it is wrapped in DataParallel, which splits each micro-batch over GPUs and averages per GPU.
        """
        if isinstance(model, torch.nn.DataParallel):
            raise EngineError(
                "the model is wrapped in DataParallel, which averages per GPU inside one process, so the weights of a "
                "window cannot be right; pass the plain model and start one process per GPU with accelerate launch"
            )
        prepared = self.accelerator.prepare_model(model)
        self._models.append(prepared)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Give an optimizer the life it has under this engine (its scaler in fp16)."""
        return self.accelerator.prepare_optimizer(optimizer)

    def unwrap(self, model: torch.nn.Module) -> Any:
        """The user's own model inside whatever the engine wrapped around it, autocast left in place."""
        return self.accelerator.unwrap_model(model)

    def gives_this_ranks_batches(self, loader: Any) -> bool:
        """Whether accelerate has already sharded this loader."""
        return isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))

    # --- one window ---

    @contextlib.contextmanager
    def microbatch(self, models: Sequence[torch.nn.Module], is_last: bool) -> Iterator[None]:
        """Run one forward and backward: gradients stay local, or are exchanged now, as the policy says."""
        # Objects that accelerate prepared (its optimizer and scheduler wrappers) act on this flag.
        self.accelerator.sync_gradients = is_last
        with self._sync(models, is_last or self.grad_sync == "every-microbatch"):
            yield

    @contextlib.contextmanager
    def _sync(self, models: Sequence[torch.nn.Module], exchange: bool) -> Iterator[None]:
        """Let the backward inside exchange gradients, or not."""
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of an already weighted loss, shape ()."""
        self.accelerator.backward(loss)

    def clip(self, optimizer: AcceleratedOptimizer, max_grad_norm: float | None) -> float:
        """Unscale the window's gradient, clip it to `max_grad_norm` where given, and return its norm before clipping.

        The norm is the 2-norm over all trained parameters; inf or nan where any gradient is.
        """
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(optimizer.optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        return float(norm)

    def step(self, optimizer: AcceleratedOptimizer, is_finite: bool) -> bool:
        """Step the optimizer, or drop this gradient, and tell the loss scaler once; return whether it stepped."""
        self.accelerator.sync_gradients = True
        scaler = self.accelerator.scaler
        if scaler is None:
            if is_finite:
                optimizer.step()
            return is_finite
        if not is_finite:
            scaler.update()  # found_inf was recorded by unscale: the scale shrinks
            return False
        optimizer.step()
        return not optimizer.step_was_skipped

    def drop(self, optimizer: AcceleratedOptimizer) -> None:
        """Throw this window's gradient away."""
        self.accelerator.sync_gradients = True
        optimizer.zero_grad()

    # --- talk between ranks ---

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's `values`: shape (world_size, len(values)), float64, equal on all ranks."""
        if self.world_size == 1:
            return np.asarray([values], dtype=np.float64)
        # MPS and some accelerators lack float64; whole numbers up to 2**53 need it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        mine = torch.tensor([list(values)], dtype=dtype, device=self.device)
        return self.accelerator.gather(mine).cpu().double().numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main process, then on the others, which find what it cached."""
        with self.accelerator.main_process_first():
            yield

    def to_device(self, batch: Any) -> Any:
        """The batch's tensors on this process's device; copied without waiting where they are pinned."""
        return send_to_device(batch, self.device, non_blocking=True)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The loss scaler's state; empty without one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def rng_state(self) -> dict[str, Any]:
        """This rank's generators: Python's, numpy's, torch's, and the device's. Only numbers, lists and tensors."""
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
        state: dict[str, Any] = {
            "python": [version, list(internal), gauss],
            "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` gave."""
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
