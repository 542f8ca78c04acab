"""Stopped at any moment and continued: the same weights to the bit, and each record once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from accum_trainer.errors import CheckpointError
from accum_trainer.train.checkpoint_folder import find_checkpoint
from accum_trainer.train.records import read_records
from tests.grids import thinned
from tests.launching import ROOT, environment, python, torchrun
from tests.test_checkpoint import PART, save

# 22 rows at B_eff 8 are windows of 8, 8 and 6: 4, 4 and 3 micro-batches an epoch. Dropout makes
# chance count.
K, UPDATES, MICRO_STEPS = 4, 6, 22


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """A LoRA run with dropout, so that a generator out of place would show."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{n}? ", "completion": "yes " * (n % 5 + 1)}) + "\n"
            for n in range(22)
        )
    )
    return [
        *(
            "--dataset-file",
            str(data),
            "--batch-size",
            "2",
            "--gradient-accumulation-steps",
            str(K),
        ),
        *(
            "--steps",
            str(UPDATES),
            "--lr",
            "1e-2",
            "--warmup",
            "2",
            "--checkpoint-every",
            "1",
            "--output-dir",
            "run",
        ),
        *("--use-peft", "--lora-dropout", "0.3", "--layout", "padded"),
    ]


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = python("-m", "accum_trainer.train", "--cpu", *argv, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert len(read_records(folder / "run" / "metrics.jsonl")) == UPDATES
    return folder / "run"


def assert_same_run(found, expected):
    """Equal weights to the bit, and the same records but for what time decides."""
    for name in ("adapter_model.safetensors",):
        ours, theirs = load_file(found / "model" / name), load_file(expected / "model" / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
    timed = {
        "tokens_per_sec",
        "samples_per_sec",
        "step_time_sec",
        "data_wait_sec",
        "memory_gb",
        "peak_gb",
    }
    plain = [
        [
            {k: v for k, v in record.items() if k not in timed}
            for record in read_records(run / "metrics.jsonl")
        ]
        for run in (found, expected)
    ]
    assert plain[0] == plain[1]


# One of each: nothing saved yet; a window's inner and last micro-batch after a save; the last of
# the epoch's tail; the run's last.
@pytest.mark.parametrize("micro_step", thinned(range(1, MICRO_STEPS + 1), (1, 6, 8, 11, 22)))
def test_i34_killed_at_any_micro_step(train, argv, undisturbed, tmp_path, micro_step):
    killed = train(*argv, inject={"micro_step": micro_step})
    assert killed.status == -signal.SIGKILL
    assert train(*argv).status == 0
    assert_same_run(tmp_path / "run", undisturbed)


# A save syncs the part; the part, the state, the manifest and the folder; its parent: 6; the third
# save begins at the 13th. One of each kind is enough: a file, the manifest, the folder, its parent.
@pytest.mark.parametrize("sync", thinned(range(13, 19), (13, 16, 18)))
def test_i34_killed_while_a_checkpoint_is_written(train, argv, undisturbed, tmp_path, sync):
    killed = train(*argv, inject={"sync": sync})
    assert killed.status == -signal.SIGKILL
    whole = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    # The sixth sync comes after the rename: the new one is whole, the oldest not yet deleted.
    assert whole == ["step-00000001", "step-00000002", "step-00000003"][: 3 if sync == 18 else 2]
    assert train(*argv).status == 0
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    train, argv, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    with open(newest / PART, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    finished = train(*argv)
    assert finished.status == 0
    assert (
        "part-00000-of-00001.safetensors is not what its manifest lists; falling back"
        in finished.err
    )
    assert "step-00000005 after 5 updates" in finished.err
    assert_same_run(tmp_path / "run", undisturbed)


def test_nothing_is_unpickled_that_the_manifest_does_not_vouch_for(
    train, argv, undisturbed, tmp_path
):
    """A pickle that would write a file when loaded, put where the optimizer state was: refused
    unread."""
    shutil.copytree(undisturbed, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        (step / PART).write_bytes(b"cos\nsystem\n(S'touch broken'\ntR.")
    refused = train(*argv)
    assert refused.status == 2
    assert refused.err.count("falling back") == 2
    assert "none of its checkpoints is whole" in refused.error
    assert train(*argv, "--resume", "anew").status == 0
    assert not (tmp_path / "broken").exists()
    assert_same_run(tmp_path / "run", undisturbed)


def test_finished_run_says_so_and_changes_nothing(train, argv, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    finished = train(*argv)
    assert finished.status == 0
    assert "the run was complete already" in finished.out
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    "name, asked, message",
    [
        ("steps", "2", "steps=2, but the run has gone past it: run/checkpoints/step-00000006 was "
         "written after 6 updates; give steps=6 or more"),
        ("epochs", "1", "epochs=1, but the run has gone past it: run/checkpoints/step-00000006 was "
         "written after 2 epochs; give epochs=2 or more"),
    ],
)  # fmt: skip
def test_a_run_that_has_gone_past_its_end_is_refused_and_not_touched(
    train, argv, undisturbed, tmp_path, name, asked, message
):
    shutil.copytree(undisturbed, tmp_path / "run")
    steps = argv.index("--steps")
    argv = [*argv[:steps], *argv[steps + 2 :], f"--{name}", asked]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    finished = train(*argv)
    assert finished.status == 2
    assert message in finished.error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("folder", ["model", "checkpoints", "."])
def test_a_folder_of_a_run_that_is_no_checkpoint_is_refused_with_one_that_is(tmp_path, folder):
    """The run itself is taken."""
    step = save(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / "run" / "model").mkdir()
    if folder == ".":
        assert find_checkpoint(str(tmp_path / "run"), None) == step
        return
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(str(tmp_path / "run" / folder), None)
    assert str(refused.value) == (
        f"{tmp_path}/run/{folder} is not a whole checkpoint: its manifest.json is missing; give "
        f"the run, {tmp_path}/run, or a checkpoint in it, such as {step}"
    )


def test_a_run_that_ended_with_its_last_epoch_is_complete(train, argv, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    steps = argv.index("--steps")
    finished = train(*argv[:steps], *argv[steps + 2 :], "--epochs", "2")
    assert finished.status == 0
    assert "the run was complete already" in finished.out


def test_i49_another_learning_rate_is_not_taken_said_so_and_not_recorded(
    train, argv, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "run")
    finished = train(
        *("5e-3" if value == "1e-2" else value for value in argv), "--weight-decay", "0.1"
    )
    assert finished.status == 0
    assert (
        "note: lr=0.005 is ignored: the run keeps the 0.01 that it was started with" in finished.err
    )
    assert "note: weight_decay=0.1 is ignored: the run keeps the 0 " in finished.err
    plan, config = recorded(tmp_path / "run")
    assert (
        (plan["lr"], plan["weight_decay"]) == (config["lr"], config["weight_decay"]) == (0.01, 0.0)
    )


def recorded(run):
    return json.loads((run / "plan.json").read_text()), yaml.safe_load(
        (run / "config.yaml").read_text()
    )


def test_i49_another_clipping_is_in_force_said_so_and_recorded(train, argv, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = yaml.safe_load((undisturbed / "config.yaml").read_text())["max_grad_norm"]
    finished = train(*argv, "--max-grad-norm", "0.001", "--steps", "7", "--scheduler", "linear")
    assert finished.status == 0
    assert f"note: max_grad_norm is 0.001 from here on; until now it was {before}" in finished.err
    assert "note: scheduler is linear from here on; until now it was cosine" in finished.err
    assert "note: total_updates is 7 from here on; until now it was 6" in finished.err
    plan, config = recorded(tmp_path / "run")
    for name, value in {"max_grad_norm": 0.001, "scheduler": "linear"}.items():
        assert plan[name] == config[name] == value


@pytest.mark.parametrize(
    "option, before, after", [("lora_alpha", 32.0, 16.0), ("lora_dropout", 0.3, 0.1)]
)
def test_i49_another_objective_is_refused(
    train, argv, undisturbed, tmp_path, option, before, after
):
    shutil.copytree(undisturbed, tmp_path / "run")
    finished = train(*argv, f"--{option.replace('_', '-')}", after)
    assert finished.status == 2
    assert f"was trained with {option}={before}, this run has {option}={after}" in finished.error


def test_i49_another_base_model_is_refused_and_a_moved_one_is_not(train, argv, tmp_path):
    adapters = argv.index("--use-peft")
    assert (
        train(*argv[: argv.index("--steps")], "--steps", "1", "--output-dir", "first").status == 0
    )
    (tmp_path / "first" / "model").rename(tmp_path / "base")
    lora = [*argv[: argv.index("--steps")], "--steps", "2", "--output-dir", "run", *argv[adapters:]]
    assert train(*lora, "--model", "base").status == 0
    longer = [*lora, "--steps", "3"]

    (tmp_path / "base").rename(tmp_path / "moved")
    moved = train(*longer, "--model", "moved")
    assert moved.status == 0
    assert "note: model=base is moved now; its content is the same" in moved.err

    config = tmp_path / "moved" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 0.5}))
    refused = train(*longer, "--steps", "4", "--model", "moved")
    assert refused.status == 2 and "rms_norm_eps of the model=0.5" in refused.error
    config.write_text(text)

    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    refused = train(*longer, "--steps", "4", "--model", "moved")
    assert refused.status == 2
    assert "the checksum of the weights of the model before training" in refused.error


def test_a_data_file_that_changed_since_is_refused_and_an_evaluation_file_is_said(
    train, argv, undisturbed, tmp_path
):
    """With the size and the time that it had."""
    shutil.copytree(undisturbed, tmp_path / "run")
    data = Path(argv[argv.index("--dataset-file") + 1])
    was, stat = data.read_text(), data.stat()
    (tmp_path / "eval.jsonl").write_text(was)

    def change(path):
        path.write_text(was.replace("yes", "yet", 1))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    try:
        change(data)
        refused = train(*argv, "--steps", "7")
    finally:
        data.write_text(was)
    assert refused.status == 2
    contents = rf"data={data} \(content (\w+)\), this run has data={data} \(content (\w+)\)"
    before, now = re.search(contents, refused.error).groups()
    assert before != now

    longer = (*argv, "--eval-file", "eval.jsonl", "--steps")
    said = "the evaluation rows' content is"
    first = train(*longer, "7")
    assert first.status == 0 and said not in first.err
    change(tmp_path / "eval.jsonl")
    second = train(*longer, "8")
    assert second.status == 0 and f"note: {said}" in second.err


def test_resume_from_another_runs_checkpoint_keeps_its_records(train, argv, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "first")
    step = tmp_path / "first" / "checkpoints" / "step-00000005"
    assert train(*argv, "--resume", step).status == 0
    assert_same_run(tmp_path / "run", undisturbed)


# SIGUSR1 arrives in test_slurm.py too, SIGINT in test_launch.py.
@pytest.mark.parametrize("name", thinned(["SIGTERM", "SIGUSR1", "SIGINT"], ["SIGTERM"]))
def test_signal_saves_and_exits_75(argv, undisturbed, tmp_path, name):
    """A real signal to a real process in the middle of training; the same command then
    continues."""
    command = [sys.executable, "-m", "accum_trainer.train", "--cpu", *argv]
    env = environment(OMP_NUM_THREADS=1, PYTHONPATH=ROOT)
    log_file = tmp_path / "log.jsonl"
    # Many updates, so that the signal finds the run still going.
    long = [
        *command,
        "--steps",
        "100000",
        "--checkpoint-every",
        "100000",
        "--log-file",
        str(log_file),
    ]
    process = subprocess.Popen(
        long, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(read_records(log_file)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert f"stopped by {name} after" in out
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert (tmp_path / "run" / "checkpoints" / f"step-{len(records):08d}").is_dir()
    assert (tmp_path / "run" / "loss.png").is_file()
    assert read_records(log_file) == records


def test_r26_time_limit_ends_saved_and_within_it(train, argv, tmp_path):
    finished = train(
        *argv, "--steps", "1000000", "--max-hours", str(4 / 3600), "--checkpoint-every", "100000"
    )
    assert finished.status == 75
    assert "stopped by time limit" in finished.out
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{len(records):08d}"
    # The run's clock starts before config.yaml is written; a loaded machine may stretch one update.
    begun = (tmp_path / "run" / "config.yaml").stat().st_mtime
    saved = (checkpoint / "manifest.json").stat().st_mtime
    assert saved - begun < 4 + max(record["step_time_sec"] for record in records)


def test_a_run_that_may_need_more_than_its_notice_says_so_once(train, argv):
    """Its windows, checkpoints and evaluations are measured."""
    options = ("--eval-file", argv[argv.index("--dataset-file") + 1], "--eval-every", "2")
    short = train(*argv, *options, "--notice-seconds", "0.001")
    assert short.status == 0, short.err
    said = [line for line in short.err.splitlines() if "notice_seconds" in line]
    assert len(said) == 1 and said[0].startswith("notice_seconds=0.001 is too short"), short.err
    found = re.search(r"need (.*) s \(a window (.*) s, .* (.*) s, an evaluation (.*) s\)", said[0])
    needed, window, save, evaluation = map(float, found.groups())
    assert needed == pytest.approx(window + 2 * save + evaluation, rel=0.02) and window > 0
    earlier = int(re.search(r"--signal=USR1@(\d+)$", said[0])[1])
    assert earlier >= needed
    enough = train(*argv, *options, "--notice-seconds", "3600", "--resume", "anew")
    assert enough.status == 0 and "notice_seconds" not in enough.err


def test_i37_two_processes_killed_then_continued_on_one_and_back(argv, tmp_path):
    """W=2 stopped, W=1 continues, W=2 finishes: the same windows and the same curve as never
    stopped (no dropout)."""
    argv = [a for a in argv if a not in ("--use-peft",)]
    argv = argv[: argv.index("--lora-dropout")]
    argv[
        argv.index("--gradient-accumulation-steps") : argv.index("--gradient-accumulation-steps")
        + 2
    ] = [
        "--global-batch-size",
        "8",
    ]

    def train(processes: int, steps: int, folder: str) -> None:
        out = ["--output-dir", tmp_path / folder, "--steps", steps, "--scheduler", "constant"]
        run = torchrun(
            processes, "accum_trainer.train", "--cpu", *argv[: argv.index("--output-dir")], *out
        )
        assert run.returncode == 0, run.stderr[-3000:]

    train(1, 6, "whole")
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        train(processes, steps, "moved")
    whole, moved = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "moved"))
    assert [r["world_size"] for r in moved] == [2, 2, 1, 1, 2, 2]
    assert [r["num_targets"] for r in moved] == [r["num_targets"] for r in whole]
    assert [r["loss"] for r in moved] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
