"""How windows are cut, from the command line: the same losses, less padding, shares as asked
for."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from accum_trainer.lm.packed_attention import PACKED_SDPA
from accum_trainer.train.records import read_records
from tests.launching import torchrun


@pytest.fixture
def rows(rows_file):
    """Lengths that are skewed as instruction data are."""
    return rows_file(
        "rows.jsonl",
        [{"prompt": f"{n}:", "completion": " x" * (1 + n * n // 40)} for n in range(96)],
    )


def curve(records):
    return [record["loss"] for record in records]


def test_every_cut_logs_the_same_losses(train, tmp_path, rows):
    common = [
        "--dataset-file",
        rows,
        "--global-batch-size",
        "32",
        "--epochs",
        "1",
        "--max-seq-len",
        "256",
    ]
    runs = {
        "by B": ["--batch-size", "8", "--layout", "padded"],
        "to a multiple": ["--batch-size", "8", "--pad-to-multiple-of", "16"],
        "by tokens": ["--max-tokens-per-micro-batch", "512", "--layout", "padded"],
        "packed": ["--batch-size", "8", "--layout", "packed"],
        "packed by tokens": ["--max-tokens-per-micro-batch", "512", "--layout", "packed"],
    }
    found = {}
    for name, argv in runs.items():
        finished = train(*common, *argv, "--output-dir", name)
        assert finished.status == 0, finished.err
        found[name] = read_records(tmp_path / name / "metrics.jsonl")
    for records in found.values():
        assert curve(records) == pytest.approx(curve(found["by B"]), rel=1e-5)
        assert [record["effective_batch_size"] for record in records] == [32, 32, 32]
        assert [record["num_tokens"] for record in records] == [
            record["num_tokens"] for record in found["by B"]
        ]
    efficiency = {
        name: min(record["padding_efficiency"] for record in records)
        for name, records in found.items()
    }
    assert efficiency["packed"] == efficiency["packed by tokens"] == 1.0
    assert efficiency["to a multiple"] < efficiency["by B"] < efficiency["by tokens"]
    plan = json.loads((tmp_path / "packed by tokens" / "plan.json").read_text())
    assert (plan["layout"], plan["max_tokens_per_micro_batch"]) == ("packed", 512)
    assert (
        plan["layout_reason"]
        == "asked for; proven: logits and gradient of packed samples are those of each alone"
    )
    assert plan["physical_batch_size"] is None and plan["effective_batch_size"] == 32
    assert json.loads((tmp_path / "by B" / "plan.json").read_text())["layout"] == "padded"


def test_i40_a_cpu_packs_by_itself_and_nothing_changes(train, tmp_path, rows):
    """The same updates as padded, without a padded token; `model/` names no attention of ours."""
    options = ["--dataset-file", rows, "--batch-size", "4", "--global-batch-size", "8"]
    options += ["--steps", "3", "--lr", "1e-2"]
    runs = {
        "auto": [],
        "named": ["--attention", PACKED_SDPA],
        "padded": ["--layout", "padded"],
        "multiple": ["--pad-to-multiple-of", "8"],
    }
    for name, argv in runs.items():
        finished = train(*options, *argv, "--output-dir", name)
        assert finished.status == 0, finished.err
    plans = {name: json.loads((tmp_path / name / "plan.json").read_text()) for name in runs}
    assert [(plan["layout"], plan["attention"]) for plan in plans.values()] == [
        *[("packed", PACKED_SDPA)] * 2,
        *[("padded", "sdpa")] * 2,
    ]
    padded = read_records(tmp_path / "padded" / "metrics.jsonl")
    for name in ("auto", "named"):
        packed = read_records(tmp_path / name / "metrics.jsonl")
        assert [record["padding_efficiency"] for record in packed] == [1.0] * 3
        assert curve(packed) == pytest.approx(curve(padded), rel=1e-6)
    assert all(record["padding_efficiency"] < 1.0 for record in padded)
    assert PACKED_SDPA not in (tmp_path / "auto" / "model" / "config.json").read_text()


@pytest.mark.long
def test_a_token_budget_continues_to_the_bit(train, tmp_path, rows):
    """The measured cost that the cut of padded samples depends on is kept: a continued run cuts its
    windows as before."""
    common = [
        "--dataset-file",
        rows,
        "--global-batch-size",
        "16",
        "--max-tokens-per-micro-batch",
        "512",
        *("--layout", "padded"),
    ]
    assert train(*common, "--steps", "6", "--output-dir", "whole").status == 0
    stopped = train(
        *common,
        "--steps",
        "6",
        "--checkpoint-every",
        "2",
        "--output-dir",
        "run",
        inject={"micro_step": 20},
    )
    assert stopped.status == -9
    assert (
        train(*common, "--steps", "6", "--checkpoint-every", "2", "--output-dir", "run").status == 0
    )
    whole, run = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert curve(run) == curve(whole) and len(run) == 6
    assert [record["num_micro_batches"] for record in run] == [
        record["num_micro_batches"] for record in whole
    ]


def test_r55_shares_of_two_processes(tmp_path, rows):
    """3:1: the samples of each process by its own count, and the losses of one process."""
    common = [
        "--cpu",
        "--dataset-file",
        rows,
        "--global-batch-size",
        "32",
        "--epochs",
        "1",
        "--max-seq-len",
        "256",
    ]
    shared = [
        *common,
        "--batch-size",
        "2",
        "--rank-weights",
        "3:1",
        *("--layout", "padded"),  # in K micro-batches
        *("--noise-every", "0"),  # a window that is measured is cut at random
        "--output-dir",
        tmp_path / "shared",
    ]
    finished = torchrun(2, "accum_trainer.train", *shared, OMP_NUM_THREADS=1)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "shares of the processes 3, 1" in finished.stderr
    alone = torchrun(
        1, "accum_trainer.train", *common, "--batch-size", "2", "--output-dir", tmp_path / "alone"
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    records = read_records(tmp_path / "shared" / "metrics.jsonl")
    assert curve(records) == pytest.approx(
        curve(read_records(tmp_path / "alone" / "metrics.jsonl")), rel=1e-5
    )
    # 16 micro-batches: 12 on the process with the larger share.
    assert [record["gradient_accumulation_steps"] for record in records] == [12, 12, 12]
    wrong = torchrun(
        2,
        "accum_trainer.train",
        *common,
        "--rank-weights",
        "3,2,1",
        "--output-dir",
        tmp_path / "wrong",
    )
    assert "rank_weights=3,2,1 are 3 shares, but there are 2 processes" in wrong.stderr
    assert not (tmp_path / "wrong").exists()


def test_r53_the_micro_batch_that_fits_keeps_the_effective_batch(train, tmp_path, rows):
    """auto finds a micro-batch, says so in the plan, and logs the losses of a B given by hand."""
    common = [
        "--dataset-file",
        rows,
        "--global-batch-size",
        "16",
        "--steps",
        "2",
        "--max-seq-len",
        "256",
    ]
    finished = train(*common, "--batch-size", "auto", "--output-dir", "auto")
    assert finished.status == 0, finished.err
    assert (
        "batch size found: 16 samples of" in finished.err
    )  # all of the share of a process: this model is small
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text())
    found = plan["batch_size_found"]
    assert (
        found["micro_batch_size"] == 16
        and plan["max_tokens_per_micro_batch"] == found["max_tokens"]
    )
    assert 0 < found["needed_gb"] < found["limit_gb"] and plan["effective_batch_size"] == 16
    assert train(*common, "--batch-size", "4", "--output-dir", "four").status == 0
    losses = [curve(read_records(tmp_path / name / "metrics.jsonl")) for name in ("auto", "four")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # The pictures are titled with the split in force, not with the one that was asked for.
    titles = [Image.open(tmp_path / name / "loss.png").text["Title"] for name in ("auto", "four")]
    limit = f"at most {found['max_tokens']:,} tokens per micro-batch"
    assert titles == [
        f"auto: {limit}, W 1, effective batch 16",
        "four: B 4 x K 4 x W 1 = effective batch 16, packed",
    ]


def test_a_plan_needs_a_number(command, tmp_path):
    finished = command("plan", "--batch-size", "auto", "--global-batch-size", "64", cwd=tmp_path)
    assert finished.status == 2 and "is found on the device when training starts" in finished.error
