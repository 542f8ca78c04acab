"""`--report-to`: what trackers hold after a run, a resume and a failure, read from their files."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import struct

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from accum_trainer.config import TrainConfig
from accum_trainer.train.records import read_records
from accum_trainer.train.trackers import Trackers, sent_configuration
from tests.launching import forked, script, torchrun
from tests.made_runs import write_sums

SMALL = ["train", "--cpu", "--batch-size", "4", "--max-seq-len", "64", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "rows.jsonl", 70)


def tensorboard_of(folder):
    """tag -> [(step, value)] as TensorBoard shows them, in the order written; and what else there
    is."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return scalars, events


def trackio_of(folder):
    """run -> its logged rows [(step, metrics)], in the order written."""
    (database,) = folder.glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        found = {}
        for name, step, metrics in rows:
            found.setdefault(name, []).append((step, json.loads(metrics)))
    return found


def wandb_of(folder):
    """What wandb wrote of one process offline: its records, in the order written. The file is one
    of LevelDB's logs: after a header of 7 bytes, blocks of 32 KiB with parts of records."""
    (file,) = folder.glob("*.wandb")
    raw, place, part, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(raw):
        left = 32768 - place % 32768
        if left < 7:  # no part begins there
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        part += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            found.append(Record.FromString(part))
            part = b""
    return found


def losses_of(run_folder):
    return [(r["step"], r["loss"]) for r in read_records(run_folder / "metrics.jsonl")]


