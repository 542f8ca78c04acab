"""Wrong uses of `config create`, `launch` and independent runs: one message with the remedy, status
2, nothing written."""

from __future__ import annotations

import socket

import pytest
import yaml

from tests.end_to_end.wrong import refused
from tests.grids import thinned
from tests.launching import python

CREATE = {
    "unknown mode": (
        ["multi-gpus"],
        "'multi-gpus' is not one of 'single-gpu', 'multi-gpu', 'parallel-independent'",
    ),
    "nodes zero": (
        ["multi-gpu", "--nodes", "0", "--gpus-per-node", "2"],
        "'--nodes': 0 is not in the range x>=1",
    ),
    "gpus zero": (
        ["multi-gpu", "--gpus-per-node", "0"],
        "0 is not in the range x>=1",
    ),
    "how many gpus": (["multi-gpu"], "needs --gpus-per-node: how many GPUs a machine has"),
    "how many runs": (["parallel-independent"], "needs --gpus-per-node: how many independent runs"),
    "one process": (["multi-gpu", "--gpus-per-node", "1"], ("is one process", "use single-gpu")),
    "single with two": (
        ["single-gpu", "--gpus-per-node", "2"],
        ("single-gpu is one process", "use multi-gpu"),
    ),
    "ZeRO of one": (
        ["single-gpu", "--engine", "zero2"],
        ("engine=zero2 shards over processes", "cpu_offload"),
    ),
    "FSDP of one": (
        ["single-gpu", "--engine", "fsdp2"],
        "engine=fsdp2 shards over processes, and single-gpu has one",
    ),
    "sharded independent": (
        ["parallel-independent", "--gpus-per-node", "2", "--engine", "zero2"],
        "each of the parallel-independent runs is one process",
    ),
    "independent nodes": (
        ["parallel-independent", "--gpus-per-node", "2", "--nodes", "2"],
        ("nodes=2", "an array of jobs spreads them"),
    ),
    "unknown engine": (
        ["multi-gpu", "--gpus-per-node", "2", "--engine", "zero4"],
        "'zero4' is not one of 'single', 'ddp', 'fsdp2', 'zero1', 'zero2', 'zero3'",
    ),
    "offload of nothing": (
        ["multi-gpu", "--gpus-per-node", "2", "--cpu-offload"],
        "engine=ddp shards none; give engine zero1 to zero3, or fsdp2",
    ),
    "offload on a CPU": (
        ["multi-gpu", "--gpus-per-node", "2", "--engine", "zero1", "--cpu-offload", "--cpu"],
        "with cpu it is there already",
    ),
    "fp16 on a CPU": (["single-gpu", "--cpu", "--precision", "fp16"], "precision=fp16 needs a GPU"),
    "fp16 with FSDP": (
        ["multi-gpu", "--gpus-per-node", "2", "--engine", "fsdp2", "--precision", "fp16"],
        "precision=fp16 needs a loss scaler",
    ),
    "K in two places": (
        [
            "single-gpu",
            "--gradient-accumulation-steps",
            "4",
            "--",
            "--gradient-accumulation-steps",
            "8",
        ],
        "gradient_accumulation_steps stands after --",
    ),
    "engine in two places": (
        ["multi-gpu", "--gpus-per-node", "2", "--engine", "zero2", "--", "--zero-stage", "zero3"],
        "zero_stage stands after --, but --engine decides it here",
    ),
    "option of train before --": (
        ["single-gpu", "--epochs", "3"],
        "No such option '--epochs'. Options of `train` go after `--`: -- --epochs",
    ),
    "name of a Trainer before --": (
        ["single-gpu", "--learning-rate", "3"],
        "No such option '--learning-rate'. Options of `train` go after `--`: -- --lr",
    ),
    "nothing of train": (["single-gpu", "--forse"], "No such option '--forse'. Did you mean '--f"),
    "engine named twice": (
        ["single-gpu", "--", "--engine", "single"],
        "engine stands after --, but --engine decides it here",
    ),
    "one process of several": (
        ["multi-gpu", "--gpus-per-node", "2", "--engine", "single"],
        "engine=single is one process, and multi-gpu has several; use ddp",
    ),
    "unknown option of train": (
        ["single-gpu", "--", "--batchsize", "4"],
        "No such option '--batchsize'",
    ),
    "wrong option of train": (["single-gpu", "--", "--lr", "fast"], "lr='fast' is not a number"),
    "no yaml": (["single-gpu", "-o", "x.json"], "output=x.json does not end in .yaml"),
    "partition without slurm": (
        ["single-gpu", "--partition", "gpu"],
        "partition=gpu is for a batch script",
    ),
    "time": (
        ["single-gpu", "--slurm", "--time", "1 day"],
        "time=1 day is not a time; give HH:MM:SS",
    ),
    "signal": (
        ["single-gpu", "--slurm", "--signal", "KILL@60"],
        "signal=KILL@60 is not USR1@SECONDS",
    ),
    "signal too early": (
        ["single-gpu", "--slurm", "--time", "00:02:00", "--signal", "USR1@180"],
        "would come 180 s before the end of time=00:02:00, which is 120 s",
    ),
    "partition of two words": (
        ["single-gpu", "--slurm", "--partition", "a b"],
        "partition='a b' is not a name",
    ),
    "vary of one": (["single-gpu", "--vary", "lr=1,2"], "vary=lr=1,2 is for independent runs"),
    "vary without values": (
        ["parallel-independent", "--vary", "lr"],
        "'lr' is not option=value,value",
    ),
    "memory of nothing": (["single-gpu", "--gpu-memory", "80"], "give --model after --"),
}


