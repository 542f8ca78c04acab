"""A caller leaves its loop over records: by a break on all processes, or by an error on one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accum_trainer.train.leaving import LoopPlaces
from accum_trainer.train.records import read_records
from tests.launching import torchrun

PROGRAM = """
import os, sys, time
from accum_trainer import TrainConfig
from accum_trainer.train import updates
rank, how = int(os.environ["RANK"]), sys.argv[1]
config = TrainConfig(cpu=True, batch_size=2, steps=6, max_seq_len=32, output_dir="run")
for record in updates(config):
    if record["step"] == 2:
        if how == "break":
            time.sleep(rank)
            break
        if how == f"rank {rank} raises":
            raise ValueError("the tracker is down")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_processs_loop_ends_the_job_and_saves_nothing(tmp_path, rank):
    """It is not held back by a save, which the other process does not join."""
    ended = torchrun(2, "-c", PROGRAM, f"rank {rank} raises", cwd=tmp_path, timeout=150)
    assert ended.returncode == 1
    assert "ValueError: the tracker is down" in ended.stderr
    assert (
        f"process {rank} left its loop after update 2 and process {1 - rank} did not, so nothing "
        "is saved here and the last checkpoint stays; break out on all processes" in ended.stderr
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_break_on_all_processes_saves_the_run(tmp_path):
    """Also if one of them takes a while."""
    ended = torchrun(2, "-c", PROGRAM, "break", cwd=tmp_path, timeout=150)
    assert ended.returncode == 0, ended.stderr
    assert "left its loop" not in ended.stderr
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    "other, verdict",
    [("4 left", None), ("4 on", 1), ("5 on", 1), ("3 left", 1), ("5 left", 1)],
)
def test_leaving_at_record_4_is_common_only_if_the_other_process_left_at_4(other, verdict):
    """Until it says either, it is waited for."""
    notes = {0: "", 1: "3 on"}
    ranks = SimpleNamespace(
        post=lambda key, note: notes.update({0: note}),
        posted=lambda key: [notes[0], notes[1]],
    )
    places = LoopPlaces(ranks, 0)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            notes[1] = other

    assert places.process_that_did_not_leave(4, sleep) == verdict
    assert len(waits) == 3
    assert notes[0] == "4 left"
