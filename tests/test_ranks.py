"""Processes that would part ways: all end together, with one message that names the one that
differs."""

from __future__ import annotations

import json
import socket

import pytest

from tests.launching import torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("apart")


@pytest.fixture(scope="module")
def ended(folder):
    """case -> how each of the two processes ended."""
    launched = torchrun(2, "tests.apart", folder)
    assert launched.returncode == 0, launched.stderr[-4000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [found[name] for found in ranks] for name in ranks[0]}


def refusal(ended):
    """The one message; all processes must have ended with status 2 and no traceback."""
    assert [found["status"] for found in ended] == [2, 2], ended
    said = [
        line for found in ended for line in found["err"].splitlines() if line.startswith("error: ")
    ]
    assert len(said) == 1 and all("Traceback" not in found["err"] for found in ended), ended
    return said[0]


def test_i44_run_folders_of_their_own_are_refused_at_the_start(ended, folder):
    said = refusal(ended["run_folders_of_their_own"])
    assert (
        f"output_dir=run is a separate folder on process 1 ({socket.gethostname()}, {folder}"
        in said
    )
    assert (
        "machine-1/fresh/run" in said
        and "machine-0/fresh/run" in said
        and "file system that all" in said
    )
    assert [found["left"] for found in ended["run_folders_of_their_own"]] == [[], []]


def test_i44_run_folders_of_other_names_are_refused_at_the_start(ended):
    said = refusal(ended["run_folders_of_other_names"])
    assert f"machine-1/named on process 1 ({socket.gethostname()})" in said


def test_i44_rank_0_chooses_the_checkpoint(ended):
    assert [found["status"] for found in ended["stale_listing"]] == [0, 0], ended["stale_listing"]
    assert "step-00000002 after 2 updates" in ended["stale_listing"][0]["err"]
    assert ended["stale_listing"][0]["steps"] == [1, 2, 3, 4]


def test_i44_checkpoints_of_their_own_are_refused(ended):
    said = refusal(ended["checkpoints_of_their_own"])
    assert (
        "machine-1/resumed/saved holds another checkpoint" in said and socket.gethostname() in said
    )


def test_i44_what_every_rank_loaded_is_compared_before_the_first_update(ended):
    said = refusal(ended["other_state_after_loading"])
    assert (
        f"process 1 ({socket.gethostname()}) would start from another state than process 0: weights"
        in said
    )


def test_i44_ranks_on_other_windows_end_at_the_first_update(ended, folder):
    said = refusal(ended["other_windows"])
    assert (
        "process 1 trained on another window than process 0 (process 0: 0 updates, epoch 0, 8 "
        "consumed" in said
    )
    assert (
        not (folder / "windows" / "checkpoints").exists()
        and not (folder / "windows" / "model").exists()
    )


@pytest.mark.parametrize(
    "name, status, says",
    [
        (
            "data_file_missing_on_one",
            2,
            "process 1 on {host}: data file /no/rows.jsonl does not exist",
        ),
        ("tokenising_fails_on_one", 1, "process 1 on {host}: OSError: the cache is read-only"),
        ("loading_fails_on_one", 1, "process 1 on {host}: MemoryError: no memory for the model"),
    ],
)
def test_i47_what_one_process_raises_before_or_between_updates_ends_all_with_its_words(
    ended, name, status, says
):
    assert [found["status"] for found in ended[name]] == [status] * 2, ended[name]
    for found in ended[name][: 1 if status == 2 else 2]:  # wrong input is said once
        assert says.rpartition(": ")[2] in found["err"]
    other = ended[name][1 if "process 0" in says else 0]
    assert says.format(host=socket.gethostname()) in other["err"]


def test_a_disk_that_is_full_for_one_process_costs_one_checkpoint(ended, folder):
    found = ended["disk_full_while_saving"]
    assert [one["status"] for one in found] == [0, 0], found
    assert (
        "step-00000001 could not be written: process 1: [Errno 28] No space left on device; "
        "training goes on" in found[0]["err"]
    )
    written = [path.name for path in (folder / "full" / "checkpoints").iterdir()]
    assert written == ["step-00000002"]


@pytest.mark.parametrize("place", ["__getitem__", "collate", "forward"])
def test_i47_what_one_process_raises_in_mid_training_ends_all_with_its_words(tmp_path, place):
    """Long before gloo gives up (30 minutes): a limit for what would else be a hang, no
    measurement."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{n} and {n + 1} " * (n % 5 + 1)}) + "\n" for n in range(40))
    )
    train = [
        "--dataset-file",
        rows,
        "--batch-size",
        2,
        "--gradient-accumulation-steps",
        3,
        "--steps",
        6,
    ]
    launched = torchrun(
        2, "tests.failing", place, *train, "--output-dir", tmp_path / "run", timeout=120
    )
    assert launched.returncode == 1
    assert f"FloatingPointError: {place} of process 1" in launched.stderr


@pytest.mark.long
@pytest.mark.parametrize("machines", [1, 2])
def test_slow_work_is_waited_for_and_done_once_per_machine(tmp_path, machines):
    launched = torchrun(2, "tests.patience", tmp_path, machines, timeout=120)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert {"done-0", "done-1"} <= {path.name for path in tmp_path.iterdir()}
