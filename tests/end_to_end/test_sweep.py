"""Branches of a run and sweeps over effective batches, as users start them."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial

import pytest

from accum_trainer import ConfigError, TrainConfig
from accum_trainer.cli import main
from accum_trainer.runs.sweep import begin, plan_sweep
from accum_trainer.train.model_origin import identity_of
from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import result_of, weights_in
from tests.end_to_end.started import Started, accum_trainer
from tests.launching import cli
from tests.reference import equal

# Short rows, of different lengths, and a rate that does not change.
RUN = ["--cpu", "--batch-size", 2, "--global-batch-size", 4, "--steps", 8, "--lr", 1e-3]
RUN += ["--scheduler", "constant", "--checkpoint-every", 4]
AT_FOUR = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with rows.jsonl and the run `first`: 8 updates of 4 samples, saved after 4 and 8."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"prompt": f"{n}:", "completion": " x" * (1 + n % 9)} for n in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = cli("train", "--dataset-file", "rows.jsonl", *RUN, "--output-dir", "first", cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def main_of(*arguments):
    """The exit status of a command that is run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in arguments])
    return ended.value.code or 0


def branch(folder, name, *more):
    options = [*RUN, "--dataset-file", "rows.jsonl", "--output-dir", name]
    return cli("train", *options, "--branch-from", f"first/{AT_FOUR}", *more, cwd=folder)


def test_a_branch_with_the_same_batch_is_the_run_itself_to_the_bit(trained):
    run = branch(trained, "same", "--steps", 4)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "this run's updates count from 0, of 4 samples" in run.stderr
    assert equal(weights_in(trained / "same/model"), weights_in(trained / "first/model"))
    theirs, ours = (read_records(trained / n / "metrics.jsonl") for n in ("first", "same"))
    assert [r["loss"] for r in theirs[4:]] == [r["loss"] for r in ours]
    assert [r["step"] for r in ours] == [1, 2, 3, 4]


def test_a_branch_has_a_batch_of_its_own_and_remembers_where_it_came_from(trained):
    assert branch(trained, "wider", "--global-batch-size", 8, "--steps", 2).returncode == 0
    origin = json.loads((trained / "wider/plan.json").read_text())["branched_from"]
    assert origin["path"].endswith(AT_FOUR) and len(origin["checkpoint"]) == 64
    # The same samples as the run's updates 5 to 8: the same targets in all.
    theirs, ours = (read_records(trained / n / "metrics.jsonl") for n in ("first", "wider"))
    assert sum(r["num_targets"] for r in theirs[4:]) == sum(r["num_targets"] for r in ours)
    # Continued without the option, it keeps it; with another, it is refused.
    wider = ["train", *RUN, "--dataset-file", "rows.jsonl", "--output-dir", "wider"]
    wider += ["--global-batch-size", 8]
    assert cli(*wider, "--steps", 3, cwd=trained).returncode == 0
    plan = json.loads((trained / "wider/plan.json").read_text())
    assert plan["branched_from"] == origin and plan["total_updates"] == 3
    other = cli(*wider, "--branch-from", "first", cwd=trained)
    assert other.returncode == 2
    assert "branch_from=first, but the run of" in other.stderr
    assert "leave branch_from out to continue it" in other.stderr


