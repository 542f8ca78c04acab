"""Experiment trackers beside metrics.jsonl: the same records, the configuration, the picture.

Accelerate's trackers do the work; this module decides what each is given so that a continued run
goes on in the same curve. `trackers.json` in the run directory notes under which id a tracker knows
the run, and up to which update it was sent records. Runs on the main process only. A tracker that
fails ends neither the run nor the others. Knows no engine and no model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accum_trainer.config import OPTIONS, TrainConfig
from accum_trainer.errors import ConfigError, first_line
from accum_trainer.train.masking import masked
from accum_trainer.train.records import Record, read_records
from accum_trainer.train.run_folder import TENSORBOARD, TRACKER_NOTES

logger = logging.getLogger(__name__)

PICTURE_KEY = "curves"


@dataclass(frozen=True)
class Kind:
    """One tracker.

    Attributes:
        packages: distributions of which one must be installed; the first is recommended.
        options: arguments of Accelerate's class for a run.
        send_picture: gives it loss.png after an update.
        finish: ends its run.
        steps_of: updates of which it has records, once it was started.
        purges: it drops what it was sent of later updates if it knows where the run goes on.
    """

    packages: tuple[str, ...]
    options: Callable[[TrackedRun], dict[str, Any]]
    send_picture: Callable[[Any, Path, int], None]
    finish: Callable[[Any], None] = lambda tracker: tracker.finish()
    steps_of: Callable[[Any, TrackedRun], Collection[int]] = lambda tracker, run: run.noted_steps
    purges: bool = False


@dataclass
class Note:
    """The entry of one tracker in trackers.json.

    Attributes:
        id: under which it knows the run: chosen here, or by its server.
        step: the last update of which it was sent a record.
    """

    id: str
    step: int = 0

    @classmethod
    def read(cls, found: dict[str, Any]) -> Note:
        """From JSON, which may be another's; ValueError if it is not a note."""
        note = cls(found["id"], found["step"])
        # The id becomes part of names of files.
        if not re.fullmatch(r"[0-9a-f]{4,64}", note.id) or type(note.step) is not int:
            raise ValueError("no note")
        return note


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it.

    Attributes:
        folder: the run directory.
        project: under which runs are gathered.
        note: of this tracker.
        first_step: the update that the run goes on with; 1 for a new run.
        is_anew: it replaces an earlier run of this folder.
    """

    folder: Path
    project: str
    note: Note
    first_step: int
    is_anew: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def check_inside(self, name: str) -> None:
        """Raise a ConfigError if a folder that a tracker writes to is a link: it may be another's,
        and lead anywhere."""
        if (self.folder / name).is_symlink():
            raise ConfigError(f"{self.folder / name} is a link, and leads out of the run directory")

    @property
    def noted_steps(self) -> range:
        return range(1, self.note.step + 1)


def _remove_events(folder: Path) -> None:
    """Remove what TensorBoard has of an earlier run: it would stay in the new one's curves."""
    place = folder / TENSORBOARD
    if place.is_symlink():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)


def _tensorboard(run: TrackedRun) -> dict[str, Any]:
    if run.is_anew:
        _remove_events(run.folder)
    run.check_inside(TENSORBOARD)
    later = {"purge_step": run.first_step} if run.note.step else {}
    return {"run_name": TENSORBOARD, "logging_dir": run.folder, **later}


def _wandb(run: TrackedRun) -> dict[str, Any]:
    import wandb

    run.check_inside("wandb")
    # Catching the console would copy each state of the live display.
    quiet = {} if "WANDB_CONSOLE" in os.environ else {"settings": wandb.Settings(console="off")}
    folder = os.environ.get("WANDB_DIR") or run.folder
    project = os.environ.get("WANDB_PROJECT") or run.project
    known = {"id": run.note.id, "resume": "allow", "name": run.name}
    return {"run_name": project, "dir": str(folder), **known, **quiet}


def _trackio(run: TrackedRun) -> dict[str, Any]:
    # It knows runs by their names only, and two folders may have the same.
    name = f"{run.name}-{run.note.id}"
    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    return {"run_name": run.project, "name": name, "resume": "allow", **quiet}


def _mlflow(run: TrackedRun) -> dict[str, Any]:
    # By its defaults it waits for a server that is gone for a quarter of an hour, and training too.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    known = {"run_id": run.note.id} if run.note.step else {"run_name": run.name}
    return {"experiment_name": run.project, **known}


