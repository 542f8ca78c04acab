"""Settings of a DeepSpeed file: those that change an update are refused, DeepSpeed itself says
nothing; those of speed and memory are taken."""

from __future__ import annotations

import json
import os
import re

import pytest

from accum_trainer import ConfigError
from accum_trainer.engine.zero_settings import check_shape, refuse_other_settings
from accum_trainer.train.records import read_records
from tests.launching import ROOT, python, torchrun

ZERO = {"stage": 2}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler={'type': 'WarmupLR'}, which sets the lea"),
        ({"optimizer": {"type": "AdamW"}}, "which makes another optimizer than the loop's; leave"),
        ({"gradient_allreduce_op": "sum"}, "adds the processes' gradients up instead of averagi"),
        ({"communication_data_type": "fp16"}, "which rounds gradients while they are added up"),
        ({"torch_autocast": {"enabled": True}}, "in another precision than mixed_precision says"),
        ({"prescale_gradients": True}, "which is not known to leave an update as it is; leave"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile=True, which is not known"),
        ({"gradient_cliping": 1.0}, "leave an update as it is (did you mean gradient_clipping?)"),
        ({"zero_force_ds_cpu_optimizer": True}, "=True, which replaces the loop's optimizer"),
        ({"wall_clock_breakdown": True}, "which times DeepSpeed's own loop, and ends any other"),
        ({"flops_profiler": {"enabled": True}}, "which times DeepSpeed's own loop, and ends"),
        *(
            ({"zero_optimization": ZERO | zero}, says)
            for zero, says in (
                ({"round_robin_gradients": True}, "checkpoints would mix them up"),
                ({"zero_quantized_gradients": True}, "which rounds what processes send to each"),
                ({"compute_grad_norm": False}, "compute_grad_norm=False, which leaves the grad"),
                (
                    {"offload_optimizer": {"ratio": 0.5}},
                    "offload_optimizer.ratio=0.5, which is not",
                ),
                ({"overlap_com": True}, "(did you mean zero_optimization.overlap_comm?)"),
                ({"cpu_offload": True}, "is a former name: write offload_optimizer with device"),
            )
        ),
    ],
)
def test_i23_settings_that_would_change_the_update_are_refused(config, says):
    with pytest.raises(ConfigError) as refused:
        refuse_other_settings({"zero_optimization": ZERO} | config, "zero.json")
    assert str(refused.value).startswith("zero.json says ") and says in str(refused.value)
    assert str(refused.value).endswith("; leave it out")


def test_remarks_and_what_is_off_are_taken():
    config = {
        "_comment": "ours",
        "//": "a remark",
        "amp": {"enabled": "auto"},
        "torch_autocast": {"enabled": False},
        "wall_clock_breakdown": False,
        "zero_optimization": ZERO | {"round_robin_gradients": False, "mics_shard_size": -1},
    }
    refuse_other_settings(config, "zero.json")
    assert config["amp"] == {"enabled": False}  # DeepSpeed would take "auto" for on


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "zero.json is '[]'; a DeepSpeed configuration is an object"),
        ({"zero_optimization": True}, "says zero_optimization='True'; write an object there"),
        ({"bf16": "auto"}, "says bf16='auto'; write an object there"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer='cpu'; write an"),
        ({"aio": [1]}, "says aio='[1]'; write an object there"),
    ],
)
def test_sections_of_another_shape_are_refused(config, says):
    with pytest.raises(ConfigError) as refused:
        check_shape(config, "zero.json")
    assert says in str(refused.value)


def test_sections_that_are_null_are_taken_out():
    zero = {"stage": 2, "offload_param": None}
    config = {"bf16": None, "fp16": {"enabled": True}, "zero_optimization": zero, "aio": None}
    assert check_shape(config, "zero.json") == {
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }


