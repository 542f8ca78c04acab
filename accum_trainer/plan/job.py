"""The input of every engine's estimate (`Job`) and its result (`Need`). Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.errors import AccumTrainerError, first_line
from accum_trainer.lm.model import frozen_dtype
from accum_trainer.plan.shapes import Trace, model_shapes, trace


@dataclass(frozen=True)
class DeepSpeedSizes:
    """DeepSpeed's buffers, in numbers; its defaults (deepspeed/runtime/zero/config.py).

    Attributes:
        reduce_bucket: gradients reduced at a time (`reduce_bucket_size`; twice that with
            `overlap_comm` at stage 1 or 2).
        prefetch: weights fetched ahead at stage 3 (`stage3_prefetch_bucket_size`).
        live: weights that stage 3 keeps gathered (`stage3_max_live_parameters`,
            `stage3_max_reuse_distance`).
    """

    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000


class Job:
    """The model, batch and precision that every engine is estimated for.

    Attributes:
        samples: samples of max_seq_len tokens in a micro-batch.
        steps: micro-batches per update on one process.
        has_earlier_gradients: gradients of earlier micro-batches exist during a backward (K > 1).
        compute: bytes per number in the forward.
        accumulated: bytes per number in accumulated gradients.
        unknown: why activations could not be traced, or None.
    """

    def __init__(self, config: TrainConfig, plan: BatchPlan, sizes: DeepSpeedSizes) -> None:
        self.config, self.plan, self.sizes = config, plan, sizes
        self.shapes = model_shapes(config)
        self.precision = config.mixed_precision or ("bf16" if config.amp else "no")
        self.samples, self.steps = plan.micro_batch_size, plan.gradient_accumulation_steps
        if config.max_tokens_per_micro_batch is not None:
            # Shorter samples make fewer micro-batches with as many tokens.
            self.samples = config.max_tokens_per_micro_batch // config.max_seq_len
            self.steps = -(-plan.global_batch_size // (self.samples * plan.world_size))
        self.has_earlier_gradients = self.steps > 1
        self.compute = 4 if self.precision == "no" else 2
        self.accumulated = 2 if config.accumulation_dtype == "bfloat16" else 4
        self.unknown: str | None = None

    def shard(self, numbers: int, processes: int | None = None) -> int:
        """One process's part of `numbers` that all `processes` share, rounded up."""
        return -(-numbers // (processes or self.plan.world_size))

    def sent(self, size: int, processes: int | None = None) -> int:
        """Bytes that one of `processes` sends in a ring, to gather a buffer of `size` bytes or to
        reduce and scatter it."""
        processes = processes or self.plan.world_size
        return size * (processes - 1) // processes

    @cached_property
    def float32_weights(self) -> int:
        """Bytes of weights in float32; those that LoRA does not train in `frozen_dtype`."""
        frozen = frozen_dtype(self.config, self.precision).itemsize
        return 4 * self.shapes.trained + frozen * (self.shapes.parameters - self.shapes.trained)

    @cached_property
    def autocast_trace(self) -> Trace | None:
        """Activations over float32 weights, as under single and DDP."""
        return self._traced("float32" if self.precision == "no" else "autocast")

    @cached_property
    def cast_trace(self) -> Trace | None:
        """Activations with the weights themselves in the compute dtype, as under ZeRO and FSDP2."""
        return self.autocast_trace if self.precision == "no" else self._traced("16-bit")

    def _traced(self, precision: str) -> Trace | None:
        try:
            return trace(self.config, self.samples, precision)
        except AccumTrainerError:
            raise
        # A model's code may fail in any way on tensors without values; activations are then
        # unknown.
        except Exception as error:
            self.unknown = f"{type(error).__name__}: {first_line(error)}"
            return None


@dataclass
class Need:
    """One engine's memory, in bytes. `extra` and `outside_trace` come on top of weights and
    optimizer.

    Attributes:
        trace: of the forward and backward; None if unknown.
        extra: per phase of the trace, what the engine holds besides activations and gradients.
        other: the engine's buffers at their largest.
        held: gradients that exist when a micro-batch starts.
        kept: bytes kept for each byte of gradient that the trace finishes.
        outside_trace: needs at other times: gradient exchange, optimizer step.
        start: while the model is placed, before it is sharded.
    """

    weights: int
    gradients: int
    optimizer: int
    trace: Trace | None
    extra: tuple[int, ...]
    other: int
    held: int
    kept: float
    outside_trace: tuple[int, ...]
    start: int = 0
