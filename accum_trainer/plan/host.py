"""Host memory of one machine that runs all processes: while the model is read, beside training, and
while a checkpoint is written.

`train/model.py` (load_same) decides who reads the model, `engine/own_parts.py` what a checkpoint
copies.
Measured by `benchmarks/loading.py` and `benchmarks/saving.py`. Not counted: Python and its
libraries, files that the system keeps in memory while there is room (the tokenised rows), and the
end of a run, which gathers the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from accum_trainer.plan.fsdp import group_size
from accum_trainer.plan.job import Job

# AdamW's two moments and the weight, in float32.
_SAVED = 12


@dataclass(frozen=True)
class HostNeed:
    """Bytes of host memory.

    Attributes:
        reading: while the model is read, until it is on the GPUs.
        beside: through the whole training: what is offloaded, as far as it is known (the block
            inputs of a model that cannot be traced are not).
        writing: a checkpoint's copy of the trained state, beside training until it is on disk.
    """

    reading: int
    beside: int
    writing: int

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.reading, self.beside + self.writing)


def host_need(job: Job, engine: str) -> HostNeed:
    """What `engine` needs under this job."""
    processes, trained = job.plan.world_size, job.shapes.trained
    beside = 0
    if job.config.cpu_offload and engine.startswith("zero"):
        # Master copy, gradient and AdamW's moments, in float32. Beside them stage 3 has the reduced
        # gradient (grad_partitions_flat_buffer), and stages 1 and 2 gather that of several
        # micro-batches in the compute dtype (accumulated_grads_in_cpu).
        beside = 16 * trained
        if engine == "zero3":
            beside += (job.accumulated if job.compute == 2 else 4) * trained
        elif job.has_earlier_gradients:
            beside += job.compute * trained
    elif job.config.cpu_offload and engine == "fsdp2":
        copies = processes // group_size(job)
        beside = copies * (4 * job.shapes.parameters + (4 + 8) * trained)  # gradient, moments
    whole = engine in ("single", "ddp")
    trace = job.autocast_trace if whole else job.cast_trace
    beside += 0 if trace is None else processes * trace.offloaded
    return HostNeed(_reading(job, engine), beside, _SAVED * trained)


def _reading(job: Job, engine: str) -> int:
    """One process reads for FSDP2; under ZeRO-3 each holds a tensor at a time, if the model comes
    from a path or the hub; else each reads the whole model."""
    processes = job.plan.world_size
    if engine == "fsdp2":
        return job.float32_weights
    if engine == "zero3" and job.config.model != "tiny":
        return processes * 4 * job.shapes.widest
    return processes * job.float32_weights
