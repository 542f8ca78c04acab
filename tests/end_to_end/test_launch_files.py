"""`config create`: what it writes is what its readers read, is what `launch_configs/` holds, and
trains."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from accum_trainer.train.records import read_records
from tests.grids import thinned
from tests.launching import ROOT, cli, python

READY_MADE = ROOT / "launch_configs"
COMMANDS = re.findall(
    r"^accum-trainer (config create .*)$", (READY_MADE / "README.md").read_text(), re.MULTILINE
)


def test_ready_made_files_are_what_their_commands_write(command, tmp_path):
    for text in COMMANDS:
        finished = command(*shlex.split(text), cwd=tmp_path)
        assert finished.status == 0, finished.err
    written = sorted(path.name for path in (tmp_path / "launch_configs").iterdir())
    assert written == sorted(path.name for path in READY_MADE.iterdir() if path.name != "README.md")
    for name in written:
        assert (tmp_path / "launch_configs" / name).read_text() == (
            READY_MADE / name
        ).read_text(), name


@pytest.mark.parametrize("path", sorted(READY_MADE.glob("*.sbatch")), ids=lambda path: path.stem)
def test_batch_scripts_are_sound_shell(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    shellcheck = (
        Path(sysconfig.get_path("scripts")) / "shellcheck"
    )  # of this environment, on the PATH or not
    found = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def accelerate_files():
    return [
        path for path in sorted(READY_MADE.glob("*.yaml")) if "distributed_type" in path.read_text()
    ]


@pytest.mark.parametrize("path", accelerate_files(), ids=lambda path: path.stem)
def test_accelerate_and_deepspeed_read_them(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(ROOT)
    read = load_config_from_file(str(path))
    expected = {
        "single_gpu": ("NO", 1),
        "zero2_offload": ("DEEPSPEED", 1),
        "cpu_2proc": ("MULTI_GPU", 2),
    }
    expected |= {
        "ddp_8gpu": ("MULTI_GPU", 8),
        "ddp_2node": ("MULTI_GPU", 16),
        "fsdp2_8gpu": ("FSDP", 8),
    }
    expected |= {f"zero{stage}_8gpu": ("DEEPSPEED", 8) for stage in (1, 2, 3)} | {
        "lora_zero2_a100": ("DEEPSPEED", 4)
    }
    assert (read.distributed_type.value, read.num_processes) == expected[path.stem]
    assert read.num_machines == (2 if path.stem == "ddp_2node" else 1)
    if read.distributed_type.value != "DEEPSPEED":
        assert read.mixed_precision == ("no" if path.stem == "cpu_2proc" else "bf16")
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    file = ROOT / read.deepspeed_config["deepspeed_config_file"]
    assert read.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    # DeepSpeed itself reads no "auto": the trainer fills it in, here with B 4, K 2, one process.
    filled = json.loads(file.read_text()) | {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }
    config = DeepSpeedConfig(filled)
    stage = re.search(r"zero(\d)", path.stem)
    assert stage is not None and config.zero_optimization_stage == int(stage[1])
    assert (
        config.bfloat16_config.enabled
        and config.gradient_accumulation_steps == 2
        and config.train_batch_size == 8
    )
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == (path.stem == "zero2_offload")


def test_independent_runs_are_options_of_train():
    from accum_trainer import TrainConfig

    config = TrainConfig.from_yaml(READY_MADE / "parallel_independent_4gpu.yaml")
    assert (
        config.parallel_independent
        and config.cuda_ids == "0,1,2,3"
        and config.mixed_precision == "bf16"
    )


def test_what_is_printed_and_commented(command, tmp_path, rows_file):
    rows = rows_file("rows.jsonl", [{"text": "a b c"}] * 100)
    argv = [
        "--engine",
        "zero2",
        "--gpus-per-node",
        "8",
        "--batch-size",
        "2",
        "--global-batch-size",
        "64",
        "-o",
        "z.yaml",
    ]
    finished = command(
        "config",
        "create",
        "multi-gpu",
        *argv,
        "--",
        "--dataset-file",
        rows,
        "--epochs",
        "3",
        cwd=tmp_path,
    )
    assert finished.status == 0, finished.err
    assert re.search(r"^K +accumulation steps +4$", finished.out, re.MULTILINE)
    assert re.search(r"^B_eff +effective batch +64 ", finished.out, re.MULTILINE)
    assert re.search(r"^updates per epoch +2$", finished.out, re.MULTILINE)
    assert (
        "start: accum-trainer launch z.yaml -- --batch-size 2 --global-batch-size 64 "
        f"--dataset-file {rows}" in finished.out
    )
    # B and K were both decided: DeepSpeed's file states them, so that another K is refused.
    config = json.loads((tmp_path / "z.json").read_text())
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        2,
        4,
    )
    changeable = (
        "distributed_type",
        "num_processes",
        "num_machines",
        "machine_rank",
        "deepspeed_config_file",
    )
    for line in (tmp_path / "z.yaml").read_text().splitlines():
        if line.strip().startswith(changeable):
            assert "  # " in line, line


@pytest.mark.parametrize(("k", "stated"), [(1, ""), (2, " --gradient-accumulation-steps 2")])
def test_r2_a_generated_command_states_k_only_above_1(command, tmp_path, k, stated):
    argv = ["--batch-size", "4", "--gradient-accumulation-steps", k, "--slurm", "-o", "one.yaml"]
    finished = command("config", "create", "single-gpu", *argv, cwd=tmp_path)
    assert f"start: accum-trainer launch one.yaml -- --batch-size 4{stated}\n" in finished.out
    assert (
        f'--output-dir "$run" --batch-size 4{stated} "$@"' in (tmp_path / "one.sbatch").read_text()
    )


TRAINED = {
    "single": ("single-gpu", [], "single", 1),
    "single bf16": ("single-gpu", ["--precision", "bf16"], "single", 1),
    "offload": ("single-gpu", ["--engine", "zero2", "--cpu-offload"], "zero2", 1),
    "ddp": ("multi-gpu", ["--gpus-per-node", "2"], "ddp", 2),
    "zero1": ("multi-gpu", ["--gpus-per-node", "2", "--engine", "zero1"], "zero1", 2),
    "zero2": (
        "multi-gpu",
        ["--gpus-per-node", "2", "--engine", "zero2", "--precision", "bf16"],
        "zero2",
        2,
    ),
    "zero3": ("multi-gpu", ["--gpus-per-node", "2", "--engine", "zero3"], "zero3", 2),
    "fsdp2": (
        "multi-gpu",
        ["--gpus-per-node", "2", "--engine", "fsdp2", "--precision", "bf16"],
        "fsdp2",
        2,
    ),
    "fsdp2 offload": (
        "multi-gpu",
        ["--gpus-per-node", "2", "--engine", "fsdp2", "--cpu-offload"],
        "fsdp2",
        2,
    ),
}


# Each kind of launch file trains; what differs from one of these in a value belongs to the grid.
@pytest.mark.parametrize("name", thinned(TRAINED, ("single", "ddp", "zero2", "fsdp2")))
def test_each_mode_trains_what_it_says(tmp_path, command, rows_file, name):
    """Created, launched and trained for 5 updates; plan.json has the engine in force."""
    mode, argv, engine, processes = TRAINED[name]
    rows = rows_file("rows.jsonl", [{"text": f"{n} and {n + 1}"} for n in range(40)])
    file, batch = (
        tmp_path / "launch.yaml",
        ["--batch-size", "2", "--gradient-accumulation-steps", "2"],
    )
    finished = command("config", "create", mode, *argv, *batch, "-o", file, cwd=tmp_path)
    assert finished.status == 0, finished.err
    start = shlex.split(re.search(r"^start: accum-trainer (.*)$", finished.out, re.MULTILINE)[1])
    assert start[:2] == ["launch", str(file)] and start[2] == "--"
    trained = cli(
        *start,
        "--dataset-file",
        rows,
        "--steps",
        5,
        "--output-dir",
        tmp_path / "run",
        OMP_NUM_THREADS=1,
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["engine"], plan["world_size"]) == (engine, processes)
    assert plan["mixed_precision"] == ("bf16" if "bf16" in argv else "no")
    assert (plan["physical_batch_size"], plan["gradient_accumulation_steps"]) == (2, 2)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5] and not any(
        r["skipped"] for r in records
    )


def test_i23_another_k_than_the_created_file_says(tmp_path, command):
    argv = [
        "--gpus-per-node",
        "2",
        "--engine",
        "zero1",
        "--batch-size",
        "2",
        "--gradient-accumulation-steps",
        "4",
    ]
    assert command("config", "create", "multi-gpu", *argv, "-o", "z.yaml", cwd=tmp_path).status == 0
    train = [
        "--batch-size",
        2,
        "--gradient-accumulation-steps",
        8,
        "--output-dir",
        tmp_path / "run",
    ]
    refused = cli("launch", tmp_path / "z.yaml", "--", *train)
    assert refused.returncode == 2, refused.stderr
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert (
        len(errors) == 1
        and "gradient_accumulation_steps=8" in errors[0]
        and "gradient_accumulation_steps=4" in errors[0]
    )
    assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()


@pytest.mark.long
def test_precision_beside_a_deepspeed_file(tmp_path, command):
    """accelerate would stop with a traceback; here it is one message."""
    argv = ["--gpus-per-node", "2", "--engine", "zero2", "--precision", "bf16", "-o", "z.yaml"]
    assert command("config", "create", "multi-gpu", *argv, cwd=tmp_path).status == 0
    file = tmp_path / "z.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"mixed_precision": "bf16"}))
    refused = cli("launch", file, "--", "--output-dir", tmp_path / "run")
    assert refused.returncode == 2, refused.stderr
    assert (
        "has mixed_precision beside deepspeed_config_file" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_the_readme_command_for_two_processes(tmp_path):
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "launch_configs/cpu_2proc.yaml",
    ]
    launcher += ["--main_process_port", "0", "-m", "accum_trainer.train", "--steps", "20"]
    finished = python(
        *launcher, "--max-seq-len", "32", "--output-dir", tmp_path / "run", OMP_NUM_THREADS=1
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["engine"], plan["world_size"]) == ("ddp", 2)
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 20