def test_tensorboard_holds_the_records_the_configuration_and_the_picture(train, tmp_path, rows):
    argv = [*SMALL[2:], "--dataset-file", rows, "--steps", "5", "--report-to", "tensorboard"]
    finished = train(*argv, "--output-dir", "run", "--seed", "7")
    assert finished.status == 0, finished.err
    assert train(*argv, "--output-dir", "run", "--seed", "7").status == 0  # it was complete
    scalars, events = tensorboard_of(tmp_path / "run" / "tensorboard")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    numbers = {k for k, v in records[0].items() if isinstance(v, int | float) and v is not None}
    assert set(scalars) == (numbers - {"step", "skipped"}) | {"skipped_windows"}
    for tag in ("loss", "lr", "grad_norm", "tokens_per_sec"):
        assert scalars[tag] == [(r["step"], pytest.approx(r[tag])) for r in records]
    (picture,) = events.Images("curves")
    assert picture.step == 5 and (picture.width, picture.height) == (1040, 715)
    (stored,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    text = stored.read_text()
    assert "seed: 7\n" in text and "batch_size: 4\n" in text
    assert "plan/effective_batch_size: 4\n" in text and "plan/trained_parameters: " in text


def test_a_resumed_run_continues_both_curves_without_doubled_steps(tmp_path, rows):
    """Killed after its checkpoint: what came between is trained again. The checkpoint is that of
    update 3, or the one of 6 if it was written in time; that one waits for the other."""
    env = {"TRACKIO_DIR": tmp_path / "trackio"}
    argv = [*SMALL, "--dataset-file", rows, "--steps", "9", "--checkpoint-every", "3"]
    argv += ["--report-to", "tensorboard,trackio", "--output-dir", "run"]
    killed = forked(1, "accum_trainer", *argv, cwd=tmp_path, inject={"micro_step": 8}, **env)
    assert killed.returncode == -signal.SIGKILL
    notes = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert {name: note["step"] for name, note in notes.items()} == {"tensorboard": 7, "trackio": 7}
    again = forked(1, "accum_trainer", *argv, cwd=tmp_path, **env)
    assert again.returncode == 0, again.stderr
    assert "after 3 updates" in again.stderr or "after 6 updates" in again.stderr
    expected = [(step, pytest.approx(loss)) for step, loss in losses_of(tmp_path / "run")]
    assert [step for step, _ in expected] == [*range(1, 10)]
    scalars, events = tensorboard_of(tmp_path / "run" / "tensorboard")
    assert scalars["loss"] == expected and len(events.Images("curves")) == 1
    ((name, logged),) = trackio_of(tmp_path / "trackio").items()
    assert name == f"run-{notes['trackio']['id']}"
    steps = [(step, metrics["loss"]) for step, metrics in logged if "loss" in metrics]
    # A killed process had not yet written all to trackio's file: it is sent again, not twice.
    assert sorted(steps) == losses_of(tmp_path / "run")
    assert [step for step, metrics in logged if "curves" in metrics] == [9]
    # Several at once, one of them only from here on: it gets the whole curve.
    without = [*argv[: argv.index("--report-to")], "--output-dir", "other"]
    assert forked(1, "accum_trainer", *without, cwd=tmp_path).returncode == 0
    longer = [*without, "--report-to", "tensorboard", "--steps", "10"]
    assert forked(1, "accum_trainer", *longer, cwd=tmp_path).returncode == 0
    scalars, _ = tensorboard_of(tmp_path / "other" / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [*range(1, 11)]


def test_wandb_offline_is_one_run_with_the_whole_curve(tmp_path, rows):
    """Each start is a file of its own, with the same id: wandb joins them when they are sent."""
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    argv = [*SMALL, "--dataset-file", rows, "--checkpoint-every", "2", "--output-dir", "run"]
    argv += ["--report-to", "wandb", "--report-project", "mine", "--seed", "3"]
    for steps in (3, 5):
        ended = forked(1, "accum_trainer", *argv, "--steps", steps, cwd=tmp_path, **env)
        assert ended.returncode == 0, ended.stderr[-3000:]
    records = [wandb_of(folder) for folder in sorted(tmp_path.glob("run/wandb/offline-run-*"))]
    assert len(records) == 2
    runs = [r.run for found in records for r in found if r.WhichOneof("record_type") == "run"]
    note = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert note["step"] == 5
    assert {run.run_id for run in runs} == {note["id"]} and {run.project for run in runs} == {
        "mine"
    }
    curve = {}
    for found in records:
        for record in found:
            items = {"".join([i.key, *i.nested_key]): i.value_json for i in record.history.item}
            if "loss" in items:
                assert int(items["_step"]) not in curve  # each is sent once
                curve[int(items["_step"])] = json.loads(items["loss"])
    assert curve == dict(losses_of(tmp_path / "run")) and [*curve] == [1, 2, 3, 4, 5]
    config = {
        item.key: json.loads(item.value_json)
        for record in records[0]
        for item in record.config.update
    }
    assert config["seed"] == 3 and config["report_to"] == "wandb"
    parts = tmp_path.glob("run/wandb/offline-run-*")
    assert all([*part.glob("files/media/images/curves_*.png")] for part in parts)


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path, rows):
    """It trains from the start, to the same numbers, in the same curves."""
    env = {"TRACKIO_DIR": tmp_path / "trackio"}
    argv = [*SMALL, "--dataset-file", rows, "--steps", "6", "--output-dir", "run"]
    argv += ["--report-to", "tensorboard,trackio"]
    killed = forked(1, "accum_trainer", *argv, cwd=tmp_path, inject={"micro_step": 4}, **env)
    assert killed.returncode == -signal.SIGKILL
    assert forked(1, "accum_trainer", *argv, cwd=tmp_path, **env).returncode == 0
    expected = losses_of(tmp_path / "run")
    scalars, _ = tensorboard_of(tmp_path / "run" / "tensorboard")
    assert scalars["loss"] == [(step, pytest.approx(loss)) for step, loss in expected]
    (logged,) = trackio_of(tmp_path / "trackio").values()
    assert sorted((s, m["loss"]) for s, m in logged if "loss" in m) == expected
    assert len([*(tmp_path / "run" / "tensorboard").glob("*/hparams.yml")]) == 1


def test_a_run_sent_back_begins_another_curve(tmp_path, rows):
    """From update 2 on it goes another way, and trackio cannot take records back."""
    env = {"TRACKIO_DIR": tmp_path / "trackio"}
    argv = [*SMALL, "--dataset-file", rows, "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    argv += ["--report-to", "trackio", "--report-project", "mine", "--output-dir", "run"]
    assert forked(1, "accum_trainer", *argv, "--steps", "6", cwd=tmp_path, **env).returncode == 0
    back = ["--resume", "run/checkpoints/step-00000002", "--max-grad-norm", "0.01"]
    again = forked(1, "accum_trainer", *argv, *back, "--steps", "5", cwd=tmp_path, **env)
    assert again.returncode == 0, again.stderr
    first, second = trackio_of(tmp_path / "trackio").values()
    assert [step for step, m in first if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [(s, m["loss"]) for s, m in second if "loss" in m] == [
        (step, pytest.approx(loss)) for step, loss in losses_of(tmp_path / "run")
    ]
    assert (tmp_path / "trackio" / "mine.db").exists()


def test_only_the_main_process_reports(tmp_path, rows):
    argv = [*SMALL[1:], "--dataset-file", rows, "--steps", "3", "--report-to", "tensorboard"]
    ended = torchrun(2, "accum_trainer.train", *argv, "--output-dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    scalars, _ = tensorboard_of(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3]
    assert len([*(tmp_path / "run" / "tensorboard").glob("events*")]) == 1


FAILING = """
import sys
from torch.utils.tensorboard import SummaryWriter
add, calls = SummaryWriter.add_scalar, 0
def failing(self, tag, *args, **kwargs):
    global calls
    calls += tag == "loss"
    if calls > 3:
        raise OSError("No space left on device")
    return add(self, tag, *args, **kwargs)
SummaryWriter.add_scalar = failing
from accum_trainer.cli import main
main(sys.argv[1:])
"""


def test_a_tracker_that_fails_is_reported_and_caught_up_later(tmp_path, rows):
    argv = [*SMALL, "--dataset-file", rows, "--report-to", "tensorboard", "--output-dir", "run"]
    ended = forked(1, "-c", FAILING, *argv, "--steps", "6", cwd=tmp_path)
    assert ended.returncode == 0 and "done: 6 updates" in ended.stdout, ended.stderr
    assert ended.stderr.count("tensorboard failed (OSError: No space left on device)") == 1
    assert "it has the updates up to 3" in ended.stderr and "Traceback" not in ended.stderr
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 6
    again = forked(1, "accum_trainer", *argv, "--steps", "8", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    scalars, _ = tensorboard_of(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [*range(1, 9)]


def test_one_that_cannot_start(train, tmp_path, rows):
    """Wrong input of a new run; a run that is continued, as after a restart at night, goes on."""
    (tmp_path / "run").mkdir()
    argv = [*SMALL[2:], "--dataset-file", rows, "--output-dir", "run"]
    assert train(*argv, "--steps", "2").status == 0
    (tmp_path / "run" / "tensorboard").write_text("no folder")
    reporting = [*argv, "--report-to", "tensorboard", "--steps", "3"]
    resumed = train(*reporting)
    assert resumed.status == 0 and "tensorboard failed (" in resumed.err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    new = train(*reporting, "--resume", "anew")
    assert new.status == 2 and "tensorboard cannot start here: " in new.error
    # The run that it would have replaced is whole.
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == kept
    (tmp_path / "run" / "tensorboard").unlink()
    assert train(*reporting, "--resume", "anew").status == 0
    assert [*tensorboard_of(tmp_path / "run" / "tensorboard")[0]["lr"]][-1][0] == 3


def test_a_run_that_is_replaced_leaves_no_curves(train, tmp_path, rows):
    argv = [*SMALL[2:], "--dataset-file", rows, "--output-dir", "run"]
    assert train(*argv, "--steps", "3", "--report-to", "tensorboard").status == 0
    assert train(*argv, "--steps", "2", "--resume", "anew").status == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "trackers.json").exists()
    assert train(*argv, "--steps", "4", "--report-to", "tensorboard").status == 0
    scalars, _ = tensorboard_of(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]


def test_one_that_cannot_start_leaves_no_folder(train, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:1/")  # without its write token
    argv = [*SMALL[2:], "--dataset-file", rows, "--output-dir", "runs/new", "--steps", "2"]
    refused = train(*argv, "--report-to", "trackio")
    assert refused.status == 2 and "trackio cannot start here: " in refused.error
    assert not (tmp_path / "runs").exists()


WITHOUT_MLFLOW = """
import importlib.util
import sys
version = importlib.metadata.version
def version_of(name):
    if name.startswith("mlflow"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = version_of
from accum_trainer.cli import main
main(sys.argv[1:])
"""


def test_a_tracker_that_is_not_installed(tmp_path):
    options = ("--cpu", "--report-to", "tensorboard,mlflow", "--output-dir", "run")
    ended = forked(1, "-c", WITHOUT_MLFLOW, "train", *options, cwd=tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "needs mlflow, which is not installed; run `pip install mlflow`" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "notes",
    [
        {"tensorboard": {"id": "../../elsewhere", "step": 2}},
        {"tensorboard": {"id": "abcd", "step": "2"}},
        {"tensorboard": [1]},
        [],
    ],
    ids=["path", "text", "list", "other"],
)
def test_notes_of_others_are_read_as_data(notes, tmp_path, fresh_accelerate):
    """Those that are none are made anew; a link does not take them elsewhere."""
    lines = ('{"step": 1, "skipped": false, "loss": 2.0}\n', '{"loss": 3}\n', "[1]\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "trackers.json").write_text(json.dumps(notes))
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / ".trackers.json.partial").symlink_to(tmp_path / "theirs")
    trackers = Trackers(tmp_path, TrainConfig(report_to="tensorboard"))
    PartialState(cpu=True)
    trackers.start({}, 1, tmp_path / "metrics.jsonl")
    trackers.close()
    written = json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]
    assert len(written["id"]) == 8 and written["step"] == 1
    assert (tmp_path / "theirs").read_text() == "precious"
    assert tensorboard_of(tmp_path / "tensorboard")[0]["loss"] == [(1, 2.0)]


def test_a_link_takes_events_nowhere_else(train, tmp_path, rows):
    (tmp_path / "elsewhere").mkdir()
    argv = [*SMALL[2:], "--dataset-file", rows, "--output-dir", "run"]
    assert train(*argv, "--steps", "1").status == 0
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    linked = train(*argv, "--steps", "2", "--report-to", "tensorboard")
    assert linked.status == 0 and "is a link, and leads out of the run directory" in linked.err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_secret_is_sent():
    config = TrainConfig(
        dataset_file="https://me:hunter2@data.example/rows.jsonl?token=abc&x=1",
        model="hf_abcdefghijk",
        seed=3,
    )
    sent = sent_configuration(config, {"world_size": 2, "versions": {"torch": "2"}, "shard": None})
    assert sent["dataset_file"] == "https://***@data.example/rows.jsonl?token=***&x=1"
    assert (
        sent_configuration(
            TrainConfig(dataset_file="s3://b/r.jsonl?X-Amz-Signature=abc&x=1&access_token=d"), {}
        )["dataset_file"]
        == "s3://b/r.jsonl?X-Amz-Signature=***&x=1&access_token=***"
    )
    assert sent["model"] == "***" and sent["seed"] == 3 and sent["amp"] is False
    assert sent["plan/versions/torch"] == "2" and sent["plan/shard"] == "None"


def test_without_trackers_none_is_imported(tmp_path, rows):
    code = (
        "import sys\nfrom accum_trainer import TrainConfig\n"
        "from accum_trainer.train import updates\n"
        f"config = TrainConfig(cpu=True, steps=1, dataset_file={str(rows)!r}, output_dir='run')\n"
        "list(updates(config))\n"
        "print({'tensorboard', 'trackio', 'wandb', 'mlflow'} & set(sys.modules))"
    )
    ended = script(code, tmp_path)
    assert ended.stdout == "set()\n", ended.stderr
    assert not (tmp_path / "run" / "trackers.json").exists()
