"""`launch`: logs apart, failures in their own words, stopping and continuing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest

from accum_trainer.launch.process import start_of
from accum_trainer.launch.rank import RankStatus
from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import result_of, weights_in
from tests.end_to_end.started import Started, accum_trainer, process_of, wait_for_end
from tests.launching import ROOT, cli, torchrun
from tests.reference import equal

TWO = ROOT / "launch_configs" / "cpu_2proc.yaml"


@pytest.fixture
def train(tmp_path, rows_file):
    rows = rows_file(
        "rows.jsonl", [{"text": f"{n} and {n + 1} " * (n % 5 + 1)} for n in range(200)]
    )
    return [
        "--cpu",
        "--dataset-file",
        rows,
        "--batch-size",
        2,
        "--gradient-accumulation-steps",
        4,
        "--lr",
        "1e-2",
    ]


def launch(tmp_path, *arguments, options=(), **more):
    return Started(accum_trainer("launch", TWO, *options, "--", *arguments), tmp_path, **more)


def hooked(tmp_path, code):
    """ACCUM_TESTS_HOOK of forked processes that run `code` first."""
    file = tmp_path / "hook.py"
    file.write_text(code)
    return file


def pid_of(run, rank):
    [status] = (run / "logs").glob(f".processes-*/rank-{rank}.json")
    return json.loads(status.read_text())["pid"]


def test_ctrl_c_saves_on_all_processes_and_the_same_command_continues(tmp_path, train):
    steps = [*train, "--steps", 12]
    whole = torchrun(2, "accum_trainer.train", *steps, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    arguments = [*steps, "--output-dir", tmp_path / "run"]
    started = launch(tmp_path, *arguments, options=("--max-restarts", 2))
    started.until_update(tmp_path / "run", 3)
    started.signal(signal.SIGINT)
    assert started.ended() == 75, started.err
    assert "again" not in started.err
    assert "stopped by SIGTERM" in started.err and "Traceback" not in started.err
    stopped_at = len(read_records(tmp_path / "run" / "metrics.jsonl"))
    assert 3 <= stopped_at < 12
    again = cli("launch", TWO, "--", *arguments, OMP_NUM_THREADS=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"after {stopped_at} updates" in again.stderr
    assert equal(weights_in(tmp_path / "run" / "model"), weights_in(tmp_path / "whole" / "model"))


def test_each_process_has_its_log_and_rank_0_the_screen(tmp_path, train):
    run = tmp_path / "run"
    finished = cli(
        "launch", TWO, "--", *train, "--steps", 2, "--output-dir", run, OMP_NUM_THREADS=1
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert sorted(path.name for path in (run / "logs").iterdir()) == [
        "launcher.log",
        "rank-0.log",
        "rank-1.log",
    ]
    log = (run / "logs" / "rank-0.log").read_text()
    assert "done: 2 updates" in log and log == finished.stderr
    for path in (run / "logs").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path  # messages quote rows
    assert "done" not in (run / "logs" / "rank-1.log").read_text()


@pytest.mark.long
def test_a_killed_process_is_named_and_its_run_continues(tmp_path, train):
    run = tmp_path / "run"
    arguments = [*train, "--steps", 8, "--checkpoint-every", 2, "--output-dir", run]
    started = launch(tmp_path, *arguments)
    started.until_update(run, 3)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    assert started.ended() == 1
    errors = [line for line in started.err.splitlines() if line.startswith("error")]
    assert "process 1 was killed by SIGKILL, as the kernel does when memory runs out" in errors[-1]
    assert all("process 0 lost another process " in error for error in errors[:-1])
    assert "torch.distributed.elastic" not in started.err and "ChildFailedError" not in started.err
    again = torchrun(2, "accum_trainer.train", *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 9))


def test_a_killed_process_is_started_again_with_all_others(tmp_path, train):
    steps = [*train, "--steps", 8, "--checkpoint-every", 2]
    whole = torchrun(2, "accum_trainer.train", *steps, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = tmp_path / "run"
    asked = (*steps, "--resume", "anew", "--output-dir", run)
    started = launch(tmp_path, *asked, options=("--max-restarts", 1))
    started.until(lambda: (run / "last-checkpoint.json").exists())
    os.kill(pid_of(run, 1), signal.SIGKILL)
    assert started.ended() == 0, started.err
    assert started.err.count("failed: process 1 was killed by SIGKILL") == 1
    again = re.findall(
        r"starting all processes again from the checkpoint of update (\d+), restart 1 of at most 1",
        started.err,
    )
    assert len(again) == 1 and f"after {again[0]} updates" in started.err
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 9))
    assert equal(weights_in(run / "model"), weights_in(tmp_path / "whole" / "model"))


@pytest.mark.long
def test_a_process_that_fails_at_every_start_ends_in_its_own_words(tmp_path, train):
    hooks = hooked(
        tmp_path,
        """
