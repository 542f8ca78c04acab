"""`make gpu`: the same parts, small, on the CPU, so that on a GPU only the device is new.

Left out of the one go are `compile`, which takes half of the time (tests/test_compile.py compiles
the same model) and is the part that fails here, and `flex`, which needs a GPU.
"""

from __future__ import annotations

import json
import math
import sys
import time

import psutil
import pytest

from benchmarks.gpu.__main__ import short_name
from benchmarks.gpu.contract import errors_of
from benchmarks.gpu.part import PARTS, Setting
from benchmarks.gpu.report import markdown
from benchmarks.gpu.runner import run_part
from benchmarks.gpu.throughput import LOOPS, throughput
from tests.launching import python

SMALL = [name for name in PARTS if name not in ("compile", "flex")]
# Parts whose content other tests run on the CPU as well (engines, 16 bits, a loop of Trainer), and
# the test that looks at each.
LONG = {
    "sharded": "test_sharded_engines_hold_it_and_fsdp2_needs_a_launcher",
    "contract": "test_contract_is_held_on_one_process_and_on_two",
    "precision": "test_precision_bf16_follows_float32",
    "throughput": "test_throughput_against_the_trainer",
}
COMMAND = ("-m", "benchmarks.gpu")


@pytest.fixture(scope="module")
def parts(request):
    """All small parts, or all but the long ones, as tests were selected."""
    tests = {item.name for item in request.session.items}
    return [part for part in SMALL if part not in LONG or LONG[part] in tests]


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory):
    """The folder of the parts, after one run."""
    folder = tmp_path_factory.mktemp("gpu")
    run = python(
        *COMMAND,
        "--small",
        "--folder",
        folder,
        "--report",
        folder / "gpu.md",
        "--parts",
        *parts,
        timeout=1500,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return folder


def result_of(folder, part):
    """(rows as header -> cell, checks by name, notes) of a part."""
    result = json.loads((folder / f"{part}.json").read_text())["result"]
    table = result["table"]
    assert all(check["passed"] for check in result["checks"]), (part, result["checks"])
    rows = [dict(zip(table["header"], row, strict=True)) for row in table["rows"]]
    return rows, {check["name"]: check for check in result["checks"]}, result["notes"]


@pytest.mark.long
def test_every_part_has_its_checks_and_they_hold(made, parts):
    for part in parts:
        rows, checks, _ = result_of(made, part)
        assert rows and checks, part
        assert all(check["passed"] for check in checks.values()), (part, checks)


@pytest.mark.long
def test_contract_is_held_on_one_process_and_on_two(made):
    rows, _, _ = result_of(made, "contract")
    assert [(row["engine"], row["processes"], row["over"]) for row in rows] == [
        ("single", 1, "-"),
        ("two on one device", 2, "gloo"),
    ]
    for row in rows:
        assert (row["cases"], row["assertions passed"], row["failed"]) == (3, 3, 0)
        assert 0 < row["worst error against float64"] < 2e-6


@pytest.mark.long
def test_sharded_engines_hold_it_and_fsdp2_needs_a_launcher(made):
    rows, _, notes = result_of(made, "sharded")
    assert [(row["engine"], row["processes"], row["cases"]) for row in rows] == [
        ("zero2", 1, 3),
        ("fsdp2", 1, 3),
        ("fsdp2, two processes", 2, 3),
    ]
    assert all(0 < row["worst error against float64"] < 2e-6 for row in rows)
    assert any("FSDP2 shards over processes, and there is one" in note for note in notes)


@pytest.mark.long
def test_precision_bf16_follows_float32(made):
    exact, bf16 = result_of(made, "precision")[0]
    assert (exact["precision"], bf16["precision"]) == ("no", "bf16")
    assert bf16["first loss"] == pytest.approx(exact["first loss"], rel=1e-3)
    assert exact["last loss"] < exact["first loss"] - 0.1
    assert 0 < bf16["worst difference / fall in float32"] <= 0.05


@pytest.mark.long
def test_memory_ran_out_and_auto_stays_below_the_limit(made):
    rows, _, _ = result_of(made, "memory")
    found = {row["what"]: row["found"] for row in rows}
    assert found["splits with all memory"] == 0 and found["splits with less"] > 0
    assert found["micro-batches with less"][:2] == [16, 8]
    assert found["update against that with all memory, relative"] < 1e-6
    assert found["gradient against float64 by hand, relative"] < 1e-6
    assert found["--batch-size auto: samples found"] == 8
    assert 0 < found["peak while training, GB"] < found["limit, GB"]


@pytest.mark.long
def test_packing_is_proven_and_exact(made):
    rows = result_of(made, "packing")[0]
    assert [row["attention"] for row in rows] == ["sdpa"] * 2 + ["packed_sdpa"] * 2
    for exact, bf16 in (rows[:2], rows[2:]):
        assert exact["proof"] == "logits and gradient of packed samples are those of each alone"
        assert 0 < exact["error of packed"] < 2e-6 and 0 < exact["error of padded"] < 2e-6
        assert 1e-4 < bf16["error of packed"] < 1.25 * bf16["error of padded"]


@pytest.mark.long
def test_waits_are_counted_and_their_callers_named(made):
    rows, _, notes = result_of(made, "waits")
    found = {(row["layout"], row["event"]): row for row in rows}
    # The loss knows its targets from the host.
    assert found["padded", "aten::nonzero"]["in all micro-batches"] == 0
    assert found["packed, sdpa", "aten::_local_scalar_dense"]["in the step"] > 0
    assert any(" engine/ranks.py:" in note for note in notes)  # the exchange that ends the window


@pytest.mark.long
def test_footprint_is_estimated_and_said_not_to_be_measured(made):
    rows, _, _ = result_of(made, "footprint")
    assert [(row["model"], row["trained"]) for row in rows] == [
        ("1M", "all"), ("1M", "LoRA"), ("9M", "all"), ("9M", "LoRA")
    ]  # fmt: skip
    assert {row["measured MB"] for row in rows} == {"not measured"}
    small, small_lora, large, large_lora = (float(row["estimated MB"]) for row in rows)
    # Weights, gradient and two moments in float32 are 16 bytes per parameter; a LoRA has the
    # weights only.
    for total, lora, row in ((small, small_lora, rows[0]), (large, large_lora, rows[2])):
        millions = float(row["parameters"].rstrip("M"))
        assert 16 * millions < total and 4 * millions < lora < total


@pytest.mark.long
def test_throughput_against_the_trainer(made):
    rows, _, _ = result_of(made, "throughput")
    assert [row["loop"] for row in rows] == list(LOOPS.values())
    speeds = [float(row["useful tokens/s"].replace(",", "")) for row in rows]
    for speed, row in zip(speeds, rows, strict=True):
        assert speed > 0 and float(row["peak GB"]) > 0
        assert float(row["over Trainer"]) == pytest.approx(speed / speeds[0], abs=0.01)


@pytest.mark.long
def test_report_has_versions_a_table_per_part_and_the_verdict(made, parts):
    text = (made / "gpu.md").read_text()
    assert "**All parts passed.**" in text and "torch 2" in text and "accelerate 1" in text
    assert text.count("\n## ") == len(parts)
    for part in parts:
        section = text.split(f"\n## {part}\n")[1].split("\n## ")[0]
        assert section.count("\n| --- |") == 2, part  # what was found, and the checks


@pytest.mark.long
def test_a_second_run_runs_no_part_again(made, parts):
    before = {part: (made / f"{part}.log").stat().st_mtime_ns for part in parts}
    report = (made / "gpu.md").read_text()
    run = python(
        *COMMAND, "--small", "--folder", made, "--report", made / "gpu.md", "--parts", *parts
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("has a result") == len(parts)
    assert {part: (made / f"{part}.log").stat().st_mtime_ns for part in parts} == before
    assert (made / "gpu.md").read_text() == report


@pytest.mark.long
def test_a_part_that_fails_is_shown_in_its_own_words_and_run_again(tmp_path):
    asked = ("--small", "--folder", tmp_path, "--parts", "compile")
    run = python(*COMMAND, *asked, CXX="/no/such/compiler", fresh=True)
    assert run.returncode == 1
    report = (tmp_path / "report.md").read_text()
    assert "**Not passed: compile.**" in report
    assert (
        "failed:" in report
        and "ConfigError: compile=true does not work here: InvalidCxxCompiler" in report
    )
    run = python(
        *COMMAND, *asked, "--limit", 0.5, fresh=True
    )  # it has no result: it is run, and ended
    assert run.returncode == 1 and "has a result" not in run.stdout
    report = (tmp_path / "report.md").read_text()
    assert (
        "out of time:" in report
        and "ended after 0 s" in report
        and "InvalidCxxCompiler" not in report
    )


def test_a_part_that_is_killed_is_shown_and_what_it_started_is_ended(tmp_path):
    setting = Setting("cpu", True, str(tmp_path))
    killed = "import os; print('before the end', flush=True); os.kill(os.getpid(), 9)"
    outcome = run_part("memory", setting, 60, [sys.executable, "-c", killed])
    assert outcome.state == "failed" and not outcome.passed
    assert outcome.words == "it ended with signal 9; its last words:\nbefore the end"
    text = markdown([outcome], "a device", "versions", True)
    assert (
        "Not passed: memory" in text
        and "it ended with signal 9" in text
        and "before the end" in text
    )

    child = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '99']); print(p.pid, "
        "flush=True); p.wait()"
    )
    begun = time.monotonic()
    outcome = run_part("memory", setting, 2, [sys.executable, "-c", child])
    assert outcome.state == "out of time" and time.monotonic() - begun < 30
    assert not psutil.pid_exists(int(outcome.words.split()[-1]))


