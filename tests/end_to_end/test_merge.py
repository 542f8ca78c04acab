"""`merge` as users run it: on runs that `train` made, and on input that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from accum_trainer.config import TrainConfig
from tests.end_to_end.wrong import snapshot
from tests.launching import environment
from tests.made_runs import list_runs, make_run

ARGV = [
    "--batch-size",
    "4",
    "--max-seq-len",
    "64",
    "--lr",
    "1e-2",
    "--eval-every",
    "2",
    "--seed",
    "3",
]


@pytest.fixture
def shards(train, tmp_path):
    """Two trainings on a share each, of 2 and 3 updates; returns the folder of both."""

    def run(*extra):
        for part in range(2):
            argv = [*ARGV, *extra, "--steps", f"{2 + part}", "--shard", f"{part}/2"]
            finished = train(*argv, "--output-dir", f"runs/two/part-{part}")
            assert finished.status == 0, finished.err
        return list_runs(tmp_path / "runs" / "two", "part-0", "part-1")

    return run


def losses(finished):
    """The evaluation losses of the table, by part."""
    return {
        cells[0]: float(cells[3])
        for line in finished.out.splitlines()
        if len(cells := line.split()) == 4
    }


def trained_loss(folder, part):
    return json.loads((folder / part / "result.json").read_text())["eval_loss"]


def test_shards_of_a_whole_model(command, shards, tmp_path):
    folder = shards()
    finished = command("merge", "runs/two", cwd=tmp_path)
    assert finished.status == 0, finished.err
    lines = finished.out.splitlines()
    assert lines[0].split() == ["run", "samples", "weight", "evaluation", "loss"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["part-0", "8", "0.4000"],
        ["part-1", "12", "0.6000"],
        ["merge", "20", "1.0000"],
    ]
    assert lines[4] == "runs/two/merged: the mean of 2 models"
    found = losses(finished)
    # The same loss, on the same rows, as the training measured at its end.
    assert found["part-0"] == pytest.approx(trained_loss(folder, "part-0"), abs=1e-4)
    assert found["part-1"] == pytest.approx(trained_loss(folder, "part-1"), abs=1e-4)
    parts = [
        load_file(folder / f"part-{part}" / "model" / "model.safetensors") for part in range(2)
    ]
    for name, tensor in load_file(folder / "merged" / "model.safetensors").items():
        exact = (8 * parts[0][name].double() + 12 * parts[1][name].double()) / 20
        assert (tensor - exact).abs().max() <= 1e-7 * exact.abs().max()
        assert not torch.equal(parts[0][name], parts[1][name])
    # What is loaded from the merge by the package itself gives the loss that was told.
    again = command("merge", "runs/two", "--force", cwd=tmp_path)
    assert losses(again) == found
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(folder / "merged")) > 1000


def test_shards_of_adapters(command, shards, tmp_path):
    folder = shards("--use-peft", "--lora-r", "4", "--lora-target-modules", "q_proj,v_proj")
    concat = command("merge", "runs/two", cwd=tmp_path)
    assert concat.status == 0, concat.err
    assert (
        "runs/two/merged: one adapter that equals the mean of 2 (their ranks concatenated)"
        in concat.out
    )
    assert json.loads((folder / "merged" / "adapter_config.json").read_text())["r"] == 8
    card = (folder / "merged" / "README.md").read_text()
    assert "library_name: peft" in card and "| part-0 | " in card
    product = command("merge", "runs/two", "--adapter", "product", "-o", "whole", cwd=tmp_path)
    assert product.status == 0, product.err
    assert "whole: the base model with the mean of 2 adapters' products added" in product.out
    assert losses(product) == pytest.approx(losses(concat), abs=2e-4) and len(losses(concat)) == 3
    assert losses(concat)["part-1"] == pytest.approx(trained_loss(folder, "part-1"), abs=1e-4)
    methods = [
        json.loads((at / "merge.json").read_text())["method"]
        for at in (folder / "merged", tmp_path / "whole")
    ]
    assert methods == ["concat", "product"]
    report = json.loads((tmp_path / "whole" / "merge.json").read_text())
    assert report["eval_loss"] == pytest.approx(
        json.loads((folder / "merged" / "merge.json").read_text())["eval_loss"]
    )


class TestRefused:
    """Status 2, one message, nothing written."""

    def refused(self, command, folder, *argv, says):
        before = snapshot(folder)
        finished = command("merge", *argv, cwd=folder)
        assert finished.status == 2, finished.err
        assert says in finished.error, finished.error
        assert snapshot(folder) == before

    @pytest.fixture
    def two(self, tmp_path):
        """runs/two of part-0 and part-1."""
        list_runs(tmp_path / "runs/two", "part-0", "part-1")
        return [
            make_run(tmp_path / "runs/two" / f"part-{n}", {"w": torch.ones(2, 3)}) for n in range(2)
        ]

    def change(self, run, file, **values):
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | values))

    def test_one_run(self, command, tmp_path, two):
        says = "runs/two/part-0 is one run, and a merge needs two or more"
        self.refused(command, tmp_path, "runs/two/part-0", "-o", "out", says=says)

    def test_a_run_given_twice(self, command, tmp_path, two):
        argv = ["runs/two/part-0", "runs/two/../two/part-0", "-o", "out"]
        self.refused(command, tmp_path, *argv, says="part-0 is given twice")

    def test_no_run(self, command, tmp_path, two):
        (tmp_path / "thesis").mkdir()
        self.refused(
            command, tmp_path, "thesis", "runs/two/part-0", "-o", "out", says="thesis is no run"
        )
        self.refused(command, tmp_path, "nowhere", says="nowhere does not exist")

    def test_missing_part(self, command, tmp_path, two):
        shutil.rmtree(two[1])
        says = (
            "part-1 of runs/two is missing: independent.json lists 2 runs, and runs/two/part-1 "
            "holds none"
        )
        self.refused(command, tmp_path, "runs/two", "--allow-unfinished", says=says)

    def test_damaged_list(self, command, tmp_path, two):
        (tmp_path / "runs/two/independent.json").write_text('{"runs": [{}]}')
        self.refused(command, tmp_path, "runs/two", says="runs/two/independent.json names no runs")

    def test_unfinished(self, command, tmp_path, two):
        self.change(two[0], "result.json", done=False, stopped_by="time limit", updates=7)
        (two[1] / "result.json").unlink()
        (two[1] / "metrics.jsonl").write_text(
            json.dumps({"skipped": False, "effective_batch_size": 4}) + "\n"
        )
        says = (
            "unfinished: part-0 stopped by time limit after 7 of 10 updates; part-1 is running, or "
            "was killed (result.json is missing) after 1 of 10 updates. The same train command "
            "continues a run; --allow-unfinished merges them"
        )
        self.refused(command, tmp_path, "runs/two", says=says)
        finished = command("merge", "runs/two", "--allow-unfinished", cwd=tmp_path)
        assert finished.status == 0
        assert (
            "note: part-0 is unfinished: stopped by time limit after 7 of 10 updates"
            in finished.err
        )
        assert [line.split()[-1] for line in finished.out.splitlines()[1:4]] == ["-", "-", "-"]

    def test_unfinished_without_a_model(self, command, tmp_path, two):
        shutil.rmtree(two[1] / "model")
        self.change(two[1], "result.json", done=False)
        self.refused(
            command, tmp_path, "runs/two", "--allow-unfinished", says="part-1 has no weights"
        )

    def test_other_initial_weights(self, command, tmp_path, two):
        self.change(two[1], "plan.json", initial_weights="12345678")
        says = "part-0 started from weights 0badcafe, part-1 from 12345678"
        self.refused(command, tmp_path, "runs/two", says=says)

    def test_unknown_initial_weights(self, command, tmp_path, two):
        for run in two:
            self.change(run, "plan.json", initial_weights=None)
        self.refused(command, tmp_path, "runs/two", says="part-0 started from weights None")

    @pytest.mark.parametrize(
        ("weights", "says"),
        [
            ({"w": torch.ones(3, 2)}, "w is F32 (2, 3) in part-0, F32 (3, 2) in part-1"),
            (
                {"w": torch.ones(2, 3, dtype=torch.bfloat16)},
                "w is F32 (2, 3) in part-0, BF16 (2, 3) in part-1",
            ),
            ({"w": torch.ones(2, 3), "bias": torch.ones(2)}, "part-1 has bias, part-0 does not"),
            ({}, "part-0 has w, part-1 does not"),
        ],
    )
    def test_other_weights(self, command, tmp_path, two, weights, says):
        shutil.rmtree(two[1])
        make_run(two[1], weights)
        says = f"part-0 and part-1 cannot be averaged: {says}"
        self.refused(command, tmp_path, "runs/two", says=says)

    def test_adapter_and_whole_model(self, command, tmp_path, two):
        (two[0] / "model" / "adapter_config.json").write_text("{}")
        (two[0] / "model" / "model.safetensors").rename(
            two[0] / "model" / "adapter_model.safetensors"
        )
        says = "part-0 is a LoRA adapter, part-1 a whole model; merge like with like"
        self.refused(command, tmp_path, "runs/two", says=says)

    def test_no_sample(self, command, tmp_path, two):
        self.change(two[1], "result.json", num_samples=0)
        self.refused(
            command,
            tmp_path,
            "runs/two",
            says="part-1 was trained on 0 samples, so it has no weight in the mean",
        )

    def test_result_of_an_older_version(self, command, tmp_path, two):
        self.change(two[1], "result.json", num_samples=None)
        self.refused(
            command,
            tmp_path,
            "runs/two",
            says="runs/two/part-1/result.json has no num_samples",
        )

    def test_where_to(self, command, tmp_path, two):
        argv = ["runs/two/part-0", "runs/two/part-1"]
        self.refused(command, tmp_path, *argv, says="name the folder of the merge with -o DIR")
        (tmp_path / "file").write_text("mine")
        self.refused(
            command,
            tmp_path,
            *argv,
            "-o",
            "file/out",
            says=f"output=file/out cannot be written: {tmp_path}/file",
        )
        says = "output=runs exists and is no merge (merge.json is missing); choose another folder"
        self.refused(command, tmp_path, *argv, "-o", "runs", "--force", says=says)
        assert command("merge", "runs/two", cwd=tmp_path).status == 0
        says = (
            "output=runs/two/merged holds a merge already; choose another folder, or replace "
            "it with --force"
        )
        self.refused(command, tmp_path, "runs/two", says=says)

    def test_options(self, command, tmp_path, two):
        says = "adapter=product is for LoRA adapters, but the runs are whole models"
        self.refused(command, tmp_path, "runs/two", "--adapter", "product", says=says)
        self.refused(
            command,
            tmp_path,
            "runs/two",
            "--adapter",
            "sum",
            says="'sum' is not one of 'concat', 'product'",
        )
        self.refused(
            command,
            tmp_path,
            "runs/two",
            "--eval-file",
            "no.jsonl",
            says="data file no.jsonl does not exist",
        )
        self.refused(command, tmp_path, says="Missing argument 'RUN...'")

    def test_evaluation_without_a_tokenizer(self, command, tmp_path, two, rows_file):
        rows = rows_file("rows.jsonl", [{"text": "one"}])
        self.refused(
            command,
            tmp_path,
            "runs/two",
            "--eval-file",
            rows,
            says="part-0/model gives no tokenizer",
        )

    def test_configuration_of_another_version(self, command, tmp_path, two):
        (two[0] / "config.yaml").write_text(TrainConfig().to_yaml() + "batch_sise: 4\n")
        self.refused(
            command,
            tmp_path,
            "runs/two",
            says="unknown option 'batch_sise'; did you mean batch_size?",
        )


def test_help_is_light_and_has_an_example():
    program = (
        "import atexit, sys; atexit.register(lambda: print('HEAVY', sorted({'torch', "
        "'transformers', 'peft'} & set(sys.modules))))\n"
        "from accum_trainer.cli import main; main(['merge', '--help'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0 and "HEAVY []" in run.stdout
    for shown in (
        "Examples: accum-trainer merge runs/four",
        "--adapter [concat|product]",
        "--allow-unfinished",
        "--force",
    ):
        assert shown in run.stdout
