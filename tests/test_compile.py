"""--compile: torch compiles the blocks once for all sizes of micro-batches, and the update stays
that of one big batch."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters

from accum_trainer import ConfigError, TrainConfig
from accum_trainer.lm.model import blocks_of, compile_blocks, load_model, load_tokenizer
from accum_trainer.train import updates
from tests.launching import cli, torchrun


@pytest.mark.long
def test_few_compilations_serve_all_sizes_of_micro_batches(tmp_path):
    seen = set()

    torch._dynamo.reset()
    counters.clear()
    sizes = {"max_tokens_per_micro_batch": 256, "global_batch_size": 16, "max_seq_len": 192}
    common = {"cpu": True, "steps": 8, "eval_every": 4, **sizes}
    config = TrainConfig(compile=True, output_dir=str(tmp_path / "compiled"), **common)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            seen.add(tuple(args[0].shape)) if type(module).__name__ == "Embedding" else None
        )
    )
    try:
        compiled = list(updates(config))
    finally:
        hook.remove()
    assert len(seen) > 20 and 1 in {samples for samples, _ in seen}
    # Several samples with and without padding, and one sample; each in training and in evaluation;
    # and the compiler's trial.
    assert 2 <= counters["stats"]["unique_graphs"] <= 7
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"]
    plan = json.loads((tmp_path / "compiled" / "plan.json").read_text())
    assert plan["compiled_blocks"] == 4 and plan["loss_path"]["path"] == "chunked"
    plain = list(updates(TrainConfig(output_dir=str(tmp_path / "plain"), **common)))
    assert [record["loss"] for record in compiled] == pytest.approx(
        [record["loss"] for record in plain], rel=1e-5
    )


def test_packed_rows_of_other_lengths_are_not_compiled_anew(tmp_path, fresh_accelerate):
    torch._dynamo.reset()
    common = {"cpu": True, "batch_size": 4, "max_seq_len": 64, "attention": "packed_sdpa"}
    config = TrainConfig(compile=True, steps=12, output_dir=str(tmp_path / "packed"), **common)
    graphs = []
    for record in updates(config):
        assert record["padding_efficiency"] == 1.0
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3] > 0  # twelve rows, each of other lengths


@pytest.mark.parametrize(
    ("engine", "options", "environment"),
    [
        ("ddp", ["--gradient-checkpointing"], {}),
        pytest.param("zero2", ["--zero-stage", "zero2"], {}, marks=pytest.mark.long),
        pytest.param("fsdp2", [], {"ACCELERATE_USE_FSDP": "true"}, marks=pytest.mark.long),
    ],
)
def test_compiled_update_is_that_of_one_big_batch_in_float64_on_two_processes(
    engine, options, environment
):
    run = torchrun(
        2, "accum_trainer.verify", "--cpu", "--compile", "--batch-size", 2,
        "--global-batch-size", 8,
        "--max-seq-len", 64, "--windows", 2, *options, OMP_NUM_THREADS=1, **environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(
        line for line in run.stdout.splitlines() if line.startswith("update = one big batch")
    )
    assert line.split()[5] == "PASS" and float(line.split()[6]) < 2e-6
    assert f"{engine} on cpu" in run.stdout
    assert "recompile_limit" not in run.stderr  # beyond it torch would run uncompiled


def test_a_loop_of_your_own_is_not_compiled_in_silence(tmp_path):
    loop = tmp_path / "loop.py"
    loop.write_text("def update(accelerator, model, optimizer, scheduler, batches):\n    pass\n")
    run = cli(
        "verify",
        "--cpu",
        "--compile",
        "--loop",
        f"{loop}:update",
        "--gradient-accumulation-steps",
        2,
    )
    assert run.returncode == 2 and "compile=true is an option of train" in run.stderr


def test_without_a_compiler_one_message_and_no_folder(tmp_path):
    run = cli(
        "train",
        "--cpu",
        "--compile",
        "--steps",
        1,
        "--output-dir",
        tmp_path / "run",
        CXX="/no/such/compiler",
        fresh=True,  # read when torch's compiler is imported
    )
    assert run.returncode == 2
    assert (
        "error: compile=true does not work here: InvalidCxxCompiler" in run.stderr
        and "Traceback" not in run.stderr
    )
    assert "/no/such/compiler" in run.stderr and "install a C++ compiler" in run.stderr
    assert not (tmp_path / "run").exists()


def test_zero3_is_refused():
    run = torchrun(
        2, "accum_trainer.train", "--cpu", "--compile", "--zero-stage", "zero3",
        "--batch-size", 1, "--steps", 1, "--dry-run",
    )  # fmt: skip
    assert run.returncode != 0
    assert (
        "compile=true cannot see through zero3" in run.stderr and "use zero2 or fsdp2" in run.stderr
    )


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="Linear names none"):
        compile_blocks(torch.nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.parametrize("use_peft", [False, True])
def test_blocks_are_the_decoder_layers(use_peft):
    config = TrainConfig(use_peft=use_peft)
    blocks = blocks_of(load_model(config, load_tokenizer(config)))
    assert [type(block).__name__ for block in blocks] == ["LlamaDecoderLayer"] * 4