REFUSED = {
    "steps on inf": (
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        ["--mixed-precision", "bf16"],
        "check_grad_overflow=True, but .* says check_grad_overflow=False",
    ),
    "gradients in 16 bits": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        [],
        "accumulation_dtype=fp32, but .* says grad_accum_dtype=bf16",
    ),
    "offload to nowhere": (
        {"zero_optimization": ZERO | {"offload_optimizer": {"device": "none"}}},
        ["--engine", "zero2", "--cpu-offload"],
        "cpu_offload=True, but .* sets offload_optimizer's device to none, as accelerate's launc",
    ),
    "offload at stage 0": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        [],
        "ZeRO stage 0 shards nothing, so optimizer state in host memory would have no effect",
    ),
    "a scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        [],
        "zero.json says scheduler=.*, which sets the learning rate behind",
    ),
    "weights of stage 2 on the host": (
        {"zero_optimization": ZERO | {"offload_param": {"device": "cpu"}}},
        [],
        "says offload_param to cpu, which stage 3 alone uses",
    ),
    "no stage": ({"zero_optimization": {"stage": 4}}, [], "zero_stage=4 is not known; give 0, 1"),
    "no number": (
        {"zero_optimization": ZERO | {"reduce_bucket_size": "x"}},
        [],
        "DeepSpeed refuses its configuration: reduce_bucket_size: Input should be a valid integer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_i23_a_file_is_refused_before_anything_is_written(tmp_path, name):
    config, options, says = REFUSED[name]
    file, run = tmp_path / "zero.json", tmp_path / "run"
    file.write_text(json.dumps({"zero_optimization": ZERO} | config))
    finished = python(
        *("-m", "accum_trainer.train", "--cpu", "--steps", 1, "--output-dir", run, *options),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=file,
    )
    assert finished.returncode == 2 and re.search(says, finished.stderr), finished.stderr[-2000:]
    assert "Traceback" not in finished.stderr and not run.exists()


SPEED_ONLY = {
    "zero_optimization": ZERO
    | {"contiguous_gradients": False, "overlap_comm": True, "reduce_bucket_size": 10_000},
    "steps_per_print": 9,
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "gradient_allreduce_op": "mean",
    "autotuning": {"enabled": False},
}


def test_settings_of_speed_and_memory_train_to_the_loss_of_one_process(tmp_path, rows_file):
    rows = rows_file("rows.jsonl", [{"text": f"{n} and {n + 1}"} for n in range(40)])
    file, argv = tmp_path / "zero.json", ["--cpu", "--steps", 2, "--batch-size", 2]
    argv += ["--global-batch-size", 8, "--max-seq-len", 32, "--dataset-file", rows, "--output-dir"]
    launcher = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    file.write_text(json.dumps(SPEED_ONLY))
    trained = [
        torchrun(2, "accum_trainer.train", *argv, tmp_path / "zero", **launcher),
        python("-m", "accum_trainer.train", *argv, tmp_path / "single"),
    ]
    assert [f.returncode for f in trained] == [0, 0], trained[0].stderr[-3000:]
    zero, single = (
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("zero", "single")
    )
    assert zero == pytest.approx(single, rel=1e-5) and len(zero) == 2


OWN_ACCELERATOR = """
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from accum_trainer import Accumulator, ConfigError

plugin = DeepSpeedPlugin(hf_ds_config={
    "zero_optimization": {"stage": 2}, "gradient_allreduce_op": "sum",
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
})
own = Accelerator(deepspeed_plugin=plugin)
try:
    Accumulator(micro_batch_size=1, gradient_accumulation_steps=1, accelerator=own)
except ConfigError as error:
    print("refused:", error)
"""


def test_i23_a_plugin_of_ones_own_accelerator_is_looked_into(tmp_path):
    (tmp_path / "own_accelerator.py").write_text(OWN_ACCELERATOR)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    finished = torchrun(1, "own_accelerator", fresh=True, PYTHONPATH=path)
    said = "refused: the DeepSpeed configuration says gradient_allreduce_op=sum, which adds the pro"
    assert said in finished.stdout, finished.stderr[-3000:]


UNKNOWN_SETTING = """
import torch
import accum_trainer.engine.zero_config as zero_config
from accum_trainer import Accumulator

zero_config.refuse_other_settings = lambda *arguments: None  # as if nobody had looked into it
acc = Accumulator(micro_batch_size=1, gradient_accumulation_steps=1, zero_stage=2)
model = torch.nn.Sequential(*(torch.nn.Linear(3, 5 + n) for n in range(4)))
acc.prepare(model, torch.optim.AdamW(model.parameters()))
"""


def test_weights_that_deepspeed_reads_back_in_another_order_are_refused(tmp_path):
    (tmp_path / "unknown_setting.py").write_text(UNKNOWN_SETTING)
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": ZERO | {"round_robin_gradients": True}}))
    finished = torchrun(
        2,
        "unknown_setting",
        fresh=True,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
        ACCELERATE_DEEPSPEED_CONFIG_FILE=file,
    )
    assert finished.returncode != 0
    assert "back as something else than the weight in use: checkpoints wo" in finished.stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_second_copies_of_weights_change_no_bit_and_backwards_gather_in_the_group(tmp_path, kind):
    """ZeRO++'s hpz on four processes in groups of two. No weight is persistent, so each of three
    micro-batches gathers twice: the first forward after a step among all processes, and what comes
    then from the copies inside the group. LoRA's frozen weights keep theirs."""
    found = []
    for size in (1, 2):
        file, out = tmp_path / f"{size}.json", tmp_path / f"found-{size}.json"
        small = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        zero = {"stage": 3, "zero_hpz_partition_size": size, **{f"stage3_{n}": 0 for n in small}}
        file.write_text(json.dumps({"zero_optimization": zero}))
        finished = torchrun(
            4, "tests.second_copies", out, kind, ACCELERATE_DEEPSPEED_CONFIG_FILE=file
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    plain, grouped = found
    assert plain["seen"] == grouped["seen"] and plain["weights"] == grouped["weights"]
    everywhere, here = grouped["gathered"]["4"], grouped["gathered"]["2"]
    assert plain["gathered"] == {"4": everywhere + here}
    if kind == "llama":
        assert everywhere == pytest.approx(plain["size"], rel=0.01)
        assert here == pytest.approx(5 * plain["size"], rel=0.01)
    else:
        assert 0 < everywhere < 0.2 * plain["size"]
