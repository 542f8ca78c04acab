"""Memory and traffic of FSDP2 (torch/distributed/fsdp/_fully_shard; engine/fsdp.py defines the
units). A group of `shard_size` processes shards the model; groups are copies of each other."""

from __future__ import annotations

from accum_trainer.engine.mesh import shard_mesh
from accum_trainer.engine.sync import EVERY, ONCE, Syncs
from accum_trainer.plan.job import Job, Need


def fsdp2(job: Job, syncs: Syncs) -> Need:
    """float32 shards of weights, gradients and AdamW moments.

    Weights outside the blocks stay gathered from the first forward to the last backward. A block's
    backward holds the block, the next one prefetched, the block's gradients, and the input of the
    last reduction in the reduce dtype (_fsdp_param_group.py, post_backward). Under once-per-window
    the whole gradient stays unsharded in the reduce dtype, from the window's first micro-batch to
    its last. Whole weights kept through the window are counted as if all were there all the time.
    Offloaded, the shards are on the host, and a block's is copied before it is gathered.
    """
    s, b, group = job.shapes, _gathered_bytes(job), group_size(job)
    shard, outside = job.shard(s.trained, group), b * s.outside
    # The head's gradient is made first and reduced last, with the weights outside the blocks.
    two, reduced = 2 * b * s.block + b * s.head, (b + job.accumulated) * s.block_trained
    whole = syncs.grad_sync == ONCE and job.has_earlier_gradients
    here = 0 if job.config.cpu_offload else 1  # of shards
    gradients = job.accumulated * s.trained if whole else here * 4 * shard
    extra: tuple[int, ...] = (
        # The last block's buffer lives until the next one's is read (comm_ctx.all_gather_state).
        outside + 2 * b * s.block,
        outside + b * s.block,
        outside + two,
        outside + two + reduced,
    )
    if syncs.weight_sync == ONCE:
        # No buffer beside them: the first micro-batch gathers, and has no gradients yet.
        kept, head = b * s.parameters, b * s.head
        first = 0 if job.has_earlier_gradients else b * s.block
        extra = (kept + first, kept, kept + head, kept + head + reduced)
    if not here:
        extra = tuple(size + 4 * job.shard(s.block, group) for size in extra)
    return Need(
        weights=here * 4 * job.shard(s.parameters, group),
        gradients=gradients,
        optimizer=here * 8 * shard,
        trace=job.cast_trace,
        extra=extra,
        other=max(extra),
        held=gradients if job.has_earlier_gradients else 0,
        kept=0.0 if job.has_earlier_gradients else here * 4 * shard / (b * s.trained),
        outside_trace=(here * (4 * shard + 8 * job.shard(s.largest, group)),),
        # Moved to the GPU and sharded block by block, then the weights outside the blocks
        # (_fsdp_init.py, _move_states_to_device).
        start=4 * (here * job.shard(s.parameters, group) + max(s.block, s.outside)),
    )


def fsdp2_traffic(job: Job, syncs: Syncs) -> int:
    """Gathers weights twice with each micro-batch, those outside the blocks once; or all once per
    window. Reduces and scatters in the accumulation dtype. All of that inside a group; groups add
    up once per window."""
    s, exchanges = job.shapes, job.steps if syncs.grad_sync == EVERY else 1
    gathered = job.steps * (2 * s.parameters - s.outside)
    if syncs.weight_sync == ONCE:
        gathered = s.parameters
    inside = _gathered_bytes(job) * gathered + exchanges * job.accumulated * s.trained
    return job.sent(inside, group_size(job)) + between_groups(job)


def between_groups(job: Job) -> int:
    """Bytes of an update that a process sends to other groups: its shard of the gradient is
    all-reduced."""
    group = group_size(job)
    gradient = job.accumulated * job.shard(job.shapes.trained, group)
    return job.sent(2 * gradient, job.plan.world_size // group)


def group_size(job: Job) -> int:
    """Processes that shard the model together."""
    return shard_mesh(0, job.plan.world_size, job.config.shard_size).shard_size


def _gathered_bytes(job: Job) -> int:
    """Bytes per number of gathered weights."""
    return 4 if job.precision == "no" else 2
