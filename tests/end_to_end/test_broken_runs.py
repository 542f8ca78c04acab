"""A run directory that lost files, is on a full disk, or is used by two commands: it goes on whole,
or one sentence says why not. tests/test_run_lock.py has the lock that two commands meet at."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket

import psutil
import pytest

from accum_trainer.train.records import read_records
from accum_trainer.train.run_lock import LOCK
from tests.end_to_end.started import Started, accum_trainer
from tests.launching import cli

STEPS = ("--batch-size", "2", "--max-seq-len", "64", "--lr", "1e-2", "--output-dir", "run")
SHORT = (*STEPS, "--steps", "4", "--checkpoint-every", "1")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four updates with its last two checkpoints."""
    folder = tmp_path_factory.mktemp("four")
    assert cli("train", "--cpu", *SHORT, cwd=folder).returncode == 0
    return folder / "run"


@pytest.fixture
def run(four, tmp_path):
    return shutil.copytree(four, tmp_path / "run")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(run):
    return [record["step"] for record in read_records(run / "metrics.jsonl")]


@pytest.mark.parametrize("left", ["folder gone", "empty folder", "all damaged"])
def test_a_saved_run_without_checkpoints_is_refused_and_not_touched(train, run, left):
    checkpoints = run / "checkpoints"
    if left == "all damaged":
        for file in checkpoints.glob("*/state.json"):
            file.write_text("{}")
    else:
        shutil.rmtree(checkpoints)
        if left == "empty folder":
            checkpoints.mkdir()
    before = content(run)
    refused = train(*SHORT)
    assert refused.status == 2
    assert "none of its checkpoints is whole" in refused.error
    assert "give resume=anew" in refused.error
    assert content(run) == before


@pytest.mark.parametrize(
    "lost", ["config.yaml", "plan.json", "metrics.jsonl", "result.json", "last-checkpoint.json"]
)
def test_any_file_beside_the_checkpoints_may_be_lost(train, run, lost):
    (run / lost).unlink()
    longer = ["5" if value == "4" else value for value in SHORT]
    finished = train(*longer)
    assert finished.status == 0, finished.err
    assert "continued from run/checkpoints/step-00000004 after 4 updates" in finished.err
    assert (run / lost).is_file()
    assert steps_of(run) == ([5] if lost == "metrics.jsonl" else [1, 2, 3, 4, 5])
    assert json.loads((run / "result.json").read_text())["num_samples"] == 5 * 2


def test_anew_replaces_the_run(train, four, run):
    shutil.rmtree(run / "checkpoints")
    assert train(*SHORT, "--resume", "anew").status == 0
    assert steps_of(run) == [1, 2, 3, 4]
    for name in ("model.safetensors", "config.json"):
        assert (run / "model" / name).read_bytes() == (four / "model" / name).read_bytes()


def test_never_names_the_ways_to_go_on(train, run):
    refused = train(*SHORT, "--resume", "never")
    assert refused.status == 2 and "resume=anew to replace it" in refused.error


def test_a_run_that_goes_back_keeps_what_it_writes_then(train, run):
    """From step 3 it writes step 4 again, and 5; a user's own copy stays."""
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000003-ok")
    longer = ("5" if value == "4" else value for value in SHORT)
    finished = train(*longer, "--resume", "run/checkpoints/step-00000003")
    assert finished.status == 0
    assert "continued from run/checkpoints/step-00000003 after 3 updates" in finished.err
    assert steps_of(run) == [1, 2, 3, 4, 5]
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert found == ["step-00000003-ok", "step-00000004", "step-00000005"]


def test_records_that_are_lost_or_damaged_cost_nothing_else(train, run):
    """Lines 2 and 3 of metrics.jsonl cannot be read; the totals are those of all."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], lines[1][:20] + "\n", "[]\n", lines[3]]))
    longer = ["5" if value == "4" else value for value in SHORT]
    finished = train(*longer)
    assert finished.status == 0
    assert "line 2 of run/metrics.jsonl is damaged" in finished.err
    assert "has 2 of the 4 records that were written before the checkpoint" in finished.err
    assert steps_of(run) == [1, 4, 5]
    result = json.loads((run / "result.json").read_text())
    assert result["num_samples"] == 5 * 2 and result["updates"] == 5


def test_a_record_that_was_changed_is_told(train, run):
    """One digit of a loss, which is still a record."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    longer = ["5" if value == "4" else value for value in SHORT]
    changed = lines[1].replace('"loss": 8.', '"loss": 9.')
    assert changed != lines[1]
    (run / "metrics.jsonl").write_text("".join([lines[0], changed, *lines[2:]]))
    finished = train(*longer)
    assert finished.status == 0
    assert "are not those that were written before the checkpoint" in finished.err
    again = train(*("6" if value == "4" else value for value in SHORT))
    assert again.status == 0 and "are not those" not in again.err


