"""What a run directory says about going back into the queue, against any status of the batch
system."""

from __future__ import annotations

import json

import pytest

from accum_trainer.launch.node_ending import note_ending
from accum_trainer.runs.requeue import decide

STOPPED = {"done": False, "stopped_by": "SIGUSR1", "updates": 12}
DONE = STOPPED | {"done": True, "stopped_by": ""}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


CASES = {
    # name: (result.json, checkpoints, statuses of the nodes, status of srun, verdict)
    "stopped and saved": (STOPPED, [12], [75, 75], 0, 75),
    "and the slower node was killed": (STOPPED, [12], [75], 137, 75),
    "and no launcher said how it ended": (STOPPED, [12], [], 137, 75),
    "one process, no launcher": (STOPPED, [12], [], 75, 75),
    "done": (DONE, [12], [0, 0], 0, 0),
    "done, and killed after that": (DONE, [12], [0], 137, 0),
    "killed in its save, with a new checkpoint": (None, [5, 10], [], 137, 75),
    "killed before it saved anything": (None, [], [], 143, 75),
    "a launcher that was stopped before training": (None, [], [143], 143, 75),
    "refused": (None, [], [2, 2], 2, 2),
    "refused on one node, the other was stopped": (None, [], [2, 143], 143, 2),
    "refused on one node, the other was killed": (None, [10], [2], 137, 2),
    "refused, where an earlier start was stopped": (STOPPED, [12], [2], 137, 2),
    "crashed": (None, [10], [1, 1], 1, 1),
    "crashed on one node, the other was killed": (None, [10], [1], 137, 1),
    "crashed as it ended, after it was saved": (STOPPED, [12], [1, 75], 1, 75),
    "diverged": (STOPPED | {"stopped_by": "divergence"}, [10], [1], 1, 1),
    "diverged, and the other node was killed": (
        STOPPED | {"stopped_by": "divergence"},
        [10],
        [],
        137,
        1,
    ),
    "no such program": (None, [], [], 127, 127),
    "a dry run": (None, [], [0], 0, 0),
    "a damaged result": ("{", [10], [75], 0, 75),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict(run, name):
    result, checkpoints, nodes, status, verdict = CASES[name]
    if result is not None:
        text = result if isinstance(result, str) else json.dumps(result)
        (run / "result.json").write_text(text)
    for step in checkpoints:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    for node, one in enumerate(nodes):
        note_ending(run / "logs", "4711.0", node, one)
    note_ending(run / "logs", "4711.9", 7, 2)  # of another start
    assert decide(run, status, "4711.0", 3).status == verdict
    assert not list(run.glob("logs/node-*"))


def test_requeues_without_progress_are_limited_and_progress_begins_anew(run):
    def stopped_at(updates):
        (run / "result.json").write_text(json.dumps(STOPPED | {"updates": updates}))
        return decide(run, 75, None, 3)

    assert [stopped_at(4).status for _ in range(5)] == [75, 75, 75, 75, 1]
    assert "stopped 4 times in a row without a new update after update 4" in stopped_at(4).reason
    assert [stopped_at(5).status for _ in range(5)] == [75, 75, 75, 75, 1]


def test_a_failure_after_an_earlier_stop_is_no_stop(run):
    """Its result.json is the earlier start's."""
    (run / "result.json").write_text(json.dumps(STOPPED))
    assert decide(run, 75, None, 3).status == 75
    assert decide(run, 1, None, 3).status == 1


def test_a_refusal_leaves_no_folder(run):
    note_ending(run / "logs", "1.0", 0, 2)
    assert decide(run, 137, "1.0", 3).status == 2
    assert not run.exists()
