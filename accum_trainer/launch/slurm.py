"""SLURM batch scripts that requeue and resume: a training over nodes, or an array of independent
ones.

Both end with status 75 if a signal stopped the training after it was saved. The script then
requeues the job. Its next start finds the run directory, which is named after the job (a requeued
job keeps its number), and continues. Text only: knows the commands, not what they run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import ConfigError

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d\d)(?::(\d\d))?")
_SIGNAL = re.compile(r"(?:SIG)?(USR1|TERM)@(\d+)")


@dataclass(frozen=True)
class Slurm:
    """Options for the batch system.

    Args:
        time: limit of one start, `HH:MM:SS` or `D-HH:MM:SS`; a requeued job gets it again.
        signal: `USR1@180`: the signal that asks for a save, and its time before the limit in
            seconds.
        requeue: requeue the job if it was stopped before the end.
        partition, account: for clusters that require them.

    Raises:
        ConfigError: a malformed time or signal, or a signal earlier than the start of the job.
    """

    time: str = "24:00:00"
    signal: str = "USR1@180"
    requeue: bool = True
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        time, signal = _TIME.fullmatch(self.time), _SIGNAL.fullmatch(self.signal)
        if time is None:
            raise ConfigError(f"time={self.time} is not a time; give HH:MM:SS or D-HH:MM:SS")
        if signal is None:
            raise ConfigError(
                f"signal={self.signal} is not USR1@SECONDS or TERM@SECONDS, the signals that save "
                "a run"
            )
        days, hours, minutes, seconds = (int(text or 0) for text in time.groups())
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if int(signal[2]) >= limit:
            raise ConfigError(
                f"signal={self.signal} would come {int(signal[2])} s before the end of "
                f"time={self.time}, which is {limit} s; give fewer seconds"
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,@+-]+", value):
                raise ConfigError(f"{name}={value!r} is not a name that SLURM takes")


def batch_script(
    slurm: Slurm, config: Path, nodes: int, gpus_per_node: int, train: Sequence[str], cpu: bool
) -> str:
    """The script of one training: a launcher per node starts that node's processes."""
    rendezvous = _RENDEZVOUS if nodes > 1 else ""
    return "\n".join(
        [
            *_head(slurm, config, "arguments go to `accum-trainer train`"),
            _directive(f"--nodes={nodes}"),
            _directive(
                "--ntasks-per-node=1", "one launcher per node; it starts the node's processes"
            ),
            *_devices(gpus_per_node, cpu),
            "",
            "set -uo pipefail",
            "",
            "# The job's number is kept when it is requeued, and with it the run.",
            'run="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"',
            f"config={shlex.quote(str(config))}",
            f"{rendezvous}{_CACHES}",
            "status=0",
            'srun --kill-on-bad-exit=1 accum-trainer launch "$config" -- \\',
            f'    --output-dir "$run"{_quoted(train, cpu)} "$@" || status=$?',
            *_ending(slurm, "$SLURM_JOB_ID"),
        ]
    )


def array_script(
    slurm: Slurm, config: Path, overrides: Sequence[Sequence[str]], train: Sequence[str], cpu: bool
) -> str:
    """The script of an array of jobs, one independent training each. `overrides` has the arguments
    that differ, per job."""
    runs = [f"    {shlex.quote(shlex.join(arguments))}" for arguments in overrides]
    return "\n".join(
        [
            *_head(slurm, config, "arguments go to each `accum-trainer train`"),
            _directive(f"--array=0-{len(overrides) - 1}", "one job per run"),
            _directive("--ntasks=1"),
            *_devices(1, cpu),
            "",
            "set -uo pipefail",
            "",
            "# The options that differ between the runs, by SLURM_ARRAY_TASK_ID.",
            "runs=(",
            *runs,
            ")",
            'read -r -a mine <<< "${runs[$SLURM_ARRAY_TASK_ID]}"',
            '# When all are done:  accum-trainer merge "$run"/part-* -o "$run/merged"',
            'run="runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID"',
            f"{_CACHES}",
            "status=0",
            "srun accum-trainer train \\",
            f'    --output-dir "$run/part-$SLURM_ARRAY_TASK_ID"{_quoted(train, cpu)} '
            f'"${{mine[@]}}" "$@" || status=$?',
            *_ending(slurm, "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"),
        ]
    )


def _head(slurm: Slurm, config: Path, arguments: str) -> list[str]:
    script = config.with_suffix(".sbatch")
    log = "%x-%A-%a.log" if "each" in arguments else "%x-%j.log"
    lines = [
        "#!/bin/bash",
        f"# Start: sbatch {script} --dataset-file rows.jsonl --epochs 1      ({arguments})",
        _directive(f"--job-name={config.stem}", "also names the run directory"),
        _directive(f"--time={slurm.time}", "of one start; a requeued job gets it again"),
        _directive(f"--signal={slurm.signal}", "save this many seconds before the limit"),
        _directive(
            "--requeue" if slurm.requeue else "--no-requeue",
            "the job may be requeued" if slurm.requeue else "",
        ),
        _directive("--open-mode=append", "after a requeue, append to the same log"),
        _directive(f"--output={log}"),
    ]
    for name in ("partition", "account"):
        if getattr(slurm, name) is not None:
            lines.append(_directive(f"--{name}={getattr(slurm, name)}"))
    return lines


def _directive(option: str, comment: str = "") -> str:
    return f"#SBATCH {option:<28} # {comment}" if comment else f"#SBATCH {option}"


def _devices(gpus: int, cpu: bool) -> list[str]:
    if cpu:
        return [_directive(f"--cpus-per-task={gpus}", "one per process")]
    return [
        _directive(f"--gpus-per-node={gpus}"),
        _directive(f"--cpus-per-task={8 * gpus}", "8 per GPU; adapt to the cluster"),
    ]


def _quoted(train: Sequence[str], cpu: bool) -> str:
    arguments = [*(["--cpu"] if cpu else []), *train]
    return f" {shlex.join(arguments)}" if arguments else ""


_RENDEZVOUS = """\
# Processes meet at the first node of the job; the launcher reads its own node's number from
# SLURM_NODEID.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# If a node has several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
"""
_CACHES = """\
# Cache compiled kernels on each node's disk: on a shared one, nodes would wait for each other.
cache="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/accum_trainer-$(id -un)"
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TORCH_EXTENSIONS_DIR="$cache/extensions"
"""


def _ending(slurm: Slurm, job: str) -> list[str]:
    if not slurm.requeue:
        return ['exit "$status"', ""]
    return [
        "case $status in",
        "    75 | 138 | 143)  # stopped by a signal, after saving or before anything was to save",
        '        echo "stopped by a signal; requeued, to continue in $run"',
        f'        scontrol requeue "{job}"',
        "        ;;",
        "esac",
        'exit "$status"',
        "",
    ]
