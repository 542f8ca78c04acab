"""A launcher after a failure: how often it starts its job again, and with which arguments; which
process it names."""

from __future__ import annotations

import json

import pytest

from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.rank import RankStatus
from accum_trainer.launch.watch import RankWatch
from accum_trainer.runs.restarts import Restarts
from accum_trainer.train.run_folder import write_json

GIVEN = ["--steps", "9"]


def checkpoint(run, step):
    write_json(run / "last-checkpoint.json", {"checkpoint": f"checkpoints/step-{step:08d}"})


def test_the_count_begins_anew_with_each_checkpoint_that_is_further_on(tmp_path):
    restarts = Restarts(tmp_path, GIVEN, "auto", 2)
    lines = []
    for written in (None, None, 4, 4, 4, 6, 5, None):
        if written is not None:
            checkpoint(tmp_path, written)
        arguments, line = restarts.after_failure()
        lines.append(line.removeprefix("starting all processes again"))
        assert arguments == (None if line.startswith("not started again") else GIVEN)
    most = "of at most 2 without a new checkpoint"
    assert lines == [
        f", restart 1 {most}",
        f", restart 2 {most}",
        f" from the checkpoint of update 4, restart 1 {most}",
        f" from the checkpoint of update 4, restart 2 {most}",
        "not started again: 2 restarts in a row ended without a new checkpoint",
        f" from the checkpoint of update 6, restart 1 {most}",
        f" from the checkpoint of update 5, restart 2 {most}",
        "not started again: 2 restarts in a row ended without a new checkpoint",
    ]


def test_a_checkpoint_of_before_is_no_progress(tmp_path):
    checkpoint(tmp_path, 4)
    restarts = Restarts(tmp_path, GIVEN, "auto", 1)
    assert restarts.after_failure()[0] == GIVEN
    checkpoint(tmp_path, 4)  # a run that is done saves the same update at each start
    assert restarts.after_failure()[0] is None


@pytest.mark.parametrize("resume", ["anew", "runs/a/checkpoints/step-00000007", "never"])
def test_a_restart_goes_on_with_what_the_launch_has_written(tmp_path, resume):
    """What was there before is not continued instead of what was asked for."""
    checkpoint(tmp_path, 8)
    given = [*GIVEN, "--resume", resume]
    restarts = Restarts(tmp_path, given, resume, 5)
    expected = [*given, "--resume", "auto"]
    assert restarts.after_failure()[0] == (expected if resume == "never" else given)
    checkpoint(tmp_path, 2)
    arguments, line = restarts.after_failure()
    assert arguments == expected and "update 2, restart 1 of" in line
    (tmp_path / "last-checkpoint.json").write_text("{")
    assert restarts.after_failure()[0] == expected


def test_a_diverged_run_is_not_started_again(tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"stopped_by": "divergence"}))
    restarts = Restarts(tmp_path, GIVEN, "auto", 5)
    assert restarts.after_failure()[0] == GIVEN  # that was an earlier launch
    write_json(result, {"stopped_by": "divergence"})
    assert restarts.after_failure() == (
        None,
        "not started again: the training has diverged, and would again",
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_of_several_nodes_none_says_which_process_failed_first_of_all(tmp_path, capsys, nodes):
    """On node 1 process 2 lost its peer, which failed on node 0."""
    place = NodePlacement(nodes - 1, nodes)
    watch = RankWatch(tmp_path, place, tmp_path)
    (tmp_path / "rank-2.log").write_text("Traceback\nRuntimeError: Connection closed by peer\n")
    RankStatus(2, 0, 0, status=1, ended=1.0).write(tmp_path)
    assert watch.exit_status(1, None) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: Connection closed by peer" in shown
    assert ("of this training failed first" in shown) == (nodes == 1)
    assert ("process 2 was the first to fail on node 1 (for what another" in shown) == (nodes == 2)
