"""Processes that would part ways: all end together, with one message that names the one that differs."""

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
    said = [line for found in ended for line in found["err"].splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and all("Traceback" not in found["err"] for found in ended), ended
    return said[0]


def test_i44_run_folders_of_their_own_are_refused_at_the_start(ended, folder):
    said = refusal(ended["run_folders_of_their_own"])
    assert f"output_dir=run is a folder of its own on process 1 ({socket.gethostname()}, {folder}" in said
    assert "machine-1/fresh/run" in said and "machine-0/fresh/run" in said and "file system that all" in said
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
    assert "machine-1/resumed/saved holds another checkpoint" in said and socket.gethostname() in said


def test_i44_what_every_rank_loaded_is_compared_before_the_first_update(ended):
    said = refusal(ended["other_state_after_loading"])
    assert f"process 1 ({socket.gethostname()}) would start from another state than process 0: weights" in said


def test_i44_ranks_on_other_windows_end_at_the_first_update(ended, folder):
    said = refusal(ended["other_windows"])
    assert "process 1 trained on another window than process 0 (process 0: 0 updates, epoch 0, 8 consumed" in said
    assert not (folder / "windows" / "checkpoints").exists() and not (folder / "windows" / "model").exists()
