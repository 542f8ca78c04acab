"""Memory and traffic of DeepSpeed's ZeRO stages.

With bf16 weights and float32 accumulation some terms differ: ZeRO then adds 16-bit reductions to a
float32 shard of gradients (_use_compact_grad_partition_buffer).
"""

from __future__ import annotations

from accum_trainer.engine.sync import EVERY, ONCE, Syncs
from accum_trainer.plan.job import Job, Need


def zero1(job: Job, syncs: Syncs) -> Need:
    """ZeRO-1 (deepspeed/runtime/zero/stage_1_and_2.py): whole gradients in the weights' dtype until
    the window's end.

    The first backward allocates a bucket of `reduce_bucket_size` numbers, whole even for a small
    model (setup_buckets); it stays until the window's end.
    """
    if _adds_to_float32(job) and not job.config.cpu_offload:
        return _zero1_bf16(job)
    whole, bucket = job.compute * job.shapes.trained, _bucket(job)
    before = bucket if job.has_earlier_gradients else 0
    return _stage_1_or_2(
        job,
        gradients=whole,
        extra=(before, before, bucket, bucket),
        kept=1.0,
        outside_trace=(bucket + whole + _gradient_shard(job),),
    )


def _zero1_bf16(job: Job) -> Need:
    """With bf16 weights stage 1 is DeepSpeed's BF16_Optimizer: permanent whole gradients in float32
    beside the last backward's in bf16 (bf16_optimizer.py, fp32_groups_gradients_flat), reduced
    through one flat copy in float32 and another in bf16 (runtime/engine.py, allreduce_bucket)."""
    trained = job.shapes.trained
    always, last, copies = 4 * trained, job.compute * trained, (4 + job.compute) * trained
    need = _stage_1_or_2(job, gradients=always + last, extra=(0,) * 4, kept=1.0, outside_trace=())
    need.held = always + (last if job.has_earlier_gradients else 0)
    need.outside_trace = (always + last + copies,)
    need.other = copies
    return need


def zero2(job: Job, syncs: Syncs) -> Need:
    """ZeRO-2 (deepspeed/runtime/zero/stage_1_and_2.py): every-microbatch keeps a shard of the
    gradient; once-per-window the whole gradient in the accumulation dtype, reduced after the window
    when activations are gone."""
    s, c, bucket = job.shapes, job.compute, _bucket(job)
    whole = c * s.trained
    if syncs.grad_sync == ONCE:
        gradients = (job.accumulated if c == 2 else 4) * s.trained
        cast = (4 + c) * s.largest if _adds_to_float32(job) else 0
        exchange = bucket + gradients + _gradient_shard(job) + cast
        return _stage_1_or_2(
            job,
            gradients=gradients,
            extra=(0,) * 4,
            kept=gradients / whole,
            outside_trace=(exchange,),
        )
    # Offloaded, a gradient shard that is not float32 waits on the host.
    offloaded = job.config.cpu_offload and not _adds_to_float32(job)
    gradients = 0 if offloaded else _gradient_shard(job)
    # A reduction during the backward copies its input out of the bucket first (allreduce_bucket).
    extra = (0, 0, bucket, 2 * bucket if whole > bucket else bucket)
    exchange = bucket + min(bucket, whole) + 2 * gradients
    return _stage_1_or_2(job, gradients=gradients, extra=extra, kept=0.0, outside_trace=(exchange,))


def _stage_1_or_2(
    job: Job, gradients: int, extra: tuple[int, ...], kept: float, outside_trace: tuple[int, ...]
) -> Need:
    """Terms of both stages: all weights in the compute dtype, master copy and AdamW moments of a
    shard, and the step on it.

    Offloaded, gradients and weights pass through two buffers of the largest tensor
    (temp_grad_buffer_for_gpu_offload).
    """
    s, c, offload = job.shapes, job.compute, job.config.cpu_offload
    shard, passing = job.shard(s.trained), 2 * c * s.largest if offload else 0
    # The step takes the shard's gradients as one float32 tensor.
    step = 0 if offload or _adds_to_float32(job) else 4 * shard
    return Need(
        weights=c * s.parameters,
        gradients=gradients,
        optimizer=0 if offload else 12 * shard,
        trace=job.cast_trace,
        extra=tuple(size + passing for size in extra),
        other=_bucket(job) + passing,
        held=gradients if job.has_earlier_gradients else 0,
        kept=0.0 if job.has_earlier_gradients else kept,
        outside_trace=(*outside_trace, _gradient_shard(job) + step),
        start=c * (s.parameters + s.trained),  # trained weights are copied into one flat buffer
    )