def test_a_check_that_fails_is_shown_and_not_passed(tmp_path):
    result = {"table": {"header": ["a"], "rows": [[1.0]]}, "notes": [], "checks": []}
    result["checks"] = [{"name": "errors", "passed": False, "words": "0.5, at most 0.1"}]
    write = (
        "import pathlib; "
        f"pathlib.Path({str(tmp_path / 'waits.result')!r}).write_text({json.dumps(result)!r})"
    )
    outcome = run_part(
        "waits", Setting("cpu", True, str(tmp_path)), 60, [sys.executable, "-c", write]
    )
    assert outcome.state == "done" and not outcome.passed
    text = markdown([outcome], "a device", "versions", False)
    assert (
        "| waits | 1 of 1 checks failed |" in text
        and "| errors | **FAILED** | 0.5, at most 0.1 |" in text
    )


def test_throughput_keeps_what_it_has_when_its_time_is_over(tmp_path):
    """On a slow machine all was lost that had been measured."""
    result = throughput(Setting("cpu", True, str(tmp_path), limit=20.0))  # less than a start needs
    assert not result.table.rows and {c.words for c in result.checks} == {
        "the part's time was over"
    }
    assert [c.name for c in result.checks] == [f"1M, {loop}: runs" for loop in LOOPS]


def test_without_a_gpu_one_message(tmp_path):
    run = python(*COMMAND, "--folder", tmp_path / "none", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2 and "no NVIDIA GPU is visible to torch" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "none").exists()


def test_names_and_errors():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "Tesla T4": "t4",
    }
    assert {name: short_name(name) for name in names} == names
    found = {
        "a": {"errors": [1.0, [2.0]], "scales": [9.0], "sizes": [[3, 3]]},
        "b": {"cuts": {"c": {"loss_errors": [3.0]}}},
    }
    kinds = {"errors_by_kind": {"llama no": [4.0], "llama bf16": [5.0]}}
    assert sorted(errors_of([found, kinds])) == [1.0, 2.0, 3.0, 4.0]
    assert not any(math.isnan(error) for error in errors_of(found))
