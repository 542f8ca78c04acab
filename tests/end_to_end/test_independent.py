"""Independent runs side by side, as users start them: shares of the data, variations, crashes,
stops."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.errors import DataError
from accum_trainer.sources.dataset import PlannedSource
from accum_trainer.sources.options import SourceOptions
from accum_trainer.train.records import read_records
from accum_trainer.window_plan import global_order
from tests.end_to_end.started import Started, accum_trainer, process_of
from tests.end_to_end.test_launch import hooked
from tests.launching import cli, environment

SIDE_BY_SIDE = ["--cpu", "--parallel-independent"]


@pytest.fixture
def rows(rows_file):
    # Every row has its own number of targets, so that a sum of targets tells which rows were
    # trained on.
    return rows_file(
        "rows.jsonl", [{"prompt": f"{n}:", "completion": " x" * (n + 1)} for n in range(90)]
    )


def records_of(folder, part):
    return read_records(folder / f"part-{part}" / "metrics.jsonl")


def targets_by_shard(rows_path, shards, epochs=1):
    """Targets that each shard must train on, from the global order and hand-counted rows."""
    from accum_trainer import TrainConfig
    from accum_trainer.lm.model import load_tokenizer
    from accum_trainer.train.rows import load_rows

    config = TrainConfig(dataset_file=str(rows_path))
    rows = load_rows(config, load_tokenizer(config))[0]
    counts = np.array(
        [sum(label != -100 for label in rows[i]["labels"][1:]) for i in range(len(rows))]
    )
    assert len(set(counts.tolist())) > 60  # rows can be told apart
    return [
        sum(
            int(counts[global_order(len(rows), 0, epoch)[i::shards]].sum())
            for epoch in range(epochs)
        )
        for i in range(shards)
    ]


@pytest.mark.long
def test_four_shards_with_one_killed_train_every_sample_once(tmp_path, rows):
    """Over two epochs; part 2 is killed twice in mid-run and restarted; the others never notice."""
    folder = tmp_path / "set"
    arguments = [
        *SIDE_BY_SIDE,
        "--cuda-ids",
        "0,1,2,3",
        "--dataset-file",
        rows,
        "--batch-size",
        1,
        "--epochs",
        2,
    ]
    started = Started(
        accum_trainer(
            "train",
            *arguments,
            "--gradient-accumulation-steps",
            2,
            "--checkpoint-every",
            4,
            "--output-dir",
            folder,
        ),
        tmp_path,
    )
    log = folder / "logs" / "part-2.log"
    for kill in (1, 2):
        started.until(lambda kill=kill: len(records_of(folder, 2)) >= 7 * kill)
        os.kill(process_of("accum_trainer.train", str(log.with_suffix(".yaml"))), signal.SIGKILL)
        started.until(lambda kill=kill: log.read_text().count("continued from") == kill)
    assert started.ended() == 0, started.err
    summary = json.loads((folder / "summary.json").read_text())["runs"]
    assert [run["restarts"] for run in summary] == [0, 0, 2, 0]
    assert [run["state"] for run in summary] == ["done"] * 4
    # 90 samples: shards of 23, 23, 22, 22, in each of two epochs; and the very rows of each shard,
    # by their targets.
    assert [sum(r["effective_batch_size"] for r in records_of(folder, i)) for i in range(4)] == [
        46,
        46,
        44,
        44,
    ]
    assert [
        sum(r["num_targets"] for r in records_of(folder, i)) for i in range(4)
    ] == targets_by_shard(rows, 4, epochs=2)
    assert [run["num_samples"] for run in summary] == [46, 46, 44, 44]
    assert "done: 4 of 4 runs done, 180 samples trained, 2 restarts" in started.out
    assert (folder / "loss.png").stat().st_size > 10_000
    # From the same weights, on data of their own.
    plans = [json.loads((folder / f"part-{i}" / "plan.json").read_text()) for i in range(4)]
    assert len({plan["initial_weights"] for plan in plans}) == 1
    ends = [
        load_file(folder / f"part-{i}" / "model" / "model.safetensors")["model.norm.weight"]
        for i in range(4)
    ]
    assert not any(torch.equal(ends[0], end) for end in ends[1:])


def test_vary_stop_and_continue(tmp_path, rows):
    """Three learning rates on two slots: the third waits; a stop saves; the same command finishes;
    each is as if alone."""
    folder = tmp_path / "set"
    common = ["--dataset-file", rows, "--batch-size", 2, "--steps", 30]
    arguments = [
        *SIDE_BY_SIDE,
        "--cuda-ids",
        "0,1",
        "--vary",
        "lr=1e-3,1e-2,3e-2",
        *common,
        "--output-dir",
        folder,
    ]
    started = Started(accum_trainer("train", *arguments), tmp_path)
    started.until(lambda: len(records_of(folder, 0)) >= 3 and len(records_of(folder, 1)) >= 3)
    assert not (folder / "part-2").exists()
    started.signal(signal.SIGINT)
    assert started.ended() == 75, started.err
    stopped = [len(records_of(folder, i)) for i in range(3)]
    assert 3 <= stopped[0] < 30 and stopped[2] == 0
    assert "continues" in started.out
    again = cli("train", *arguments, OMP_NUM_THREADS=1)
    assert again.returncode == 0, again.stderr
    assert [len(records_of(folder, i)) for i in range(3)] == [30, 30, 30]
    peaks = [max(record["lr"] for record in records_of(folder, i)) for i in range(3)]
    assert peaks == [1e-3, 1e-2, 3e-2]
    alone = cli(
        "train",
        "--cpu",
        *common,
        "--lr",
        "1e-2",
        "--output-dir",
        tmp_path / "alone",
        OMP_NUM_THREADS=1,
    )
    assert alone.returncode == 0, alone.stderr
    mine = [record["loss"] for record in records_of(folder, 1)]
    assert mine == [record["loss"] for record in read_records(tmp_path / "alone" / "metrics.jsonl")]
    # Their mean is no result: the best is named, here and by merge, and only who names runs one by
    # one gets it.
    ends = [records_of(folder, i)[-1]["loss"] for i in range(3)]
    best = ends.index(min(ends))
    told = f"part-{best} lr={('1e-3', '1e-2', '3e-2')[best]}, loss {min(ends):.4f}"
    assert told in again.stdout and f"{folder}/part-{best}/model" in again.stdout
    assert "merge" not in again.stdout
    merged = cli("merge", folder, OMP_NUM_THREADS=1)
    assert merged.returncode == 2, merged.stderr
    assert "differ in lr" in merged.stderr and told in merged.stderr
    assert merged.stderr.count("error") == 1 and not (folder / "merged").exists()
    # Other runs in the same folder would not be these.
    other = cli("train", *[a if a != "lr=1e-3,1e-2,3e-2" else "lr=1e-4,1e-5" for a in arguments])
    assert (
        other.returncode == 2 and "3 runs (lr=1e-3; lr=1e-2; lr=3e-2), and 2 runs" in other.stderr
    )


def test_runs_that_are_stopped_before_they_save_do_not_say_that_they_saved(tmp_path, rows):
    folder = tmp_path / "set"
    arguments = [*SIDE_BY_SIDE, "--cuda-ids", "0,1", "--dataset-file", rows, "--steps", 500]
    started = Started(accum_trainer("train", *arguments, "--output-dir", folder), tmp_path)
    started.until(lambda: (folder / "logs" / "part-1.log").exists())
    started.signal(signal.SIGTERM)
    assert started.ended() == 128 + signal.SIGTERM, started.err
    assert not list(folder.glob("part-*/result.json"))


def test_a_run_that_keeps_crashing_is_given_up_and_the_other_ends(tmp_path, rows):
    folder = tmp_path / "set"
    hook = hooked(
        tmp_path,
        "import sys\nif any('part-1.yaml' in argument for argument in sys.argv):\n    import "
        "accum_trainer.train.loop as train\n    def failing(model, batch):\n        raise "
        "RuntimeError('device 1 went away')\n    train.causal_lm_loss = failing\n",
    )
    arguments = [
        *SIDE_BY_SIDE,
        "--cuda-ids",
        "0,1",
        "--max-restarts",
        1,
        "--dataset-file",
        rows,
        "--steps",
        4,
    ]
    finished = cli(
        "train", *arguments, "--output-dir", folder, ACCUM_TESTS_HOOK=hook, OMP_NUM_THREADS=1
    )
    assert finished.returncode == 1, finished.stderr
    assert "part-1 failed: RuntimeError: device 1 went away" in finished.stderr
    assert "Traceback" not in finished.stderr
    states = {
        run["name"]: (run["state"], run["restarts"])
        for run in json.loads((folder / "summary.json").read_text())["runs"]
    }
    assert states == {"part-0": ("done", 0), "part-1": ("failed", 1)}
    assert len(records_of(folder, 0)) == 4


@pytest.mark.long
def test_a_terminal_shows_one_table_of_all_runs(tmp_path, rows):
    screen, inside = pty.openpty()
    argv = [
        *SIDE_BY_SIDE,
        "--cuda-ids",
        "0,1",
        "--vary",
        "lr=1e-3,1e-2",
        "--dataset-file",
        rows,
        "--steps",
        3,
    ]
    process = subprocess.Popen(
        [str(part) for part in accum_trainer("train", *argv, "--output-dir", tmp_path / "set")],
        stdout=inside,
        stderr=inside,
        env=environment(OMP_NUM_THREADS=1, TERM="xterm", COLUMNS=120),
    )
    os.close(inside)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 65536)
        except OSError:  # the other side is closed
            break
    assert process.wait() == 0
    last = shown.decode().rpartition("tokens/s")[2]
    for part, lr in (("part-0", "1e-3"), ("part-1", "1e-2")):
        row = next(line for line in last.splitlines() if part in line and lr in line)
        assert "done" in row and "3/3" in row, row


def test_through_a_configuration_and_merged(tmp_path, rows, command):
    """config create -> launch -> merge, as the guide has it."""
    argv = [
        "--gpus-per-node",
        "2",
        "--cpu",
        "--batch-size",
        "4",
        "--gradient-accumulation-steps",
        "2",
        "-o",
        "two.yaml",
    ]
    assert command("config", "create", "parallel-independent", *argv, cwd=tmp_path).status == 0
    folder = tmp_path / "set"
    finished = cli(
        "launch",
        tmp_path / "two.yaml",
        "--",
        "--dataset-file",
        rows,
        "--output-dir",
        folder,
        OMP_NUM_THREADS=1,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"done: 2 of 2 runs done, 90 samples trained, 0 restarts", finished.stdout)
    merged = command("merge", folder, "--eval-file", rows, cwd=tmp_path)
    assert merged.status == 0, merged.err
    parts = [load_file(folder / f"part-{i}" / "model" / "model.safetensors") for i in range(2)]
    mean = load_file(folder / "merged" / "model.safetensors")
    for name, tensor in mean.items():
        exact = (parts[0][name].double() * 45 + parts[1][name].double() * 45) / 90
        assert (tensor.double() - exact).norm() <= 1e-7 * exact.norm(), name


def test_dry_run_writes_nothing(tmp_path, command, rows):
    argv = [
        *SIDE_BY_SIDE,
        "--cuda-ids",
        "0,1",
        "--vary",
        "lr=1,2; seed=3,4",
        "--dry-run",
        "--dataset-file",
        rows,
    ]
    finished = command("train", *argv, "--output-dir", "set", cwd=tmp_path)
    assert finished.status == 0 and not (tmp_path / "set").exists()
    shown = re.findall(r"^part-\d  (.*)$", finished.err, re.MULTILINE)
    assert shown == ["lr=1 seed=3", "lr=1 seed=4", "lr=2 seed=3", "lr=2 seed=4"]


@pytest.mark.parametrize(("size", "shards"), [(10, 3), (7, 7), (5, 1), (101, 4)])
def test_shards_hold_each_sample_once_in_every_epoch(size, shards):
    data = [{"x": torch.tensor(i)} for i in range(size)]

    def seen(shard, epoch):
        options = SourceOptions(seed=5, shard=(shard, shards))
        source = PlannedSource(data, BatchPlan(2, 2, 1), 0, options)
        parts = list(source.shares(epoch, 0))
        assert len(parts) == source.num_windows()
        return [int(i) for part in parts for batch in part.batches for i in batch["x"]]

    for epoch in (0, 1):
        assert sorted(sample for i in range(shards) for sample in seen(i, epoch)) == list(
            range(size)
        )
    with pytest.raises(DataError, match="is empty"):
        PlannedSource(data, BatchPlan(2, 2, 1), 0, SourceOptions(seed=5, shard=(size, size + 1)))


def test_a_share_of_the_data_cannot_be_had_of_a_stream():
    from accum_trainer import Accumulator

    with pytest.raises(DataError, match="is a share of a map-style data set; generator is none"):
        Accumulator(micro_batch_size=1, cpu=True).windows((x for x in []), shard=(0, 2))
