"""The contract between the accumulator and whatever moves the gradients.

An engine says what it will divide by (`gradient_divisor`), holds gradients local or exchanges them
(`microbatch`), runs a backward, and finishes a window: unscale, norm, clip, step or not, zero. It
gives whole gradients, weights and optimizer state by parameter name however it shards them, so that
a checkpoint and a comparison know no engine. It knows nothing of windows, targets or data. What is
here is right for one process; an engine overrides what differs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import ConfigError, EngineError

# How libraries say that memory ran out where they do not raise torch.OutOfMemoryError. The same
# list as in accelerate's find_executable_batch_size, without the cuDNN error that may mean
# anything, and with what CPU and cuBLAS say.
_OUT_OF_MEMORY = (
    " out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "PT_DEVMEM Allocation failed",
)


ACCUMULATION_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What the user wants of every engine alike.

    Attributes:
        max_grad_norm: clip the averaged gradient to this 2-norm; None for no clipping.
        accumulation_dtype: the dtype gradients accumulate in, `float32` or `bfloat16`.
    """

    max_grad_norm: float | None = None
    accumulation_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm} must be above 0; give None for no clipping"
            )
        if self.accumulation_dtype not in ACCUMULATION_DTYPES:
            raise ConfigError(
                f"accumulation_dtype={self.accumulation_dtype!r} is not known; give one of "
                f"{', '.join(ACCUMULATION_DTYPES)}"
            )


