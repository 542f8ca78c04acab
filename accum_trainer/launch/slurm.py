"""SLURM batch scripts that requeue and resume: a training over nodes, or an array of independent
ones.

At its end a script asks `accum-trainer requeue`, which looks into the run directory: the status of
srun may be that of any node, or one that the scheduler made up. Status 75 means that the job goes
back into the queue. Its next start finds the run directory, which is named after the job (a
requeued job keeps its number), and continues. Text only: knows the commands, not what they run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import ConfigError
from accum_trainer.launch.quoting import word, words

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

    @property
    def notice(self) -> str:
        """The line that tells the run how long it has from the signal to the end."""
        seconds = int(self.signal.rpartition("@")[2])
        return (
            "# The seconds of --signal: a run whose save takes longer says so.\n"
            f"export ACCUM_TRAINER_NOTICE_SECONDS={max(1, seconds)}\n"
        )


def batch_script(
    slurm: Slurm, config: Path, nodes: int, gpus_per_node: int, train: Sequence[str], cpu: bool
) -> str:
    """The script of one training: a launcher per node starts that node's processes."""
    rendezvous = _RENDEZVOUS if nodes > 1 else ""
    batch_start = '"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'
    return "\n".join(
        [
            *_head(slurm, config, "arguments go to `accum-trainer train`"),
            _directive(f"--nodes={nodes}"),
            _directive(
                "--ntasks-per-node=1", "one launcher per node; it starts the node's processes"
            ),
            *_devices(gpus_per_node, cpu),
            *_OF_THE_CLUSTER,
            "# The job's number is kept when it is requeued, and with it the run.",
            'run="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"',
            f"config={word(config)}",
            f'train=(--output-dir "$run"{_quoted(train, cpu)} "$@")',
            f"{rendezvous}{_caches(on_each_node=nodes > 1)}",
            slurm.notice,
            "status=0",
            "# A node that fails ends the others. One that is stopped must not: it ends with 0.",
            f"srun {_TASK_CPUS} --kill-on-bad-exit=1 \\",
            f"    accum-trainer launch --batch-start {batch_start} \\",
            '    "$config" -- "${train[@]}" || status=$?',
            *_ending(
                f'accum-trainer requeue --batch-start {batch_start} \\\n    "$status"',
                "$SLURM_JOB_ID",
                slurm.requeue,
            ),
        ]
    )


def array_script(
    slurm: Slurm, config: Path, overrides: Sequence[Sequence[str]], train: Sequence[str], cpu: bool
) -> str:
    """The script of an array of jobs, one independent training each. `overrides` has the arguments
    that differ, per job."""
    runs = [f"    {i}) mine=({words(arguments)}) ;;" for i, arguments in enumerate(overrides)]
    return "\n".join(
        [
            *_head(slurm, config, "arguments go to each `accum-trainer train`"),
            _directive(f"--array=0-{len(overrides) - 1}", "one job per run"),
            _directive("--ntasks=1"),
            *_devices(1, cpu),
            *_OF_THE_CLUSTER,
            "# The options that differ between the runs.",
            "case $SLURM_ARRAY_TASK_ID in",
            *runs,
            '    *) echo "error: there is no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
            "esac",
            '# When all are done:  accum-trainer merge "$run"/part-* -o "$run/merged"',
            'run="runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID"',
            f'train=(--output-dir "$run/part-$SLURM_ARRAY_TASK_ID"{_quoted(train, cpu)} '
            '"${mine[@]}" "$@")',
            f"{_caches(on_each_node=False)}",
            slurm.notice,
            "status=0",
            f"srun {_TASK_CPUS} \\",
            '    accum-trainer train "${train[@]}" || status=$?',
            *_ending(
                'accum-trainer requeue "$status"',
                "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
                slurm.requeue,
            ),
        ]
    )


def _head(slurm: Slurm, config: Path, arguments: str) -> list[str]:
    script = config.with_suffix(".sbatch")
    log = "%x-%A-%a.log" if "each" in arguments else "%x-%j.log"
    lines = [
        "#!/bin/bash",
        f"# Start: sbatch {word(script)} --dataset-file rows.jsonl --epochs 1      ({arguments})",
        # sbatch takes a blank for the end of an option, and `#` for a comment.
        _directive(
            f"--job-name={re.sub(r'[^A-Za-z0-9._+-]', '_', config.stem)}",
            "also names the run directory",
        ),
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
    return f" {words(arguments)}" if arguments else ""


# sbatch reads a line of two # as a comment.
_OF_THE_CLUSTER = [
    "# What some clusters ask for; remove one # to use it:",
    "##SBATCH --mem=0                       # all the memory of a node",
    "##SBATCH --qos=NAME",
    "##SBATCH --constraint=NAME",
    "",
    "set -uo pipefail",
    "",
    "# Where accum-trainer is installed, and models and data for nodes without a network:",
    "# source venv/bin/activate",
    "# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1",
    "# Paths begin at the folder that sbatch was called in, unless --chdir names another:",
    '# cd "$SLURM_SUBMIT_DIR"',
    "",
]

_RENDEZVOUS = """\
# Processes meet at the first node of the job; the launcher reads its own node's number from
# SLURM_NODEID.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# If a node has several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
"""
# Since SLURM 22.05 srun does not take this from the job by itself, and would pin each launcher and
# all its processes to one core.
_TASK_CPUS = '${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}'


def _caches(on_each_node: bool) -> str:
    return _CACHES.replace("ON_EACH_NODE ", "srun --ntasks-per-node=1 " if on_each_node else "")


_CACHES = """\
# Cache compiled kernels on each node's disk: on a shared one, nodes would wait for each other. A
# folder that another user made first could hold that user's code.
cache="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/accum_trainer-$(id -un)"
# shellcheck disable=SC2016  # the node's own bash expands it
own='mkdir -p -m 700 "$1"; [[ -d $1 && ! -L $1 && -O $1 ]] && chmod 700 "$1"'
if ! ON_EACH_NODE bash -c "$own" own "$cache"; then
    echo "error: $cache is no folder of your own; name another place for it in TMPDIR" >&2
    exit 2
fi
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TORCH_EXTENSIONS_DIR="$cache/extensions"
"""


def _ending(verdict: str, job: str, requeue: bool) -> list[str]:
    back = [
        "if ((status == 75)); then",
        f'    scontrol requeue "{job}" ||',
        '        echo "error: the job was not requeued; submit it again to continue" >&2',
        "fi",
    ]
    return [
        "# The run directory decides, not the status that srun gives; 75 means to continue.",
        f'{verdict} -- "${{train[@]}}"',
        "status=$?",
        *(back if requeue else []),
        'exit "$status"',
        "",
    ]
