"""Launch files: an accelerate configuration, a DeepSpeed configuration where ZeRO needs one, a
SLURM batch script.

`launch_files(spec, path)` is text in, text out; nothing is written here. Every line that someone
may want to change carries a comment (JSON has none: the accelerate file beside it explains).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.errors import ConfigError
from accum_trainer.launch.slurm import Slurm, array_script, batch_script

MODES = ("single-gpu", "multi-gpu", "parallel-independent")
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = ("no", "bf16", "fp16")
# Elements reduced at once; DeepSpeed's default of 5e8 takes 2 GB.
_BUCKET = 50_000_000


@dataclass(frozen=True)
class LaunchSpec:
    """What to launch.

    Args:
        mode: `single-gpu`, `multi-gpu` or `parallel-independent`.
        engine: `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`; with one process `ddp` is plain
            training.
        nodes, gpus_per_node: machines, and processes on each (one per GPU).
        precision: `no`, `bf16` or `fp16`.
        cpu: processes on the CPU instead of on GPUs.
        cpu_offload: keep ZeRO's optimizer state in host memory.
        micro_batch_size, gradient_accumulation_steps: B and K, where DeepSpeed's file shall state
            them; else it says "auto".
        train: options of `train` that go into the command and the batch script, as typed.
        vary: with parallel-independent, what differs between the runs instead of their share of the
            data.
        slurm: also write a batch script.

    Raises:
        ConfigError: a combination that cannot run, or that would not do what it says.
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
        for check in (_check_places, _check_engine, _check_precision):
            check(self)

    @property
    def num_processes(self) -> int:
        """Processes that share the gradient: one in each of the parallel-independent runs."""
        return 1 if self.mode == "parallel-independent" else self.nodes * self.gpus_per_node

    @property
    def zero_stage(self) -> int | None:
        return int(self.engine.removeprefix("zero")) if self.engine.startswith("zero") else None


def _check_places(spec: LaunchSpec) -> None:
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
            "an array of jobs "
            "spreads them over the cluster: leave nodes out and give the number of runs as "
            "gpus_per_node"
        )


