"""Describe a launch: mode, engine, nodes and precision, refused if the combination cannot run.

Standard library only; knows the options, not the files made of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from accum_trainer.errors import ConfigError
from accum_trainer.launch.slurm import Slurm

MODES = ("single-gpu", "multi-gpu", "parallel-independent")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class LaunchSpec:
    """A launch, as the user describes it.

    Args:
        mode: `single-gpu`, `multi-gpu` or `parallel-independent`.
        engine: `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`; `ddp` of one process is `single`,
            which may be written too.
        nodes, gpus_per_node: machines, and processes on each (one per GPU).
        precision: `no`, `bf16` or `fp16`.
        cpu: processes on the CPU instead of on GPUs.
        cpu_offload: keep ZeRO's optimizer state, or FSDP2's shards, in host memory.
        micro_batch_size, gradient_accumulation_steps: B and K for DeepSpeed's file; None for
            "auto".
        train: options of `train` for the command and the batch script, as typed.
        vary: with parallel-independent, options that differ between the runs, instead of their
            shares of the data.
        slurm: also write a batch script.

    Raises:
        ConfigError: the combination cannot run, or would not have the effect it names.
    """

    mode: str
    engine: str = "ddp"
    nodes: int = 1
    gpus_per_node: int = 1
    precision: str = "no"
    cpu: bool = False
    cpu_offload: bool = False
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    train: tuple[str, ...] = ()
    vary: str | None = None
    slurm: Slurm | None = None

    def __post_init__(self) -> None:
        if self.engine == "single":
            if self.mode == "multi-gpu":
                raise ConfigError(
                    "engine=single is one process, and multi-gpu has several; use ddp, or the mode "
                    "single-gpu"
                )
            object.__setattr__(self, "engine", "ddp")
        _check_processes(self)
        _check_engine(self)
        _check_precision(self)

    @property
    def num_processes(self) -> int:
        """Processes that share the gradient: one in each of the parallel-independent runs."""
        return 1 if self.mode == "parallel-independent" else self.nodes * self.gpus_per_node

    @property
    def zero_stage(self) -> int | None:
        return int(self.engine.removeprefix("zero")) if self.engine.startswith("zero") else None


def _check_processes(spec: LaunchSpec) -> None:
    if spec.mode == "single-gpu" and (spec.nodes, spec.gpus_per_node) != (1, 1):
        raise ConfigError(
            f"single-gpu is one process, but nodes={spec.nodes} and "
            f"gpus_per_node={spec.gpus_per_node}; use multi-gpu"
        )
    if spec.mode == "multi-gpu" and spec.num_processes == 1:
        raise ConfigError(
            "multi-gpu with nodes=1 and gpus_per_node=1 is one process; use single-gpu, or raise "
            "one of them"
        )
    if spec.mode == "parallel-independent" and spec.nodes > 1:
        raise ConfigError(
            f"parallel-independent starts runs on one machine, but nodes={spec.nodes}; with slurm "
            "an array of jobs spreads them over the cluster: leave nodes out and give the number "
            "of runs as gpus_per_node"
        )


def _check_engine(spec: LaunchSpec) -> None:
    if spec.mode == "parallel-independent" and spec.engine != "ddp":
        raise ConfigError(
            f"engine={spec.engine} shards over processes, and each of the parallel-independent "
            "runs is one process; leave engine out"
        )
    if (
        spec.mode == "single-gpu"
        and spec.engine != "ddp"
        and not (spec.zero_stage and spec.cpu_offload)
    ):
        other = ", or give cpu_offload, which helps on one GPU too" if spec.zero_stage else ""
        raise ConfigError(
            f"engine={spec.engine} shards over processes, and single-gpu has one; leave engine "
            f"out{other}"
        )
    if spec.cpu_offload and not spec.zero_stage and spec.engine != "fsdp2":
        raise ConfigError(
            f"cpu_offload keeps sharded state in host memory, but engine={spec.engine} shards "
            "none; give engine zero1 to zero3, or fsdp2"
        )
    if spec.cpu_offload and spec.cpu:
        raise ConfigError(
            "cpu_offload moves state from a GPU to the host, and with cpu it is there already; "
            "leave one out"
        )


def _check_precision(spec: LaunchSpec) -> None:
    if spec.precision == "fp16" and spec.cpu:
        raise ConfigError("precision=fp16 needs a GPU; on the CPU use bf16 or no")
    if spec.precision == "fp16" and spec.engine == "fsdp2":
        raise ConfigError(
            "precision=fp16 needs a loss scaler, and there is none for FSDP2 here; use bf16, or "
            "engine zero2"
        )


def combinations(vary: str) -> list[list[str]]:
    """The settings of each run of `vary`: `lr=1e-4,3e-4; seed=0,1` gives [["lr=1e-4", "seed=0"],
    ["lr=1e-4", "seed=1"], ...].

    Raises:
        ConfigError: not `option=value,value`, or an option twice.
    """
    runs: list[list[str]] = [[]]
    seen = set()
    for term in vary.split(";"):
        key, equals, values = (text.strip() for text in term.partition("="))
        key = key.replace("-", "_")
        choices = [value.strip() for value in values.split(",")]
        if not equals or not key or not all(choices):
            raise ConfigError(
                f"vary={vary}: {term.strip()!r} is not option=value,value; such as lr=1e-4,3e-4"
            )
        if key in seen:
            raise ConfigError(f"vary={vary} names {key} twice; write all its values in one list")
        seen.add(key)
        runs = [[*run, f"{key}={value}"] for run in runs for value in choices]
    return runs
