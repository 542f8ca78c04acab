"""What a node of several does after a failure, by the notes of the others in the run directory."""

from __future__ import annotations

import socket

import pytest

from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch import starting_together
from accum_trainer.launch.placement import NodePlacement
from accum_trainer.launch.restarting import Restarting
from accum_trainer.launch.starting_together import StartingTogether

TRAIN = ["--steps", "9"]


class Again(Restarting):
    def after_failure(self):
        return TRAIN, "again"


def node(logs, number, port=29500, nodes=2, starts_again=True):
    place = NodePlacement(number, nodes, "node-a", port)
    decides = Again() if starts_again else Restarting()
    return StartingTogether(logs, place, TRAIN, decides, starts_again)


def met(logs, **options):
    """Two nodes whose processes have met."""
    both = [node(logs, number, **options) for number in (0, 1)]
    for one in both:
        one.has_met()
    return both


def test_both_start_again_until_one_ends(tmp_path):
    first, second = met(tmp_path)
    for _ in range(3):
        assert first.after_failure() == (TRAIN, "again")
        assert second.after_failure()[0] == TRAIN
        assert not first.is_over() and not second.is_over()
    first.end(1)
    assert second.is_over()
    assert second.after_failure() == (None, "not started again: node 0 has ended, with status 1")


def test_node_0_ends_with_a_node_that_will_not_come_again(tmp_path):
    """It is done, was stopped between two starts, or was started without restarts."""
    first, second = met(tmp_path)
    second.end(0)
    assert first.is_over()
    assert first.after_failure() == (None, "not started again: node 1 has ended, with status 0")


def test_a_node_without_restarts_ends_at_its_failure(tmp_path):
    alone = node(tmp_path, 1, starts_again=False)
    alone.has_met()
    assert alone.after_failure() == (None, "")


def test_notes_of_another_launch_count_for_nothing(tmp_path):
    """One of before, also if it was late, and one beside, at another port or never met."""
    first, second = met(tmp_path)
    first.end(75)
    new = node(tmp_path, 1)
    assert not new.is_over()
    first.end(75)
    new.has_met()
    assert not new.is_over() and new.lost_node() is None
    beside = node(tmp_path, 0, port=29600)
    beside.end(130)
    beside.has_met()
    beside.end(2)
    assert not new.is_over()
    same_port = node(tmp_path, 0)
    same_port.end(2)
    assert not new.is_over()
    second.end(1)  # of the same node as `new`
    assert not new.is_over()


def test_processes_have_a_while_to_notice_a_loss(tmp_path, monkeypatch):
    first, second = met(tmp_path, nodes=3)
    second.after_failure()
    assert first.lost_node() is None
    monkeypatch.setattr(starting_together, "_NOTICED_WITHIN_SEC", -1.0)
    assert first.lost_node() == 1
    first.after_failure()
    assert first.lost_node() is None  # that was the start before


@pytest.mark.parametrize("status", [0, 75])
def test_a_node_that_is_done_or_was_stopped_is_not_lost(tmp_path, monkeypatch, status):
    monkeypatch.setattr(starting_together, "_NOTICED_WITHIN_SEC", -1.0)
    first, second = met(tmp_path)
    second.end(status)
    assert first.lost_node() is None


@pytest.mark.parametrize(
    "text", ["", "[2]", "null", '{"port": 29500}', '{"port": 29500, "restart": null, "status": 1}']
)
def test_damaged_notes_are_none(tmp_path, text):
    first, _ = met(tmp_path)
    (tmp_path / "together-1.json").write_text(text)
    assert not first.is_over() and first.lost_node() is None


def test_nodes_meet_at_two_ports_by_turns_under_a_name_of_the_run():
    place = NodePlacement(1, 2, "node-a", 29500)
    places = [place]
    for number in (1, 2, 3):
        places.append(places[-1].of_restart(number, 60.5, "runs/x/logs"))
    assert [p.main_process_port for p in places] == [29500, 29501, 29500, 29501]
    names = [p.environment().get("PET_RDZV_ID") for p in places]
    assert names[0] is None and len(set(names)) == 4
    other = place.of_restart(1, 60.5, "runs/y/logs")
    assert other.environment() != places[1].environment()
    assert "timeout=61" in places[1].arguments() and "--rdzv_conf" not in place.arguments()


def test_a_port_that_was_taken_meanwhile_ends_the_job(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = NodePlacement(0, 2, "node-a", port - 1)
        with pytest.raises(ConfigError, match=f"main_process_port={port} cannot be used here"):
            place.check(may_restart=True)
        with pytest.raises(AccumTrainerError, match="not started again: main_process") as refused:
            place.of_restart(1, 60, "runs/x/logs")
        assert refused.value.exit_status == 1
