"""What is read from others stays data: no path leaves its folder, no file runs code. The threats
are listed in docs/security.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from accum_trainer.data.files import private_cache
from accum_trainer.errors import AccumTrainerError, CheckpointError
from accum_trainer.runs.merge import merge
from accum_trainer.train import durable
from accum_trainer.train.loss_picture import draw_loss
from accum_trainer.train.records import RecordWriter
from tests.launching import ROOT, run
from tests.made_runs import list_runs, make_run

W = {"w": torch.ones(2)}


def everything(folder):
    """Path -> content of all files below a folder; links are not followed."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def two_runs(folder):
    return [make_run(folder / name, W) for name in ("a", "b")]


def shard(run, file):
    """Give the weights of a run to `file`, and name it in the index, as a model of several files
    does."""
    target = run / "model" / file
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(run / "model" / "model.safetensors", target)
    index = {"metadata": {}, "weight_map": {"w": file}}
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


class TestMerge:
    """Runs that came from others."""

    @pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
    def test_a_name_in_the_index_that_leads_out_of_the_model(self, tmp_path, absolute):
        runs = two_runs(tmp_path / "runs")
        outside = tmp_path / "outside.safetensors"
        name = str(outside) if absolute else "../../../outside.safetensors"
        for made in runs:
            shard(made, name)
        save_file({"w": torch.tensor([7.0, 7.0])}, outside)
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=r"index\.json names .*outside\.safetensors"):
            merge(runs, tmp_path / "out")
        assert everything(tmp_path) == before

    @pytest.mark.parametrize(
        "weight_map", [{"w": 3}, {"w": ""}, {"w": ".."}, {"w": "sub/a.safetensors"}, ["w"], None]
    )
    def test_an_index_that_names_no_files(self, tmp_path, weight_map):
        runs = two_runs(tmp_path / "runs")
        for made in runs:
            shard(made, "model-00001-of-00001.safetensors")
        index = runs[1] / "model" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            merge(runs, tmp_path / "out")
        assert everything(tmp_path) == before

    def test_a_part_named_outside(self, tmp_path):
        two_runs(tmp_path / "elsewhere")
        folder = list_runs(tmp_path / "four", "../elsewhere/a", "../elsewhere/b")
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=r"independent\.json names \.\./elsewhere/a"):
            merge([folder])
        assert everything(tmp_path) == before

    @pytest.mark.parametrize(
        "link", ["part-1", "part-1/model", "part-0/model/notes.txt", "part-0/model/more"]
    )
    def test_a_link_that_leads_out_of_the_run(self, tmp_path, link):
        """Its target would be averaged, or copied into the result, which people publish."""
        folder = list_runs(tmp_path / "four", "part-0", "part-1")
        two_runs(tmp_path / "own")
        for part in ("part-0", "part-1"):
            make_run(folder / part, W)
        target = {
            "part-1": tmp_path / "own" / "a",
            "part-1/model": tmp_path / "own" / "a" / "model",
            "part-0/model/more": tmp_path / "own",
        }.get(link, tmp_path / "own" / "secret.txt")
        (tmp_path / "own" / "secret.txt").write_text("secret")
        if (folder / link).exists():
            shutil.rmtree(folder / link)
        (folder / link).symlink_to(target)
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=f"{link} is a link to .*own"):
            merge([folder])
        assert everything(tmp_path) == before

    def test_links_inside_a_run_are_followed(self, tmp_path):
        """Some people keep the weights once and link to them."""
        runs = two_runs(tmp_path / "runs")
        for made in runs:
            shutil.move(made / "model" / "model.safetensors", made / "best.safetensors")
            (made / "model" / "model.safetensors").symlink_to("../best.safetensors")
        merge(runs, tmp_path / "out")
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], W["w"])
        assert not (tmp_path / "out" / "model.safetensors").is_symlink()

    def test_a_run_that_the_user_names_by_a_link(self, tmp_path):
        runs = two_runs(tmp_path / "runs")
        (tmp_path / "latest").symlink_to(runs[1])
        merge([runs[0], tmp_path / "latest"], tmp_path / "out")
        assert (tmp_path / "out" / "merge.json").is_file()

    @pytest.mark.parametrize("place", [".merged.partial", "merged"])
    def test_a_link_where_the_result_is_written(self, tmp_path, place):
        """One that a folder from others brings must not take the result elsewhere."""
        folder = list_runs(tmp_path / "four", "part-0", "part-1")
        for part in ("part-0", "part-1"):
            make_run(folder / part, W)
        own = tmp_path / "own"
        own.mkdir()
        (own / "merge.json").write_text("{}")
        (own / "mine.txt").write_text("mine")
        (folder / place).symlink_to(own)
        before = everything(own)
        try:
            merge([folder], force=True)
            assert place == ".merged.partial" and (folder / "merged" / "merge.json").is_file()
        except AccumTrainerError as error:
            assert place == "merged" and "is a link to" in str(error)
        assert everything(own) == before

    def test_an_output_that_the_user_names_by_a_link(self, tmp_path):
        runs = two_runs(tmp_path / "runs")
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "disk")
        for _ in range(2):
            merge(runs, tmp_path / "out", force=True)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "merge.json").is_file()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "out", "runs"]

    @pytest.mark.parametrize(
        ("file", "key"),
        [
            ("independent.json", "runs"),
            ("part-0/plan.json", "initial_weights"),
            ("part-1/plan.json", "shard"),
            ("part-1/result.json", "num_samples"),
            ("part-0/model/adapter_config.json", "r"),
            ("part-0/model/adapter_config.json", "lora_alpha"),
        ],
    )
    def test_values_of_another_type_or_size(self, tmp_path, file, key):
        """Each is refused, or harmless; none is a traceback."""
        folder = list_runs(tmp_path / "four", "part-0", "part-1")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True}
        halves = {
            "base_model.model.q.lora_A.weight": torch.ones(2, 4),
            "base_model.model.q.lora_B.weight": torch.ones(4, 2),
        }
        for part in ("part-0", "part-1"):
            model = make_run(folder / part) / "model"
            model.mkdir()
            save_file(halves, model / "adapter_model.safetensors")
            (model / "adapter_config.json").write_text(json.dumps(config))
        right = json.loads((folder / file).read_text())
        refused = 0
        values = [None, True, -1, 0, 1, 1.5, "x", "", [], {}, [1], {"a": 1}, 10**400, float("nan")]
        for value in values:
            (folder / file).write_text(json.dumps(right | {key: value}))
            try:
                merge([folder], force=True)
            except AccumTrainerError:
                refused += 1
        assert refused >= len(values) // 2 or key == "shard"
        (folder / file).write_text(json.dumps(right))
        merge([folder], force=True)


