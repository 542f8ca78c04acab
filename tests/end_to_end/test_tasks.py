"""The eight tasks of the quick start, from its table to the result: the commands that its links
lead to run as they stand, each in less than five minutes, and make what the pages say."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from tests.end_to_end.read_runs import weights_in
from tests.launching import cli, script, shell
from tests.pages import tasks
from tests.reference import big_batch, equal

FIVE_MINUTES = 300.0  # seconds, of the machine
# Dropout draws another number for another cut.
WITHOUT_DROPOUT = """
import functools, torch, transformers
none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
transformers.GPT2Config = functools.partial(transformers.GPT2Config, **none)
torch.manual_seed(0)
"""


@pytest.fixture
def do(tmp_path):
    """Run the commands of a task in an empty folder; what they print."""

    def run(task: str) -> str:
        (code,) = tasks()[task]
        done = shell(code, tmp_path, timeout=FIVE_MINUTES)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean_loss(records):
    """Per target, over several updates."""
    return sum(r["loss"] * r["num_targets"] for r in records) / sum(
        r["num_targets"] for r in records
    )


def numbers_of(file, name):
    """How many numbers the tensors of this name in a file hold."""
    with safe_open(file, "pt") as tensors:
        keys = [key for key in tensors.keys() if name in key]  # noqa: SIM118 - it is no dict
        return sum(tensors.get_tensor(key).numel() for key in keys)


def products_of(folder):
    """What each adapted layer of an adapter adds to its weight, in float64."""
    weights, config = weights_in(folder), read(folder / "adapter_config.json")
    return {
        name: config["lora_alpha"]
        / config["r"]
        * (weights[name.replace("lora_A", "lora_B")].double() @ a.double())
        for name, a in weights.items()
        if "lora_A" in name
    }


def test_the_table_has_the_eight():
    assert list(tasks()) == [
        "convert an Accelerate script",
        "train on a CSV",
        "LoRA on ZeRO-2 with two processes",
        "SLURM files for 2 nodes of 4 GPUs",
        "resume after a kill",
        "compare two runs",
        "merge two independent trainings",
        "find the batch size",
    ]


def test_a_converted_accelerate_script_is_one_big_batch_in_float64(tmp_path, monkeypatch):
    scripts = tasks()["convert an Accelerate script"]
    weights = []
    for name, code in zip(("before", "after"), scripts, strict=True):
        saved = f"\nimport torch\ntorch.save(model.state_dict(), {name!r})\n"
        done = script(WITHOUT_DROPOUT + code + saved, tmp_path, timeout=FIVE_MINUTES)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(torch.load(tmp_path / name, weights_only=True))
    assert re.search(r"Update\(step=4, .*num_samples=2,", done.stdout)

    monkeypatch.setattr(transformers, "GPT2Config", transformers.GPT2Config)  # put back afterwards
    made: dict = {}
    exec(WITHOUT_DROPOUT + scripts[1].partition("acc = ")[0], made)
    model, rows = made["model"].double(), [{"input_ids": row.tolist()} for row in made["ids"]]
    begun = {name: w.clone() for name, w in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for at in range(0, 50, 16):
        window = [row | {"labels": row["input_ids"]} for row in rows[at : at + 16]]
        _, gradients = big_batch(model, window)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    exact = model.state_dict()
    moved = sum(float(((exact[name] - begun[name]) ** 2).sum()) for name in exact) ** 0.5
    before, after = (
        sum(float(((found[name].double() - exact[name]) ** 2).sum()) for name in exact) ** 0.5
        for found in weights
    )
    assert after <= 5e-4 * moved < 1e-2 * moved <= before


def test_a_csv_becomes_a_run_and_a_model(do, tmp_path):
    said = do("train on a CSV")
    run = tmp_path / "runs/first"
    records = lines_of(run / "metrics.jsonl")
    assert [r["effective_batch_size"] for r in records] == [8, 4] * 3
    assert json.dumps(records[-1]) in said.splitlines()  # `tail` shows it
    assert records[-1]["step"] == 6 and records[-1]["epoch"] == 3
    assert read(run / "plan.json")["data"].startswith("rows.csv (")
    assert read(run / "result.json")["num_samples"] == 36
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    answers = AutoTokenizer.from_pretrained(run / "model")(["2", "13"])["input_ids"]
    # Targets are the answers (2 to 13) and an end each, in every epoch.
    least = 3 * 12 * (min(map(len, answers)) + 1)
    assert least <= sum(r["num_targets"] for r in records) <= least + 3 * 12
    assert equal(model.state_dict(), model.state_dict() | weights_in(run / "model"))


def test_lora_is_sharded_by_zero_2(do, tmp_path):
    said = do("LoRA on ZeRO-2 with two processes")
    run = tmp_path / "runs/zero2"
    assert "B 2 x K 4 x W 2 = effective batch 16" in said and "\nengine zero2, " in said
    plan, records = read(run / "plan.json"), lines_of(run / "metrics.jsonl")
    assert (plan["engine"], plan["world_size"], len(records)) == ("zero2", 2, 3)
    assert plan["grad_sync"] == "once-per-window"
    # Each process wrote the half of Adam's state that it keeps: no number twice.
    parts = sorted((run / "checkpoints/step-00000003").glob("part-*.safetensors"))
    states = [numbers_of(part, "exp_avg_sq") for part in parts]
    assert len(states) == 2 and sum(states) == plan["trained_parameters"] == 157_696
    assert max(states) < 0.6 * sum(states)

    adapter = weights_in(run / "model")
    assert sum(weight.numel() for weight in adapter.values()) == 157_696
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert ModelCard.load(run / "model/README.md").data.library_name == "peft"


def test_slurm_files_are_of_2_nodes_of_4_gpus(do, tmp_path):
    assert "(B 4 x K 2 x W 8 = effective batch 64)" in do("SLURM files for 2 nodes of 4 GPUs")
    launch = yaml.safe_load((tmp_path / "zero2_2node.yaml").read_text())
    assert (launch["num_machines"], launch["num_processes"]) == (2, 8)
    assert launch["deepspeed_config"]["deepspeed_config_file"] == "zero2_2node.json"
    zero = read(tmp_path / "zero2_2node.json")
    assert zero["zero_optimization"]["stage"] == 2 and zero["bf16"]["enabled"] is True
    assert zero["train_micro_batch_size_per_gpu"] == 4 and zero["gradient_accumulation_steps"] == 2
    script = (tmp_path / "zero2_2node.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("2", "4", "1")
    assert (asked["time"], asked["signal"], asked["partition"]) == ("12:00:00", "USR1@300", "gpu")
    assert "--batch-size 4 --global-batch-size 64" in script


def test_a_killed_run_becomes_the_run_that_was_not_killed(do, tmp_path):
    said = do("resume after a kill")
    # A fast machine may write a second checkpoint before the kill.
    assert re.search(r"continued from runs/mine/checkpoints/step-000000[1-5]0 after [1-5]0 ", said)
    run = tmp_path / "runs/mine"
    assert [r["step"] for r in lines_of(run / "metrics.jsonl")] == [*range(1, 61)]
    lines = tasks()["resume after a kill"][0].replace("\\\n", " ").splitlines()
    started, again = (line for line in lines if line.startswith("accum-trainer train "))
    assert started.split() == [*again.split(), "&"]
    whole = cli(*again.split()[1:-1], "whole", cwd=tmp_path, timeout=FIVE_MINUTES)
    assert whole.returncode == 0 and "continued" not in whole.stderr, whole.stderr[-3000:]
    losses = [
        [r["loss"] for r in lines_of(at / "metrics.jsonl")] for at in (run, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]
    weights = weights_in(tmp_path / "whole/model")
    assert equal(weights_in(run / "model"), weights)
    assert equal(weights_in(tmp_path / "exported"), weights)


def test_two_runs_are_compared(do, tmp_path):
    said = do("compare two runs")
    found = read(tmp_path / "runs/k1-k8.json")
    small, large = (
        statistics.mean(
            (a / 2 - b + c / 2) ** 2 / 1.5 for a, b, c in zip(x, x[1:], x[2:], strict=False)
        )
        for name in ("k1", "k8")
        if (x := [r["loss"] for r in lines_of(tmp_path / f"runs/{name}/metrics.jsonl")])
    )
    assert [run["variance"] for run in found["runs"]] == pytest.approx([small, large])
    assert found["runs"][1]["variance_fall"] == pytest.approx(1 - large / small)
    assert found["runs"][1]["at_least_half"] == "yes" and large < small / 2
    assert "at least 50% lower: yes" in said
    assert (tmp_path / "runs/k1-k8.png").read_bytes().startswith(b"\x89PNG")
    assert "k8" in (tmp_path / "runs/k1-k8.html").read_text()


def test_merged_adapters_are_the_mean_of_their_products(do, tmp_path):
    do("merge two independent trainings")
    folder = tmp_path / "runs/shares"
    samples = [read(folder / f"part-{part}/result.json")["num_samples"] for part in range(2)]
    assert samples == [23, 22]
    parts = [products_of(folder / f"part-{part}/model") for part in range(2)]
    merged = products_of(folder / "merged")
    assert len(merged) == 28  # 7 linear layers in each of 4 blocks
    for name, product in merged.items():
        exact = sum(n / 45 * part[name] for n, part in zip(samples, parts, strict=True))
        assert (product - exact).abs().max() <= 1e-6 * exact.abs().max()
        assert not torch.equal(parts[0][name], parts[1][name])
    report = read(folder / "merged/merge.json")
    assert [part["weight"] for part in report["parts"]] == [23 / 45, 22 / 45]
    assert all(part["eval_loss"] > 0 for part in [*report["parts"], report])


def test_a_sweep_names_the_batch(do, tmp_path):
    said = do("find the batch size")
    sweep = tmp_path / "runs/base-sweep"
    records = {size: lines_of(sweep / f"b-{size}/metrics.jsonl") for size in (4, 8)}
    assert [len(branch) for branch in records.values()] == [16, 8]  # 64 samples each
    # The second half of the samples, in blocks that end a window of both.
    blocks = range(4, 8)
    targets = [records[8][block]["num_targets"] for block in blocks]
    lost = [
        records[8][block]["loss"] - mean_loss(records[4][2 * block : 2 * block + 2])
        for block in blocks
    ]
    difference = sum(n * d for n, d in zip(targets, lost, strict=True)) / sum(targets)
    smallest, other = read(sweep / "verdict.json")["compared"]
    assert smallest["verdict"] == "loses nothing" and (smallest["size"], other["size"]) == (4, 8)
    assert other["difference"] == pytest.approx(difference)
    loses = difference > max(0.01, other["margin"])
    assert other["verdict"] == "loses" and loses
    assert "\nevery larger effective batch loses per sample against 4, the smallest" in said
