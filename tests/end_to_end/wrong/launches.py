"""Wrong arguments of `launch` and of independent runs, which end before a process is started."""

from __future__ import annotations

LAUNCH = {
    "no file": ([], "Missing argument 'CONFIG'"),
    "a folder": (["folder"], "cannot read the launch configuration folder: Is a directory"),
    "not text": (["binary.yaml"], "cannot read the launch configuration binary.yaml: 'utf-8'"),
    "empty": (["empty.yaml"], "empty.yaml holds a NoneType, not a launch configuration"),
    "processes of words": (["words.yaml"], "num_processes='two' is no whole number"),
    "processes zero": (["zero.yaml"], "num_processes=0 is below 1"),
    "half a process": (["half.yaml"], "num_processes=1.5 is no whole number"),
    "a section that is a list": (["list.yaml"], "deepspeed_config=[1] is no section of"),
    "precision unknown": (["int4.yaml"], "mixed_precision='int4' is not known; give one of no"),
    "kind unknown": (["kind.yaml"], "cannot read kind.yaml: 'GPUS' is not a valid Distributed"),
    "an option twice": (["twice.yaml"], "line 2 is not YAML: num_processes has two values"),
    "nested without end": (["deep.yaml"], "deep.yaml cannot be read: its values are nested too"),
    "option of train before --": (
        ["launch.yaml", "--batch-size", "4"],
        "No such option '--batch-size'. Options of `train` go after `--`: -- --batch-size",
    ),
    "port word": (["launch.yaml", "--main-process-port", "x"], "'x' is not a valid integer"),
    "node word": (["launch.yaml", "--machine-rank", "first"], "'first' is not a valid integer"),
    "node negative": (
        ["nodes.yaml", "--machine-rank", "-1", "--main-process-ip", "a", "--main-process-port",
         "29500", "--", "--output-dir", "run"],
        "machine_rank=-1 is no node of num_machines=2; give 0 to 1",
    ),
    "nodes without a run": (["nodes.yaml"], "must agree on one --output-dir; give it after --"),
    "run that is a file": (
        ["launch.yaml", "--", "--cpu", "--output-dir", "rows.txt"],
        "output_dir=rows.txt cannot be written: rows.txt is a file, not a folder",
    ),
    "run of another": (
        ["launch.yaml", "--", "--cpu", "--output-dir", "folder"],
        "output_dir=folder holds other files and no run",
    ),
    "run that must be new": (
        ["launch.yaml", "--", "--cpu", "--output-dir", "run", "--resume", "never"],
        "output_dir=run already holds a run and resume=never; choose another folder",
    ),
    "contradiction": (
        ["launch.yaml", "--", "--dataset", "a", "--dataset-file", "b"],
        "dataset_file=b and dataset=a both name the training data; give one of them",
    ),
    "a loose word": (["launch.yaml", "--", "stray"], "unexpected extra argument (stray)"),
    "batch job of a file": (
        ["launch.yaml", "--batch-start", "1.0", "--", "--cpu", "--output-dir", "rows.txt"],
        "rows.txt is a file, not a folder",
    ),
}  # fmt: skip
INDEPENDENT = {
    "a damaged index": (["--output-dir", "nothing"], "nothing/independent.json names no runs"),
    "an index that is no JSON": (["--output-dir", "torn-set"], "independent.json cannot be read"),
    "another set": (["--output-dir", "sweep"], "give the same devices and vary as before"),
    "runs that must be new": (["--output-dir", "sweep", "--resume", "never"], "already holds runs"),
    "a single run": (["--output-dir", "run"], "run holds a single run, not a set of runs"),
    "a checkpoint for all": (["--resume", "run"], "resume=run is one place, and parallel_indep"),
    "a place of words": (["--cuda-ids", "0,1,x"], "cuda_ids=0,1,x is not a list of device numbers"),
    "a place left out": (["--cuda-ids", "0,,1"], "cuda_ids=0,,1 is not a list of device numbers"),
    "values that contradict": (["--vary", "scheduler=cosine,step"], "scheduler=step is not known"),
    "code": (["--vary", "trust_remote_code=true,false"], "trust_remote_code cannot differ"),
}
