"""Run `train` under a launch configuration, through `accelerate launch`, until it ends.

Each process writes its own log; rank 0's log is shown as it grows. A failure is reported with the
message of the process that failed first, and may be followed by another start. Signals are passed
on to the processes, which save and stop. Knows processes and logs; nothing of training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.folders import make_folder, private, remove_folders
from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.rank import follow_parent, make_statuses
from accum_trainer.launch.signals import (
    POLL_INTERVAL_SEC,
    RESEND_AFTER_SEC,
    collect_stop_signals,
)
from accum_trainer.launch.watch import LAUNCHER_LOG, RankWatch

# After a failure: the arguments of `train` for another start or None, and a line for the user.
AfterFailure = Callable[[], tuple[Sequence[str] | None, str]]


def launch(
    config: Path,
    place: NodePlacement,
    train: Sequence[str],
    logs: Path,
    deepspeed_file: Path | None = None,
    after_failure: AfterFailure = lambda: (None, ""),
) -> int:
    """Run `train` with the arguments `train` under the accelerate configuration `config`.

    Args:
        config: the accelerate configuration.
        place: this node among the nodes.
        train: arguments of `train`; must name the run directory.
        logs: folder for the logs; made if missing.
        deepspeed_file: the DeepSpeed configuration that `config` names, as a path that exists.
        after_failure: asked after an exit status of 1, unless a signal asked for a stop.

    Returns:
        The exit status: 0 done, 75 stopped by a signal after saving, 128 + N stopped by signal N
        with nothing saved, 2 wrong input, 1 anything else.
    """
    made = make_folder(logs)
    try:
        with collect_stop_signals() as signals:
            while True:
                failure = None
                try:
                    status = _start(
                        config, place, train, logs, deepspeed_file, logs in made, signals
                    )
                except AccumTrainerError as error:
                    failure, status = error, error.exit_status
                again, line = after_failure() if status == 1 and not signals else (None, "")
                if again is not None and failure is not None:
                    print(f"failed: {failure}", file=sys.stderr)
                if line:
                    print(line, file=sys.stderr, flush=True)
                if again is None:
                    if failure is not None:
                        raise failure
                    return status
                train = again
    finally:
        remove_folders(made)


def _start(
    config: Path,
    place: NodePlacement,
    train: Sequence[str],
    logs: Path,
    deepspeed_file: Path | None,
    made_logs: bool,
    signals: list[int],
) -> int:
    """Start the processes once and wait for their end; see `launch`."""
    try:
        statuses = make_statuses(logs)
    except OSError as error:
        raise ConfigError(
            f"no file can be made in {logs}: {error.strerror}; name another output_dir"
        ) from None
    try:
        watch = RankWatch(logs, place, statuses)
        command = _command(config, place, train, logs, statuses, deepspeed_file)
        status = _run(command, watch, logs, signals)
        if status == 2 and made_logs:  # refused: leave nothing behind
            watch.remove_logs()
        return status
    finally:
        shutil.rmtree(statuses, ignore_errors=True)


def _run(command: list[str], watch: RankWatch, logs: Path, signals: list[int]) -> int:
    with open(logs / LAUNCHER_LOG, "a", opener=private) as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _terminal(),
            start_new_session=True,  # Ctrl-C reaches only us; we pass it on
            preexec_fn=follow_parent,
        )
        try:
            _wait(process, watch, signals)
            watch.stop_orphans()
        finally:
            watch.send(signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            watch.show()
        return watch.exit_status(process.returncode, signals[0] if signals else None)


def _command(
    config: Path,
    place: NodePlacement,
    train: Sequence[str],
    logs: Path,
    statuses: Path,
    deepspeed_file: Path | None,
) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += place.arguments()
    if deepspeed_file is not None:
        command += ["--deepspeed_config_file", str(deepspeed_file)]
    rank = ["-m", "accum_trainer.launch.rank", str(logs), str(statuses)]
    return [*command, *rank, "--", *train]


def _terminal() -> dict[str, str]:
    """Environment with which rank 0, which writes to a file, draws for the terminal it is shown
    on."""
    if not sys.stderr.isatty():
        return {}
    return {"FORCE_COLOR": "1", "COLUMNS": str(os.get_terminal_size(sys.stderr.fileno()).columns)}


def _wait(process: subprocess.Popen[bytes], watch: RankWatch, signals: list[int]) -> None:
    """Wait for accelerate's launcher, showing rank 0 and passing on a stop."""
    asked = 0.0
    while process.poll() is None:
        time.sleep(POLL_INTERVAL_SEC)
        watch.show()
        if signals and time.monotonic() - asked > RESEND_AFTER_SEC:
            asked = time.monotonic()
            if not watch.send(signal.SIGTERM):
                process.terminate()  # no process runs yet, so there is nothing to save
