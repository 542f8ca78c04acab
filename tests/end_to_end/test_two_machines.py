"""Two machines: two network namespaces joined by one cable, one launcher on each.

Each side sees its own network devices only, so that nothing can go by the loopback of the other.
One machine is lost in mid-run, or a process of one; both start again; the end is bit-equal to that
of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import weights_in
from tests.end_to_end.started import Started
from tests.launching import cli
from tests.reference import equal

SIDES = ("accum-left", "accum-right")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "cable"


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def can_make_namespaces():
    made = shutil.which("ip") is not None and ip("netns", "add", "accum-probe").returncode == 0
    if made:
        ip("netns", "del", "accum-probe")
    return made


pytestmark = pytest.mark.skipif(
    not can_make_namespaces(), reason="this user may not make network namespaces (`ip netns add`)"
)


@pytest.fixture(scope="module")
def cable():
    for side in SIDES:
        ip("netns", "del", side)
        assert ip("netns", "add", side).returncode == 0
    made = ip(
        "link",
        "add",
        DEVICE,
        "netns",
        SIDES[0],
        "type",
        "veth",
        "peer",
        "name",
        DEVICE,
        "netns",
        SIDES[1],
    )
    assert made.returncode == 0, made.stderr
    for side, address in zip(SIDES, ADDRESSES, strict=True):
        for command in (
            ("addr", "add", f"{address}/24", "dev", DEVICE),
            ("link", "set", DEVICE, "up"),
            ("link", "set", "lo", "up"),
        ):
            assert ip("-n", side, *command).returncode == 0
    yield
    for side in SIDES:
        ip("netns", "del", side)


class Machine(Started):
    """A launcher, with its arguments, on one side of the cable."""

    def __init__(self, number, folder, launcher):
        self.side = SIDES[number]
        folder = folder / f"machine-{number}"
        folder.mkdir(exist_ok=True)
        super().__init__(
            ["ip", "netns", "exec", self.side, sys.executable, "-m", *launcher],
            folder,
            fresh=True,  # a forked process would be outside the namespace
            GLOO_SOCKET_IFNAME=DEVICE,
        )

    def lose(self):
        """The machine is gone: every process of it, at once."""
        for pid in ip("netns", "pids", self.side).stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Arguments of a training of ten updates, but for its folder."""
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{n} and {n + 1} " * (n % 5 + 1)}) + "\n" for n in range(200))
    )
    options = {
        "dataset-file": rows,
        "batch-size": 2,
        "gradient-accumulation-steps": 4,
        "lr": "1e-2",
        "steps": 10,
        "checkpoint-every": 2,
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "two.yaml"
    argv = ["config", "create", "multi-gpu", "--nodes", "2", "--gpus-per-node", "1", "-o", file]
    assert cli(*argv).returncode == 0
    return file


def start(folder, config, train, *options):
    """Start a run on both machines, by accelerate's launcher or, with options, by ours."""
    arguments = [*train, "--output-dir", folder / "run"]
    meeting = {"main-process-ip": ADDRESSES[0], "main-process-port": 29500}
    machines = []
    for number in (0, 1):
        place = {"machine-rank": number} | meeting
        if options:
            flags = [part for flag, value in place.items() for part in (f"--{flag}", value)]
            launcher = ["accum_trainer", "launch", config, *flags, *options, "--"]
        else:
            place = {"config-file": config, "num-machines": 2} | place
            flags = [
                part
                for flag, value in place.items()
                for part in (f"--{flag.replace('-', '_')}", value)
            ]
            launcher = ["accelerate.commands.launch", *flags, "-m", "accum_trainer.train"]
        machines.append(Machine(number, folder, [*launcher, *arguments]))
    return machines


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cable, config, train):
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    machines = start(folder, config, train)
    assert ended(machines) == [0, 0], machines[0].err + machines[1].err
    return folder / "run"


def losses_of(run):
    return [(record["step"], record["loss"]) for record in read_records(run / "metrics.jsonl")]


def ended(machines):
    return [machine.ended() for machine in machines]