def _picture_as_image(tracker: Any, picture: Path, step: int) -> None:
    from matplotlib.image import imread

    pixels = (imread(picture)[..., :3] * 255).astype("uint8")
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({PICTURE_KEY: pixels[None]}, step=step, **layout)


def _picture_of_trackio(tracker: Any, picture: Path, step: int) -> None:
    import trackio

    tracker.log({PICTURE_KEY: trackio.Image(str(picture))}, step=step)


def _steps_of_trackio(tracker: Any, run: TrackedRun) -> Collection[int]:
    """As its file says: what a killed process had not written yet is lost."""
    if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
        return run.noted_steps
    try:
        from trackio.sqlite_storage import SQLiteStorage

        name = _trackio(run)["name"]
        logs = SQLiteStorage.get_logs(run.project, name, max_points=None)
        return {log["step"] for log in logs if "loss" in log}
    except Exception:  # of any type: another version of it
        return run.noted_steps


def _steps_of_mlflow(tracker: Any, run: TrackedRun) -> Collection[int]:
    from mlflow import MlflowClient

    history = MlflowClient().get_metric_history(tracker.tracker.info.run_id, "loss")
    return {point.step for point in history}


def _finish_trackio(tracker: Any) -> None:
    import trackio

    trackio.finish()  # the tracker's own would be repeated when the process ends


def _picture_as_file(tracker: Any, picture: Path, step: int) -> None:
    tracker.log_artifact(str(picture))


KINDS = {
    "tensorboard": Kind(
        ("tensorboard", "tensorboardX"), _tensorboard, _picture_as_image, purges=True
    ),
    "trackio": Kind(
        ("trackio",), _trackio, _picture_of_trackio, _finish_trackio, _steps_of_trackio
    ),
    "wandb": Kind(("wandb",), _wandb, _picture_as_image),
    "mlflow": Kind(
        ("mlflow", "mlflow-skinny"), _mlflow, _picture_as_file, steps_of=_steps_of_mlflow
    ),
}


def check_installed(config: TrainConfig) -> None:
    """Raise a ConfigError that names the command which installs what is missing."""
    missing = [name for name in config.trackers if not any(map(_has, KINDS[name].packages))]
    if missing:
        packages = " ".join(KINDS[name].packages[0] for name in missing)
        raise ConfigError(
            f"report_to={config.report_to} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run `pip install {packages}`, "
            "or leave it out: metrics.jsonl has every record"
        )


