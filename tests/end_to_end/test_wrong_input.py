"""Wrong data, configurations and folders of `train`, and runs that it cannot continue: refused."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.end_to_end.wrong import refused

GOOD = [{"prompt": f"What is {n}?\n", "completion": f"It is {n}."} for n in range(20)]


FILES = {
    "empty": ("rows.jsonl", "", "rows.jsonl is empty"),
    "blank": ("rows.txt", "\n\n  \n", "rows.txt has no rows"),
    "malformed line": (
        "rows.jsonl",
        "".join(json.dumps(row) + "\n" for row in GOOD[:6])
        + '{"prompt": "x", \n'
        + json.dumps(GOOD[7])
        + "\n",
        "rows.jsonl line 7 is not JSON",
    ),
    "malformed json": (
        "rows.json",
        '[{"text": "a"},\n {"text": }]',
        "rows.json line 2 is not JSON",
    ),
    "not objects": (
        "rows.jsonl",
        '{"text": "a"}\n[1, 2]\n',
        "rows.jsonl line 2 is not a JSON object",
    ),
    "no column": (
        "rows.jsonl",
        '{"body": "a", "title": "b"}\n',
        ("row 1 has the columns ['body', 'title']", "expected text;"),
    ),
    "csv columns": ("rows.csv", "a,b\n1,2\n", "row 1 has the columns ['a', 'b']"),
    "one row short": (
        "rows.jsonl",
        json.dumps(GOOD[0]) + "\n" + '{"prompt": "x"}\n',
        "row 2: null value in column completion",
    ),
    "not text": (
        "rows.jsonl",
        '{"prompt": [3], "completion": 4}\n',
        "rows.jsonl row 1: prompt=[3] is a list, not text",
    ),
    "messages": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        "the tokenizer has no chat template",
    ),
    "suffix": ("rows.tsv", "a\tb\n", "ends in '.tsv'"),
    "no target": ("rows.jsonl", '{"text": ""}\n', "has no target in any of its 1 samples"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_data(train, tmp_path, rows_file, name):
    file, content, says = FILES[name]
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--dataset-file",
        rows_file(file, content),
        says=says,
    )


def test_not_utf8(train, tmp_path, rows_file):
    path = rows_file("rows.jsonl", "")
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    refused(
        train, tmp_path, "--output-dir", "run", "--dataset-file", path, says="is not UTF-8 text"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("batch_sise: 4\n", ("unknown option 'batch_sise'", "did you mean batch_size?")),
        ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps=0 is below 1"),
        (
            "gradient_accumulation_steps: true\n",
            "gradient_accumulation_steps=True is not an integer",
        ),
        ("lr: [1\n", "line 2 is not YAML"),
        ("lr: 1\nseed: 2\nlr: 3\n", "line 3 is not YAML: lr has two values; give it once"),
        ("lr: 2001-99-99\n", "line 1 is not YAML: '2001-99-99' is no timestamp (month must be"),
        ("model: " + "[" * 5000, "cannot be read: its values are nested too deeply"),
        (f"seed: {1 << 64}\n", f"seed={1 << 64} is beyond 64 bits"),
        ("- lr\n", "holds a list, not `option: value` lines"),
    ],
)
def test_wrong_yaml(train, tmp_path, rows_file, content, says):
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--config",
        file := rows_file("run.yaml", content),
        says=(*((says,) if isinstance(says, str) else says), str(file)),
    )


def test_wrong_environment(train, tmp_path):
    says = "environment: unknown option 'batchsize'; did you mean batch_size?"
    refused(train, tmp_path, "--output-dir", "run", says=says, ACCUM_TRAINER_BATCHSIZE=4)


def test_output_dir_under_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train, tmp_path, "--output-dir", "file/run", says="file is a file, not a folder")


def test_output_dir_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train, tmp_path, "--output-dir", "file", says="file is a file, not a folder")


def test_output_dir_holds_something_else(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused(train, tmp_path, "--output-dir", "run", says="holds other files and no run")


def test_log_file_holds_something_else(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--log-file",
        "notes.txt",
        says="does not hold records",
    )


def test_model_folder_without_a_model(train, tmp_path):
    (tmp_path / "model").mkdir()
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--model",
        "model",
        says="model=model gives no tokenizer",
    )


class TestResume:
    """Continuing what is not the same run."""

    @pytest.fixture
    def folder(self, train, tmp_path, rows_file):
        self.data = rows_file("rows.jsonl", GOOD)
        self.argv = [
            "--dataset-file",
            self.data,
            "--batch-size",
            "4",
            "--steps",
            "2",
            "--output-dir",
            "run",
        ]
        finished = train(*self.argv)
        assert finished.status == 0, finished.err
        return tmp_path

    def test_other_effective_batch(self, train, folder):
        says = "trained with global_batch_size=4, this run has global_batch_size=8"
        refused(train, folder, *self.argv, "--gradient-accumulation-steps", "2", says=says)

    def test_other_data(self, train, folder):
        self.data.write_text("".join(json.dumps(row) + "\n" for row in reversed(GOOD)))
        refused(train, folder, *self.argv, says=("trained with data=", "this run has data="))

    def test_other_seed(self, train, folder):
        refused(
            train,
            folder,
            *self.argv,
            "--seed",
            "7",
            says="trained with seed=0, this run has seed=7",
        )

    def test_never(self, train, folder):
        refused(
            train,
            folder,
            *self.argv,
            "--resume",
            "never",
            says="already holds a run and resume=never",
        )

    def test_foreign_folder(self, train, folder):
        (folder / "elsewhere").mkdir()
        argv = [*self.argv[:-1], "fresh", "--resume", "elsewhere"]
        refused(
            train,
            folder,
            *argv,
            says="elsewhere is not a whole checkpoint: its manifest.json is missing; give a run "
            "directory, or a checkpoint in it (RUN/checkpoints/step-N)",
        )

    def test_damaged_checkpoint(self, train, folder):
        step = folder / "run" / "checkpoints" / "step-00000002"
        part = step / "part-00000-of-00001.safetensors"
        part.write_bytes(b"x" * part.stat().st_size)
        argv = [*self.argv[:-1], "fresh", "--resume", step]
        refused(train, folder, *argv, says=f"damaged: {part.name} is not what its manifest lists")

    def test_run_without_checkpoints(self, train, folder):
        for path in (folder / "run" / "checkpoints").iterdir():
            shutil.rmtree(path)
        argv = [*self.argv[:-1], "fresh", "--resume", "run"]
        refused(train, folder, *argv, says="resume=run is a run without a whole checkpoint")
