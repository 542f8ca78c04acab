"""Independent runs side by side: N complete trainings on one machine, one process and one device
each.

    runs/<name>/
      independent.json   the runs and what differs between them
      part-0/, part-1/   a run directory each
      logs/              what each printed, and the configuration it was started with
      summary.json       how they ended; loss.png, all their curves

No gradient is exchanged. Either each trains on its own share of the samples (`--shard i/N`, so that
every sample is trained exactly once) or each on all of them with settings of its own (`--vary`).
One that crashes is restarted from its checkpoint and leaves the others alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accum_trainer.config import ENVIRONMENT_PREFIX, OTHER_ENVIRONMENT, TrainConfig
from accum_trainer.errors import ConfigError
from accum_trainer.launch.files import combinations
from accum_trainer.launch.rank import follow_parent
from accum_trainer.launch.run import (
    ASK_AGAIN,
    LOOK_EVERY,
    STOPPED_AND_SAVED,
    make_folder,
    remove_folders,
    stopping,
)
from accum_trainer.runs.merge_inputs import INDEPENDENT, best_run
from accum_trainer.train import run_folder as files
from accum_trainer.train.loss_picture import draw_loss
from accum_trainer.train.records import Record, read_records

SUMMARY = "summary.json"
# What all runs share, or the launcher gives to each by itself.
_NOT_VARIED = {
    *("output_dir", "log_file", "resume", "dry_run", "shard", "max_restarts", "cpu"),
    *("parallel_independent", "cuda_ids", "vary"),
}
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass
class IndependentRun:
    """One of the runs.

    Attributes:
        settings: what differs from the others, option to text.
        state: `waiting` (for a device), `running`, `done`, `stopped` (saved, to be continued) or
            `failed`.
        device: where it runs now.
        restarts: how often it was restarted after a crash.
        reason: why it failed, in its own words.
        status: the exit status of its last process.
    """

    name: str
    settings: dict[str, str]
    config: TrainConfig
    folder: Path
    log: Path
    state: str = WAITING
    device: str | None = None
    restarts: int = 0
    reason: str = ""
    status: int | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log_begins: int = 0
    _records: tuple[int, Record] | None = None

    def start(self, device: str, environment: Mapping[str, str]) -> None:
        self.device, self.state = device, RUNNING
        file = self.log.with_suffix(".yaml")
        file.write_text(self.config.to_yaml())
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accum_trainer.train", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=follow_parent,
            )

    def last_record(self) -> Record | None:
        """The newest whole record of its metrics.jsonl."""
        path = self.folder / files.METRICS
        try:
            size = path.stat().st_size
        except OSError:
            return None
        if self._records is None or self._records[0] != size:
            with open(path, "rb") as file:
                file.seek(max(0, size - 8192))
                lines = file.read().split(b"\n")[:-1]
            if not lines:
                return None
            with contextlib.suppress(
                ValueError
            ):  # the first line of the tail may be the end of a longer one
                self._records = size, json.loads(lines[-1])
        return self._records[1] if self._records is not None else None

    def total_updates(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / files.PLAN).read_text())["total_updates"]
        return None

    def result(self) -> dict[str, Any] | None:
        """How it ended, or None where it has not."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / files.RESULT).read_text())
        return None

    def last_words(self) -> str:
        """Its error line, or the last line it printed since its last start."""
        if not self.log.exists():
            return ""
        with open(self.log, errors="replace") as file:
            file.seek(self._log_begins)
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
        return next(
            (line for line in reversed(lines) if line.startswith("error")),
            lines[-1] if lines else "",
        )


