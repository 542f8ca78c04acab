"""Run parts, each in a process of its own, and keep what they gave: a part that has a result is not
run again.

    FOLDER/<part>.json   the outcome: result or last words, when, how long, of which code
    FOLDER/<part>.log    all that it printed
    FOLDER/<part>/       its own files

A part that crashed, ran out of time or was not reached has no result and is run by the next call.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.part import PARTS, ROOT, Setting, last_words

MINUTES = 20
LIBRARIES = ("torch", "accelerate", "transformers", "peft", "deepspeed", "triton", "flash-attn")


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        state: `done` (it has a result), `failed`, `out of time` or `not run`.
        result: as `part.Result` has it; None unless done.
        words: the last that it wrote, unless done.
        code: commit that it ran on.
    """

    part: str
    state: str
    result: dict[str, Any] | None
    words: str
    seconds: float
    date: str
    code: str

    @property
    def passed(self) -> bool:
        return self.result is not None and all(check["passed"] for check in self.result["checks"])


def run_parts(
    names: Sequence[str], setting: Setting, again: bool, limit: float | None = None
) -> list[Outcome]:
    """Run those of the named parts that have no result, until the time is over.

    Args:
        again: run all.
        limit: seconds for each part, instead of its own.
    """
    folder, ends = Path(setting.folder), time.monotonic() + MINUTES * 60
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        known = None if again else read(folder, name)
        if known is not None and known.state == "done":
            print(f"{name}: has a result, of {known.date} (--again runs it anew)", flush=True)
            continue
        left = ends - time.monotonic()
        if left < 10:
            outcome = _outcome(
                name, "not run", f"the {MINUTES} minutes were over; the next call runs it", 0.0
            )
        else:
            print(f"{name}: {PARTS[name][3]} ...", flush=True)
            outcome = run_part(name, setting, min(left, limit or PARTS[name][2] * setting.patience))
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(outcome)))
        print(
            f"{name}: {outcome.state}, {outcome.seconds:.0f} s\n{outcome.words}".rstrip(),
            flush=True,
        )
    return [
        read(folder, name) or _outcome(name, "not run", "not asked for yet", 0.0) for name in PARTS
    ]


def run_part(
    name: str, setting: Setting, limit: float, command: Sequence[str] | None = None
) -> Outcome:
    """Run one part for at most `limit` seconds; `command` stands in for the part's own process."""
    folder = Path(setting.folder)
    out, log = folder / f"{name}.result", folder / f"{name}.log"
    out.unlink(missing_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    own = dataclasses.replace(setting, folder=str(folder / name), limit=limit)
    command = command or [
        sys.executable,
        *("-m", "benchmarks.gpu.part", name, json.dumps(dataclasses.asdict(own)), str(out)),
    ]
    begun = time.monotonic()
    status = processes.run(command, log, limit, environment(setting))
    ended = processes.how_it_ended(status, limit)
    if out.exists():  # whole, whatever its process did afterwards
        result = json.loads(out.read_text())
        result["notes"] += [f"After it had given its result, {ended}."] if ended else []
        return _outcome(name, "done", "", time.monotonic() - begun, result)
    words = (
        f"{ended or 'it gave no result'}; its last "
        f"words:\n{last_words(log.read_text(errors='replace'))}"
    )
    return _outcome(
        name, "out of time" if status is None else "failed", words, time.monotonic() - begun
    )


def environment(setting: Setting) -> dict[str, str]:
    """One GPU or none; as pytest's, so that a part is what the tests run."""
    # A part that crashes or is ended shows where it was.
    given = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
    given |= {"OMP_NUM_THREADS": "1"} if setting.cpu else {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    devices = "" if setting.cpu else visible.split(",")[0]
    return given | dict(os.environ) | {"CUDA_VISIBLE_DEVICES": devices}


def read(folder: Path, name: str) -> Outcome | None:
    """The outcome of an earlier call, if there is one."""
    try:
        return Outcome(**json.loads((folder / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None


def _outcome(
    name: str, state: str, words: str, seconds: float, result: dict[str, Any] | None = None
) -> Outcome:
    return Outcome(name, state, result, words, seconds, time.strftime("%Y-%m-%d %H:%M"), code())


def code() -> str:
    """The commit of this tree, `+` where files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