class Engine(Ranks):
    """One process's view of training: its place among the ranks, and the life of its gradients.

    Attributes:
        name: of the engine, as it stands in plan.json.
        grad_sync: the policy in force, `once-per-window` or `every-microbatch`.
        grad_sync_reason: why it is this one.
        equal_micro_batches: every rank must run the same number of micro-batches, because each
            exchanges something.
        can_change_trained: parameters may be frozen and unfrozen after `prepare`.
        shards_weights: no process holds the whole model, so that none can run it by itself.
        defer_grad_reduction: exchange gradients after a window's last backward where the engine
            would do so during it, so that no other rank waits for a backward that fails. Set
            between windows, on all ranks together.
    """

    name: str
    grad_sync: str
    grad_sync_reason: str = "asked for"
    equal_micro_batches: bool = False
    shards_weights: bool = False
    can_change_trained: bool = True
    defer_grad_reduction: bool = False

    def __init__(self, accelerator: Accelerator, grad_sync: str) -> None:
        self.accelerator = accelerator
        self._grad_sync_asked = grad_sync
        self.grad_sync = grad_sync
        if grad_sync == "auto":
            self.grad_sync, self.grad_sync_reason = "once-per-window", "it costs no memory"

    @property
    def mixed_precision(self) -> str:
        return self.accelerator.mixed_precision

    @property
    def gradient_divisor(self) -> float:
        """What will divide the sum of all backwards by itself.

        Ranks are averaged over (1 in one process), and Accelerator.backward divides by the K it was
        configured with, which is 1 unless the user passed an Accelerator of their own.
        """
        return self.world_size * self.accelerator.gradient_accumulation_steps

    # --- set-up ---

    def configure(self, plan: BatchPlan, settings: Settings) -> None:
        """Learn the sizes and settings in force, once, before `prepare`; ConfigError where another
        source contradicts them."""
        self.plan, self.settings = plan, settings

    def prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        """Place and wrap models and the optimizers of their parameters, given together.

        Raises:
            EngineError: a model is wrapped in DataParallel, which splits each micro-batch over GPUs
                and averages per GPU; or the engine cannot take these together.
        """
        for model in models:
            if isinstance(model, torch.nn.DataParallel):
                raise EngineError(
                    "the model is wrapped in DataParallel, which averages per GPU inside one "
                    "process, so the weights of a "
                    "window cannot be right; pass the plain model and start one process per GPU "
                    "with accelerate launch"
                )
        ready = self._prepare(models, optimizers)
        self._accumulate_in(
            [p for model in ready[0] for p in model.parameters() if p.requires_grad]
        )
        return ready

    def _accumulate_in(self, parameters: list[torch.nn.Parameter]) -> None:
        """Have autograd keep gradients in the accumulation dtype, whatever the weights' dtype: bf16
        loses 256 + 1 - 256."""
        wanted = getattr(torch, self.settings.accumulation_dtype)
        for parameter in parameters:
            if parameter.is_floating_point() and parameter.dtype != wanted:
                parameter.grad_dtype = wanted

    def _decide_grad_sync(self, model: torch.nn.Module) -> None:
        """Under `auto`, defer the exchange where a full local gradient takes at most half of the
        memory that is free.

        4 bytes per trained parameter in float32, 2 in bfloat16. All ranks decide alike, by the one
        with least room.
        """
        if self._grad_sync_asked != "auto":
            return
        size = 4 if self.settings.accumulation_dtype == "float32" else 2
        needed = size * sum(
            getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad
        )
        free = float(self.all_gather_floats([free_bytes(self.device)])[:, 0].min())
        self.grad_sync = "once-per-window" if needed <= free / 2 else "every-microbatch"
        self.grad_sync_reason = (
            f"a full local gradient takes {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
        )

    def _prepare(
        self, models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.nn.Module], list[AcceleratedOptimizer]]:
        prepared = [self.accelerator.prepare_model(model) for model in models]
        return prepared, [self.accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]

    def prepared_models(self) -> list[torch.nn.Module]:
        """What accelerate itself prepared, for a loop that asked it to."""
        return list(self.accelerator._models)

    def unwrap(self, model: torch.nn.Module) -> Any:
        """The user's own model inside what the engine wrapped around it, autocast left in place."""
        return model

    def gives_this_ranks_batches(self, loader: Any) -> bool:
        """Whether accelerate has already sharded this loader."""
        return isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))

    def reads_with_the_others(self, loader: Any) -> bool:
        """Whether a batch of this loader is read by all ranks together, so that it may be read at
        the same place only."""
        return isinstance(loader, DataLoaderDispatcher)

    # --- one window ---

    @contextlib.contextmanager
    def microbatch(
        self, models: Sequence[torch.nn.Module], is_first: bool, is_last: bool
    ) -> Iterator[None]:
        """Run one forward and backward of a window: gradients stay local, or are exchanged now, as
        the policy says."""
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

    # --- out of memory inside a window ---

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether `error` says that a device, or the host, has no memory left."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        return isinstance(error, RuntimeError) and any(
            text in str(error) for text in _OUT_OF_MEMORY
        )

    def retry_blocker(self, is_last: bool) -> str:
        """Why a micro-batch that failed cannot be run again, on this rank alone, in the same
        window; "" where it can."""
        return ""

    def abort_micro_batch(self, error: Exception) -> None:
        """Be ready for another micro-batch after `error` ended one."""
        self.accelerator.sync_gradients = False

    def discard_local_grads(self, models: Iterable[torch.nn.Module]) -> None:
        """Throw away what this rank alone has accumulated in this window, of which nothing was
        exchanged yet."""
        for model in models:
            for parameter in model.parameters():
                parameter.grad = None

    def free_memory(self) -> None:
        """Give back what nobody uses any more, cycles included."""
        clear_device_cache(garbage_collection=True)
        if self.device.type == "cpu":
            with contextlib.suppress(
                OSError, AttributeError
            ):  # glibc keeps what was freed, until asked
                ctypes.CDLL(None).malloc_trim(0)

    def optimizer_bytes(self, optimizer: AcceleratedOptimizer) -> int:
        """Memory of this device that the optimizer's first step will take for its state: two
        numbers for each trained one, as Adam has them; nothing where the state is there."""
        fresh = [t for t in self._stepped(optimizer) if t.device.type == self.device.type]
        return sum(2 * t.numel() * t.element_size() for t in fresh)

    def _stepped(self, optimizer: AcceleratedOptimizer) -> list[torch.Tensor]:
        """This rank's tensors that the optimizer will step and has no state for yet."""
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        return [p for p in parameters if not optimizer.optimizer.state.get(p)]

    def finish(
        self, optimizer: AcceleratedOptimizer, numbers: Sequence[float]
    ) -> tuple[float, bool, np.ndarray]:
        """End a window that had targets: unscale, clip, decide on all ranks together, step or drop.

        Args:
            numbers: gathered in the same exchange that decides.

        Returns:
            (norm, stepped, table): the norm before clipping, inf or nan where any gradient is;
            whether the optimizer stepped; every rank's `numbers`, shape (world_size, len(numbers)).
        """
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(optimizer.optimizer)
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        table = self.end_window([self._square_sum(parameters), *numbers])
        norm = self._norm(table[:, 0])
        is_finite = bool(np.isfinite(table[:, 0]).all())
        if is_finite and self.settings.max_grad_norm is not None:
            # torch's convention, a hair below the limit: max / (norm + 1e-6).
            total = torch.tensor(norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, total)
        with self._in_weights_dtype(optimizer):
            stepped = self._step(optimizer, is_finite)
        self.discard_window_grads(optimizer)
        return norm, stepped, table[:, 1:]

    def end_window(self, numbers: Sequence[float]) -> np.ndarray:
        """The one small exchange at the end of a window: every rank's `numbers`, as
        `all_gather_floats` gives them."""
        return self.all_gather_floats(numbers)

    @contextlib.contextmanager
    def _in_weights_dtype(self, optimizer: AcceleratedOptimizer) -> Iterator[None]:
        """Optimizers take gradients in their weights' dtype only; the accumulation dtype comes back
        after the step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        cast = [p for p in parameters if p.grad is not None and p.grad.dtype != p.dtype]
        for p in cast:
            gradient, p.grad = p.grad.to(p.dtype), None
            p.grad_dtype = p.dtype
            p.grad = gradient
        yield
        for p in cast:
            p.grad = None
        self._accumulate_in(cast)

    def _square_sum(self, parameters: list[torch.nn.Parameter]) -> float:
        """Squares of what this rank holds of the gradient, added up in float64: in float32 a
        million squares are already 1e-5 off, and every clipped update with them."""
        return sum(square_sums([p.grad for p in parameters if p.grad is not None]))

    def _norm(self, squares: np.ndarray) -> float:
        """2-norm of the whole gradient, from every rank's `_square_sum`.

        Raises:
            EngineError: the ranks hold different gradients.
        """
        # Equal gradients have equal norms, but for the last bits where ranks run on GPUs of
        # different make. All go by rank 0's: by its own each would clip by another number, and the
        # replicas would drift apart.
        norms = np.sqrt(squares)
        if np.isfinite(norms).all() and not np.allclose(norms, norms[0], rtol=1e-5, atol=0):
            raise EngineError(
                "the processes hold different gradients (norms "
                f"{', '.join(f'{n:.6g}' for n in norms)}), which an exchange should "
                "have made equal: does the loop change gradients, or call backward itself, on some "
                "processes only?"
            )
        return float(norms[0])

    def _step(self, optimizer: AcceleratedOptimizer, is_finite: bool) -> bool:
        """Step the optimizer or not, and tell the loss scaler once; return whether it stepped."""
        self.accelerator.sync_gradients = True
        scaler = self.accelerator.scaler
        if scaler is None:
            if is_finite:
                optimizer.step()
            return is_finite
        if not is_finite:
            # As scaler.update() would after an inf, on all ranks alike: this one's own gradient may
            # be finite.
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 0})
            return False
        optimizer.step()
        return not optimizer.step_was_skipped

    def discard_window_grads(self, optimizer: AcceleratedOptimizer) -> None:
        """Throw this window's gradient away."""
        self.accelerator.sync_gradients = True
        optimizer.zero_grad()

    def to_device(self, batch: Any) -> Any:
        """The batch's tensors on this process's device; copied without waiting where they are
        pinned."""
        return send_to_device(batch, self.device, non_blocking=True)

    # --- whole tensors by parameter name, however they are sharded; every rank calls, every rank
    # gets them ---

    def full_gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The averaged, unscaled gradient of each trained parameter that has one, after a window's
        last backward and before the window is finished."""
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        named = self.unwrap(model).named_parameters()
        return {
            name: self._whole(p.grad).detach() / scale for name, p in named if p.grad is not None
        }

    def full_weights(
        self, model: torch.nn.Module, trained_only: bool = False
    ) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers on the CPU, in the precision that the optimizer
        updates.

        `trained_only` leaves frozen parameters out: they are what the model was loaded with.
        """
        plain = self.unwrap(model)
        weights = {
            name: self._whole_weight(p).detach().cpu()
            for name, p in plain.named_parameters()
            if p.requires_grad or not trained_only
        }
        return weights | {name: b.detach().cpu() for name, b in persistent_buffers(plain).items()}

    def load_full_weights(self, model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """Copy what `full_weights(trained_only=True)` gave; names and shapes were compared
        before."""
        plain = self.unwrap(model)
        parameters, buffers = dict(plain.named_parameters()), dict(plain.named_buffers())
        for name, tensor in weights.items():
            if name in buffers:
                buffers[name].copy_(tensor)
            else:
                self._set_weight(parameters[name], tensor)

    def full_optimizer_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer
    ) -> dict[str, Any]:
        """{"state": {parameter name: {key: tensor}}, "groups": [options of each group]}, tensors on
        the CPU."""
        state = {}
        for name, p in self.unwrap(model).named_parameters():
            found = self._parameter_state(optimizer, p)
            if found:
                state[name] = {key: value.detach().cpu().clone() for key, value in found.items()}
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        return {"state": state, "groups": groups}

    def load_full_optimizer_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer, saved: dict[str, Any]
    ) -> None:
        """Restore what `full_optimizer_state` gave, on this engine or another."""
        for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update(options)
        for name, p in self.unwrap(model).named_parameters():
            if name in saved["state"]:
                self._set_parameter_state(optimizer, p, saved["state"][name])

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _whole_weight(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._whole(parameter)

    def _set_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)

    def _parameter_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {
            key: self._whole(value)
            for key, value in optimizer.optimizer.state.get(parameter, {}).items()
        }

    def _set_parameter_state(
        self,
        optimizer: AcceleratedOptimizer,
        parameter: torch.Tensor,
        state: dict[str, torch.Tensor],
    ) -> None:
        # A scalar such as AdamW's `step` stays where the optimizer wants it: on the CPU, unless it
        # is fused.
        optimizer.optimizer.state[parameter] = {
            key: value.clone() if value.ndim == 0 else value.to(parameter.device).clone()
            for key, value in state.items()
        }

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
        """This rank's generators: Python's, numpy's, torch's, and the device's. Only numbers, lists
        and tensors."""
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = cast(
            tuple[Any, ...], np.random.get_state(legacy=True)
        )
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


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a state dict holds, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    return {
        name: buffers[name]
        for name in model.state_dict()
        if name not in parameters and name in buffers
    }


