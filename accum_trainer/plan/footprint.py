"""Memory of each engine on one GPU, and bytes per update, before anything is allocated.

With P parameters of which T are trained, W processes, c bytes per number in the forward (2 or 4)
and a in accumulated gradients:

    weights      float32 under single and DDP, and autocast's 16-bit copies; c P under ZeRO
    gradients    a T, or a T / W if sharded
    optimizer    AdamW's two moments, 8 bytes per trained parameter; ZeRO's master copy, 4 more
                 (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3: 2 + 2 + 12 bytes in
                 mixed precision)
    activations  traced on the model's own code, see `shapes`

The terms describe the engines of this package, which do not always do what the papers describe:
each term names the module of torch or DeepSpeed that allocates or sends. Traffic counts what one
process sends with a ring algorithm (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce): (W-1)/W
of a buffer that is gathered or reduced-and-scattered, twice that when it is all-reduced. Numbers
exchanged once per window (norms, counts, losses) are left out.

Not counted: the CUDA context, NCCL's buffers and fragmentation, for which RESERVED is kept free.
Host memory is `host`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.engine.sync import AUTO, EVERY, ONCE, Syncs
from accum_trainer.errors import ConfigError
from accum_trainer.plan import fsdp, unsharded, zero
from accum_trainer.plan.host import HostNeed, host_need
from accum_trainer.plan.job import DeepSpeedSizes, Job, Need
from accum_trainer.plan.shapes import PHASES, Shapes

# Share of a GPU that torch's tensors cannot use. A judgement, not a measurement.
RESERVED = 0.08


@dataclass(frozen=True)
class _Engine:
    """How an engine is estimated.

    Attributes:
        need: its memory under the two policies.
        sent: bytes that a process sends in an update under them.
        policy_matters: its memory depends on `grad_sync`.
        gathers_in_forward: forwards wait for weights from the network, and its memory depends on
            `weight_sync`.
        shards: something is split between the processes.
    """

    need: Callable[[Job, Syncs], Need]
    sent: Callable[[Job, Syncs], int]
    policy_matters: bool = False
    gathers_in_forward: bool = False
    shards: bool = True


_ENGINES = {
    "single": _Engine(unsharded.single, unsharded.single_traffic, shards=False),
    "ddp": _Engine(unsharded.ddp, unsharded.ddp_traffic, shards=False),
    "zero1": _Engine(zero.zero1, zero.zero1_traffic),
    "zero2": _Engine(zero.zero2, zero.zero2_traffic, policy_matters=True),
    "zero3": _Engine(zero.zero3, zero.zero3_traffic, policy_matters=True, gathers_in_forward=True),
    "fsdp2": _Engine(fsdp.fsdp2, fsdp.fsdp2_traffic, policy_matters=True, gathers_in_forward=True),
}
ENGINE_NAMES = tuple(_ENGINES)


@dataclass(frozen=True)
class Footprint:
    """One engine under one policy of each kind, in bytes per process.

    Attributes:
        engine: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`.
        grad_sync, weight_sync: the policies that the memory is for; the second is None if the
            engine does not shard weights.
        weights, gradients, optimizer, activations, other: each at its largest; `other` is what the
            engine itself holds to reduce gradients and gather weights. `activations` is None if the
            model could not be traced.
        total: the peak; less than the sum if the terms are not largest at the same time (at K = 1
            gradients come as activations go). None if activations are unknown.
        start: while the model is placed, before it is sharded; `total` is no less.
        traffic: `grad_sync` to bytes sent per update.
    """

    engine: str
    grad_sync: str
    weight_sync: str | None
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    other: int
    total: int | None
    start: int
    traffic: dict[str, int]

    def fits(self, gpu_memory: float) -> bool | None:
        """Whether a GPU of `gpu_memory` bytes holds it, RESERVED aside; None if unknown."""
        return None if self.total is None else self.total <= gpu_memory * (1 - RESERVED)

    @property
    def policy_matters(self) -> bool:
        """Whether the engine's memory depends on `grad_sync`."""
        return _ENGINES[self.engine].policy_matters

    @property
    def shards(self) -> bool:
        """Whether something is split between the processes."""
        return _ENGINES[self.engine].shards

    @property
    def gathers_in_forward(self) -> bool:
        """Whether forwards wait for weights from the network: each, or a window's first."""
        return _ENGINES[self.engine].gathers_in_forward


@dataclass(frozen=True)
class Footprints:
    """The engines' needs and their common inputs.

    Attributes:
        samples: samples of max_seq_len tokens in a micro-batch.
        precision: `no`, `bf16` or `fp16`.
        unknown: why activations are not known, or None.
        between_groups: bytes of an update that a process sends to other groups of `shard_size`
            processes; None without groups.
        host: engine to its host memory.
    """

    shapes: Shapes
    samples: int
    precision: str
    rows: list[Footprint]
    unknown: str | None
    between_groups: int | None
    host: dict[str, HostNeed]


def footprints(
    config: TrainConfig, plan: BatchPlan, sizes: DeepSpeedSizes | None = None
) -> Footprints:
    """Every engine that `plan.world_size` processes can run, under each policy that changes its
    memory.

    Allocates nothing and reads no weights.

    Raises:
        ConfigError: the model cannot be found, or does not take these options.
    """
    job = Job(config, plan, sizes or DeepSpeedSizes())
    engines = (
        ["single"] if plan.world_size == 1 else [name for name in _ENGINES if name != "single"]
    )
    if plan.world_size == 1 and config.zero_stage != "none":
        engines.append(config.zero_stage)
    if job.precision == "fp16":
        if config.engine == "fsdp2":
            raise ConfigError(
                "mixed_precision=fp16 needs a loss scaler, and there is none for engine=fsdp2; use "
                "bf16, or zero2"
            )
        engines = [engine for engine in engines if engine != "fsdp2"]
    rows = [
        _footprint(job, engine, Syncs(grad_sync, weight_sync))
        for engine in engines
        for grad_sync in _policies(engine, config.grad_sync)
        for weight_sync in _weight_policies(job, engine)
    ]
    between = fsdp.between_groups(job) if config.shard_size is not None else None
    host = {engine: host_need(job, engine) for engine in engines}
    return Footprints(job.shapes, job.samples, job.precision, rows, job.unknown, between, host)


def recommend(found: Sequence[Footprint], gpu_memory: float) -> Footprint | None:
    """The engine to take on `gpu_memory` bytes, or None if none fits: whole copies if they fit (the
    exchange overlaps the backward, and there is nothing to shard or to install), else the one that
    sends least, the first of equals.

    Engines that gather weights in forwards come after those that do not: they wait for the
    network there, even if they send less.
    """
    fitting = [f for f in found if f.fits(gpu_memory)]
    return min(
        fitting,
        key=lambda f: (f.shards, f.gathers_in_forward, f.traffic[f.grad_sync]),
        default=None,
    )


def _policies(engine: str, asked: str) -> list[str]:
    if not _ENGINES[engine].policy_matters:
        return [EVERY if asked == EVERY and engine == "ddp" else ONCE]
    return [ONCE, EVERY] if asked == "auto" else [asked]


def _weight_policies(job: Job, engine: str) -> list[str]:
    """AUTO for an engine that does not shard weights. With one micro-batch `auto` keeps none."""
    if not _ENGINES[engine].gathers_in_forward:
        return [AUTO]
    if job.config.weight_sync != AUTO:
        return [job.config.weight_sync]
    return [ONCE, EVERY] if job.steps > 1 else [EVERY]


def _footprint(job: Job, engine: str, syncs: Syncs) -> Footprint:
    need = _ENGINES[engine].need(job, syncs)
    base, other = need.weights + need.optimizer, need.other
    copies, total, activations = 0, None, None
    if need.trace is not None:
        phases = zip(PHASES, need.extra, strict=True)
        running = need.held + max(
            need.trace.peak(phase, kept=need.kept) + extra for phase, extra in phases
        )
        peak = base + max(running, *need.outside_trace)
        total, activations = max(peak, need.start), need.trace.peak()
        copies = need.trace.copies  # allocated among the activations, but copies of weights
        other = max(other, peak - base - need.gradients - activations)
    return Footprint(
        engine=engine,
        grad_sync=syncs.grad_sync,
        weight_sync=None if syncs.weight_sync == AUTO else syncs.weight_sync,
        weights=need.weights + copies,
        gradients=need.gradients,
        optimizer=need.optimizer,
        activations=None if activations is None else activations - copies,
        other=other,
        total=total,
        start=need.start,
        traffic={
            policy: _ENGINES[engine].sent(job, replace(syncs, grad_sync=policy))
            for policy in (ONCE, EVERY)
        },
    )
