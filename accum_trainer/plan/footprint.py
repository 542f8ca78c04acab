"""What each engine needs on one GPU, and sends in one update, before anything is allocated.

With P parameters of which T are trained, W processes, c bytes per number in the forward (2 or 4)
and a in accumulated gradients:

    weights      float32 under single and DDP, and autocast's 16-bit copies; c P under ZeRO
    gradients    a T, or a T / W where sharded
    optimizer    AdamW's two moments, 8 bytes per trained parameter; ZeRO's master copy, 4 more
                 (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3: 2 + 2 + 12 bytes in
                 mixed precision)
    activations  traced on the model's own code, see `shapes`

What is written here is what the engines of this package do, which is not always what the papers
describe: the module of torch or DeepSpeed that allocates or sends is named at each term. Traffic
counts what one process sends when a ring does the work (Patarasuk and Yuan 2009, Bandwidth optimal
all-reduce): (W-1)/W of a buffer that is gathered or reduced-and-scattered, twice that when it is
all-reduced. Numbers exchanged once per window (norms, counts, losses) are left out.

Not counted: the CUDA context, NCCL's buffers and fragmentation, for which RESERVED is kept free;
and host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.errors import AccumTrainerError
from accum_trainer.lm.model import frozen_dtype
from accum_trainer.plan.shapes import PHASES, Shapes, Trace, model_shapes, trace

ONCE, EVERY = "once-per-window", "every-microbatch"
# Share of a GPU that is not for torch's tensors. A judgement: nothing here has measured it.
RESERVED = 0.08


@dataclass(frozen=True)
class DeepSpeedSizes:
    """DeepSpeed's buffers, in numbers; its defaults (deepspeed/runtime/zero/config.py).

    Attributes:
        reduce_bucket: gradients reduced at a time (`reduce_bucket_size`; twice that where
            `overlap_comm` is set at stage 1 or 2).
        prefetch: weights fetched ahead at stage 3 (`stage3_prefetch_bucket_size`).
        live: weights that stage 3 holds gathered (`stage3_max_live_parameters`,
            `stage3_max_reuse_distance`).
    """

    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000


@dataclass(frozen=True)
class Footprint:
    """One engine under one policy, in bytes per process.

    Attributes:
        engine: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`.
        grad_sync: the policy that the memory is for.
        weights, gradients, optimizer, activations, other: each at its largest; `other` is what the
            engine itself holds to reduce gradients and gather weights. `activations` is None where
            the model could not be traced.
        total: the peak: less than the sum where they are not largest at the same time (at K = 1
            gradients come as activations go). None where activations are unknown.
        start: while the model is placed, before it is sharded; `total` is no less.
        traffic: policy to bytes sent per update.
    """

    engine: str
    grad_sync: str
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    other: int
    total: int | None
    start: int
    traffic: dict[str, int]

    def fits(self, gpu_memory: float) -> bool | None:
        """Whether a GPU of so many bytes holds it, RESERVED aside; None where that is unknown."""
        return None if self.total is None else self.total <= gpu_memory * (1 - RESERVED)


@dataclass(frozen=True)
class Footprints:
    """What the engines need, and what it was found from.

    Attributes:
        samples: of max_seq_len tokens in a micro-batch.
        precision: `no`, `bf16` or `fp16`.
        unknown: why activations are not known, or None.
    """

    shapes: Shapes
    samples: int
    precision: str
    rows: list[Footprint]
    unknown: str | None


def footprints(
    config: TrainConfig, plan: BatchPlan, sizes: DeepSpeedSizes | None = None
) -> Footprints:
    """Every engine that `plan.world_size` processes can run, under each policy that makes a
    difference to its memory.

    Nothing is allocated, and no weight is read.

    Raises:
        ConfigError: the model cannot be found, or does not take these options.
    """
    job = _Job(config, plan, sizes or DeepSpeedSizes())
    engines = ["single"] if plan.world_size == 1 else ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    if plan.world_size == 1 and config.zero_stage != "none":
        engines.append(config.zero_stage)
    if job.precision == "fp16":
        engines = [engine for engine in engines if engine != "fsdp2"]
    rows = [
        _footprint(job, engine, policy)
        for engine in engines
        for policy in _policies(engine, config.grad_sync)
    ]
    return Footprints(job.shapes, job.samples, job.precision, rows, job.unknown)


def recommend(found: Sequence[Footprint], gpu_memory: float) -> Footprint | None:
    """The fastest that fits into `gpu_memory` bytes, or None: the one that sends least, the first
    of equals.

    One that gathers weights in every forward waits for the network in each micro-batch, however
    little it sends: it comes after those that do not.
    """
    fitting = [f for f in found if f.fits(gpu_memory)]
    return min(
        fitting,
        key=lambda f: (f.engine in ("zero3", "fsdp2"), f.traffic[f.grad_sync]),
        default=None,
    )


def _policies(engine: str, asked: str) -> list[str]:
    if engine in ("single", "ddp", "zero1"):  # the same memory under both
        return [EVERY if asked == EVERY and engine == "ddp" else ONCE]
    return [ONCE, EVERY] if asked == "auto" else [asked]


class _Job:
    """What all engines are given alike. Lengths of buffers in bytes unless they are called
    numbers."""

    def __init__(self, config: TrainConfig, plan: BatchPlan, sizes: DeepSpeedSizes) -> None:
        self.config, self.plan, self.sizes = config, plan, sizes
        self.shapes = model_shapes(config)
        self.precision = config.mixed_precision or ("bf16" if config.amp else "no")
        self.samples, self.steps = plan.micro_batch_size, plan.gradient_accumulation_steps
        if (
            config.max_tokens_per_micro_batch is not None
        ):  # shorter samples make fewer micro-batches of as many tokens
            self.samples = config.max_tokens_per_micro_batch // config.max_seq_len
            self.steps = -(-plan.global_batch_size // (self.samples * plan.world_size))
        self.held = self.steps > 1  # gradients of earlier micro-batches are there
        self.compute = 4 if self.precision == "no" else 2
        self.accumulated = 2 if config.accumulation_dtype == "bfloat16" else 4
        self.unknown: str | None = None

    def shard(self, numbers: int) -> int:
        return -(-numbers // self.plan.world_size)

    @cached_property
    def weights(self) -> int:
        """Bytes of weights in float32, those that LoRA does not train as `frozen_dtype` has
        them."""
        frozen = frozen_dtype(self.config, self.precision).itemsize
        return 4 * self.shapes.trained + frozen * (self.shapes.parameters - self.shapes.trained)

    @cached_property
    def autocast(self) -> Trace | None:
        """Activations over float32 weights, as under single and DDP."""
        return self._traced("float32" if self.precision == "no" else "autocast")

    @cached_property
    def cast(self) -> Trace | None:
        """Activations with the weights themselves in the compute dtype, as under ZeRO and FSDP2."""
        return self.autocast if self.precision == "no" else self._traced("16-bit")

    def _traced(self, precision: str) -> Trace | None:
        try:
            return trace(self.config, self.samples, precision)
        except AccumTrainerError:
            raise
        # a model's code may trip over tensors without values in any way; then it is unknown
        except Exception as error:
            self.unknown = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            return None

    @property
    def compact(self) -> bool:
        """Whether ZeRO adds 16-bit reductions to a float32 shard of gradients
        (_use_compact_grad_partition_buffer)."""
        return self.precision == "bf16" and self.accumulated == 4

    @property
    def mine(self) -> int:
        """Bytes of a process's shard of the gradient under ZeRO."""
        return (4 if self.compact else self.compute) * self.shard(self.shapes.trained)

    @property
    def bucket(self) -> int:
        return self.compute * self.sizes.reduce_bucket


@dataclass
class _Need:
    """An engine's terms, in bytes; from `extra` on above weights and optimizer.

    Attributes:
        trace: of the forward and backward; None where unknown.
        extra: by phase of the trace, what the engine holds besides activations and gradients.
        other: the engine's own buffers, at their largest.
        held, kept: gradients there when a micro-batch starts; bytes kept for each byte of gradient
            that the trace finishes.
        moments: bytes at other moments: the exchange, the optimizer's step.
    """

    weights: int
    gradients: int
    optimizer: int
    trace: Trace | None
    extra: tuple[int, ...]
    other: int
    held: int
    kept: float
    moments: tuple[int, ...]
    start: int = 0


def _footprint(job: _Job, engine: str, policy: str) -> Footprint:
    need = {
        "single": _single,
        "ddp": _ddp,
        "zero1": _zero1,
        "zero2": _zero2,
        "zero3": _zero3,
        "fsdp2": _fsdp2,
    }[engine](job, engine, policy)
    base, other, copies, total, activations = (
        need.weights + need.optimizer,
        need.other,
        0,
        None,
        None,
    )
    if need.trace is not None:
        phases = zip(PHASES, need.extra, strict=True)
        running = need.held + max(
            need.trace.peak(phase, kept=need.kept) + extra for phase, extra in phases
        )
        peak = base + max(running, *need.moments)
        total, activations = max(peak, need.start), need.trace.peak()
        copies = need.trace.copies  # they live among the activations and belong to the weights
        other = max(other, peak - base - need.gradients - activations)
    return Footprint(
        engine=engine,
        grad_sync=policy,
        weights=need.weights + copies,
        gradients=need.gradients,
        optimizer=need.optimizer,
        activations=None if activations is None else activations - copies,
        other=other,
        total=total,
        start=need.start,
        traffic={p: _traffic(job, engine, p) for p in (ONCE, EVERY)},
    )


def _single(job: _Job, engine: str, policy: str) -> _Need:
    """float32 weights and moments, gradients in the accumulation dtype, autocast around the
    forward."""
    trained = job.shapes.trained
    gradients = job.accumulated * trained
    return _Need(
        weights=job.weights,
        gradients=gradients,
        optimizer=8 * trained,
        trace=job.autocast,
        extra=(0,) * 4,
        other=0,
        held=gradients if job.held else 0,
        kept=0.0 if job.held else job.accumulated / 4,
        # The norm is taken in float64, and gradients in another dtype are cast for the step
        # (engine/base.py, _norm and _in_weights_dtype). Fused AdamW (assemble.py) takes nothing
        # more.
        moments=(gradients + 8 * job.shapes.largest, 4 * trained),
    )


def _ddp(job: _Job, engine: str, policy: str) -> _Need:
    """As one process, and the reducer's buckets: a second copy of the gradient in the weights'
    dtype, since accelerate leaves `gradient_as_bucket_view` off
    (torch/csrc/distributed/c10d/reducer.cpp, initialize_buckets)."""
    alone, buckets = _single(job, engine, policy), 4 * job.shapes.trained
    alone.extra, alone.other = (buckets,) * 4, buckets
    alone.moments = tuple(moment + buckets for moment in alone.moments)
    return alone


def _zero1(job: _Job, engine: str, policy: str) -> _Need:
    """ZeRO-1 (deepspeed/runtime/zero/stage_1_and_2.py): whole gradients in the weights' dtype until
    the window's end.

    A bucket of `reduce_bucket_size` numbers is allocated whole, however small the model, in the
    first backward (setup_buckets), and stays until the window's end.
    """
    if job.compact and not job.config.cpu_offload:
        return _zero1_bf16(job)
    whole = job.compute * job.shapes.trained
    before = job.bucket if job.held else 0
    return _zero(
        job,
        gradients=whole,
        extra=(before, before, job.bucket, job.bucket),
        kept=1.0,
        moments=(job.bucket + whole + job.mine,),
    )


def _zero1_bf16(job: _Job) -> _Need:
    """With bf16 weights stage 1 is DeepSpeed's BF16_Optimizer: whole gradients in float32, always
    there, beside the last backward's in bf16 (bf16_optimizer.py, fp32_groups_gradients_flat), and
    reduced through one flat copy in float32 and another in bf16 (runtime/engine.py,
    allreduce_bucket)."""
    trained = job.shapes.trained
    always, last, copies = 4 * trained, job.compute * trained, (4 + job.compute) * trained
    need = _zero(
        job, gradients=always + last, extra=(0,) * 4, kept=1.0, moments=(always + last + copies,)
    )
    need.held = always + (last if job.held else 0)
    need.moments = (always + last + copies,)
    need.other = copies
    return need


def _zero2(job: _Job, engine: str, policy: str) -> _Need:
    """ZeRO-2 (deepspeed/runtime/zero/stage_1_and_2.py): every-microbatch keeps a shard of the
    gradient; once-per-window the whole gradient in the accumulation dtype, reduced when the window
    is over and activations are gone."""
    s, c = job.shapes, job.compute
    whole = c * s.trained
    if policy == ONCE:
        gradients = (job.accumulated if c == 2 else 4) * s.trained
        cast = (4 + c) * s.largest if job.compact else 0
        moment = job.bucket + gradients + job.mine + cast
        return _zero(
            job, gradients=gradients, extra=(0,) * 4, kept=gradients / whole, moments=(moment,)
        )
    # Offloaded, a gradient shard that is not float32 waits on the host.
    gradients = 0 if job.config.cpu_offload and not job.compact else job.mine
    # What is reduced while the backward still runs is copied out of the bucket first
    # (allreduce_bucket).
    extra = (0, 0, job.bucket, 2 * job.bucket if whole > job.bucket else job.bucket)
    moment = job.bucket + min(job.bucket, whole) + 2 * gradients
    return _zero(job, gradients=gradients, extra=extra, kept=0.0, moments=(moment,))


def _zero(
    job: _Job, gradients: int, extra: tuple[int, ...], kept: float, moments: tuple[int, ...]
) -> _Need:
    """What stages 1 and 2 share: all weights in the compute dtype, master copy and moments of a
    shard, and the step on it.

    Offloaded, gradients and weights pass through two buffers of the largest tensor
    (temp_grad_buffer_for_gpu_offload).
    """
    s, c, offload = job.shapes, job.compute, job.config.cpu_offload
    shard, passing = job.shard(s.trained), 2 * c * s.largest if offload else 0
    step = 0 if offload or job.compact else 4 * shard  # the shard's gradients as one tensor
    return _Need(
        weights=c * s.parameters,
        gradients=gradients,
        optimizer=0 if offload else 12 * shard,
        trace=job.cast,
        extra=tuple(bytes_held + passing for bytes_held in extra),
        other=job.bucket + passing,
        held=gradients if job.held else 0,
        kept=0.0 if job.held else kept,
        moments=(*moments, job.mine + step),
        start=c * (s.parameters + s.trained),  # the trained weights are copied into one flat buffer
    )


def _zero3(job: _Job, engine: str, policy: str) -> _Need:
    """ZeRO-3 (deepspeed/runtime/zero/stage3.py).

    Shards of weights, master copy, moments and gradients; small tensors whole; the reduction bucket
    and the gradient shard are allocated at the start. Gathered weights stay while fewer than `live`
    are (partitioned_param_coordinator.py, release_sub_module: none is released whose next use is
    near), so a model below a billion parameters is whole between forward and backward; while they
    are fetched, a flat buffer holds them a second time (partition_parameters.py,
    all_gather_coalesced).
    """
    s, c, offload = job.shapes, job.compute, job.config.cpu_offload
    shard, bucket = job.shard(s.trained), job.bucket
    sharded = 0 if offload else job.mine
    whole = s.parameters - s.persistent
    gathered = c * min(whole, job.sizes.live)
    fetched = c * min(whole, max(job.sizes.prefetch, s.widest))
    local = (job.accumulated if c == 2 else 4) * s.trained if policy == ONCE else 0
    always = bucket + sharded
    return _Need(
        weights=c * (job.shard(s.parameters) + s.persistent),
        gradients=local + sharded,
        optimizer=0 if offload else 12 * shard,
        trace=job.cast,
        extra=(bucket + gathered + fetched, *(bucket + gathered,) * 3),
        other=bucket + gathered + fetched,
        held=sharded + (local if job.held else 0),
        kept=0.0 if job.held or not local else local / (c * s.trained),
        moments=(
            always + local + min(bucket, c * s.trained),
            always + (0 if offload else 4 * shard),
        ),
        # A path or hub id is sharded while it is loaded (transformers reads DeepSpeed's stage); the
        # built-in model is not.
        start=c * s.parameters if job.config.model == "tiny" else 0,
    )


def _fsdp2(job: _Job, engine: str, policy: str) -> _Need:
    """FSDP2 (torch/distributed/fsdp/_fully_shard; engine/fsdp.py says what is sharded together).

    float32 shards of weights, gradients and moments. What lies outside the blocks is gathered from
    the first forward to the last backward. In a block's backward: the block, the next one fetched
    ahead, the block's gradients, and the input of the last reduction in the reduce dtype
    (_fsdp_param_group.py, post_backward). Once-per-window the whole gradient is kept unsharded in
    the reduce dtype, from the window's first micro-batch to its last.
    """
    s, b = job.shapes, 4 if job.precision == "no" else 2
    shard, outside = job.shard(s.trained), b * s.outside
    # The head's gradient is made first and reduced last, with what lies outside the blocks.
    two, reduced = 2 * b * s.block + b * s.head, (b + job.accumulated) * s.block_trained
    whole = policy == ONCE and job.held
    gradients = job.accumulated * s.trained if whole else 4 * shard
    return _Need(
        weights=4 * job.shard(s.parameters),
        gradients=gradients,
        optimizer=8 * shard,
        trace=job.cast,
        # The last block's buffer outlives it, until the next one's is read
        # (comm_ctx.all_gather_state).
        extra=(
            outside + 2 * b * s.block,
            outside + b * s.block,
            outside + two,
            outside + two + reduced,
        ),
        other=outside + two + reduced,
        held=gradients if job.held else 0,
        kept=0.0 if job.held else 4 * shard / (b * s.trained),
        moments=(4 * shard + 8 * job.shard(s.largest),),
        # Moved to the GPU and sharded block by block, then what lies outside the blocks
        # (_fsdp_init.py, _move_states_to_device).
        start=4 * (job.shard(s.parameters) + max(s.block, s.outside)),
    )


def _traffic(job: _Job, engine: str, policy: str) -> int:
    """Bytes that one process sends in one update.

    DDP all-reduces gradients in the accumulation dtype. ZeRO-1 and 2 all-reduce them too, in the
    compute dtype (`use_multi_rank_bucket_allreduce`; the paper's reduce-scatter would be half of
    it), and gather the new weights. ZeRO-3 gathers weights in each forward and, but for those it
    kept, in each backward, reduces and scatters gradients, and gathers the small tensors after the
    step. FSDP2 gathers weights twice, those outside the blocks once, and reduces and scatters in
    the accumulation dtype.
    """
    s, c, k = job.shapes, job.compute, job.steps
    exchanges = k if policy == EVERY else 1
    if engine == "single":
        sent = 0
    elif engine == "ddp":
        sent = 2 * exchanges * job.accumulated * s.trained
    elif engine in ("zero1", "zero2"):
        sent = 2 * (1 if engine == "zero1" else exchanges) * c * s.trained + c * s.trained
    elif engine == "zero3":
        whole = s.parameters - s.persistent
        sent = c * (
            k * (2 * whole - min(whole, job.sizes.live)) + exchanges * s.trained + s.persistent
        )
    else:
        b = 4 if job.precision == "no" else 2
        sent = b * k * (2 * s.parameters - s.outside) + exchanges * job.accumulated * s.trained
    return sent * (job.plan.world_size - 1) // job.plan.world_size