@pytest.mark.parametrize("name", CREATE)
def test_wrong_creation(command, tmp_path, name):
    argv, says = CREATE[name]
    refused(command, tmp_path, "config", "create", *argv, says=says)


def test_files_are_not_overwritten(command, tmp_path):
    argv = ["config", "create", "multi-gpu", "--gpus-per-node", "2", "-o", "a.yaml"]
    assert command(*argv, cwd=tmp_path).status == 0
    written = (tmp_path / "a.yaml").read_text()
    refused(
        command,
        tmp_path,
        *argv,
        "--precision",
        "bf16",
        says="a.yaml exists already; name another file, or give --force",
    )
    assert command(*argv, "--precision", "bf16", "--force", cwd=tmp_path).status == 0
    assert (tmp_path / "a.yaml").read_text() != written


TWO = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_processes": 2,
    "num_machines": 1,
}
MEETING = ("--machine-rank", "0", "--main-process-ip", "a", "--main-process-port", "29500")
LAUNCH = {
    "no such file": (None, [], "cannot read the launch configuration launch.yaml"),
    "not YAML": ("a: [1", [], "launch.yaml line 1 is not YAML"),
    "a list": ("- 1", [], "launch.yaml holds a list, not a launch configuration"),
    "options of train": (
        {"batch_size": 4},
        [],
        ("it has no distributed_type", "accum-trainer train --config"),
    ),
    "of another version": (
        TWO | {"warp_drive": True},
        [],
        ("cannot read launch.yaml", "warp_drive", "config create"),
    ),
    "one process in silence": (
        TWO | {"distributed_type": "MULTI_CPU"},
        [],
        "accelerate starts one process only",
    ),
    "use_cpu": (
        TWO | {"use_cpu": True},
        [],
        ("use_cpu=True", "write distributed_type: MULTI_GPU and use_cpu: false"),
    ),
    "engine of others": (
        TWO | {"distributed_type": "MEGATRON_LM"},
        [],
        "distributed_type=MEGATRON_LM has no engine here",
    ),
    "uneven nodes": (
        TWO | {"num_processes": 3, "num_machines": 2},
        ["--machine-rank", "0"],
        "do not spread evenly",
    ),
    "too many processes": (TWO | {"num_processes": 4096}, [], ("4096 processes", "CPU cores")),
    "too many processes of two nodes": (
        TWO | {"num_processes": 8192, "num_machines": 2},
        [*MEETING],
        ("4096 processes on this machine", "or less (over 2 nodes)"),
    ),
    "which node": (TWO | {"num_machines": 2}, [], "say which one this is with --machine-rank"),
    "no such node": (
        TWO | {"num_machines": 2},
        ["--machine-rank", "2", "--main-process-ip", "a", "--main-process-port", "29500"],
        "machine_rank=2 is no node of num_machines=2; give 0 to 1",
    ),
    "where to meet": (
        TWO | {"num_machines": 2},
        ["--machine-rank", "1"],
        "2 nodes must know where to meet",
    ),
    "restarts of two nodes that do not continue": (
        TWO | {"num_machines": 2},
        [*MEETING, "--max-restarts", "3", "--", "--resume", "anew"],
        ("max_restarts=3 on 2 nodes continues a run", "resume=anew does not", "a new --output-dir"),
    ),
    "restarts beyond the last port": (
        TWO | {"num_machines": 2},
        [*MEETING[:-1], "65535", "--max-restarts", "3"],
        ("main_process_port=65535 has no port after it", "give at most 65534"),
    ),
    "restarts below zero": (TWO, ["--max-restarts", "-1"], "-1 is not in the range x>=0"),
    "a node of one": (TWO, ["--machine-rank", "1"], "machine_rank=1, but launch.yaml has one node"),
    "no port": (TWO, ["--main-process-port", "70000"], "main_process_port=70000 is not a port"),
    "no DeepSpeed file": (
        TWO
        | {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": "z.json"},
        },
        [],
        "deepspeed_config_file=z.json does not exist",
    ),
}


