"""Launch files: an accelerate configuration, a DeepSpeed configuration for ZeRO, a SLURM batch
script.

`launch_files(spec, path)` returns texts; `write_files` writes all of them or none. Every line that
someone may want to change has a comment (JSON has none: the accelerate file beside it explains).
Knows what accelerate and DeepSpeed read; starts nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accum_trainer.errors import ConfigError
from accum_trainer.launch.quoting import word, words, yaml_scalar
from accum_trainer.launch.slurm import array_script, batch_script
from accum_trainer.launch.spec import LaunchSpec, combinations

# Elements reduced at once; DeepSpeed's default of 5e8 takes 2 GB.
_BUCKET = 50_000_000


def launch_files(spec: LaunchSpec, path: Path) -> dict[Path, str]:
    """Path -> text of the files of `spec`: the configuration at `path`, and beside it .json and
    .sbatch as needed."""
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
    """The command that starts the training locally; with several nodes, on each of them."""
    nodes = ""
    if spec.nodes > 1:
        nodes = " --machine-rank N --main-process-ip NODE-0 --main-process-port 29500"
    arguments = [*(["--cpu"] if spec.cpu else []), *spec.train]
    return f"accum-trainer launch {word(path)}{nodes}" + (
        f" -- {words(arguments)}" if arguments else ""
    )


def _head(spec: LaunchSpec, path: Path, title: str) -> list[str]:
    return [
        f"# {title}. Written by `accum-trainer config create`.",
        f"# Start: {run_command(spec, path)}",
    ]


def _lines(entries: list[tuple[str, Any, str]]) -> list[str]:
    """`key: value` lines with their comments in one column."""
    texts = [f"{key}: {_scalar(value)}" for key, value, _ in entries]
    commented = [t for t, (_, _, comment) in zip(texts, entries, strict=True) if comment]
    width = max(map(len, commented), default=0) + 2
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
                yaml_scalar(path.with_suffix(".json")),
                "from the folder that you start from",
            ),
            (
                "  deepspeed_multinode_launcher",
                "standard",
                "torch's rendezvous on each node; no ssh",
            ),
        ]
        if spec.zero_stage == 3:
            comment = "a model from a path or hub id is sharded while it is read"
            nested.append(("  zero3_init_flag", True, comment))
        lines += [*_JSON_COMMENT, "deepspeed_config:", *_lines(nested)]
    if spec.engine == "fsdp2":
        fsdp: list[tuple[str, Any, str]] = [("  fsdp_version", 2, "")]
        if spec.cpu_offload:
            comment = "weights, gradients and optimizer state lie in host memory"
            fsdp.append(("  fsdp_offload_params", True, comment))
        lines += ["fsdp_config:", *_lines(fsdp)]
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
            (
                "vary",
                yaml_scalar(spec.vary),
                "each run sees all samples, with its own of these",
            )
        )
    entries += [
        ("max_restarts", 3, "how often a run that crashed is continued from its checkpoint"),
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
        *_head(spec, path, f"parallel-independent: {runs} runs, each {' '.join(what.split())}"),
        *_lines(entries),
    ]
    return (
        "\n".join([*lines, "# Any other option of `train` may stand here, underscores for dashes."])
        + "\n"
    )


def write_files(files: dict[Path, str], force: bool) -> None:
    """Write all of `files` (path -> text), or none.

    Raises:
        ConfigError: one exists and `force` is not given, or a folder cannot be written.
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
