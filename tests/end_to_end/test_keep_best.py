"""`--keep-best`: the checkpoint with the lowest evaluation loss is there, whatever happens."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest

from accum_trainer.train.records import read_records
from tests.end_to_end.read_runs import result_of
from tests.grids import thinned
from tests.launching import forked, torchrun

# So high a rate that the evaluation loss falls and then rises, by far.
RUN = (
    *("--batch-size", "2", "--max-seq-len", "32", "--lr", "1.0", "--scheduler", "constant"),
    *("--eval-every", "1", "--keep-best", "--keep-checkpoints", "1", "--checkpoint-every", "3"),
    *("--output-dir", "run"),
)
TEN = (*RUN, "--steps", "10")


def losses_of(run):
    return {r["step"]: r["eval_loss"] for r in read_records(run / "metrics.jsonl")}


def kept_in(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def assert_best_is_kept(run, losses=None):
    losses = losses or losses_of(run)
    best = min(losses, key=losses.__getitem__)
    assert result_of(run)["best"] == {
        "checkpoint": f"checkpoints/step-{best:08d}",
        "updates": best,
        "eval_loss": losses[best],
    }
    assert kept_in(run) == sorted({best, max(losses)}), losses
    state = json.loads((run / "checkpoints" / f"step-{best:08d}" / "state.json").read_text())
    assert state["accumulator"]["num_updates"] == best
    return best


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("ten")
    done = torchrun(1, "accum_trainer.train", "--cpu", *TEN, cwd=folder)
    assert done.returncode == 0, done.stderr
    best = assert_best_is_kept(folder / "run")
    assert best < 10
    assert re.search(
        rf"best evaluation: \d+\.\d{{4}} after update {best}; `accum-trainer checkpoint export "
        rf"run/checkpoints/step-{best:08d} -o DIR` writes its model\n",
        done.stdout,
    )
    return folder / "run"


@pytest.mark.long
def test_on_two_processes(tmp_path):
    done = torchrun(2, "accum_trainer.train", "--cpu", *TEN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_best_is_kept(tmp_path / "run")


def killed_and_continued(train, run, ten, kill):
    assert train(*TEN, inject=kill).status == -signal.SIGKILL
    again = train(*TEN)
    assert again.status == 0, again.err
    assert losses_of(run) == losses_of(ten)
    assert result_of(run) == result_of(ten)
    assert kept_in(run) == kept_in(ten)


@pytest.mark.parametrize("update", thinned((4, 7), ()))
def test_a_run_that_is_killed_before_an_update_has_the_same_best(train, tmp_path, ten, update):
    killed_and_continued(train, tmp_path / "run", ten, {"micro_step": update})


# The second to the fourth save. Each syncs 6 times, the last time after its rename and before the
# earlier best is deleted.
@pytest.mark.long
@pytest.mark.parametrize("sync", thinned((*range(9, 15), 18, 24), (18,)))
def test_a_run_that_is_killed_in_a_save_has_the_same_best(train, tmp_path, ten, sync):
    killed_and_continued(train, tmp_path / "run", ten, {"sync": sync})


def test_the_best_travels_with_a_run_that_goes_on(train, tmp_path, ten):
    shutil.copytree(ten, tmp_path / "run")
    best = result_of(ten)["best"]
    finished = train(*RUN, "--steps", "12")
    assert finished.status == 0, finished.err
    assert f"after update {best['updates']}; it is kept in run/{best['checkpoint']}" in finished.err
    assert_best_is_kept(tmp_path / "run")
    # Without the option it is a checkpoint like any other.
    ended = train(*(word for word in RUN if word != "--keep-best"), "--steps", "14")
    assert ended.status == 0
    assert "without keep_best its checkpoint is deleted like any other" in ended.err
    assert kept_in(tmp_path / "run") == [14] and "best" not in result_of(tmp_path / "run")


@pytest.mark.long
def test_a_run_that_goes_back_gives_up_the_best_of_what_it_left(train, tmp_path):
    run, all_kept = tmp_path / "run", ("--keep-checkpoints", "100", "--checkpoint-every", "1")
    assert train(*TEN, *all_kept).status == 0
    losses = losses_of(run)
    best = min(losses, key=losses.__getitem__)
    assert 2 < best < 10
    # To before the best, and on another way.
    back = ("--resume", f"run/checkpoints/step-{best - 1:08d}", "--max-grad-norm", "0.001")
    other = train(*RUN, "--steps", str(best + 1), *back)
    assert other.status == 0, other.err
    assert losses_of(run)[best] != losses[best]
    assert_best_is_kept(run)


def test_a_best_that_is_gone_or_on_other_rows_is_not_compared(train, tmp_path, ten, rows_file):
    run, best = tmp_path / "run", result_of(ten)["best"]
    shutil.copytree(ten, run)
    shutil.rmtree(run / best["checkpoint"])
    went_on = train(*RUN, "--steps", "11")
    assert f"run/{best['checkpoint']} is not there, so the next one is the best" in went_on.err
    assert result_of(run)["best"]["updates"] == 11 and kept_in(run) == [11]
    rows = rows_file("rows.jsonl", [{"text": "other rows"}])
    other = train(*RUN, "--steps", "12", "--eval-file", rows)
    assert "on other evaluation rows; it is not compared" in other.err
    assert result_of(run)["best"]["updates"] == 12


# The evaluation gives LOSSES, one after the other. After the updates FULL no checkpoint can be
# written; the gradient of the windows SKIPPED is not finite.
SCRIPTED = """
import json, logging, resource, sys, threading
import accum_trainer.train.loop as loop
from accum_trainer import TrainConfig
from accum_trainer.train.checkpoint_writer import CheckpointWriter
from accum_trainer.train.evaluation import Evaluation
losses, full, skipped = json.loads(sys.argv[1])
given, windows, real = iter(losses), [0], loop.causal_lm_loss
def loss(model, batch):
    windows[0] += 1
    found = real(model, batch)
    if windows[0] in skipped:
        found.register_hook(lambda gradient: gradient * float("inf"))
    return found
