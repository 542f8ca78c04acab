"""Every file of examples/ runs, and shows what it says; examples/README.md lists them."""

from __future__ import annotations

import difflib
import re
import shutil

import pytest

from tests.launching import ROOT, shell

EXAMPLES = ROOT / "examples"
CLUSTER = ROOT / "tests" / "cluster"


@pytest.fixture
def run(tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))

    def _run(command: str) -> str:
        finished = shell(f"export OMP_NUM_THREADS=1; cd examples; {command}", tmp_path)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout

    return _run


def figures(name: str, text: str) -> list[float]:
    return [float(figure) for figure in re.findall(rf"\b{name} +([\d.]+)", text)]


def test_only_the_loop_made_exact_gives_one_result_for_both_cuts(run):
    said = run(
        "for cut in 4 16; do python accelerate_before.py $cut; done; "
        "for cut in 4 16; do python accelerate_after.py $cut; done"
    )
    before, before_whole, after, after_whole = figures("loss", said)
    assert abs(after - after_whole) <= 2e-6 < 1e-3 < abs(before - before_whole)
    # One big batch of Accelerate's own is exact, too, but for the mean over its tail.
    assert abs(after - before_whole) <= 2e-6


def test_the_exact_loop_differs_in_marked_lines_only():
    lines = [
        re.sub(r'^""".*?"""', "", (EXAMPLES / f"accelerate_{name}.py").read_text(), flags=re.S)
        for name in ("before", "after")
    ]
    changes = list(difflib.ndiff(*(text.splitlines() for text in lines)))
    assert sum(line.startswith("- ") for line in changes) <= 9
    assert sum(line.startswith("+ ") for line in changes) <= 11


def test_lora_with_zero2_is_the_update_of_one_process(run):
    said = run(
        "python lora_zero2.py; torchrun --standalone --nproc_per_node 2 lora_zero2.py 2>/dev/null"
    )
    for name in ("loss", "norm"):
        one, two = figures(name, said)[:3], figures(name, said)[3:]
        assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)


def test_single_process_examples(run):
    said = run(
        "for cut in 4 16; do python own_loss.py $cut; done; "
        "python classification.py; python vision.py; python streaming.py"
    )
    own, whole = re.findall(r"updates 40  loss ([\d.]+)", said)
    assert float(own) == pytest.approx(float(whole), abs=2e-6) and float(own) < 0.6
    assert figures("accuracy", said)[-1] >= 0.9
    assert "correct 8 of 8" in said
    assert figures("samples", said) == [8, 8, 8, 8, 8, 2]  # 42 rows: none dropped, none repeated


def test_a_stream_on_two_processes_ends_unevenly(run):
    said = run("torchrun --standalone --nproc_per_node 2 streaming.py")
    # 20 rows on one process and 22 on the other.
    assert sum(figures("samples", said)) == 42 and figures("samples", said)[-1] < 16


def test_the_hydra_application_takes_a_policy(run):
    said = run("cd hydra_app; python train.py; python train.py accumulate_grad_batches=high")
    assert "B 4 x K 2 x W 1 = effective batch 8" in said
    assert "B 4 x K 8 x W 1 = effective batch 32" in said
    assert figures("updates", said) == [16, 4]


def test_slurm_from_files_to_model(run, tmp_path):
    smaller = "NODES=1 GPUS=2 ENGINE=ddp CPU=1"
    said = run(f'export STAND_IN="$PWD" PATH="{CLUSTER}:$PATH"; {smaller} bash slurm.sh')
    assert "effective batch      64   (B 4 x K 8 x W 2 = effective batch 64)" in said
    assert "for from_pretrained: runs/job-4711/model" in said
    assert (tmp_path / "examples/runs/job-4711/model/model.safetensors").exists()
    assert '"step": 4' in said  # 200 rows: three updates of 64, and one of 8


def test_every_example_is_short_and_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.rglob("*"):
        name = str(file.relative_to(EXAMPLES))
        if file.suffix in (".py", ".sh"):
            assert f"({name})" in table, f"{name} is not in examples/README.md"
            assert name == "demo.py" or len(file.read_text().splitlines()) < 60, name
