"""State of a training as whole tensors by parameter name, however an engine shards them.

A checkpoint, a comparison and a merge read it, so they know no engine. Here tensors are whole
already, as in one process and DDP; an engine that shards overrides the methods at the end. All
methods are collective, and every rank gets the result.

`torch.distributed.checkpoint.state_dict` does the same for DDP and FSDP2, but not exactly: before
the first update it makes optimizer state with a step at lr 0, so `step` is 1; it refuses to load,
or invents, the state of a parameter that no micro-batch used; on the CPU only rank 0 gets tensors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer

from accum_trainer.engine.own_parts import Part, share_of, state_name, weight_name
from accum_trainer.engine.ranks import Ranks
from accum_trainer.engine.step import parameters_of


class FullState(Ranks):
    """Gradients, weights and optimizer state by name; the loss scaler; this rank's generators.

    Attributes:
        nonfinite_parameter: set by the last `note_nonfinite`; "" if no gradient has inf or nan.
    """

    nonfinite_parameter: str = ""

    def prepared_models(self) -> list[torch.nn.Module]:
        """The models that `prepare` or accelerate prepared."""
        raise NotImplementedError

    def unwrap(self, model: torch.nn.Module) -> Any:
        """The user's own model inside the engine's wrappers; autocast stays."""
        return model

    # --- whole tensors by parameter name ---

    def full_gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The averaged, unscaled gradient of each trained parameter that has one.

        Call it after a window's last backward and before `finish`.
        """
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        named = self.unwrap(model).named_parameters()
        return {
            name: self._whole(p.grad).detach() / scale for name, p in named if p.grad is not None
        }

    def note_nonfinite(self, stepped: Iterable[torch.Tensor] | None = None) -> None:
        """Set `nonfinite_parameter`: the first, in the models' order, with inf or nan in the part
        of its averaged gradient that some rank holds.

        For a window whose norm is not finite, before its gradient is dropped: it reads parameter
        after parameter from the device.

        Args:
            stepped: only of these; default: all that are trained.
        """
        ids = None if stepped is None else {id(p) for p in stepped}
        named = [
            (name, p)
            for model in self.prepared_models()
            for name, p in self.unwrap(model).named_parameters()
            if p.requires_grad and (ids is None or id(p) in ids)
        ]
        parts = (self._held_gradient(p) for _, p in named)
        here = next((i for i, part in enumerate(parts) if not _is_finite(part)), len(named))
        first = int(self.all_gather_floats([float(here)]).min())
        self.nonfinite_parameter = named[first][0] if first < len(named) else ""

    def full_weights(
        self, model: torch.nn.Module, trained_only: bool = False
    ) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers on the CPU, in the precision that the optimizer steps.

        Args:
            model: as `prepare` returned it.
            trained_only: leave out frozen parameters, which are as the model was loaded.
        """
        return {name: w.cpu() for name, w in self.each_full_weight(model, trained_only)}

    def each_full_weight(
        self, model: torch.nn.Module, trained_only: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`full_weights`, one at a time and on the device; every rank takes all of them."""
        plain = self.unwrap(model)
        for name, p in plain.named_parameters():
            if p.requires_grad or not trained_only:
                yield name, self._whole_weight(p).detach()
        for name, b in persistent_buffers(plain).items():
            yield name, b.detach()

    def shapes_of_weights(self, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        """The shape of each trained weight and persistent buffer. Not collective."""
        plain = self.unwrap(model)
        trained = {n: self._shape(p) for n, p in plain.named_parameters() if p.requires_grad}
        return trained | {n: tuple(b.shape) for n, b in persistent_buffers(plain).items()}

    def load_full_weights(
        self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Copy weights that `full_weights` gave; the caller has compared names and shapes."""
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
        """{"state": {parameter name: {key: tensor}}, "groups": [options of each group]}, tensors
        on the CPU; a parameter that was never stepped has no entry."""
        state = dict(self.each_parameter_state(model, optimizer))
        return {"state": state, "groups": self.optimizer_groups(optimizer)}

    def each_parameter_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(parameter name, {key: tensor}) of `full_optimizer_state`, one at a time; every rank
        takes all of them."""
        for name, p in self.unwrap(model).named_parameters():
            found = self._parameter_state(optimizer, p)
            if found:
                yield name, {key: value.detach().cpu().clone() for key, value in found.items()}

    def load_full_optimizer_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer, saved: dict[str, Any]
    ) -> None:
        """Restore state that `full_optimizer_state` gave, on this engine or another. Of tensors
        that are read when they are asked for, one parameter's are in memory."""
        for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update(options)
        for name, p in self.unwrap(model).named_parameters():
            if name in saved["state"]:
                self._set_parameter_state(optimizer, p, saved["state"][name])

    # --- this rank's parts of them, for a checkpoint ---

    def own_parts(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> list[Part]:
        """This rank's parts of the trained weights, the persistent buffers and the optimizer's
        state, where they lie; together the ranks have each element once.

        Not collective. `full_weights` and `full_optimizer_state` give the same, whole.
        """
        plain, found = self.unwrap(model), []
        for name, p in plain.named_parameters():
            if p.requires_grad:
                found.append(Part(weight_name(name), self._shape(p), *self._own_weight(p)))
                for key, (shape, begin, values) in self._own_state(optimizer, p).items():
                    found.append(Part(state_name(name, key), shape, begin, values))
        if self.is_main:  # buffers may differ between ranks; those of rank 0 hold
            for name, b in persistent_buffers(plain).items():
                found.append(Part(weight_name(name), tuple(b.shape), 0, b.detach().reshape(-1)))
        # Of a tensor without elements rank 0 has all: its name and shape.
        return [p for p in found if p.values.numel() or (self.is_main and 0 in p.shape)]

    def all_parts(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> list[Part]:
        """`own_parts` of all ranks, of an engine whose every rank has the whole state
        (`shards_optimizer` is False). Not collective."""
        plain = self.unwrap(model)
        tensors: dict[str, torch.Tensor] = {}
        for name, p in plain.named_parameters():
            if p.requires_grad:
                tensors[weight_name(name)] = p
                for key, value in self._parameter_state(optimizer, p).items():
                    tensors[state_name(name, key)] = value
        tensors |= {weight_name(name): b for name, b in persistent_buffers(plain).items()}
        return [
            Part(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))
            for name, tensor in tensors.items()
        ]

    def optimizer_groups(self, optimizer: AcceleratedOptimizer) -> list[dict[str, Any]]:
        """The options of each group, such as lr and betas."""
        return [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]

    # --- small state ---

    def state_dict(self) -> dict[str, Any]:
        """The loss scaler's state; empty without one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore state that `state_dict` gave."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def rng_state(self) -> dict[str, Any]:
        """This rank's generators: Python's, numpy's, torch's and the device's, without pickling:
        numbers, lists and tensors."""
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
        """Restore generators that `rng_state` gave."""
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    # --- an engine that shards overrides these ---

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A gradient or optimizer state, gathered."""
        return tensor

    def _held_gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The part of a parameter's averaged gradient that this rank has. Not collective."""
        return parameter.grad

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
        # A scalar such as AdamW's `step` stays on the CPU, unless the optimizer is fused and moves
        # it.
        optimizer.optimizer.state[parameter] = {
            key: value.clone() if value.ndim == 0 else value.to(parameter.device).clone()
            for key, value in state.items()
        }

    def _shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(parameter.shape)

    def _own_weight(self, parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(begin, values) of this rank's part of a trained weight, in the precision that the
        optimizer steps."""
        return share_of(parameter, self.rank, self.world_size)

    def _own_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, tuple[tuple[int, ...], int, torch.Tensor]]:
        """(shape, begin, values) of this rank's part of each state of a trained parameter."""
        return {
            key: (tuple(value.shape), *share_of(value, self.rank, self.world_size))
            for key, value in optimizer.optimizer.state.get(parameter, {}).items()
        }

    def _without_state(self, optimizer: AcceleratedOptimizer) -> list[torch.Tensor]:
        """This rank's tensors that the optimizer will step and has no state for yet."""
        trained = [p for p in parameters_of(optimizer) if p.requires_grad]
        return [p for p in trained if not optimizer.optimizer.state.get(p)]


def _is_finite(part: torch.Tensor | None) -> bool:
    if part is None or part.numel() == 0:
        return True
    return math.isfinite(torch.linalg.vector_norm(part, ord=math.inf))  # the largest; takes no copy


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a state dict holds, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    return {
        name: buffers[name]
        for name in model.state_dict()
        if name not in parameters and name in buffers
    }