import os
if os.environ.get("RANK") == "1":
    import accum_trainer.train.rank_agreement as first
    def failing(engine, config):
        raise RuntimeError("the disk of process 1")
    first._check_same_options = failing
""",
    )
    arguments = (*train, "--steps", 4, "--output-dir", tmp_path / "run")
    options = ("--max-restarts", 2)
    finished = launch(tmp_path, *arguments, options=options, ACCUM_TESTS_HOOK=hooks)
    assert finished.ended() == 1
    lines = [line for line in finished.err.splitlines() if "start" in line and "again" in line]
    assert lines == [
        "starting all processes again, restart 1 of at most 2 without a new checkpoint",
        "starting all processes again, restart 2 of at most 2 without a new checkpoint",
        "not started again: 2 restarts in a row ended without a new checkpoint",
    ]
    assert finished.err.count("RuntimeError: the disk of process 1") == 3


@pytest.mark.long
def test_after_a_stop_nothing_is_started_again(tmp_path, train):
    """Process 1 is killed while it should save, as a batch system does."""
    run = tmp_path / "run"
    arguments = (*train, "--steps", 500, "--output-dir", run)
    started = launch(tmp_path, *arguments, options=("--max-restarts", 3))
    started.until_update(run, 2)
    for rank in (0, 1):
        os.kill(pid_of(run, rank), signal.SIGSTOP)
    started.signal(signal.SIGTERM)
    time.sleep(1)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    os.kill(pid_of(run, 0), signal.SIGCONT)
    assert started.ended() == 1
    assert "starting all processes again" not in started.err


def test_the_process_that_failed_first_speaks_for_itself(tmp_path, train):
    """Process 1 raises in its third micro-batch; process 0 only loses its peer."""
    hooks = hooked(
        tmp_path,
        "import os\nif os.environ.get('RANK') == '1':\n    import accum_trainer.train.loop as "
        "train\n    loss, calls = train.causal_lm_loss, []\n    def failing(model, batch):\n       "
        " calls.append(1)\n        if len(calls) == 3:\n            raise FloatingPointError('the "
        "third micro-batch of process 1')\n        return loss(model, batch)\n    "
        "train.causal_lm_loss = failing\n",
    )
    finished = launch(
        tmp_path, *train, "--steps", 4, "--output-dir", tmp_path / "run", ACCUM_TESTS_HOOK=hooks
    )
    assert finished.ended() == 1
    shown = finished.err.partition("process 1 of this training failed first, with status 1")[2]
    error = "FloatingPointError: the third micro-batch of process 1"
    assert shown.strip().endswith(error) and shown.count(error) == 1
    assert "ChildFailedError" not in finished.err


@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_wrong_input_of_another_process_than_rank_0_is_shown(tmp_path, train, start):
    """Process 1 alone has a wrong variable: rank 0, which waits for it, has nothing to say."""
    hooks = hooked(
        tmp_path,
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    os.environ['ACCUM_TRAINER_MAX_GRAD_NORM'] = 'much'\n",
    )
    arguments = [*train, "--steps", 4, "--output-dir", tmp_path / "run"]
    if start == "launch":
        options = ("--max-restarts", 2)
        finished = launch(tmp_path, *arguments, options=options, ACCUM_TESTS_HOOK=hooks)
        status, err = finished.ended(), finished.err
        assert status == 2 and "process 1 of this training failed first, with status 2" in err
        assert not (tmp_path / "run").exists()
    else:
        ended = torchrun(2, "accum_trainer.train", *arguments, ACCUM_TESTS_HOOK=hooks)
        status, err = ended.returncode, ended.stderr
        assert status == 1
    said = "error (process 1): environment: max_grad_norm='much' is not a number"
    assert err.count(said) == 1, err


def test_an_error_that_rank_0_takes_for_wrong_input_is_shown_and_its_log_kept(tmp_path, train):
    """Process 1 crashes between two exchanges; rank 0 cannot reach it and says so, with status
    2."""
    hooks = hooked(
        tmp_path,
        """