def plan_members(config: TrainConfig, folder: Path) -> tuple[list[IndependentRun], list[str], bool]:
    """The runs that `config` asks for, the devices (or slots) to run them on, and whether those are
    GPUs.

    Raises:
        ConfigError: devices that are not there, settings that cannot vary, or a folder that holds
            something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "parallel_independent starts single processes by itself, but runs as one of "
            f"{os.environ['WORLD_SIZE']} of a "
            "launcher; start it with `accum-trainer train`"
        )
    for name in ("log_file", "resume"):
        value = getattr(config, name)
        if value is not None and not (name == "resume" and value in ("auto", "never")):
            raise ConfigError(
                f"{name}={value} is one place, and parallel_independent has several runs; leave it "
                "out"
            )
    on_gpu = torch.cuda.is_available() and not config.cpu
    devices = _devices(config.cuda_ids, torch.cuda.device_count() if on_gpu else None)
    if config.vary is not None:
        settings = [dict(text.split("=", 1) for text in run) for run in combinations(config.vary)]
    else:
        settings = [{"shard": f"{i}/{len(devices)}"} for i in range(len(devices))]
    for name in settings[0]:
        if name in _NOT_VARIED and config.vary is not None:
            raise ConfigError(f"vary={config.vary}: {name} cannot differ between the runs")
    base = replace(
        config,
        parallel_independent=False,
        cuda_ids=None,
        vary=None,
        max_restarts=TrainConfig.max_restarts,
        resume="auto",
    )
    members = []
    for i, own in enumerate(settings):
        name = f"part-{i}"
        varied = base.varied(
            [*(f"{key}={value}" for key, value in own.items()), f"output_dir={folder / name}"]
        )
        members.append(
            IndependentRun(name, own, varied, folder / name, folder / files.LOGS / f"{name}.log")
        )
    _check_folder(folder, members, config.resume)
    return members, devices, on_gpu


def _devices(text: str | None, gpus: int | None) -> list[str]:
    if text is None:
        if gpus is None:
            raise ConfigError(
                "parallel_independent on a CPU needs cuda_ids, the names of its slots, such as 0,1"
            )
        return [str(i) for i in range(gpus)]
    devices = [part.strip() for part in text.split(",")]
    if not all(device.isdecimal() for device in devices):
        raise ConfigError(f"cuda_ids={text} is not a list of device numbers, such as 0,1")
    if len(set(devices)) < len(devices):
        raise ConfigError(f"cuda_ids={text} names a device twice; each run has a device of its own")
    if gpus is not None and any(int(device) >= gpus for device in devices):
        raise ConfigError(f"cuda_ids={text}, but this machine has {gpus} GPUs, 0 to {gpus - 1}")
    return devices


def _check_folder(folder: Path, members: list[IndependentRun], resume: str) -> None:
    manifest = folder / INDEPENDENT
    if not manifest.is_file():
        files.check_output_dir(folder, resume)
        if (folder / files.CONFIG).is_file():
            raise ConfigError(
                f"output_dir={folder} holds a run of its own, not a set of runs; choose another "
                "folder"
            )
        return
    if resume == "never":
        raise ConfigError(
            f"output_dir={folder} already holds runs and resume=never; choose another folder, or "
            "resume=auto"
        )
    held = {run["name"]: run["settings"] for run in json.loads(manifest.read_text())["runs"]}
    wanted = {member.name: member.settings for member in members}
    if held != wanted:
        raise ConfigError(
            f"output_dir={folder} holds {_summary(held)}, and {_summary(wanted)} are asked for "
            "now; give the same "
            "devices and vary as then, or another output_dir"
        )


def _summary(runs: dict[str, dict[str, str]]) -> str:
    shown = [
        " ".join(f"{key}={value}" for key, value in settings.items()) for settings in runs.values()
    ]
    return f"{len(runs)} runs ({'; '.join(shown[:3])}{'; ...' if len(shown) > 3 else ''})"


class IndependentRunner:
    """Runs members on devices, each as a process of its own, until all have ended.

    Args:
        members: the runs.
        devices: one run at a time on each; more runs than devices wait.
        on_gpu: whether a device is a GPU number; else a slot on the CPU, which shares its cores.
        folder: the folder of the set.
        max_restarts: how often one run may be restarted after a crash.
    """

    def __init__(
        self,
        members: list[IndependentRun],
        devices: list[str],
        on_gpu: bool,
        folder: Path,
        max_restarts: int,
    ) -> None:
        self.members, self.folder = members, folder
        self._devices, self._on_gpu, self._max_restarts = devices, on_gpu, max_restarts
        self._free = list(devices)

    def run(self, show: Callable[[], None]) -> int:
        """Run all to their ends, calling `show` now and then; returns the exit status of the whole.

        0 where all are done, 75 where some were stopped and saved, 2 where their input was wrong, 1
        where some failed.
        """
        made = make_folder(self.folder / files.LOGS)
        self._begin()
        with stopping() as stopped:
            asked = 0.0
            try:
                while self._step(bool(stopped)):
                    show()
                    time.sleep(LOOK_EVERY)
                    if stopped and time.monotonic() - asked > ASK_AGAIN:
                        asked = time.monotonic()
                        self._send(signal.SIGTERM)
            finally:
                self._send(signal.SIGKILL)
        show()
        if all(member.status == 2 and not member.folder.exists() for member in self.members):
            self._unmake(made)
            return 2
        self._end()
        states = {member.state for member in self.members}
        return 1 if FAILED in states else STOPPED_AND_SAVED if states != {DONE} else 0

    @property
    def is_sweep(self) -> bool:
        """Whether the runs differ in options, and not in their shares of the samples."""
        return any(set(member.settings) - {"shard"} for member in self.members)

    def best(self) -> str:
        """The best run in words; see `best_run`."""
        return best_run(self.folder, self._listed())

    def _listed(self) -> list[dict[str, Any]]:
        return [{"name": member.name, "settings": member.settings} for member in self.members]

    def _begin(self) -> None:
        files.write_json(self.folder / INDEPENDENT, {"runs": self._listed()})
        for member in self.members:
            if (
                (result := member.result()) is not None
                and result["done"]
                and not _wants_more(member)
            ):
                member.state = DONE

    def _step(self, stopped: bool) -> bool:
        """Look after every run once; False where none runs and none may start."""
        for member in self.members:
            if (
                member.state == RUNNING
                and member.process is not None
                and member.process.poll() is not None
            ):
                self._ended(member, stopped)
            if member.state == WAITING and not stopped and self._free:
                member.start(device := self._free.pop(0), self._environment(device))
        if stopped:
            for member in self.members:
                member.state = STOPPED if member.state == WAITING else member.state
        return any(member.state in (WAITING, RUNNING) for member in self.members)

    def _ended(self, member: IndependentRun, stopped: bool) -> None:
        assert member.process is not None and member.device is not None
        member.status, member.process = member.process.returncode, None
        result = member.result()
        if member.status in (0, STOPPED_AND_SAVED) or stopped:
            member.state = DONE if result is not None and result["done"] else STOPPED
        elif member.status == 2 or member.restarts >= self._max_restarts:
            member.state, member.reason = FAILED, member.last_words() or _died(member.status)
            if member.status < 0:
                member.reason = _died(member.status)
        else:
            member.restarts += 1
            member.start(member.device, self._environment(member.device))
            return
        self._free.append(member.device)

    def _environment(self, device: str) -> dict[str, str]:
        # The configuration is composed; an option in the environment would beat the file that says
        # it.
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_ENVIRONMENT
        }
        if self._on_gpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            return kept | {
                "CUDA_VISIBLE_DEVICES": visible.split(",")[int(device)] if visible else device
            }
        threads = max(1, (os.cpu_count() or 1) // len(self._devices))
        return {"OMP_NUM_THREADS": str(threads)} | kept

    def _send(self, number: int) -> None:
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(number)

    def _end(self) -> None:
        runs = []
        for member in self.members:
            result = member.result() or {}
            shown = {
                key: result.get(key) for key in ("updates", "num_samples", "loss", "eval_loss")
            }
            runs.append(
                {
                    "name": member.name,
                    "settings": member.settings,
                    "state": member.state,
                    "restarts": member.restarts,
                }
                | shown
                | {"reason": member.reason}
            )
        files.write_json(self.folder / SUMMARY, {"runs": runs})
        curves = {
            f"{member.name} {label(member)}": made
            for member in self.members
            if (made := read_records(member.folder / files.METRICS))
        }
        if curves:
            draw_loss(
                curves,
                self.folder / files.PICTURE,
                f"{self.folder.name}: {len(curves)} independent runs",
            )

    def _unmake(self, made: list[Path]) -> None:
        """All were refused before they began: leave nothing behind."""
        for member in self.members:
            for file in (member.log, member.log.with_suffix(".yaml")):
                file.unlink(missing_ok=True)
        (self.folder / INDEPENDENT).unlink()
        remove_folders(made)


def label(member: IndependentRun) -> str:
    """What sets a run apart, in a few words: `shard 0/4`, `lr=1e-4`."""
    return " ".join(
        f"{key} {value}" if key == "shard" else f"{key}={value}"
        for key, value in member.settings.items()
    )


def _wants_more(member: IndependentRun) -> bool:
    """Whether the run is now asked to train longer than when it was done."""
    before = TrainConfig.from_yaml(member.folder / files.CONFIG)
    return (before.steps, before.epochs) != (member.config.steps, member.config.epochs)


def _died(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"killed by {name}" + (
        ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    )