@pytest.mark.parametrize("name", LAUNCH)
def test_wrong_launch(command, tmp_path, name):
    content, argv, says = LAUNCH[name]
    if content is not None:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "launch.yaml").write_text(text)
    more = argv if "--" in argv else [*argv, "--"]
    refused(command, tmp_path, "launch", "launch.yaml", *more, "--output-dir", "run", says=says)


def test_a_batch_job_without_a_run_directory(command, tmp_path):
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(TWO))
    argv = ["launch", "launch.yaml", "--batch-start", "4711.0", "--", "--steps", "4"]
    says = "batch_start=4711.0 is noted in the run directory; give its --output-dir after --"
    refused(command, tmp_path, *argv, says=says)
    argv = ["requeue", "0", "--", "--steps", "4"]
    says = "requeue looks into the run directory; give its --output-dir after --"
    refused(command, tmp_path, *argv, says=says)


def test_port_in_use(command, tmp_path):
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(TWO))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says = f"main_process_port={port} cannot be used here"
        refused(command, tmp_path, "launch", "launch.yaml", "--main-process-port", port, says=says)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "0"], "steps=0 is below 1"),
        (
            ["--parallel-independent", "--cuda-ids", "0,1"],
            "parallel_independent starts single processes",
        ),
        (["--help"], "--help is among the options"),
    ],
)
def test_wrong_options_after_the_dashes(command, tmp_path, argv, says):
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(TWO))
    refused(command, tmp_path, "launch", "launch.yaml", "--", *argv, says=says)


def test_options_before_the_dashes(command, tmp_path):
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(TWO))
    refused(
        command, tmp_path, "launch", "launch.yaml", "--steps", "4", says="No such option '--steps'"
    )


