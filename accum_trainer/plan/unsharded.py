"""Memory and traffic of one process and of DDP: whole float32 weights on every process."""

from __future__ import annotations

from accum_trainer.engine.sync import EVERY, Syncs
from accum_trainer.plan.job import Job, Need


def single(job: Job, syncs: Syncs) -> Need:
    """float32 weights and AdamW moments, gradients in the accumulation dtype, autocast around the
    forward."""
    trained = job.shapes.trained
    gradients = job.accumulated * trained
    return Need(
        weights=job.float32_weights,
        gradients=gradients,
        optimizer=8 * trained,
        trace=job.autocast_trace,
        extra=(0,) * 4,
        other=0,
        held=gradients if job.has_earlier_gradients else 0,
        kept=0.0 if job.has_earlier_gradients else job.accumulated / 4,
        # The norm is computed in float64, and gradients of another dtype are cast for the step.
        # Fused AdamW allocates nothing more.
        outside_trace=(gradients + 8 * job.shapes.largest, 4 * trained),
    )


def ddp(job: Job, syncs: Syncs) -> Need:
    """One process's needs plus the reducer's buckets: a second copy of the gradient in the weights'
    dtype, since accelerate leaves `gradient_as_bucket_view` off
    (torch/csrc/distributed/c10d/reducer.cpp, initialize_buckets)."""
    need, buckets = single(job, syncs), 4 * job.shapes.trained
    need.extra, need.other = (buckets,) * 4, buckets
    need.outside_trace = tuple(size + buckets for size in need.outside_trace)
    return need


def single_traffic(job: Job, syncs: Syncs) -> int:
    return 0


def ddp_traffic(job: Job, syncs: Syncs) -> int:
    """All-reduces gradients in the accumulation dtype."""
    exchanges = job.steps if syncs.grad_sync == EVERY else 1
    return job.sent(2 * exchanges * job.accumulated * job.shapes.trained)