def free_bytes(device: torch.device) -> float:
    """Memory that this process could still take on its device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil  # comes with accelerate

    return min(float(psutil.virtual_memory().available), _free_in_cgroup())


def _free_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that the container of this process, if any, may still take; page cache that can be
    dropped counts as free."""
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return float(most - taken + int(stat.get(cache, 0)))
    return math.inf


# Numbers squared at a time: 32 MiB in float64.
_PIECE = 2**22


def square_sums(gradients: list[torch.Tensor]) -> list[float]:
    """Sum of squares of each gradient, in float64 where the device has it; one wait for the device.

    In pieces, for torch copies what it is asked to add up in another dtype: twice a gradient in
    memory.
    """
    if not gradients:
        return [0.0]
    dtype = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    norms = [
        torch.linalg.vector_norm(piece, dtype=dtype) for g in gradients for piece in _pieces(g)
    ]
    squares = iter(norm**2 for norm in torch.stack(norms).tolist())
    return [sum(next(squares) for _ in _pieces(g)) for g in gradients]


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of at most `_PIECE` numbers of a contiguous tensor, of whole rows of another; at least
    one."""
    if tensor.numel() <= _PIECE:
        return [tensor]
    if tensor.is_contiguous():
        return tensor.view(-1).split(_PIECE)
    return tensor.split(max(1, _PIECE * tensor.shape[0] // tensor.numel()))