def _check_engine(spec: LaunchSpec) -> None:
    if spec.mode == "parallel-independent" and spec.engine != "ddp":
        raise ConfigError(
            f"engine={spec.engine} shards over processes, and each of the parallel-independent "
            "runs is one process; "
            "leave engine out"
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
    if spec.cpu_offload and not spec.zero_stage:
        raise ConfigError(
            f"cpu_offload keeps ZeRO's optimizer state in host memory, but engine={spec.engine}; "
            "give engine zero1 to zero3"
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
            "precision=fp16 needs a loss scaler, which FSDP2 has none of here; use bf16, or engine "
            "zero2"
        )


def launch_files(spec: LaunchSpec, path: Path) -> dict[Path, str]:
    """The files of `spec`: the configuration at `path`, and beside it .json and .sbatch as needed.
    Path to text."""
    if spec.mode == "parallel-independent":
        files = {path: _independent_yaml(spec, path)}
        if spec.slurm is not None:
            overrides = [
                ["--shard", f"{i}/{spec.gpus_per_node}"] for i in range(spec.gpus_per_node)
            ]
            if spec.vary is not None:
                overrides = [
                    [f"--set={setting}" for setting in settings]
                    for settings in combinations(spec.vary)
                ]
            train = [*_precision_arguments(spec), *spec.train]
            script = array_script(spec.slurm, path, overrides, train, spec.cpu)
            files[path.with_suffix(".sbatch")] = script
        return files
    files = {path: _accelerate_yaml(spec, path)}
    if spec.zero_stage is not None:
        files[path.with_suffix(".json")] = json.dumps(_deepspeed(spec), indent=1) + "\n"
    if spec.slurm is not None:
        files[path.with_suffix(".sbatch")] = batch_script(
            spec.slurm, path, spec.nodes, spec.gpus_per_node, list(spec.train), spec.cpu
        )
    return files


def run_command(spec: LaunchSpec, path: Path) -> str:
    """The command that starts the training locally (on each node, where there are several)."""
    nodes = ""
    if spec.nodes > 1:
        nodes = " --machine-rank N --main-process-ip NODE-0 --main-process-port 29500"
    arguments = [*(["--cpu"] if spec.cpu else []), *spec.train]
    return f"accum-trainer launch {path}{nodes}" + (
        f" -- {shlex.join(arguments)}" if arguments else ""
    )


def combinations(vary: str) -> list[list[str]]:
    """`lr=1e-4,3e-4; seed=0,1` as the settings of each run: [["lr=1e-4", "seed=0"], ["lr=1e-4",
    "seed=1"], ...].

    Raises:
        ConfigError: not `option=value,value`, or an option twice.
    """
    runs: list[list[str]] = [[]]
    seen = set()
    for term in vary.split(";"):
        key, equals, values = (part.strip() for part in term.partition("="))
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


def _head(spec: LaunchSpec, path: Path, what: str) -> list[str]:
    return [
        f"# {what}. Written by `accum-trainer config create`.",
        f"# Start: {run_command(spec, path)}",
    ]


def _lines(entries: list[tuple[str, Any, str]]) -> list[str]:
    """`key: value` lines with their comments in one column."""
    texts = [f"{key}: {_scalar(value)}" for key, value, _ in entries]
    width = (
        max(len(text) for text, (_, _, comment) in zip(texts, entries, strict=True) if comment) + 2
    )
    return [
        f"{text:<{width}}# {comment}" if comment else text
        for text, (_, _, comment) in zip(texts, entries, strict=True)
    ]


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # YAML would read these words as booleans.
    return f"'{value}'" if value in ("no", "NO", "yes") else str(value)


def _accelerate_yaml(spec: LaunchSpec, path: Path) -> str:
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    kind = kinds.get(spec.engine, "DEEPSPEED")
    if spec.num_processes == 1 and kind == "MULTI_GPU":
        kind = "'NO'"
    places = (
        f"{spec.nodes} node{'s' if spec.nodes > 1 else ''} x {spec.gpus_per_node} "
        f"{'CPU process' if spec.cpu else 'GPU'}"
    )
    if spec.gpus_per_node > 1:
        places += "es" if spec.cpu else "s"
    engine = "" if kind == "'NO'" else f", {spec.engine}"
    processes = "in all, over all nodes" + ("" if spec.cpu else ": one per GPU")
    entries: list[tuple[str, Any, str]] = [
        ("compute_environment", "LOCAL_MACHINE", ""),
        ("distributed_type", kind, _KIND_COMMENT[kind]),
        ("num_processes", spec.num_processes, processes),
        ("num_machines", spec.nodes, "nodes"),
        ("machine_rank", 0, "this node's number; `--machine-rank` on the command line sets it"),
    ]
    if (
        spec.zero_stage is None
    ):  # beside a DeepSpeed file accelerate reads the precision from that file only
        entries.append(("mixed_precision", spec.precision, "no, bf16 or fp16"))
    entries.append(("use_cpu", False, "true would start one process only" if spec.cpu else ""))
    if spec.nodes > 1:
        entries += [
            ("main_process_ip", "127.0.0.1", "the first node; `--main-process-ip` sets it"),
            ("main_process_port", 29500, "a free port there; `--main-process-port` sets it"),
            (
                "rdzv_backend",
                "static",
                "ranks in the order of the nodes, so that a run can be repeated to the bit",
            ),
            ("same_network", True, ""),
        ]
    lines = [*_head(spec, path, f"{spec.mode}: {places}{engine}"), *_lines(entries)]
    if spec.zero_stage is not None:
        nested: list[tuple[str, Any, str]] = [
            (
                "  deepspeed_config_file",
                path.with_suffix(".json"),
                "from the folder that you start from",
            ),
            (
                "  deepspeed_multinode_launcher",
                "standard",
                "torch's rendezvous on each node; no ssh",
            ),
            ("  zero3_init_flag", False, "the model is loaded whole, then sharded"),
        ]
        lines += [*_JSON_COMMENT, "deepspeed_config:", *_lines(nested)]
    if spec.engine == "fsdp2":
        lines += ["fsdp_config:", "  fsdp_version: 2"]
    return "\n".join(lines) + "\n"


_KIND_COMMENT = {
    "'NO'": "one process",
    "MULTI_GPU": "DDP; without GPUs its processes meet over gloo",
    "FSDP": "weights, gradients and optimizer state sharded by torch",
    "DEEPSPEED": "ZeRO; without GPUs its processes meet over gloo",
}
_JSON_COMMENT = (
    "# In the JSON: `stage`; `reduce_bucket_size`, elements reduced at once (less memory, more "
    "messages);",
    "# `overlap_comm`, reduce while the backward goes on; `bf16` or `fp16`: the precision. What "
    "says auto is filled in",
    "# from the options of `train`; a number there must agree with them.",
)


def _deepspeed(spec: LaunchSpec) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": _BUCKET,
        "overlap_comm": not spec.cpu,
        "contiguous_gradients": True,
    }
    if spec.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 100_000,
        }
    elif spec.zero_stage is not None:
        zero["allgather_bucket_size"] = _BUCKET
    if spec.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": spec.micro_batch_size or "auto",
        # Left out it would be 1, and beat every other source of K.
        "gradient_accumulation_steps": spec.gradient_accumulation_steps or "auto",
        "gradient_clipping": "auto",
    }
    if spec.precision != "no":
        config[spec.precision] = {"enabled": True}
    return config