def zero3(job: Job, syncs: Syncs) -> Need:
    """ZeRO-3 (deepspeed/runtime/zero/stage3.py).

    Shards of weights, master copy, AdamW moments and gradients; small tensors whole; the reduction
    bucket and the gradient shard are allocated at the start. Gathered weights stay while fewer than
    `live` are (partitioned_param_coordinator.py, release_sub_module keeps those whose next use is
    near), so a model below a billion parameters is whole between forward and backward. During a
    fetch, a flat buffer holds the fetched weights a second time (partition_parameters.py,
    all_gather_coalesced). Kept once per window, all weights are whole but in a step, which gathers
    the new ones each into its place (_allgather_params_coalesced).
    """
    s, c, offload = job.shapes, job.compute, job.config.cpu_offload
    shard, bucket = job.shard(s.trained), _bucket(job)
    sharded = 0 if offload else _gradient_shard(job)
    whole = s.parameters - s.persistent
    gathered = c * min(whole, job.sizes.live)
    fetched = c * min(whole, max(job.sizes.prefetch, s.widest))
    kept_whole = 0
    if syncs.weight_sync == ONCE:
        gathered = kept_whole = c * whole
        fetched = 0
    local = (job.accumulated if c == 2 else 4) * s.trained if syncs.grad_sync == ONCE else 0
    always = bucket + sharded
    return Need(
        weights=c * (job.shard(s.parameters) + s.persistent),
        gradients=local + sharded,
        optimizer=0 if offload else 12 * shard,
        trace=job.cast_trace,
        extra=(bucket + gathered + fetched, *(bucket + gathered,) * 3),
        other=bucket + gathered + fetched,
        held=sharded + (local if job.has_earlier_gradients else 0),
        kept=0.0 if job.has_earlier_gradients or not local else local / (c * s.trained),
        outside_trace=(
            always + kept_whole + local + min(bucket, c * s.trained),
            always + (0 if offload else 4 * shard),
        ),
        # A path or hub id is sharded while it is loaded (transformers reads DeepSpeed's stage); the
        # built-in model is not.
        start=c * s.parameters if job.config.model == "tiny" else 0,
    )


def zero1_traffic(job: Job, syncs: Syncs) -> int:
    """All-reduces gradients once, in the compute dtype (`use_multi_rank_bucket_allreduce`; the
    paper's reduce-scatter would be half of it), and gathers the new weights."""
    return job.sent((2 + 1) * job.compute * job.shapes.trained)


def zero2_traffic(job: Job, syncs: Syncs) -> int:
    """As ZeRO-1, with an all-reduce per exchange."""
    exchanges = job.steps if syncs.grad_sync == EVERY else 1
    return job.sent((2 * exchanges + 1) * job.compute * job.shapes.trained)


def zero3_traffic(job: Job, syncs: Syncs) -> int:
    """Gathers weights in each forward and, except those it kept, in each backward; reduces and
    scatters gradients; gathers the small tensors after the step. Kept once per window, all are
    gathered there only."""
    s, exchanges = job.shapes, job.steps if syncs.grad_sync == EVERY else 1
    if syncs.weight_sync == ONCE:
        return job.sent(job.compute * (s.parameters + exchanges * s.trained))
    whole = s.parameters - s.persistent
    gathered = job.steps * (2 * whole - min(whole, job.sizes.live))
    return job.sent(job.compute * (gathered + exchanges * s.trained + s.persistent))


def _adds_to_float32(job: Job) -> bool:
    return job.precision == "bf16" and job.accumulated == 4


def _gradient_shard(job: Job) -> int:
    """Bytes of one process's shard of the gradient."""
    return (4 if _adds_to_float32(job) else job.compute) * job.shard(job.shapes.trained)


def _bucket(job: Job) -> int:
    return job.compute * job.sizes.reduce_bucket
