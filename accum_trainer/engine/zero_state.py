"""Whole tensors by parameter name out of DeepSpeed's shards, stages 1 to 3.

DeepSpeed keeps float32 master weights, gradients and optimizer state in flat shards, and gives one
parameter of them through its `safe_*` functions. It knows no windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer

from accum_trainer.engine.full_state import FullState
from accum_trainer.engine.own_parts import Part, share_of
from accum_trainer.errors import EngineError


class ShardedState(FullState):
    """State that every sharding stage keeps alike; `FlatState` and `PartitionedState` complete it.

    `_deepspeed` is DeepSpeed's engine, `_deepspeed.optimizer` its sharding optimizer, and
    `_deepspeed.optimizer.optimizer` the user's, which steps this rank's flat shards.
    """

    _deepspeed: Any

    def full_gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        named = [(name, p) for name, p in self.unwrap(model).named_parameters() if p.requires_grad]
        return {
            name: gradient for name, p in named if (gradient := safe_get_full_grad(p)) is not None
        }

    def each_parameter_state(
        self, model: torch.nn.Module, optimizer: AcceleratedOptimizer
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        self._link_states()
        yield from super().each_parameter_state(model, optimizer)

    def own_parts(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> list[Part]:
        self._link_states()
        return super().own_parts(model, optimizer)

    def _own_weight(self, parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
        return self._fragment(parameter, None)

    def _own_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, tuple[tuple[int, ...], int, torch.Tensor]]:
        inner = self._inner_states()
        found: dict[str, tuple[tuple[int, ...], int, torch.Tensor]] = {}
        for key, value in inner[0].items() if inner else ():
            if _is_number(value):
                number = torch.as_tensor(value)
                found[key] = ((), *share_of(number, self.rank, self.world_size))
            else:
                found[key] = (self._shape(parameter), *self._fragment(parameter, key))
        return found

    def _whole_weight(self, parameter: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if not parameter.requires_grad:
            return self._whole_frozen(parameter)
        weight: torch.Tensor = safe_get_full_fp32_param(parameter)
        return weight

    def _set_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        if parameter.requires_grad:  # a frozen one has no master copy
            self._set_fragment(parameter, None, value)
        # DeepSpeed makes the copy that the forward uses at a step only.
        self._set_forward_weight(parameter, value)

    def _parameter_state(
        self, optimizer: AcceleratedOptimizer, parameter: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._inner_states()
        if not inner or not parameter.requires_grad:
            return {}
        # A number, such as AdamW's `step`, is one for all parameters of a shard.
        return {
            key: value if _is_number(value) else safe_get_full_optimizer_state(parameter, key)
            for key, value in inner[0].items()
        }

    def _set_parameter_state(
        self,
        optimizer: AcceleratedOptimizer,
        parameter: torch.Tensor,
        state: dict[str, torch.Tensor],
    ) -> None:
        if not self._inner_states():
            self._make_inner_states(state)
        for key, value in state.items():
            if value.ndim == 0:
                for inner in self._inner_states():
                    inner[key] = value.clone()
            else:
                self._set_fragment(parameter, key, value)

    def _without_state(self, optimizer: AcceleratedOptimizer) -> list[torch.Tensor]:
        return [] if self._inner_states() else self._shards()

    def _inner_states(self) -> list[dict[str, Any]]:
        """State of the flat shards, which the optimizer's first step makes."""
        return [state for state in self._deepspeed.optimizer.optimizer.state.values() if state]

    def _make_inner_states(self, like: dict[str, torch.Tensor]) -> None:
        """Make the flat shards' state as a first step would, to be filled in."""
        inner = self._deepspeed.optimizer.optimizer
        for shard in self._shards():
            inner.state[shard] = {
                key: value.clone() if value.ndim == 0 else torch.zeros_like(shard)
                for key, value in like.items()
            }
        self._link_states()

    # --- differences between the stages ---

    def _shards(self) -> list[torch.Tensor]:
        """This rank's flat parts of the trained weights, which the user's optimizer steps."""
        raise NotImplementedError

    def _link_states(self) -> None:
        """Have DeepSpeed find each parameter's part of the flat optimizer state."""

    def _fragment(self, parameter: torch.Tensor, key: str | None) -> tuple[int, torch.Tensor]:
        """(begin, values) of this rank's float32 part of a weight, or of its optimizer state."""
        raise NotImplementedError

    def _set_fragment(self, parameter: torch.Tensor, key: str | None, value: torch.Tensor) -> None:
        """Set what `_fragment` gives, out of the whole `value`."""
        raise NotImplementedError

    def _whole_frozen(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter

    def _set_forward_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)


