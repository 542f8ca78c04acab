"""Wrong input of every command but `train` and `config create`, in one table, run in this process:
status 2, one message with the value and what to do, nothing written.

What the command does is what `accum_trainer.cli.main` does; only rows that end before a process is
started or an engine is built stand here. test_wrong_input.py and test_wrong_launch.py have the
others, in processes; `test_wrong_inputs_of_all_commands_are_many` counts them all.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from accum_trainer import TrainConfig
from accum_trainer.cli import main
from tests.end_to_end import test_wrong_input as wrong
from tests.end_to_end import test_wrong_launch as wrong_launch
from tests.made_runs import list_runs, make_run
from tests.test_checkpoint import save

EXTRA = "a: 1\nb: 2\n"
LOOP = "def update(accelerator, model, optimizer, scheduler, batches):\n    pass\n"
# name: (arguments, parts of the message)
PLAN = {
    "B zero": (["--batch-size", "0"], "batch_size=0 is below 1"),
    "B word": (["--batch-size", "four"], "batch_size='four' is not an integer"),
    "B of nobody knows": (
        ["--batch-size", "auto", "--global-batch-size", "8"],
        ("batch_size=auto is found on the device", "give a number to plan with"),
    ),
    "K against B_eff": (
        ["--batch-size", "4", "--gradient-accumulation-steps", "3", "--global-batch-size", "64"],
        ("global_batch_size=64 contradicts", "leave gradient_accumulation_steps out"),
    ),
    "B_eff beyond 64 bits": (
        ["--global-batch-size", str(1 << 64)],
        f"global_batch_size={1 << 64} is beyond 64 bits",
    ),
    "processes zero": (["--processes", "0"], "world_size=0 is below 1"),
    "processes word": (["--processes", "two"], "'two' is not a valid integer"),
    "samples zero": (["--num-samples", "0"], "num_samples=0 is below 1"),
    "samples negative": (["--num-samples", "-5"], "num_samples=-5 is below 1"),
    "samples word": (["--num-samples", "many"], "'many' is not a valid integer"),
    "two counts": (
        ["--num-samples", "5", "--dataset-file", "rows.txt"],
        "num_samples=5 and dataset_file=rows.txt both say how much data there is; give one",
    ),
    "data missing": (["--dataset-file", "no.jsonl"], "data file no.jsonl does not exist"),
    "data a folder": (["--dataset-file", "folder"], "data file folder is a folder; name one file"),
    "data empty": (["--dataset-file", "empty.jsonl"], "data file empty.jsonl is empty"),
    "data of no kind": (["--dataset-file", "launch.yaml"], "ends in '.yaml'; give .txt, .jsonl"),
    "data not text": (["--dataset-file", "binary.txt"], "line 1 is not UTF-8 text"),
    "header twice": (["--dataset-file", "twice.csv"], "the header has column a 2 times"),
    "parquet that is none": (["--dataset-file", "no.parquet"], "cannot be read as parquet"),
    "warm-up of words": (["--warmup", "lots"], "warmup='lots' is not a warm-up; give updates"),
    "warm-up too long": (
        ["--steps", "5", "--warmup", "9"],
        ("warmup=9 is 9 updates, but the run has only 5", "shorten the warm-up or train longer"),
    ),
    "warm-up beyond all": (["--steps", "5", "--warmup", "200%"], "warmup='200%' is not a warm-up"),
    "epochs of warm-up": (
        ["--steps", "5", "--warmup", "1ep"],
        "warmup=1ep counts epochs, but the data has no length; give updates or a percentage",
    ),
    "base of scaling": (
        ["--lr-scaling", "sqrt"],
        "lr_scaling=sqrt needs lr_base_batch_size, the effective batch at which lr=0.0003",
    ),
    "memory word": (["--model", "tiny", "--gpu-memory", "big"], "gpu_memory=big is not a size"),
    "memory zero": (["--model", "tiny", "--gpu-memory", "0"], "gpu_memory=0 must be above 0"),
    "memory of nothing": (
        ["--gpu-memory", "80"],
        "gpu_memory=80 is compared with what a model needs; give --model too",
    ),
    "no such model": (["--model", "no/such"], "model=no/such"),
    "a folder without model": (["--model", "folder"], "model=folder"),
    "an option of train only": (["--output-dir", "run"], "No such option '--output-dir'"),
    "its name in a Trainer": (["--max-steps", "5"], "Did you mean '--steps'?"),
    "a contradiction in a file": (
        ["--config", "both.yaml"],
        "error: both.yaml: steps=5 and epochs=2 both say how long to train",
    ),
    "a value in a file": (
        ["--config", "both.yaml", "--epochs", "3", "--warmup", "9%x"],
        "error: warmup='9%x' is not a warm-up",
    ),
    "a size in a file": (
        [
            "--config",
            "three.yaml",
            "--global-batch-size",
            "8",
            "--gradient-accumulation-steps",
            "4",
        ],
        "error: three.yaml and command line: global_batch_size=8 contradicts micro_batch_size=3",
    ),
    "config missing": (["--config", "no.yaml"], "cannot read the configuration no.yaml: No such"),
    "config of a launcher": (["--config", "launch.yaml"], "unknown option 'compute_environment'"),
    "config with options of nobody": (["--config", "extra.yaml"], "unknown option 'a'"),
    "lengths both": (["--steps", "5", "--epochs", "2"], "steps=5 and epochs=2 both say how long"),
}
VERIFY = {
    "windows zero": (["--windows", "0"], "'--windows': 0 is not in the range x>=1"),
    "windows word": (["--windows", "all"], "'all' is not a valid integer"),
    "report nowhere": (
        ["--json", "no/such/report.json"],
        "json=no/such/report.json cannot be written: there is no folder no/such",
    ),
    "report in a folder": (["--json", "folder"], "json=folder cannot be written: it is a folder"),
    "report below a file": (["--json", "rows.txt/a"], "json=rows.txt/a cannot be written"),
    "K zero": (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0 is below 1"),
    "loop of no file": (["--loop", "no.py:update"], "loop=no.py:update: there is no file no.py"),
    "loop of no function": (["--loop", "loop.py:no"], "has no function no; it has update"),
    "loop without colon": (["--loop", "loop.py"], "loop=loop.py does not name a function; give"),
    "loop without name": (["--loop", "loop.py:"], "loop=loop.py: does not name a function; give"),
    "loop that is no Python": (["--loop", "rows.txt:update"], "rows.txt is not a Python file"),
    "loop that fails": (["--loop", "bad.py:update"], "bad.py cannot be imported: ZeroDivisionErr"),
    "loop that is broken": (["--loop", "broken.py:update"], "cannot be imported: SyntaxError"),
    "loop of two": (["--loop", "two.py:update"], "give it these five parameters"),
    "loop in another order": (["--loop", "order.py:update"], "put them in this order"),
    "loop that ends Python": (["--loop", "ends.py:update"], "ends.py cannot be imported"),
    "loop that is a number": (["--loop", "number.py:update"], "has no function update"),
    "data missing": (["--dataset-file", "no.csv"], "data file no.csv does not exist"),
    "unknown option": (["--windws", "3"], "No such option '--windws'"),
    "value left out": (["--windows"], "Option '--windows' requires an argument"),
}
EXPORT = {
    "no source": ([], "Missing argument 'RUN|CHECKPOINT'"),
    "no target": (["run"], "Missing option '-o'"),
    "source missing": (
        ["nowhere", "-o", "out"],
        "source=nowhere is no folder; give a run directory, or a checkpoint in it",
    ),
    "source a file": (["rows.txt", "-o", "out"], "source=rows.txt is no folder"),
    "source without checkpoints": (["folder", "-o", "out"], "folder is not a whole checkpoint"),
    "a run without a whole one": (["empty-run", "-o", "out"], "is a run without a whole check"),
    "target taken": (["run", "-o", "folder"], "output=folder exists already; name a new or empty"),
    "target a file": (["run", "-o", "rows.txt"], "output=rows.txt exists already"),
    "target below a file": (["run", "-o", "rows.txt/out"], "output=rows.txt/out cannot be written"),
    "a checkpoint alone": (["alone/c/step-00000001", "-o", "out"], "lies in no run directory"),
    "other weights": (["run", "-o", "out"], ("run/checkpoints/step-00000001", "model=tiny")),
    "a configuration that is none": (["torn", "-o", "out"], "torn/config.yaml line 1 is not YAML"),
    "damaged": (["damaged", "-o", "out"], "is a run without a whole checkpoint"),
    "two sources": (["run", "run", "-o", "out"], "unexpected extra argument (run)"),
}
REQUEUE = {
    "no status": ([], "Missing argument 'STATUS'"),
    "status word": (["zero"], "'zero' is not a valid integer"),
    "no run": (["0", "--", "--steps", "4"], "give its --output-dir after --"),
    "wrong option": (["75", "--", "--output-dir", "run", "--lr", "x"], "lr='x' is not a number"),
    "unknown option": (["75", "--", "--output-dri", "run"], "No such option '--output-dri'"),
    "limit negative": (
        ["--max-without-progress", "-1", "75", "--", "--output-dir", "run"],
        "-1 is not in the range x>=0",
    ),
    "limit word": (["--max-without-progress", "x", "75"], "'x' is not a valid integer"),
    "a run that is a file": (["0", "--", "--output-dir", "rows.txt"], "rows.txt is a file"),
    "configuration missing": (
        ["0", "--", "--config", "no.yaml", "--output-dir", "run"],
        "cannot read the configuration no.yaml",
    ),
    "help": (["0", "--", "--help"], "run `accum-trainer train --help` instead"),
}
COMPARE = {
    "nothing": ([], "Missing argument 'RUN...'"),
    "no such run": (["logs/one.jsonl", "nowhere"], "nowhere does not exist; name a run directory"),
    "a folder of none": (["folder"], "folder is a folder without metrics.jsonl, and so are those"),
    "an empty log": (["empty.jsonl"], "empty.jsonl has no update: it is empty; name a run direc"),
    "rows": (["rows.txt"], "rows.txt has no update (lines that are no JSON object: 2)"),
    "twice": (["logs/one.jsonl", "logs/../logs/one.jsonl"], "is named twice; name each run once"),
    "twice by its folder": (["logs", "logs/b"], "b/metrics.jsonl is named twice"),
    "baseline of none": (
        ["logs/one.jsonl", "logs/b", "--baseline", "c"],
        "baseline=c is none of the runs; give a number from 1 to 2, or one of one, b",
    ),
    "baseline beyond": (["logs/b", "--baseline", "2"], "baseline=2 is none of the runs"),
    "axis unknown": (["logs/b", "--axis", "time"], "'time' is not one of 'auto', 'updates'"),
    "axis of no log": (
        ["logs/one.jsonl", "--axis", "samples"],
        ("one.jsonl has no effective_batch_size", "choose the axis updates"),
    ),
    "batch word": (
        ["logs/b", "--effective-batch-size", "2,x"],
        "effective_batch_size=2,x is no list of samples per update; give whole numbers above 0",
    ),
    "batch zero": (["logs/b", "--effective-batch-size", "0"], "effective_batch_size=0 is no list"),
    "batches too many": (
        ["logs/b", "logs/one.jsonl", "--effective-batch-size", "1,2,3"],
        "effective_batch_size=1,2,3 gives 3 numbers for 2 runs; give one for all, or one for each",
    ),
    "picture of no kind": (["logs/b", "-o", "a.gif"], "output=a.gif is no name of a picture"),
    "picture nowhere": (["logs/b", "-o", "no/a.png"], "output=no/a.png cannot be written: there"),
    "picture and none": (["logs/b", "-o", "a.png", "--no-picture"], "no_picture asks for none"),
    "picture of somebody": (["logs/b", "-o", "mine.png"], "output=mine.png exists and is no PNG"),
    "json of somebody": (
        ["logs/b", "--no-picture", "--json", "rows.txt"],
        "json=rows.txt exists and is no comparison; name another file",
    ),
    "json over a log": (
        ["logs/one.jsonl", "--no-picture", "--json", "logs/one.jsonl"],
        "json=logs/one.jsonl cannot be written: it is one of the runs; name another file",
    ),
    "json in a folder": (["logs/b", "--json", "folder"], "json=folder cannot be written: it is a"),
    "json and picture": (["logs/b", "-o", "a.png", "--json", "./a.png"], "is the picture's name"),
    "unknown option": (["logs/b", "--base-line", "1"], "No such option '--base-line'"),
}
REPORT = {
    "nothing": ([], "Missing argument 'RUN...'"),
    "no place": (["logs/one.jsonl"], "name the page with -o FILE.html; only that of one run"),
    "no place for two": (["logs/b", "logs/one.jsonl"], "name the page with -o FILE.html"),
    "no such run": (["nowhere", "-o", "a.html"], "nowhere does not exist; name a run directory"),
    "page of somebody": (["logs/b", "-o", "rows.txt"], "rows.txt exists and is no report"),
    "page in a folder": (["logs/b", "-o", "folder"], "output=folder cannot be written: it is a"),
    "page nowhere": (["logs/b", "-o", "no/a.html"], "there is no folder no"),
    "baseline of none": (["logs/b", "-o", "a.html", "--baseline", "x"], "baseline=x is none of"),
}
MERGE = {
    "nothing": ([], "Missing argument 'RUN...'"),
    "one run": (["a", "-o", "out"], "a is one run, and a merge needs two or more"),
    "no such run": (["a", "nowhere", "-o", "out"], "nowhere does not exist; name a folder with"),
    "no run": (["a", "folder", "-o", "out"], "folder is no run; name a folder with"),
    "a file": (["a", "rows.txt", "-o", "out"], "rows.txt is no run; name a folder with"),
    "twice": (["a", "a", "-o", "out"], "a is given twice, and would count twice; name each run"),
    "twice by another name": (["a", "./b/../a", "-o", "out"], "is given twice, and would count"),
    "no output": (["a", "b"], "name the folder of the merge with -o DIR"),
    "output taken": (["a", "b", "-o", "folder"], "output=folder exists and is no merge"),
    "output a file": (["a", "b", "-o", "rows.txt"], "output=rows.txt exists and is no merge"),
    "output below a file": (["a", "b", "-o", "rows.txt/x"], "rows.txt is no folder that may be"),
    "a merge there": (["a", "b", "-o", "merged"], "output=merged holds a merge already"),
    "unfinished": (["a", "stopped", "-o", "out"], ("unfinished: stopped", "--allow-unfinished")),
    "of no sample": (["a", "untrained", "-o", "out"], "untrained was trained on 0 samples"),
    "other weights": (["a", "other", "-o", "out"], "merge runs of the same model and seed"),
    "a sweep": (["sweep"], ("sweep is a sweep: its 2 runs differ in lr", "one by one")),
    "parts missing": (["lost"], "part-9 of lost is missing: independent.json lists 2 runs"),
    "parts outside": (["outside"], "names ../a, which is no name of an entry of its folder"),
    "no parts": (
        ["nothing"],
        "nothing/independent.json names no runs; name the run directories",
    ),
    "a damaged plan": (["a", "planless", "-o", "out"], "planless/plan.json cannot be read"),
    "a plan that is a list": (["a", "listed", "-o", "out"], "plan.json holds a list, not an obj"),
    "a result of words": (["a", "worded", "-o", "out"], "worded/result.json has no num_samples"),
    "no weights": (["a", "weightless", "-o", "out"], "weightless has no weights"),
    "adapter unknown": (["a", "b", "--adapter", "sum"], "'sum' is not one of 'concat', 'product'"),
    "adapter of whole models": (
        ["a", "b", "-o", "out", "--adapter", "concat"],
        "adapter=concat is for LoRA adapters, but the runs are whole models; leave it out",
    ),
    "unknown option": (["a", "b", "--out", "x"], "No such option '--out'"),
    "rows missing": (["a", "b", "-o", "out", "--eval-file", "no.txt"], "no.txt does not exist"),
    "a shard of words": (["a", "sharded", "-o", "out"], "shard=first is not a shard"),
}
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
ANY = {
    "no such command": (["trian"], "No such command 'trian'. Did you mean 'train'?"),
    "a command in capitals": (["Compare"], "Did you mean 'compare'?"),
    "a command cut short": (["cmp"], "Did you mean 'compare'?"),
    "a command of others": (["finetune"], "Did you mean 'train'?"),
    "a part of a command": (["export"], "Did you mean 'checkpoint export'?"),
    "nothing like a command": (["zzz"], "No such command 'zzz'. There are train, verify, plan"),
    "an option of none": (["--verbose"], "No such option '--verbose'"),
    "config without a verb": (["config", "make"], "No such command 'make'"),
    "checkpoint without a verb": (["checkpoint", "import"], "No such command 'import'"),
}
TABLES = {
    "plan": PLAN,
    "verify": VERIFY,
    "checkpoint export": EXPORT,
    "requeue": REQUEUE,
    "compare": COMPARE,
    "report": REPORT,
    "merge": MERGE,
    "launch": LAUNCH,
    "train --cpu --parallel-independent": INDEPENDENT,
    "": ANY,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files and runs to be wrong about."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.txt").write_text("mine")
    launch = {
        "words": {"num_processes": "two"},
        "zero": {"num_processes": 0},
        "half": {"num_processes": 1.5},
        "list": {"deepspeed_config": [1]},
        "int4": {"mixed_precision": "int4"},
        "kind": {"distributed_type": "GPUS"},
        "nodes": {"num_machines": 2},
        "launch": {},
    }
    texts = {f"{n}.yaml": yaml.safe_dump(wrong_launch.TWO | more) for n, more in launch.items()}
    texts |= {
        "rows.txt": "one\ntwo\n",
        "empty.jsonl": "",
        "empty.yaml": "",
        "twice.yaml": "num_processes: 2\nnum_processes: 4\n",
        "deep.yaml": "a: " + "[" * 5000,
        "twice.csv": "a,a\n1,2\n",
        "no.parquet": "PAR1xxxxPAR1",
        "extra.yaml": EXTRA,
        "both.yaml": "steps: 5\nepochs: 2\n",
        "three.yaml": "batch_size: 3\n",
        "loop.py": LOOP,
        "bad.py": "1 / 0\n",
        "broken.py": "def update(:\n",
        "two.py": "def update(model, batches):\n    pass\n",
        "order.py": LOOP.replace("accelerator, model", "model, accelerator"),
        "ends.py": "raise SystemExit(0)\n",
        "number.py": "update = 3\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("binary.txt", "binary.yaml"):
        (folder / name).write_bytes(b"caf\xe9\n")

    (folder / "mine.png").write_text("mine")
    (folder / "logs" / "b").mkdir(parents=True)
    updates = "".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(1, 4))
    for name in ("one.jsonl", "b/metrics.jsonl"):
        (folder / "logs" / name).write_text(updates)

    weights = {"w": torch.ones(2)}
    for name in ("a", "b", "listed", "planless", "worded", "sharded", "run", "empty-run"):
        make_run(folder / name, weights)
    make_run(folder / "weightless")
    make_run(folder / "stopped", weights, done=False, stopped_by="SIGTERM")
    make_run(folder / "untrained", weights, num_samples=0)
    make_run(folder / "other", weights, initial_weights="feedbeef")
    for name in ("torn", "damaged"):
        make_run(folder / name, weights)
        save(folder / name / "checkpoints", 1)
    (folder / "torn" / "config.yaml").write_text("lr: [1")
    (folder / "damaged" / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    (folder / "run" / "config.yaml").write_text(TrainConfig().to_yaml())
    shutil.copytree(
        save(folder / "run" / "checkpoints", 1), folder / "alone" / "c" / "step-00000001"
    )
    (folder / "empty-run" / "checkpoints").mkdir()
    (folder / "listed" / "plan.json").write_text("[]")
    (folder / "planless" / "plan.json").write_text("{")
    (folder / "worded" / "result.json").write_text('{"done": true, "num_samples": "many"}')
    for name, shard in (("sharded", "first"), ("a", "0/2")):
        plan = json.loads((folder / name / "plan.json").read_text())
        (folder / name / "plan.json").write_text(json.dumps(plan | {"shard": shard}))
    (folder / "merged").mkdir()
    (folder / "merged" / "merge.json").write_text("{}")
    list_runs(folder / "lost", "part-0", "part-9")
    make_run(folder / "lost" / "part-0")
    list_runs(folder / "outside", "../a", "b")
    list_runs(folder / "nothing")
    (folder / "torn-set").mkdir()
    (folder / "torn-set" / "independent.json").write_text('{"runs": ')
    sweep = [{"name": f"part-{n}", "settings": {"lr": str(n)}} for n in (1, 2)]
    (folder / "sweep").mkdir()
    (folder / "sweep" / "independent.json").write_text(json.dumps({"runs": sweep}))
    return folder


ROWS = [(words, name) for words, table in TABLES.items() for name in table]


@pytest.fixture
def refused(place, monkeypatch, tmp_path_factory, capsys):
    """Give a command in `place`, in this process: it must be refused."""
    monkeypatch.chdir(place)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # the command sets them
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODEID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path_factory.mktemp("cache")))

    def give(argv, says):
        before = wrong.snapshot(place)
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in argv])
        said = capsys.readouterr()
        assert ended.value.code == 2, said
        assert "Traceback" not in said.err
        [message] = [line for line in said.err.splitlines() if line.lower().startswith("error")]
        for part in says if isinstance(says, tuple) else (says,):
            assert part in message, message
        assert ".;" not in message
        assert wrong.snapshot(place) == before

    return give


@pytest.mark.parametrize(("words", "name"), ROWS, ids=[f"{w} {n}" for w, n in ROWS])
def test_wrong_command(refused, words, name):
    table = TABLES[words]
    argv, says = table[name]
    given = [*words.split(), *argv]
    if table is INDEPENDENT:
        for option, value in (("--cuda-ids", "0,1"), ("--output-dir", "set")):
            given += [] if option in argv else [option, value]
    refused(given, says)


VARIABLES = {
    "an option of words": ({"ACCUM_TRAINER_LR": "x"}, "error: environment: lr='x' is not a number"),
    "processes of words": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number of processes"),
    "a port of words": ({"MASTER_PORT": "x"}, "'x' is not a valid integer"),
    "a node of words": ({"SLURM_NODEID": "x"}, "'x' is not a valid integer"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_wrong_variable(refused, monkeypatch, name):
    variables, says = VARIABLES[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    sets = ["train", "--cpu", "--parallel-independent", "--cuda-ids", "0,1", "--output-dir", "set"]
    refused(sets if "WORLD_SIZE" in variables else ["launch", "launch.yaml"], says)


def test_wrong_inputs_of_all_commands_are_many():
    """Each row is another input: its arguments differ from all others of its command."""
    tables = {
        **TABLES,
        "train --dataset-file": wrong.FILES,
        "config create": wrong_launch.CREATE,
        "launch launch.yaml": wrong_launch.LAUNCH,
        "train": wrong.OPTIONS,
        "train in sets": wrong_launch.INDEPENDENT,
    }
    rows = {(words, str(row[:-1])) for words, table in tables.items() for row in table.values()}
    assert len(rows) == sum(map(len, tables.values()))
    assert len(rows) >= 250