loop.causal_lm_loss = loss
Evaluation.mean_loss = lambda self, progress: next(given)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
failed, under_way, save = threading.Event(), [], CheckpointWriter.save
def noted(writer, *arguments):
    save(writer, *arguments)
    under_way[:] = [writer._thread]
CheckpointWriter.save = noted
class Failed(logging.Handler):
    def emit(self, record):
        if "could not be written" in record.getMessage():
            print(record.getMessage(), file=sys.stderr)
            failed.set()
logging.getLogger("accum_trainer").addHandler(Failed())
config = TrainConfig(
    cpu=True, batch_size=2, steps=len(losses), max_seq_len=32, eval_every=1, keep_best=True,
    keep_checkpoints=1, checkpoint_every=100, output_dir="run",
)
for record in loop.updates(config):
    if record["step"] in full:
        assert failed.wait(60)
        failed.clear()
    elif under_way:
        under_way[0].join()  # before the disk is full
    is_next = record["step"] + 1 in full
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if is_next else hard, hard))
"""


def scripted(tmp_path, losses, full=(), skipped=()):
    asked = json.dumps([losses, list(full), list(skipped)])
    ended = forked(1, "-c", SCRIPTED, asked, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("could not be written") == len(full)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("losses", "full", "best"),
    [
        ([5.0, 4.0, 4.5, 3.0, 3.5, 9.0], [4], 5),  # worse than what was lost, and the best there is
        ([5.0, 4.0, 4.5, 3.0, 4.2, 9.0], [4], 2),
        ([5.0, 4.0, 3.0, 2.0, 6.0, 9.0], [3, 4], 2),
        ([5.0, 9.0, 8.0], [], 1),
        ([5.0, 4.0, 4.0, 4.0], [], 2),  # the first of equals
        ([float("nan"), 4.0, float("nan"), 5.0], [], 2),
    ],
)
def test_a_best_checkpoint_that_could_not_be_written_is_none(tmp_path, losses, full, best):
    """On a full disk, the one before stays."""
    run = scripted(tmp_path, losses, full)
    assert result_of(run)["best"]["updates"] == best
    assert result_of(run)["best"]["eval_loss"] == losses[best - 1]
    assert kept_in(run) == [best, len(losses)]


def test_windows_without_an_update_are_not_evaluated(tmp_path):
    run = scripted(tmp_path, [5.0, 4.0, 6.0, 7.0], skipped=[1, 3, 4])
    records = read_records(run / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [True, False, True, True, *[False] * 3]
    assert result_of(run)["best"]["updates"] == 2 and kept_in(run) == [2, 4]


def test_without_an_evaluation_it_is_refused(train, tmp_path, rows_file):
    refused = train("--keep-best", "--output-dir", "run")
    assert refused.status == 2
    assert (
        "keep_best=true compares evaluations, and this run makes none; give eval_every or leave "
        "keep_best out" in refused.error
    )
    rows = rows_file("rows.jsonl", [{"text": "a row"}])
    refused = train("--keep-best", "--output-dir", "run", "--dataset-file", rows)
    assert "give eval_every, and eval_file with the rows to evaluate on, or" in refused.error
    assert not (tmp_path / "run").exists()
    at_the_end = ("--dataset-file", rows, "--eval-file", rows, "--dry-run")
    assert train("--keep-best", *at_the_end).status == 0