class FlatState(ShardedState):
    """Stages 1 and 2: every rank has the weights that the forward uses."""

    def check_own_parts(self, model: torch.nn.Module) -> None:
        """Raise an EngineError on all ranks unless this rank's float32 parts are, where they are
        read, those of the weights that the forward uses. Call it before the first step.

        A checkpoint is made of them. In another order (round_robin_gradients) training is right
        and what is saved is not.
        """
        wrong = None
        for name, p in self.unwrap(model).named_parameters():
            if p.requires_grad:
                begin, values = self._own_weight(p)
                used = p.detach().reshape(-1)[begin : begin + values.numel()]
                if not torch.equal(values.to(used.device, used.dtype), used):
                    wrong = EngineError(
                        f"DeepSpeed reads {name} back as something else than the weight in use: "
                        "checkpoints would be wrong. Take settings out of its configuration that "
                        "move weights, or use another engine"
                    )
                    break
        self.agree(wrong)

    def _shards(self) -> list[torch.Tensor]:
        return list(self._deepspeed.optimizer.single_partition_of_fp32_groups)

    def _fragment(self, parameter: torch.Tensor, key: str | None) -> tuple[int, torch.Tensor]:
        part = cast(Any, parameter)._hp_mapping  # noqa: SLF001 - what `safe_get_full_fp32_param` adds up
        if part is None:  # none of it is on this rank
            return 0, torch.empty(0)
        return part.lp_fragment_address.start, part.get_hp_fragment(key).detach().reshape(-1)

    def _held_gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        part = cast(Any, parameter)._hp_mapping  # noqa: SLF001 - as in `_fragment`
        if part is None:
            return None
        index = cast(Any, parameter)._index_in_param_group  # noqa: SLF001
        return cast(torch.Tensor, part.get_lp_grad_fragment(index))

    def _set_fragment(self, parameter: torch.Tensor, key: str | None, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value.to(self.device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(self.device), key)

    def _link_states(self) -> None:
        # DeepSpeed links them once, when the first of several parameter groups has stepped and the
        # others have no state.
        sharded = self._deepspeed.optimizer
        if hasattr(sharded, "_lazy_init_hp_params_optimizer_state"):
            sharded._hp_optimizer_states_linked = False  # noqa: SLF001 - no public way to relink
            sharded._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


class PartitionedState(ShardedState):
    """Stage 3: a weight is whole inside `GatheredParameters` only."""

    def _held_gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        from deepspeed.utils import safe_get_local_grad

        return cast(torch.Tensor, safe_get_local_grad(parameter))

    def _shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return tuple(cast(Any, parameter).ds_shape)

    def _fragment(self, parameter: torch.Tensor, key: str | None) -> tuple[int, torch.Tensor]:
        local = _local(parameter, key)
        begin = self.rank * local.numel()
        rest = cast(Any, parameter).ds_numel - begin
        return begin, local.detach().reshape(-1)[: max(0, rest)]  # the last one is padded

    def _set_fragment(self, parameter: torch.Tensor, key: str | None, value: torch.Tensor) -> None:
        # DeepSpeed's setters of whole tensors read beyond the end of one that is padded.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        local, flat = torch.zeros_like(_local(parameter, key)), value.reshape(-1)
        own = flat[self.rank * local.numel() :][: local.numel()]
        local[: own.numel()] = own.to(local.device)
        if key is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, key)

    def _shards(self) -> list[torch.Tensor]:
        return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _whole_frozen(self, parameter: torch.Tensor) -> torch.Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set_forward_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            super()._set_forward_weight(parameter, value)


def _local(parameter: torch.Tensor, key: str | None) -> torch.Tensor:
    """This rank's part of a weight under stage 3, or of its optimizer state, with its padding."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    local: torch.Tensor = (
        safe_get_local_fp32_param(parameter)
        if key is None
        else safe_get_local_optimizer_state(parameter, key)
    )
    return local


def _is_number(value: Any) -> bool:
    return not torch.is_tensor(value) or value.ndim == 0
