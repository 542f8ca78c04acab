"""`train` on sharded engines as users launch them: configs, adapters, precision, contradictions,
moving between engines."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from accum_trainer.train.checkpoint import load_checkpoint
from accum_trainer.train.checkpoint_folder import newest_whole
from accum_trainer.train.records import read_records
from tests.launching import python, torchrun

ZERO2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "zero_stage": 2,
        "gradient_accumulation_steps": 8,
        "zero3_init_flag": False,
    },
    "num_machines": 1,
    "num_processes": 2,
    "mixed_precision": "no",
    "use_cpu": False,
}
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {"fsdp_version": 2},
    "num_machines": 1,
    "num_processes": 2,
    "mixed_precision": "no",
    "use_cpu": False,
}


@pytest.fixture
def rows(rows_file):
    return rows_file(
        "rows.jsonl",
        [
            {"prompt": f"{n} plus {n} is ", "completion": f"{2 * n} " * (n % 7 + 1)}
            for n in range(150)
        ],
    )


def launch(tmp_path, config, *argv):
    """`accelerate launch --config_file FILE -m accum_trainer.train ARGV`."""
    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump(config))
    launcher = ("-m", "accelerate.commands.launch", "--config_file", file)
    return python(
        *launcher, "--main_process_port", 0, "-m", "accum_trainer.train", *argv, OMP_NUM_THREADS=1
    )


@pytest.mark.parametrize(
    "extra",
    [[], ["--amp", "--gradient-checkpointing"]],
    ids=["float32", "amp+checkpointing"],
)
@pytest.mark.long
def test_r14_r18_r41_lora_under_zero2(tmp_path, rows, extra):
    argv = [
        "--use-peft",
        "--lora-r",
        "16",
        "--batch-size",
        "4",
        "--gradient-accumulation-steps",
        "8",
        "--steps",
        "20",
    ]
    finished = launch(
        tmp_path,
        ZERO2,
        *argv,
        "--lr",
        "1e-2",
        "--dataset-file",
        rows,
        "--output-dir",
        tmp_path / "run",
        *extra,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 20 and not any(r["skipped"] for r in records)
    first = records[0]
    assert (first["effective_batch_size"], first["physical_batch_size"]) == (64, 4)
    assert records[-1]["loss"] < first["loss"] - 0.2
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    # Packed in the memory of four samples, often in fewer.
    assert 1 < first["gradient_accumulation_steps"] <= plan["gradient_accumulation_steps"] == 8
    assert (plan["engine"], plan["world_size"], plan["mixed_precision"]) == (
        "zero2",
        2,
        "bf16" if extra else "no",
    )
    assert plan["grad_sync"] == "once-per-window" and "free" in plan["grad_sync_reason"]
    assert plan["weight_sync"] is None and "whole weights" in plan["weight_sync_reason"]
    # What is saved is the adapter alone, as peft loads it.
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) == plan["trained_parameters"] == 157_696
    newest = newest_whole(tmp_path / "run" / "checkpoints")
    assert len(list(newest.glob("part-*-of-00002.safetensors"))) == 2  # each process wrote its own
    assert sum(t.numel() for t in load_checkpoint(newest).model.values()) == 157_696


def test_r18_merged_model_is_the_base_with_the_adapter(tmp_path, rows):
    """On ZeRO-3, where the trained model is in shards: the merged model predicts what base and
    adapter predict together."""
    argv = [
        "--use-peft",
        "--merge-adapter",
        "--lr",
        "1e-1",
        "--steps",
        "3",
        "--dataset-file",
        rows,
        "--zero-stage",
        "zero3",
    ]
    finished = torchrun(2, "accum_trainer.train", "--cpu", *argv, "--output-dir", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr[-3000:]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from accum_trainer import TrainConfig
    from accum_trainer.lm.model import load_model, load_tokenizer

    config = TrainConfig()
    torch.manual_seed(config.seed)
    base = load_model(config, load_tokenizer(config)).eval()
    ids = torch.arange(5, 25)[None]
    before = base(input_ids=ids).logits
    adapted = (
        PeftModel.from_pretrained(base, tmp_path / "run" / "model").eval()(input_ids=ids).logits
    )
    merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model-merged")
        .eval()(input_ids=ids)
        .logits
    )
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert (adapted - before).abs().max() > 1e-2


@pytest.mark.long
def test_r18_lora_with_modules_to_save_under_zero2(tmp_path, rows):
    """The nine norms of 128 are trained whole and saved with the adapter; the curve is that of one
    process."""
    argv = [
        "--use-peft",
        "--lora-modules-to-save",
        "norm",
        "--batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--lr",
        "1e-2",
    ]
    argv += ["--steps", "3", "--scheduler", "constant", "--dataset-file", rows, "--cpu"]
    for name, run_it in (
        ("two", lambda *a: torchrun(2, "accum_trainer.train", *a, "--zero-stage", "zero2")),
        ("one", lambda *a: python("-m", "accum_trainer.train", *a)),
    ):
        finished = run_it(*argv, "--output-dir", tmp_path / name)
        assert finished.returncode == 0, finished.stderr[-3000:]
    curves = [
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("two", "one")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert (
        json.loads((tmp_path / "two" / "plan.json").read_text())["trained_parameters"]
        == 157_696 + 9 * 128
    )
    saved = [
        load_file(tmp_path / name / "model" / "adapter_model.safetensors")
        for name in ("two", "one")
    ]
    assert sum("norm" in key for key in saved[0]) == 9
    for key in saved[1]:
        assert torch.allclose(saved[0][key], saved[1][key], rtol=1e-3, atol=1e-5), key


def test_fsdp2_from_a_launch_config(tmp_path, rows):
    argv = ["--batch-size", "2", "--global-batch-size", "8", "--steps", "4", "--dataset-file", rows]
    finished = launch(tmp_path, FSDP2, *argv, "--output-dir", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["engine"], plan["world_size"]) == ("fsdp2", 2)
    assert plan["weight_sync"] and plan["weight_sync_reason"]
    single = python(
        "-m", "accum_trainer.train", "--cpu", *argv, "--output-dir", tmp_path / "single"
    )
    assert single.returncode == 0, single.stderr
    curves = [
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "single")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "single")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.long
def test_fsdp2_on_an_adapters_folder_trains_as_one_process(tmp_path, rows):
    """Its folder has no model's configuration that process 1 could build shapes from."""
    argv = ["--use-peft", "--steps", "2", "--batch-size", "1", "--dataset-file", rows, "--cpu"]
    base, saved = tmp_path / "base", tmp_path / "adapters"
    for folder, model, *options in ((base, "tiny"), (saved, base / "model", "--use-peft")):
        made = ["--model", model, "--cpu", "--steps", "1", "--output-dir", folder, *options]
        finished = python("-m", "accum_trainer.train", *made)
        assert finished.returncode == 0, finished.stderr[-3000:]
    argv += ["--model", saved / "model", "--global-batch-size", "2"]
    finished = [
        torchrun(
            *(2, "accum_trainer.train", *argv, "--engine", "fsdp2"),
            *("--output-dir", tmp_path / "fsdp2"),
        ),
        python("-m", "accum_trainer.train", *argv, "--output-dir", tmp_path / "single"),
    ]
    assert [f.returncode for f in finished] == [0, 0], finished[0].stderr[-3000:]
    curves = [
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("fsdp2", "single")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    # Without new adapters nothing of it is trained.
    alone = python("-m", "accum_trainer.train", *argv[1:], "--output-dir", tmp_path / "frozen")
    assert alone.returncode == 2 and "has no weight that is trained" in alone.stderr


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["--engine", "fsdp2", "--cpu-offload"], {}),
        ([], {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}),
    ],
    ids=["option", "launcher"],
)
def test_fsdp2_offloaded_trains_and_continues_to_the_same_bits(tmp_path, options, variables):
    """Against the same engine that is not; the second half continues a checkpoint of the first."""
    argv = ["accum_trainer.train", "--cpu", *("--batch-size", 2, "--global-batch-size", 8)]
    argv += ["--max-seq-len", 32, "--scheduler", "constant", "--warmup", 0]
    plain = torchrun(
        2, *argv, "--engine", "fsdp2", "--steps", 4, "--output-dir", tmp_path / "plain"
    )
    halves = [
        torchrun(2, *argv, *options, "--steps", n, "--output-dir", tmp_path / "there", **variables)
        for n in (2, 4)
    ]
    assert [f.returncode for f in (plain, *halves)] == [0] * 3, halves[0].stderr[-3000:]
    curves = [
        [
            (r["step"], r["loss"], r["grad_norm"])
            for r in read_records(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("plain", "there")
    ]
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [1, 2, 3, 4]
    plans = [
        json.loads((tmp_path / name / "plan.json").read_text())["offloaded"]
        for name in ("plain", "there")
    ]
    assert plans == ["", "weights, gradients and optimizer state in host memory"]
    assert "engine fsdp2, weights, gradients and optimizer state in host mem" in halves[0].stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1 is asked for; only FSDP2 is available"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give gradient_checkpointing to train"),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "and give shard_size, the processes of a"),
    ],
    ids=["version", "checkpointing", "groups"],
)
def test_i23b_fsdp_settings_that_would_be_lost(tmp_path, variables, says):
    argv = ["--cpu", "--steps", "1", "--output-dir", tmp_path / "run"]
    finished = python(
        "-m", "accum_trainer", "train", *argv, ACCELERATE_USE_FSDP="true", **variables
    )
    assert (
        finished.returncode == 2 and says in finished.stderr and "Traceback" not in finished.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "argv", "says"),
    [
        ({"gradient_accumulation_steps": 4}, [], "gradient_accumulation_steps=8, but"),
        ({"gradient_clipping": 0.5}, [], "max_grad_norm=1.0, but"),
        ({"zero_optimization": {"stage": 3}}, [], "engine=zero2, zero_stage=2, but"),
        ({"train_micro_batch_size_per_gpu": 2}, [], "micro_batch_size=4, but"),
        ({"bf16": {"enabled": True}}, ["--mixed-precision", "no"], "mixed_precision=no, but"),
    ],
    ids=["K", "clipping", "stage", "micro-batch", "precision"],
)
def test_i23_a_deepspeed_file_that_says_otherwise(tmp_path, rows, config, argv, says):
    """One process sees it as well as two: the comparison is made before anything is built."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config))
    finished = python(
        *(
            "-m",
            "accum_trainer",
            "train",
            "--batch-size",
            "4",
            "--gradient-accumulation-steps",
            "8",
            "--zero-stage",
        ),
        *(argv[1:] if argv[:1] == ["--zero-stage"] else ["zero2", *argv]),
        *("--dataset-file", rows, "--output-dir", tmp_path / "run"),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=file,
    )
    assert finished.returncode == 2, finished.stderr[-2000:]
    assert (
        says in finished.stderr
        and str(file) in finished.stderr
        and "make them agree" in finished.stderr
    )
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_i23_a_missing_or_auto_k_is_filled_in(tmp_path, rows):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}))
    finished = torchrun(
        2,
        "accum_trainer.train",
        *("--batch-size", "2", "--global-batch-size", "16", "--steps", "2", "--dataset-file", rows),
        *("--output-dir", tmp_path / "run"),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=file,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["engine"], plan["gradient_accumulation_steps"]) == ("zero1", 4)


def test_i37_a_run_moves_between_engines(tmp_path, rows):
    """Begun on ZeRO-3 with two processes, continued on one, finished on ZeRO-2: the windows and the
    curve of one process."""
    argv = [
        "--cpu",
        "--batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--lr",
        "1e-3",
        "--scheduler",
        "constant",
    ]
    argv += ["--dataset-file", rows, "--eval-file", rows, "--eval-every", "2"]
    whole = python(
        "-m", "accum_trainer.train", *argv, "--steps", "6", "--output-dir", tmp_path / "whole"
    )
    assert whole.returncode == 0, whole.stderr
    for processes, steps, extra in (
        (2, 2, ["--zero-stage", "zero3"]),
        (1, 4, []),
        (2, 6, ["--engine", "zero2"]),
    ):
        arguments = [*argv, "--steps", str(steps), *extra, "--output-dir", tmp_path / "moved"]
        moved = torchrun(processes, "accum_trainer.train", *arguments)
        assert moved.returncode == 0, moved.stderr[-3000:]
    expected, found = (
        read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "moved")
    )
    assert [r["world_size"] for r in found] == [2, 2, 1, 1, 2, 2]
    assert json.loads((tmp_path / "moved" / "plan.json").read_text())["engine"] == "zero2"
    for key in ("num_targets", "loss", "eval_loss"):
        assert [r.get(key) for r in found] == [
            pytest.approx(r[key], rel=1e-4) if key in r else None for r in expected
        ]


FSDP_ENVIRONMENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("processes", "engine", "variables", "says"),
    [
        (2, "single", {}, "engine=single on 2 processes: it is one process"),
        (2, "zero2", FSDP_ENVIRONMENT, "(ACCELERATE_USE_FSDP=true) asks for fsdp2; make them"),
        (1, "ddp", {"ACCELERATE_USE_DEEPSPEED": "true"}, "(ACCELERATE_USE_DEEPSPEED=true) asks"),
    ],
    ids=["one of two", "FSDP of the launcher", "DeepSpeed of the launcher"],
)
def test_an_engine_that_is_not_in_force_is_refused(tmp_path, processes, engine, variables, says):
    finished = torchrun(
        *(processes, "accum_trainer.train", "--cpu", "--engine", engine, "--steps", "1"),
        *("--output-dir", tmp_path / "run"),
        **variables,
    )
    assert finished.returncode and f"engine={engine}" in finished.stderr
    assert says in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_deepspeed_missing_is_told_with_the_command_that_installs_it(tmp_path):
    program = (
        "import sys; sys.modules['deepspeed'] = None\nfrom accum_trainer.cli import "
        "main\nmain(['train', '--zero-stage', 'zero2', '--steps', '1', '--output-dir', "
        f"{str(tmp_path / 'run')!r}])"
    )
    finished = python("-c", program)
    assert finished.returncode == 2
    assert (
        "pip install 'accum-trainer[deepspeed]'" in finished.stderr
        and "Traceback" not in finished.stderr
    )