def test_a_checkpoint_copied_alone_is_enough(train, run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000004", tmp_path / "copied")
    longer = ["5" if value == "4" else value for value in SHORT]
    finished = train(*longer, "--output-dir", "other", "--resume", "copied")
    assert finished.status == 0
    assert steps_of(tmp_path / "other") == [5]
    assert json.loads((tmp_path / "other" / "result.json").read_text())["num_samples"] == 10


# --- a full disk ---


def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(tmp_path):
    """The kernel refuses files above a limit for a while; the run ends whole."""
    command = accum_trainer("train", "--cpu", *STEPS, "--checkpoint-every", "2", "--steps", "60")
    started = Started([*command, "--keep-checkpoints", "1"], tmp_path, cwd=tmp_path, fresh=True)
    run = tmp_path / "run"
    started.until(lambda: (run / "last-checkpoint.json").exists())
    process = psutil.Process(started.process.pid)
    unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (100_000, unlimited[1]))
    started.until(lambda: "could not be written" in started.err)
    kept = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert len(kept) == 1 and not list((run / "checkpoints").glob(".partial*"))
    process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
    assert started.ended() == 0, started.err
    assert "training goes on, and it is tried again when the next is due" in started.err
    assert "Traceback" not in started.err
    assert steps_of(run) == list(range(1, 61))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000060"]
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.long
def test_a_run_that_cannot_be_saved_at_its_end_says_so_and_continues_later(train, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    started = None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        started = Started(
            accum_trainer("train", "--cpu", *SHORT), tmp_path, cwd=tmp_path, fresh=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert started.ended() == 1
    assert "Traceback" not in started.err
    assert "the run ended after 4 updates, and not all of it could be saved" in started.err
    assert not list((tmp_path / "run").glob(".model*"))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / LOCK).exists()
    assert train(*SHORT).status == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_record_that_cannot_be_written_waits_for_the_next(tmp_path, caplog):
    from accum_trainer.train.records import RecordWriter

    def record(number):
        return {"batch_idx": number, "skipped": False, "text": "x" * 1000}

    writer = RecordWriter(tmp_path / "metrics.jsonl")
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    writer.write(record(1))
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # half a line fits
        writer.write(record(2))
        writer.write(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert caplog.text.count("could not be written") == 1
    writer.write(record(4))
    writer.close()
    assert [r["batch_idx"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# --- two commands in one directory ---


def test_a_second_command_in_the_same_directory_is_refused(train, tmp_path):
    """While the first trains, and until it is gone; killed, it leaves nothing to clean up."""
    command = accum_trainer(
        "train", "--cpu", *STEPS, "--checkpoint-every", "2", "--steps", "100000"
    )
    started = Started(command, tmp_path, cwd=tmp_path, fresh=True)
    try:
        started.until(lambda: (tmp_path / "run" / "last-checkpoint.json").exists())
        refused = train(*SHORT)
        assert refused.status == 2
        pid, host = started.process.pid, socket.gethostname()
        assert f"output_dir=run is in use: process {pid} on {host}, since 20" in refused.error
        assert "choose another output_dir" in refused.error
    finally:
        os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    done = steps_of(tmp_path / "run")[-1] + 1
    finished = train(*STEPS, "--steps", done)
    assert finished.status == 0, finished.err
    assert steps_of(tmp_path / "run") == list(range(1, done + 1))
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_that_was_killed_between_two_renames_keeps_its_checkpoint(train, run):
    """The checkpoint lies aside, and the one that was to replace it is not there yet."""
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000003")
    (checkpoints / "step-00000004").rename(checkpoints / ".replaced-step-00000004")
    went_on = train(*STEPS, "--steps", "5")
    assert went_on.status == 0, went_on.err
    assert "gone" not in went_on.err
    assert steps_of(run) == [1, 2, 3, 4, 5]


def test_a_run_whose_checkpoints_are_a_link_can_be_replaced(train, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    replaced = train(*STEPS, "--steps", "2", "--resume", "anew")
    assert replaced.status == 0, replaced.err
    assert steps_of(run) == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["step-00000003", "step-00000004"]
