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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.folders import make_folder, private, remove_folders
from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.rank import follow_parent, make_statuses
from accum_trainer.launch.restarting import Restarting
from accum_trainer.launch.signals import (
    POLL_INTERVAL_SEC,
    RESEND_AFTER_SEC,
    collect_stop_signals,
)
from accum_trainer.launch.watch import NodesNotMet, RankWatch, launcher_log_of

_LOOK_AFTER_SEC = 2.0  # for what other nodes have noted, on a file system that all share


def launch(
    config: Path,
    place: NodePlacement,
    train: Sequence[str],
    logs: Path,
    deepspeed_file: Path | None = None,
    restarting: Restarting | None = None,
    meeting_sec: float = 600.0,
) -> int:
    """Run `train` with the arguments `train` under the accelerate configuration `config`.

    Args:
        config: the accelerate configuration.
        place: this node among the nodes.
        train: arguments of `train`; must name the run directory.
        logs: folder for the logs; made if missing.
        deepspeed_file: the DeepSpeed configuration that `config` names, as a path that exists.
        restarting: asked after an exit status of 1, unless a signal asked for a stop or the nodes
            did not meet; by default the first start is the only one.
        meeting_sec: how long each restart waits for the other nodes.

    Returns:
        The exit status: 0 done, 75 stopped by a signal after saving, 128 + N stopped by signal N
        with nothing saved, 2 wrong input, 1 anything else.
    """
    made = make_folder(logs)
    restarting = restarting or Restarting()
    try:
        with collect_stop_signals() as signals:
            start = _Start(config, logs, deepspeed_file, logs in made, signals, restarting)
            restarts = 0
            while True:
                failure = None
                try:
                    status = start.run(place, train)
                except AccumTrainerError as error:
                    failure, status = error, error.exit_status
                again, line = None, ""
                if isinstance(failure, NodesNotMet) and not restarting.is_over():
                    raise failure
                if status == 1 and not signals:
                    again, line = restarting.after_failure()
                if again is not None and failure is not None:
                    print(f"failed: {failure}", file=sys.stderr)
                if line:
                    print(line, file=sys.stderr, flush=True)
                if again is None:
                    if failure is not None and not isinstance(failure, NodesNotMet):
                        raise failure
                    return status
                restarts += 1
                train, place = again, place.of_restart(restarts, meeting_sec, str(logs))
    finally:
        remove_folders(made)


@dataclass(frozen=True)
class _Start:
    """One start of the processes and the wait for their end; see `launch`."""

    config: Path
    logs: Path
    deepspeed_file: Path | None
    made_logs: bool
    signals: list[int]
    restarting: Restarting

    def run(self, place: NodePlacement, train: Sequence[str]) -> int:
        """The exit status.

        Raises:
            NodesNotMet: no process ran, because another node did not come.
            AccumTrainerError: a process was killed, or the launcher failed before any process.
        """
        try:
            statuses = make_statuses(self.logs)
        except OSError as error:
            raise ConfigError(
                f"no file can be made in {self.logs}: {error.strerror}; name another output_dir"
            ) from None
        try:
            watch = RankWatch(self.logs, place, statuses)
            command = _command(self.config, place, train, self.logs, statuses, self.deepspeed_file)
            log = launcher_log_of(self.logs, place.machine_rank)
            status = self._run(command, place.environment(), log, watch)
            if status == 2 and self.made_logs:  # refused: leave nothing behind
                watch.remove_logs()
            return status
        finally:
            shutil.rmtree(statuses, ignore_errors=True)

    def _run(self, command: list[str], env: dict[str, str], log: Path, watch: RankWatch) -> int:
        with open(log, "a", opener=private) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _terminal() | env,
                start_new_session=True,  # Ctrl-C reaches only us; we pass it on
                preexec_fn=follow_parent,
            )
            try:
                lost = self._wait(process, watch)
                watch.stop_orphans()
            finally:
                watch.send(signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                watch.show()
            if lost is not None and not watch.all_ended_well():
                raise AccumTrainerError(
                    f"the processes of node {lost} have failed, and those of this node had not "
                    "noticed, so they were stopped; the same command continues from the last "
                    "checkpoint"
                )
            signals = self.signals
            return watch.exit_status(process.returncode, signals[0] if signals else None)

    def _wait(self, process: subprocess.Popen[bytes], watch: RankWatch) -> int | None:
        """Wait for accelerate's launcher, showing rank 0 and passing on a stop; at most until
        another node is lost, whose number is returned."""
        asked = looked = 0.0
        has_met = False
        while process.poll() is None:
            time.sleep(POLL_INTERVAL_SEC)
            watch.show()
            now = time.monotonic()
            if self.signals and now - asked > RESEND_AFTER_SEC:
                asked = now
                if not watch.send(signal.SIGTERM):
                    process.terminate()  # no process runs yet, so there is nothing to save
            if not has_met and watch.has_processes():
                has_met = True
                self.restarting.has_met()
            if now - looked > _LOOK_AFTER_SEC:
                looked = now
                lost = self.restarting.lost_node() if has_met else None
                if lost is not None:
                    return lost
                if not has_met and self.restarting.is_over():
                    process.kill()  # it waits in a library for nodes that will not come
        return None


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