def _has(package: str) -> bool:
    # Not find_spec: a folder `wandb` that an earlier run left here looks like a package.
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Trackers:
    """The trackers of one run.

    Every process has one; the main process calls `start`, and others send nothing.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._folder, self._config = folder, config
        self._active: dict[str, Any] = {}
        self._held: dict[str, Collection[int]] = {}  # updates that are not to be sent again
        self._notes: dict[str, Note] = {}
        self._was_sent: set[str] = set()  # a record, by this process
        self._skipped = 0

    def start(self, plan: dict[str, Any], kept: int, metrics: Path) -> None:
        """Begin or continue each tracker's run, and send what it misses of the kept records.

        Args:
            plan: of the run, sent with its configuration.
            kept: records that the run keeps from before.
            metrics: metrics.jsonl, which has them.

        Raises:
            ConfigError: the run is new, and a tracker cannot start.
        """
        is_anew = self._config.resume == "anew"
        if not self._config.trackers:
            if is_anew:
                _remove_events(self._folder)
                (self._folder / TRACKER_NOTES).unlink(missing_ok=True)
            return
        found = read_records(metrics) if kept else []
        records = [record for record in found if isinstance(record.get("step"), int)]
        self._skipped = sum(bool(record.get("skipped")) for record in records)
        last = max((record["step"] for record in records), default=0)
        self._notes = self._read_notes(last)
        # The local one last: it replaces an earlier run's events, once the others have started.
        for name in sorted(self._config.trackers, key=lambda name: name == "tensorboard"):
            try:
                with _output_on_stderr():
                    self._begin(name, last, plan, records)
            except Exception as error:  # of any type: the tracker's own, of its server, of login
                self._active.pop(name, None)
                if kept:
                    self._report(name, error)
                    continue
                self.close()
                raise ConfigError(
                    f"report_to={self._config.report_to}: {name} cannot start here: "
                    f"{first_line(error)}; mend that, or leave {name} out"
                ) from error
        if is_anew and "tensorboard" not in self._config.trackers:
            _remove_events(self._folder)
        self._write_notes()

    def _read_notes(self, last: int) -> dict[str, Note]:
        notes: dict[str, Note] = {}
        # Lost, or not ours: all is sent again, under a new id. A run that was killed before its
        # first checkpoint has notes and no records that are kept.
        is_anew = self._config.resume == "anew"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = {} if is_anew else json.loads((self._folder / TRACKER_NOTES).read_text())
            notes = {name: Note.read(found[name]) for name in KINDS if name in found}
        for name in self._config.trackers:
            known = notes.get(name)
            # A run that was sent back to an earlier update may go another way from there.
            is_sent_back = self._config.resume != "auto" and known and known.step > last
            if known is None or (is_sent_back and not KINDS[name].purges):
                notes[name] = Note(secrets.token_hex(4))
        return notes

    def _begin(self, name: str, last: int, plan: dict[str, Any], records: list[Record]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        note, kind = self._notes[name], KINDS[name]
        is_new = note.step == 0
        is_anew = self._config.resume == "anew"
        run = TrackedRun(self._folder, self._config.report_project, note, last + 1, is_anew)
        tracker = LOGGER_TYPE_TO_CLASS[name](**kind.options(run))
        tracker.start()
        self._active[name] = tracker
        if name == "mlflow":  # its server makes the id
            note.id = tracker.tracker.info.run_id
        self._held[name] = kind.steps_of(tracker, run)
        if kind.purges:
            self._held[name] = range(1, min(note.step, last) + 1)
        if is_new:
            tracker.store_init_configuration(sent_configuration(self._config, plan))
        skipped = 0
        for record in records:
            skipped += bool(record.get("skipped"))
            self._send(name, record, skipped)

    def log(self, record: Record) -> None:
        """Send a record. A tracker that fails is reported and left alone from there on."""
        self._skipped += bool(record["skipped"])
        for name in [*self._active]:
            with self._reporting(name):
                self._send(name, record, self._skipped)
        if self._active:
            self._write_notes()

    def _send(self, name: str, record: Record, skipped: int) -> None:
        note = self._notes[name]
        if record.get("skipped") or record["step"] in self._held[name]:
            return
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        numbers["skipped_windows"] = skipped
        finite = {k: v for k, v in numbers.items() if abs(v) <= sys.float_info.max}
        self._active[name].log(finite, step=record["step"])
        note.step = max(note.step, record["step"])
        self._was_sent.add(name)

    def finish(self, picture: Path) -> None:
        """Send the picture, if there is one, and end each tracker's run."""
        for name in [*self._active]:
            with self._reporting(name), _output_on_stderr():
                if picture.is_file() and name in self._was_sent:
                    KINDS[name].send_picture(self._active[name], picture, self._notes[name].step)
        self.close()

    def close(self) -> None:
        """End each tracker's run that is still under way."""
        for name in [*self._active]:
            with self._reporting(name), _output_on_stderr():
                KINDS[name].finish(self._active[name])
            self._active.pop(name, None)

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: the tracker's own, of its server, of a disk
            self._active.pop(name, None)
            self._report(name, error)

    def _report(self, name: str, error: Exception) -> None:
        logger.warning(
            "%s failed (%s: %s) and is sent nothing more: it has the updates up to %d. Training "
            "goes on, metrics.jsonl has every record, and the same command sends what is missing "
            "when it continues the run",
            *(name, type(error).__name__, first_line(error), self._notes[name].step),
        )

    def _write_notes(self) -> None:
        notes = {name: asdict(note) for name, note in self._notes.items()}
        # Lost with the machine it is only sent again, so it is not synced to disk at each update.
        with contextlib.suppress(OSError):
            partial = self._folder / f".{TRACKER_NOTES}.partial"
            partial.unlink(missing_ok=True)  # a link would take the content elsewhere
            partial.write_text(json.dumps(notes, indent=1) + "\n")
            partial.replace(self._folder / TRACKER_NOTES)


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Trackers print for people; standard output is for programs."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def sent_configuration(config: TrainConfig, plan: dict[str, Any]) -> dict[str, Any]:
    """The composed configuration and, under `plan/`, the run's plan, as trackers take them: flat,
    numbers or text. No option holds a secret, but a URL or a name may contain one: it is masked."""
    flat = {name: getattr(config, name) for name in OPTIONS} | dict(_flattened("plan", plan))
    return {name: _sent(value) for name, value in flat.items()}


def _flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flattened(f"{name}/{key}", inner)
    else:
        yield name, value


def _sent(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float):
        return value
    return masked(str(value))
