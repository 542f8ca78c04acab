"""Wrong input of every command but `train` and `config create`, from tables, run in this process:
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
from tests.end_to_end import test_wrong_launch as in_processes
from tests.end_to_end.test_wrong_input import FILES
from tests.end_to_end.wrong import launches, options, plans, runs, snapshot
from tests.made_runs import list_runs, make_run
from tests.test_checkpoint import save

EXTRA = "a: 1\nb: 2\n"
LOOP = "def update(accelerator, model, optimizer, scheduler, batches):\n    pass\n"
TABLES = {
    "plan": plans.PLAN,
    "completion": plans.COMPLETION,
    "verify": plans.VERIFY,
    "checkpoint export": runs.EXPORT,
    "requeue": runs.REQUEUE,
    "compare": runs.COMPARE,
    "report": runs.REPORT,
    "merge": runs.MERGE,
    "launch": launches.LAUNCH,
    "train --cpu --parallel-independent": launches.INDEPENDENT,
    "": plans.ANY,
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
    texts = {f"{n}.yaml": yaml.safe_dump(in_processes.TWO | more) for n, more in launch.items()}
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
        "data.yaml": "dataset_file: no.jsonl\n",
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
        before = snapshot(place)
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in argv])
        said = capsys.readouterr()
        assert ended.value.code == 2, said
        assert "Traceback" not in said.err
        [message] = [line for line in said.err.splitlines() if line.lower().startswith("error")]
        for part in says if isinstance(says, tuple) else (says,):
            assert part in message, message
        assert ".;" not in message
        assert snapshot(place) == before

    return give


@pytest.mark.parametrize(("words", "name"), ROWS, ids=[f"{w} {n}" for w, n in ROWS])
def test_wrong_command(refused, words, name):
    table = TABLES[words]
    argv, says = table[name]
    given = [*words.split(), *argv]
    if table is launches.INDEPENDENT:
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
        "train --dataset-file": FILES,
        "config create": in_processes.CREATE,
        "launch launch.yaml": in_processes.LAUNCH,
        "train": options.OPTIONS,
        "train in sets": in_processes.INDEPENDENT,
    }
    rows = {(words, str(row[:-1])) for words, table in tables.items() for row in table.values()}
    assert len(rows) == sum(map(len, tables.values()))
    assert len(rows) >= 250