def _precision_arguments(spec: LaunchSpec) -> list[str]:
    return ["--mixed-precision", spec.precision] if spec.precision != "no" else []


def _independent_yaml(spec: LaunchSpec, path: Path) -> str:
    runs = spec.gpus_per_node
    devices = ",".join(str(device) for device in range(runs))
    what = (
        f"with its own {spec.vary}" if spec.vary else f"on its own share (1/{runs}) of the samples"
    )
    entries: list[tuple[str, Any, str]] = [
        ("parallel_independent", True, "complete trainings side by side; no gradient is exchanged"),
        (
            "cuda_ids",
            f'"{devices}"',
            "names of slots on the CPU" if spec.cpu else "the GPUs: one run on each",
        ),
    ]
    if spec.vary:
        entries.append(
            ("vary", f'"{spec.vary}"', "each run sees all samples, with its own of these")
        )
    entries += [
        ("max_restarts", 3, "a run that crashed goes on from its checkpoint, at most so often"),
        ("mixed_precision", spec.precision, "no, bf16 or fp16"),
    ]
    if spec.cpu:
        entries.append(("cpu", True, ""))
    if spec.micro_batch_size is not None:
        entries.append(("batch_size", spec.micro_batch_size, "B, of each run"))
    if spec.gradient_accumulation_steps is not None:
        entries.append(
            ("gradient_accumulation_steps", spec.gradient_accumulation_steps, "K, of each run")
        )
    lines = [
        *_head(spec, path, f"parallel-independent: {runs} runs, each {what}"),
        *_lines(entries),
    ]
    return (
        "\n".join([*lines, "# Any other option of `train` may stand here, underscores for dashes."])
        + "\n"
    )


def write_files(files: dict[Path, str], force: bool) -> None:
    """Write all of `files` (path to text), or none.

    Raises:
        ConfigError: one exists and `force` is not given; a folder cannot be written.
    """
    existing = [str(path) for path in files if path.exists()]
    if existing and not force:
        raise ConfigError(
            f"{' and '.join(existing)} exist{'s' * (len(existing) == 1)} already; name another "
            "file, or give --force"
        )
    written: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            written.append(partial)
            partial.write_text(text, encoding="utf-8")
        for path in files:
            path.with_name(f".{path.name}.partial").replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        for partial in written:
            partial.unlink(missing_ok=True)