@pytest.mark.long
def test_a_lost_machine_changes_nothing(tmp_path, config, train, whole):
    run = tmp_path / "run"
    machines = start(tmp_path, config, train)
    machines[0].until_update(run, 5)
    machines[1].lose()
    # The one that is left cannot go on, and says so with its status instead of hanging.
    assert machines[0].ended() not in (0, 75) and machines[1].ended() != 0
    assert 5 <= len(losses_of(run)) < 10
    machines = start(tmp_path, config, train)
    assert ended(machines) == [0, 0], machines[0].err + machines[1].err
    assert "continued from" in machines[0].err
    assert [step for step, _ in losses_of(run)] == list(range(1, 11))
    assert equal(weights_in(run / "model"), weights_in(whole / "model"))
    assert losses_of(run) == losses_of(whole)


def lose_process(run, rank, machine):
    """Kill a process as soon as it runs."""
    found = []
    machine.until(
        lambda: found.extend((run / "logs").glob(f".processes-*/rank-{rank}.json")) or found
    )
    os.kill(json.loads(found[0].read_text())["pid"], signal.SIGKILL)


@pytest.mark.long
def test_both_start_again_when_a_process_of_either_is_lost(tmp_path, config, train, whole):
    run = tmp_path / "run"
    machines = start(tmp_path, config, train, "--max-restarts", 1)
    for number, (update, rank) in enumerate([(3, 1), (6, 0)], 1):
        machines[0].until_update(run, update)
        lose_process(run, rank, machines[rank])
        machines[0].until(lambda n=number: machines[0].err.count("continued from") == n)
    assert ended(machines) == [0, 0], machines[0].err + machines[1].err
    again = (
        r"starting all processes again from the checkpoint of update (\d), restart 1 of at most 1"
    )
    first, second = map(int, re.findall(again, machines[0].err))
    assert 2 <= first < second
    assert machines[1].err.count("starting the processes of this node again") == 2
    assert losses_of(run) == losses_of(whole)
    assert equal(weights_in(run / "model"), weights_in(whole / "model"))
    assert not any("Traceback" in machine.err for machine in machines)


def started_again(run, machines, restart):
    """Wait until both machines run the start after so many restarts."""
    line = "starting all processes again"
    machines[0].until(lambda: machines[0].err.count(line) == restart)
    machines[0].until(lambda: machines[0].err.count("run directory: ") == restart + 1)


@pytest.mark.long
def test_node_1_ends_when_node_0_does_not_start_again(tmp_path, cable, config, train):
    train = [*train]
    train[train.index("--checkpoint-every") + 1] = 500
    run = tmp_path / "run"
    machines = start(tmp_path, config, train, "--max-restarts", 1)
    for restart in (0, 1):
        started_again(run, machines, restart)
        lose_process(run, 1, machines[1])
    assert ended(machines) == [1, 1]
    assert "not started again: 1 restart in a row ended without" in machines[0].err
    assert "not started again: node 0 has ended, with status 1" in machines[1].err
    assert not any("Traceback" in machine.err for machine in machines)
    logs = {path.name for path in (run / "logs").glob("launcher*.log")}
    assert logs == {"launcher.log", "launcher-1.log"}
    # The note of that launch does not end the next one.
    machines = start(tmp_path, config, train, "--max-restarts", 1)
    started_again(run, machines, 0)
    lose_process(run, 0, machines[0])
    assert ended(machines) == [0, 0], machines[0].err + machines[1].err


@pytest.mark.long
def test_processes_that_do_not_notice_a_lost_node_are_stopped(tmp_path, cable, config, train):
    """Process 1 is lost while process 0 does not yet talk to it, as one whose network is silent."""
    run = tmp_path / "run"
    machines = start(tmp_path, config, train, "--max-restarts", 1)
    started_again(run, machines, 0)
    [status] = (run / "logs").glob(".processes-*/rank-0.json")
    os.kill(json.loads(status.read_text())["pid"], signal.SIGSTOP)
    lose_process(run, 1, machines[1])
    assert ended(machines) == [0, 0], machines[0].err + machines[1].err
    assert "the processes of node 1 have failed, and those of this node had not" in machines[0].err
    assert machines[0].err.count("starting all processes again") == 1
