"""Two machines: two network namespaces joined by one cable, `accelerate launch --num_machines 2` on
both.

Each side sees its own network devices only, so that nothing can go by the loopback of the other.
One machine is lost in mid-run; both start again; the end is bit-equal to that of an undisturbed
run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import weights_in
from tests.end_to_end.started import Started
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
    """`accelerate launch` on one side of the cable."""

    def __init__(self, number, config, folder, train):
        self.side = SIDES[number]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        launcher += [
            "--num_machines",
            2,
            "--machine_rank",
            number,
            "--main_process_ip",
            ADDRESSES[0],
        ]
        launcher += ["--main_process_port", 29500, "-m", "accum_trainer.train"]
        folder = folder / f"machine-{number}"
        folder.mkdir(exist_ok=True)
        super().__init__(
            ["ip", "netns", "exec", self.side, *launcher, *train],
            folder,
            fresh=True,  # a forked process would be outside the namespace
            GLOO_SOCKET_IFNAME=DEVICE,
        )

    def lose(self):
        """The machine is gone: every process of it, at once."""
        for pid in ip("netns", "pids", self.side).stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_lost_machine_changes_nothing(tmp_path, command, rows_file, cable, engine):
    rows = rows_file(
        "rows.jsonl", [{"text": f"{n} and {n + 1} " * (n % 5 + 1)} for n in range(200)]
    )
    config = tmp_path / "two.yaml"
    argv = ["--nodes", "2", "--gpus-per-node", "1", "--engine", engine, "-o", config]
    assert command("config", "create", "multi-gpu", *argv, cwd=tmp_path).status == 0

    def start(name):
        train = [
            "--dataset-file",
            rows,
            "--batch-size",
            2,
            "--gradient-accumulation-steps",
            4,
            "--lr",
            "1e-2",
        ]
        train += ["--steps", 10, "--checkpoint-every", 2, "--output-dir", tmp_path / name]
        return [Machine(number, config, tmp_path, train) for number in (0, 1)]

    whole = start("whole")
    assert [machine.ended() for machine in whole] == [0, 0], whole[0].err + whole[1].err
    machines = start("run")
    machines[0].until_update(tmp_path / "run", 5)
    machines[1].lose()
    # The one that is left cannot go on, and says so with its status instead of hanging.
    assert machines[0].ended() not in (0, 75) and machines[1].ended() != 0
    survived = len(read_records(tmp_path / "run" / "metrics.jsonl"))
    assert 5 <= survived < 10
    again = start("run")
    assert [machine.ended() for machine in again] == [0, 0], again[0].err + again[1].err
    assert "continued from" in again[0].err
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == list(
        range(1, 11)
    )
    assert equal(weights_in(tmp_path / "run" / "model"), weights_in(tmp_path / "whole" / "model"))
    losses = [
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "whole")
    ]
    assert losses[0] == losses[1]