class TestLogFile:
    """The file of --log-file is the user's: it may be a link, a pipe or private."""

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_is_followed(self, tmp_path, exists):
        target, link = tmp_path / "disk" / "log.jsonl", tmp_path / "log.jsonl"
        target.parent.mkdir()
        if exists:
            target.write_text("")
        link.symlink_to(target)
        writer = RecordWriter(tmp_path / "run" / "metrics.jsonl", link)
        writer.write({"step": 1})
        writer.close()
        assert link.is_symlink() and not target.is_symlink()
        assert target.read_text() == '{"step": 1}\n'

    def test_it_keeps_its_permissions(self, tmp_path):
        log = tmp_path / "log.jsonl"
        log.touch(mode=0o600)
        RecordWriter(tmp_path / "metrics.jsonl", log).close()
        assert log.stat().st_mode & 0o777 == 0o600

    def test_a_pipe_stays_one(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            writer = RecordWriter(tmp_path / "metrics.jsonl", pipe)
            writer.write({"step": 1})
            assert os.read(reader, 100) == b'{"step": 1}\n'
            writer.close()
        finally:
            os.close(reader)
        assert pipe.is_fifo()

    def test_a_link_in_the_run_directory_is_not(self, tmp_path):
        own, metrics = tmp_path / "own.txt", tmp_path / "run" / "metrics.jsonl"
        own.write_text("mine")
        metrics.parent.mkdir()
        metrics.symlink_to(own)
        writer = RecordWriter(metrics)
        writer.write({"step": 1})
        writer.close()
        assert own.read_text() == "mine"
        assert not metrics.is_symlink() and metrics.read_text() == '{"step": 1}\n'


class TestCache:
    """Files in the cache hold rows."""

    def test_at_its_usual_place_it_is_the_users_alone(self, tmp_path, monkeypatch):
        """Also one that an earlier version made."""
        monkeypatch.delenv("ACCUM_TRAINER_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "accum_trainer" / "rows").mkdir(parents=True, mode=0o755)
        for name in ("rows", "tokenized"):
            assert stat.S_IMODE(private_cache(name).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "accum_trainer").stat().st_mode) == 0o700

    def test_one_that_the_user_names_is_left_as_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path))
        tmp_path.chmod(0o755)
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows").chmod(0o775)
        assert stat.S_IMODE(private_cache("rows").stat().st_mode) == 0o775
        assert stat.S_IMODE(private_cache("tokenized").stat().st_mode) == 0o755
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
@pytest.mark.parametrize("name", ["{}", ".{}.partial"], ids=["itself", "its new content"])
def test_no_file_is_written_through_a_link(tmp_path, name):
    """Pages, plans and pictures in a run directory of others."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    record = {"step": 1, "skipped": False, "loss": 1.0, "lr": 1.0}
    writers = {
        "report.html": lambda path: durable.write_text(path, "theirs"),
        "loss.png": lambda path: draw_loss({"run": [record]}, path, "title"),
    }
    for file, write in writers.items():
        (tmp_path / name.format(file)).symlink_to(mine)
        write(tmp_path / file)
        assert (tmp_path / file).is_file() and not (tmp_path / file).is_symlink()
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["mine", *writers])


def test_modules_of_the_current_folder_are_not_imported(tmp_path):
    """`accum-trainer` does not import them; the processes that it starts would, as `python -m`."""
    started, ran = tmp_path / "bin" / "start.py", tmp_path / "ran"
    started.parent.mkdir()
    started.write_text("from accum_trainer.cli import main; main()")
    here = tmp_path / "theirs"
    here.mkdir()
    (here / "yaml.py").write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit(9)")
    arguments = ("train", "--parallel-independent", "--cuda-ids", "0,1", "--cpu", "--steps", "1")
    finished = run(
        [sys.executable, started, *arguments, "--batch-size", "0.5"], cwd=here, PYTHONPATH=ROOT
    )
    assert finished.returncode == 2, finished.stderr  # the command itself reads options with yaml
    finished = run(
        [sys.executable, started, *arguments, "--max-seq-len", "4000"], cwd=here, PYTHONPATH=ROOT
    )
    assert "max_seq_len=4000 is more than the 2048 positions" in finished.stderr, finished.stderr
    assert not ran.exists()


def test_the_threat_table_names_tests_that_exist():
    text = (ROOT / "docs" / "security.md").read_text()
    files = {"U": "tests/end_to_end/test_untrusted.py", "S": "tests/test_security.py"}
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for *_, shown in rows:
        file = None
        for kind, name in re.findall(r"\b([US]) (?=`)|`([\w/.]+)`", shown):
            if kind or name.endswith(".py"):
                file = files.get(kind, name)
                continue
            assert file is not None, shown
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), (file, name)
        assert file is not None, shown


def test_make_clean_leaves_runs(tmp_path):
    for name in ("runs/first/model", "build", ".cache", ".pytest_cache", "x.egg-info"):
        (tmp_path / name).mkdir(parents=True)
    finished = run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert (tmp_path / "runs" / "first" / "model").is_dir()
