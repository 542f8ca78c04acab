"""A process that is frozen ends the run with its name, instead of leaving the others to wait."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import time

import psutil
import pytest

from accum_trainer.train.records import read_records
from tests.end_to_end.started import Started, accum_trainer

OPTIONS = (
    *("--cpu", "--batch-size", "2", "--max-seq-len", "64", "--global-batch-size", "8"),
    *("--steps", "100000", "--checkpoint-every", "2", "--output-dir", "run", "--timeout", "4"),
)


def launched(*arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return [sys.executable, *launcher, *arguments]


def worker(started, rank):
    for process in psutil.Process(started.process.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process
    raise LookupError(rank)


# Rank 0 is the one whose output a launcher shows, and the one that holds the run's lock.
EITHER = [0, pytest.param(1, marks=pytest.mark.long)]


@pytest.mark.parametrize("frozen", EITHER)
def test_a_frozen_process_is_named(tmp_path, frozen):
    """The store that the processes meet at is torchrun's here, so that rank 0 may freeze, too."""
    started = Started(
        launched("-m", "accum_trainer.train", *OPTIONS), tmp_path, cwd=tmp_path, fresh=True
    )
    try:
        started.until_update(tmp_path / "run", 3)
        process = worker(started, frozen)
        process.suspend()
        started.until(lambda: "--timeout" in started.err)
        process.kill()
        assert started.ended() == 1
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
    host, other = socket.gethostname(), 1 - frozen
    said = next(line for line in started.err.splitlines() if "--timeout" in line)
    assert "no process got on for 4 s (--timeout), in window " in said
    assert f"process {frozen} on {host} did not answer (frozen, or the machine is gone)" in said
    assert f"process {other} on {host} is at " in said
    assert "continues from the last checkpoint" in said


@pytest.mark.parametrize("frozen", EITHER)
@pytest.mark.long
def test_the_launcher_shows_which_process_is_frozen(tmp_path, command, frozen):
    """Also if that is the one whose output it shows."""
    made = command(
        *("config", "create", "multi-gpu", "--gpus-per-node", "2", "--cpu", "-o", "two.yaml"),
        cwd=tmp_path,
    )
    assert made.status == 0, made.err
    started = Started(
        accum_trainer("launch", "two.yaml", "--", *OPTIONS), tmp_path, cwd=tmp_path, fresh=True
    )
    try:
        started.until_update(tmp_path / "run", 3)
        worker(started, frozen).suspend()
        assert started.ended() == 1
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
    host = socket.gethostname()
    assert f"process {frozen} on {host} did not answer" in started.err
    assert not (tmp_path / "run" / "run.lock").exists() or frozen == 0


LOOP = """
import os, time
from accum_trainer import TrainConfig
from accum_trainer.train import updates

config = TrainConfig(cpu=True, batch_size=2, global_batch_size=8, max_seq_len=64, steps=6,
                     output_dir="run", timeout=4)
for record in updates(config):
    if record["step"] == 2 and os.environ["RANK"] == "1":
        time.sleep(100)
print("done")
"""


@pytest.mark.long
def test_code_between_windows_that_keeps_one_process_is_named(tmp_path):
    (tmp_path / "loop.py").write_text(textwrap.dedent(LOOP))
    started = Started(launched("loop.py"), tmp_path, cwd=tmp_path, fresh=True)
    assert started.ended() == 1
    host = socket.gethostname()
    words = "between windows (saving, or the caller's own code)"
    assert f"process 1 on {host} is {words}" in started.err
    assert f"process 0 on {host} is at " in started.err


@pytest.mark.long
def test_time_in_the_callers_own_code_on_all_processes_is_not_a_hang(tmp_path):
    everywhere = LOOP.replace(' and os.environ["RANK"] == "1"', "").replace("100", "8")
    (tmp_path / "loop.py").write_text(textwrap.dedent(everywhere))
    started = Started(launched("loop.py"), tmp_path, cwd=tmp_path, fresh=True)
    assert started.ended() == 0, started.err
    assert started.out.count("done") == 2


@pytest.mark.long
def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path):
    """A batch system suspends and resumes a job with SIGSTOP and SIGCONT: the clocks go on, and no
    process hangs."""
    started = Started(
        launched("-m", "accum_trainer.train", *OPTIONS), tmp_path, cwd=tmp_path, fresh=True
    )
    try:
        started.until_update(tmp_path / "run", 3)
        both = [worker(started, rank) for rank in (0, 1)]
        for process in both:
            process.suspend()
        time.sleep(10)
        before = len(read_records(tmp_path / "run" / "metrics.jsonl"))
        for process in both:
            process.resume()
        time.sleep(12)
        started.until_update(tmp_path / "run", before + 3)
        assert "--timeout" not in started.err
    finally:
        os.killpg(started.process.pid, signal.SIGKILL)