def test_a_branch_of_other_data_is_refused(trained):
    (trained / "others.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    run = branch(trained, "other", "--dataset-file", "others.jsonl")
    assert run.returncode == 2 and "num_samples=90, this run has num_samples=9" in run.stderr
    assert not (trained / "other").exists()
    with pytest.raises(ConfigError, match="resume=first continues a run and branch_from=first"):
        TrainConfig(branch_from="first", resume="first")


SWEEP = ["sweep", "--global-batch-size", "2,8", "--from", f"first/{AT_FOUR}", "--samples", 60]


def test_a_sweep_that_was_stopped_goes_on_and_names_a_batch(trained, tmp_path, monkeypatch, capsys):
    command = [*SWEEP, "-o", tmp_path / "swept"]
    started = Started(accum_trainer(*command), tmp_path, cwd=trained)
    started.until_update(tmp_path / "swept/b-2", 3)
    started.signal(signal.SIGTERM)
    assert started.ended() == 75
    assert "the same command continues the sweep" in started.err
    run = cli(*command, cwd=trained)
    assert run.returncode == 0, run.stderr[-3000:]
    results = {size: result_of(tmp_path / f"swept/b-{size}") for size in (2, 8)}
    # 60 is no multiple of 8: 64. Both saw the same samples, whose targets differ from row to row.
    assert [r["num_samples"] for r in results.values()] == [64, 64]
    assert [r["updates"] for r in results.values()] == [32, 8]
    assert len({r["num_targets"] for r in results.values()}) == 1
    plans = {
        size: json.loads((tmp_path / f"swept/b-{size}/plan.json").read_text()) for size in (2, 8)
    }
    assert plans[2]["lr"] == pytest.approx(1e-3 * 0.5**0.5)
    assert plans[8]["lr"] == pytest.approx(1e-3 * 2**0.5)
    verdict = json.loads((tmp_path / "swept/verdict.json").read_text())
    assert [one["size"] for one in verdict["compared"]] == [2, 8]
    assert verdict["num_blocks"] == 4 and verdict["block"] == 8
    assert "learning rate 0.001 at B_eff 4, constant; sqrt: " in run.stderr
    assert "95 % margin of paired differences over 4 blocks of about 8 samples" in run.stdout
    # Done, it only says the verdict again; with other branches it is refused.
    monkeypatch.chdir(trained)
    assert main_of(*command) == 0 and capsys.readouterr().out == run.stdout
    assert main_of(*command, "--lr-scaling", "none") == 2
    said = capsys.readouterr().err
    assert "holds a sweep with lr_scaling=sqrt, and lr_scaling=none is asked for" in said


def test_a_sweep_goes_on_from_the_checkpoint_that_it_began_from(trained, tmp_path):
    """RUN trains on meanwhile, and deletes it: the same command finds the one that it kept."""
    shutil.copytree(trained / "first", tmp_path / "first")
    shutil.rmtree(tmp_path / "first/checkpoints/step-00000008")
    for source in (tmp_path / "first", tmp_path / "first" / AT_FOUR):
        folder = tmp_path / f"swept-{source.name}"
        began = plan_sweep(source, [2, 8], output=folder, samples=16, lr=1e-3)
        begin(began)
        assert began.checkpoint.name == "step-00000004"
    shutil.copytree(
        trained / "first/checkpoints/step-00000008", tmp_path / "first/checkpoints/step-00000008"
    )
    shutil.rmtree(tmp_path / "first" / AT_FOUR)
    for source in (tmp_path / "first", tmp_path / "first" / AT_FOUR):
        folder = tmp_path / f"swept-{source.name}"
        again = plan_sweep(source, [2, 8], output=folder, samples=16, lr=1e-3)
        begin(again)
        assert again.checkpoint == folder / "from/step-00000004"
    other = trained / "first"
    with pytest.raises(ConfigError, match="holds a sweep with run=.*, and run=.* is asked for now"):
        begin(plan_sweep(other, [2, 8], output=tmp_path / "swept-first", samples=16, lr=1e-3))


@pytest.mark.long
def test_a_sweep_that_was_killed_while_it_began_begins_again_with_its_own_checkpoint(
    trained, tmp_path
):
    plan = partial(plan_sweep, sizes=[2, 8], output=tmp_path / "swept", samples=16, lr=1e-3)
    begin(plan(trained / "first" / AT_FOUR))
    (tmp_path / "swept/sweep.json").unlink()
    kept = tmp_path / "swept" / "from/step-00000004"
    kept.rename(kept.with_name("step-00000008"))  # as if of another run
    sweep = plan(trained / "first")
    begin(sweep)
    assert identity_of(kept.with_name("step-00000008")) == identity_of(sweep.checkpoint)
    (tmp_path / "mine/from/me").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds other files and no sweep"):
        plan_sweep(trained / "first", [2, 8], output=tmp_path / "mine", samples=16, lr=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--global-batch-size", "8"], "compares two or more different effective batches"),
        (["--global-batch-size", "a,b"], "is no list of samples per update"),
        (["--from", "nowhere"], "from=nowhere is no folder; give a run directory"),
        (["--samples", "0"], "samples=0 is below 1"),
        (["--lr", "-1"], "lr=-1.0 must be above 0"),
        (["-o", "first"], "output=first holds other files and no sweep"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(trained, options, said, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert main_of(*SWEEP, "-o", "unborn", *options) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (trained / "unborn").exists()


def test_a_damaged_sweep_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    (trained / "damaged").mkdir()
    (trained / "damaged" / "sweep.json").write_text("{")
    assert main_of(*SWEEP, "-o", "damaged") == 2
    assert "damaged/sweep.json cannot be read: " in capsys.readouterr().err


def test_a_run_whose_schedule_has_ended_is_refused_with_the_remedy(trained, monkeypatch, capsys):
    options = [*RUN, "--dataset-file", "rows.jsonl", "--output-dir", "ended", "--steps", 2]
    assert cli("train", *options, "--scheduler", "linear", cwd=trained).returncode == 0
    monkeypatch.chdir(trained)
    asked = ["sweep", "--global-batch-size", "2,8", "--from", "ended"]
    assert main_of(*asked) == 2
    assert "of a peak of 0.001: the run's schedule has ended" in capsys.readouterr().err
    assert main_of(*asked, "--lr", 1e-3, "--dry-run") == 0
    assert "B_eff 8: " in capsys.readouterr().err
    assert not (trained / "ended-sweep").exists()