INDEPENDENT = {
    "no slots": (["--parallel-independent"], "needs cuda_ids, the names of its slots, such as 0,1"),
    "not numbers": (
        ["--parallel-independent", "--cuda-ids", "a,b"],
        "cuda_ids=a,b is not a list of device numbers",
    ),
    "twice": (["--parallel-independent", "--cuda-ids", "0,0"], "names a device twice"),
    "ids alone": (
        ["--cuda-ids", "0,1"],
        "cuda_ids=0,1 is for independent runs; give parallel_independent too",
    ),
    "shard and all": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--shard", "0/2"],
        "shard=0/2 is one share",
    ),
    "shard beyond": (
        ["--shard", "2/2"],
        "shard=2/2 is not a shard; give I/N with I from 0 to N - 1",
    ),
    "shard of words": (["--shard", "first"], "shard=first is not a shard"),
    "vary unknown": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--vary", "rl=1,2"],
        ("unknown option 'rl'", "lr?"),
    ),
    "vary the folder": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--vary", "output_dir=a,b"],
        "output_dir cannot differ between the runs",
    ),
    "vary twice": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--vary", "lr=1;lr=2"],
        "names lr twice",
    ),
    "vary badly": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--vary", "lr=1e-3,fast"],
        "lr='fast' is not a number",
    ),
    "one log": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--log-file", "a.jsonl"],
        "log_file=a.jsonl is one place",
    ),
    "missing data": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--dataset-file", "nowhere.jsonl"],
        "data file nowhere.jsonl does not exist",
    ),
    "restarts": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--max-restarts", "-1"],
        "max_restarts=-1 is below 0",
    ),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_wrong_independent_runs(train, tmp_path, name):
    argv, says = INDEPENDENT[name]
    refused(train, tmp_path, "--output-dir", "runs/set", *argv, says=says)


def test_independent_runs_under_a_launcher(train, tmp_path):
    argv = ["--output-dir", "run", "--parallel-independent", "--cuda-ids", "0,1"]
    refused(
        train, tmp_path, *argv, says="start it with `accum-trainer train`", WORLD_SIZE=2, RANK=0
    )


MULTI_CPU = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_CPU",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "use_cpu": True,
}


@pytest.mark.parametrize("how", thinned(["options", "file", "no gpu"], ["file"]))
def test_i23b_processes_that_accelerate_does_not_start_are_missed(how, tmp_path):
    """accelerate starts one process here, without a word; it must not train alone."""
    options = {
        "options": ["--cpu", "--num_processes", "2"],
        "no gpu": ["--num_processes", "2"],
        "file": [],
    }[how]
    if how == "file":
        (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(MULTI_CPU))
        options = ["--config_file", tmp_path / "cpu.yaml"]
    train = ("-m", "accum_trainer.train", "--dry-run", "--cpu", "--output-dir", tmp_path / "run")
    # Fresh: a launcher is known by its command line.
    launcher = ("-m", "accelerate.commands.launch", *options)
    run = python(*launcher, *train, CUDA_VISIBLE_DEVICES="", fresh=True)
    assert run.returncode != 0
    [message] = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert f"was asked for {'several' if how == 'file' else 2} processes and started one" in message
    assert "accelerate launch --multi_gpu --num_processes N" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_one_process_that_was_asked_for_is_not_missed(tmp_path):
    """Also where the shell has a meeting place of its own; what nothing can tell is said."""
    shell = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "CUDA_VISIBLE_DEVICES": ""}
    train = (
        "-m",
        "accum_trainer.train",
        "--dry-run",
        "--cpu",
        "--dataset-file",
        tmp_path / "rows.txt",
    )
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    launcher = ("-m", "accelerate.commands.launch")  # known by its command line: fresh
    told = python(*launcher, "--cpu", "--num_processes", "1", *train, fresh=True, **shell)
    assert told.returncode == 0, told.stderr
    assert "if several processes were asked for" not in told.stderr
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump(MULTI_CPU | {"distributed_type": "NO", "num_processes": 1})
    )
    file = ("--config_file", tmp_path / "one.yaml")
    unknown = python(*launcher, *file, *train, fresh=True, **shell)
    assert unknown.returncode == 0, unknown.stderr
    assert (
        "note: accelerate launch started this one process, and MASTER_ADDR is set" in unknown.stderr
    )
