"""Independent runs side by side: N complete trainings on one machine, one process and one device
each.

    runs/<name>/
      independent.json   the runs and their settings
      part-0/, part-1/   a run directory each
      logs/              output of each run, and the configuration of its last start
      summary.json       how they ended; loss.png, all their curves

No gradient is exchanged. Each run trains either on its own share of the samples (`--shard i/N`, so
that every sample is trained exactly once) or on all of them with its own settings (`--vary`). A run
that crashes is restarted from its checkpoint; the others continue. `independent_plan` decides which
runs there are, `independent_run` is one of them; this module gives them devices until all have
ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accum_trainer.config import ENVIRONMENT_PREFIX, OTHER_ENVIRONMENT
from accum_trainer.launch.folders import make_folder, remove_folders
from accum_trainer.launch.signals import (
    POLL_INTERVAL_SEC,
    RESEND_AFTER_SEC,
    STOPPED_AND_SAVED,
    collect_stop_signals,
)
from accum_trainer.runs.independent_files import INDEPENDENT, SUMMARY
from accum_trainer.runs.independent_run import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    IndependentRun,
)
from accum_trainer.runs.merge_inputs import best_run
from accum_trainer.train import run_folder as files
from accum_trainer.train.loss_picture import draw_loss
from accum_trainer.train.records import read_records


class IndependentRunner:
    """Runs trainings on devices, one process each, until all have ended.

    Args:
        runs: the runs.
        devices: one run at a time on each; if there are more runs than devices, some wait.
        on_gpu: a device is a GPU number; else a slot on the CPU with its share of the cores.
        folder: the folder of all runs.
        max_restarts: how often one run may be restarted after a crash.
    """

    def __init__(
        self,
        runs: list[IndependentRun],
        devices: list[str],
        on_gpu: bool,
        folder: Path,
        max_restarts: int,
    ) -> None:
        self.runs, self.folder = runs, folder
        self._devices, self._on_gpu, self._max_restarts = devices, on_gpu, max_restarts
        self._free = list(devices)

    def run(self, show: Callable[[], None]) -> int:
        """Run all to their ends, calling `show` several times a second; returns the exit status.

        0 if all are done, 75 if some were stopped and saved, 128 + N if signal N stopped all before
        they could save, 2 if all had wrong input, 1 if one failed.
        """
        made = make_folder(self.folder / files.LOGS)
        self._begin()
        with collect_stop_signals() as signals:
            asked = 0.0
            try:
                while self._step(bool(signals)):
                    show()
                    time.sleep(POLL_INTERVAL_SEC)
                    if signals and time.monotonic() - asked > RESEND_AFTER_SEC:
                        asked = time.monotonic()
                        self._send(signal.SIGTERM)
            finally:
                self._send(signal.SIGKILL)
        show()
        if all(run.status == 2 and not run.folder.exists() for run in self.runs):
            self._remove_files(made)
            return 2
        self._write_summary()
        states = {run.state for run in self.runs}
        if FAILED in states:
            return 1
        if states == {DONE}:
            return 0
        # Not by statuses: a process that has saved may be killed by a signal that was sent again.
        is_saved = any(run.result() is not None for run in self.runs)
        return STOPPED_AND_SAVED if is_saved or not signals else 128 + signals[0]

    @property
    def is_sweep(self) -> bool:
        """Whether the runs differ in options, not in their shares of the samples."""
        return any(set(run.settings) - {"shard"} for run in self.runs)

    def best(self) -> str:
        """The best run as text; see `best_run`."""
        return best_run(self.folder, self._listed())

    def _listed(self) -> list[dict[str, Any]]:
        return [{"name": run.name, "settings": run.settings} for run in self.runs]

    def _begin(self) -> None:
        files.write_json(self.folder / INDEPENDENT, {"runs": self._listed()})
        for run in self.runs:
            if run.is_done() and not run.is_extended():
                run.state = DONE

    def _step(self, stopped: bool) -> bool:
        """Look after every run once; False if none is running and none may start."""
        for run in self.runs:
            if run.state == RUNNING and run.has_exited():
                self._after_exit(run, stopped)
            if run.state == WAITING and not stopped and self._free:
                device = self._free.pop(0)
                run.start(device, self._environment(device))
        if stopped:
            for run in self.runs:
                run.state = STOPPED if run.state == WAITING else run.state
        return any(run.state in (WAITING, RUNNING) for run in self.runs)

    def _after_exit(self, run: IndependentRun, stopped: bool) -> None:
        """Set the state of a run whose process has ended, or restart it."""
        assert run.device is not None
        if run.status in (0, STOPPED_AND_SAVED) or stopped:
            run.state = DONE if run.is_done() else STOPPED
        elif run.status == 2 or run.restarts >= self._max_restarts:
            run.state, run.reason = FAILED, run.failure()
        else:
            run.restarts += 1
            run.start(run.device, self._environment(run.device))
            return
        self._free.append(run.device)

    def _environment(self, device: str) -> dict[str, str]:
        # The run's file holds the composed configuration; options in the environment would
        # override it.
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_ENVIRONMENT
        }
        if self._on_gpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            gpu = visible.split(",")[int(device)] if visible else device
            return kept | {"CUDA_VISIBLE_DEVICES": gpu}
        threads = max(1, (os.cpu_count() or 1) // len(self._devices))
        return {"OMP_NUM_THREADS": str(threads)} | kept

    def _send(self, number: int) -> None:
        for run in self.runs:
            run.send(number)

    def _write_summary(self) -> None:
        entries = []
        for run in self.runs:
            result = run.result() or {}
            entries.append(
                {
                    "name": run.name,
                    "settings": run.settings,
                    "state": run.state,
                    "restarts": run.restarts,
                    **{k: result.get(k) for k in ("updates", "num_samples", "loss", "eval_loss")},
                    "reason": run.reason,
                }
            )
        files.write_json(self.folder / SUMMARY, {"runs": entries})
        records = {
            f"{run.name} {run.label}": read_records(run.folder / files.METRICS) for run in self.runs
        }
        curves = {name: made for name, made in records.items() if made}
        if curves:
            title = f"{self.folder.name}: {len(curves)} independent runs"
            draw_loss(curves, self.folder / files.PICTURE, title)

    def _remove_files(self, made: list[Path]) -> None:
        """Leave nothing behind after every run was refused before it began."""
        for run in self.runs:
            for file in (run.log, run.log.with_suffix(".yaml")):
                file.unlink(missing_ok=True)
        (self.folder / INDEPENDENT).unlink()
        remove_folders(made)