import os
if os.environ.get("RANK"):
    import atexit, time
    from accum_trainer.errors import EngineError
    import accum_trainer.train.rank_agreement as first
    def failing(engine, config):
        if engine.rank == 1:
            atexit.register(time.sleep, 20)  # the launcher sees rank 0 end first
            raise RuntimeError("the disk of process 1")
        time.sleep(3)
        raise EngineError("the processes cannot reach each other")
    first._check_same_options = failing
""",
    )
    finished = launch(
        tmp_path, *train, "--steps", 4, "--output-dir", tmp_path / "run", ACCUM_TESTS_HOOK=hooks
    )
    assert finished.ended() == 1, finished.err
    assert "RuntimeError: the disk of process 1" in finished.err
    assert "the disk of process 1" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_a_mistake_that_all_processes_find_is_shown_once(tmp_path, train):
    for finished in (
        cli(
            "launch", TWO, "--", *train, "--output-dir", tmp_path / "run", "--lr-scaling", "linear"
        ),
        torchrun(
            *(2, "accum_trainer.train", *train, "--output-dir", tmp_path / "run"),
            *("--lr-scaling", "linear"),
        ),
    ):
        assert finished.returncode != 0
        assert finished.stderr.count("lr_base_batch_size") == 1, finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_that_a_foreign_file_names_is_not_killed(tmp_path, train):
    """A start of this run on another machine left its statuses; here the PIDs are others'."""
    run = tmp_path / "run"
    bystander = subprocess.Popen(["sleep", "300"])
    try:
        started = launch(tmp_path, *train, "--steps", 3, "--output-dir", run)
        started.until_update(run, 1)
        foreign = {"rank": 7, "pid": bystander.pid, "start": None, "status": None, "ended": None}
        other = run / "logs" / f".processes-other+{bystander.pid}+1+x"
        other.mkdir()
        for place in (run / "logs", other):
            (place / "rank-7.json").write_text(json.dumps(foreign))
        assert started.ended() == 0, started.err
        assert bystander.poll() is None
        # And of its own start: the PID was given to another process after the first had ended.
        reused = RankStatus(0, bystander.pid, start_of(bystander.pid) - 1)
        assert not reused.send(signal.SIGKILL) and bystander.poll() is None
        assert RankStatus(0, bystander.pid, start_of(bystander.pid)).send(signal.SIGTERM)
        assert bystander.wait(10) == -signal.SIGTERM
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    "whole_group",
    [False, True],
    ids=["launcher", "launcher and torchrun"],
)
@pytest.mark.long
def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path, train, whole_group):
    """Nothing is left that would write into the run while the next start does; the run was
    saved."""
    run = tmp_path / "run"
    started = launch(tmp_path, *train, "--steps", 500, "--output-dir", run, fresh=True)
    started.until_update(run, 2)
    pids = [pid_of(run, rank) for rank in (0, 1)]
    if whole_group:
        os.kill(process_of("accelerate.commands.launch", str(run / "logs")), signal.SIGKILL)
        assert started.ended() == 75, started.err
    else:
        started.signal(signal.SIGKILL)
        assert started.ended() == -signal.SIGKILL
    for pid in pids:
        wait_for_end(pid)
    saved = result_of(run)
    assert not saved["done"] and saved["updates"] >= 2
