"""Logs of any trainer: each line is an update, or is counted under the reason why not."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import numpy as np
import pytest

from accum_trainer.errors import ConfigError, DataError
from accum_trainer.runs.curve import labels_of, make_curve, read_curves
from accum_trainer.runs.log_file import read_log


@pytest.fixture
def log(tmp_path):
    """Write records (or bare lines) and read them."""

    def write(*records, end="\n"):
        path = tmp_path / "log.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
        path.write_text("\n".join(lines) + end)
        return read_log(path)

    return write


def at(step, loss=1.0, **more):
    return {"step": step, "loss": loss, **more}


def steps(found):
    return found.step.tolist()


def test_what_is_no_update_is_counted_by_its_reason(log):
    found = log(
        *("no json", "[1]", '"text"', "3", "null", "{" + '"a":{' * 3000, "9" * 5000),
        *({"loss": 1}, at("7"), at(True), at(1.5), at(10**400), at(float("nan"))),
        *({"step": 1}, at(1, None), at(1, "2.5"), at(1, [2])),
        *(at(2, float("nan")), at(3, float("inf")), at(3, 10**400), at(3, -1e16)),
        *("", "   "),
        *(at(4, 2), at(5.0, 3, extra={"deep": [1]})),
    )
    assert steps(found) == [4, 5]
    assert found.columns["loss"].tolist() == [2, 3]
    assert found.left_out == {
        "lines that are no JSON object": 7,
        "records without a whole number as step": 6,
        "records without a loss": 4,
        "losses that are not finite or beyond 1e15": 4,
    }


def test_a_log_that_is_being_written_ends_in_half_a_line(log):
    assert log(at(1), at(2), '{"step": 3, "lo', end="").left_out == {}
    assert steps(log(at(1), at(2), end="")) == [1, 2]
    # In the middle it is damage.
    assert log(at(1), '{"step": 3, "lo', at(2)).left_out == {"lines that are no JSON object": 1}


def test_a_step_that_goes_back_replaces_what_was_made_after_it(log):
    before = [at(n, float(n), eval_loss=float(n)) for n in range(1, 8)]
    after = [at(n, 10.0 * n) for n in range(4, 7)]
    found = log(*before, *after, at(6, 99.0))
    assert steps(found) == [1, 2, 3, 4, 5, 6]
    assert found.columns["loss"].tolist() == [1, 2, 3, 40, 50, 99]
    assert found.restarts == [4]
    assert found.left_out == {"records of a step that a later record has too": 1}
    # Those after step 4 belonged to what was made again.
    assert [step for step, _ in found.evaluations] == [1, 2, 3, 4]


def test_windows_without_an_update_are_no_updates_and_took_time(log):
    skip = {"skipped": True, "skip_reason": "non-finite", "loss": None, "step_time_sec": 2.0}
    one = {"step_time_sec": 0.5}
    found = log(at(1, **one), {"step": 1, **skip}, {"step": 1, **skip, "loss": 3.0}, at(2, **one))
    assert make_curve("run", found).axes["seconds"].tolist() == [0.5, 5.0]
    assert steps(found) == [1, 2]
    assert (found.num_skipped, found.lost_sec.tolist()) == (2, [0, 4])
    assert found.skipped[0] == (1, "non-finite")


def test_evaluations_may_stand_in_records_of_their_own(log):
    found = log(at(1), {"step": 1, "eval_loss": 4.0}, at(2, eval_loss=3.0), {"step": 2, "lr": 1})
    assert found.evaluations == [(1, 4.0), (2, 3.0)]
    assert found.left_out == {"records without a loss": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ": it is empty"),
        (b"\n\n", ": it is empty"),
        (b'{"step": 1', ": it is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "(lines that are no JSON object: 2)"),
        (b'{"a": 1}\n', "(records without a whole number as step: 1)"),
        (b'{"step": 1, "loss": NaN}\n', "(losses that are not finite or beyond 1e15: 1)"),
        (b'{"step": 1, "skipped": true}\n', "(windows without an update: 1)"),
    ],
)
def test_a_log_without_an_update_is_refused(tmp_path, content, says):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_log(path)
    assert str(raised.value).startswith(
        f"{path} has no update{says if says[0] == ':' else ' ' + says}; name a"
    )


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is no file"):
        read_log(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no file"):
        read_log(tmp_path)


def test_a_line_without_end_is_not_held_in_memory(tmp_path):
    path = tmp_path / "log.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"step": 1, "loss": 2, "x": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"step": 2, "loss": 3}\n')
    tracemalloc.start()
    found = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert steps(found) == [2]
    assert found.left_out == {"lines that are no JSON object": 1}
    assert peak < 8 << 20


def test_many_restarts_take_no_longer_than_their_records(tmp_path):
    """Five hundred restarts of a hundred steps each, as a job that is preempted again and again."""
    path = tmp_path / "log.jsonl"
    records = [json.dumps(at(s)) for s in range(1, 101)]
    path.write_text("\n".join(records * 500) + "\n")
    begun = time.perf_counter()
    found = read_log(path)
    assert steps(found) == list(range(1, 101))
    assert len(found.restarts) == 499
    assert time.perf_counter() - begun < 20


class TestAxes:
    def test_of_our_records(self, log):
        rows = [at(n, effective_batch_size=32, step_time_sec=0.5) for n in range(1, 5)]
        curve = make_curve("run", log(*rows))
        assert curve.axes["updates"].tolist() == [1, 2, 3, 4]
        assert curve.axes["samples"].tolist() == [32, 64, 96, 128]
        assert curve.axes["seconds"].tolist() == [0.5, 1.0, 1.5, 2.0]

    def test_missing_records_count_as_updates_like_the_next(self, log):
        rows = [at(n, effective_batch_size=32, step_time_sec=0.5) for n in (1, 2, 5, 6)]
        curve = make_curve("run", log(*rows))
        assert curve.axes["samples"].tolist() == [32, 64, 160, 192]
        assert curve.axes["seconds"].tolist() == [0.5, 1.0, 2.5, 3.0]

    def test_a_log_of_every_tenth_update_says_so(self, log):
        curve = make_curve("run", log(*[at(n) for n in range(10, 101, 10)]), batch_size=4)
        assert curve.axes["updates"].tolist() == list(range(10, 101, 10))
        assert curve.axes["samples"].tolist() == list(range(40, 401, 40))
        assert curve.notes == (
            "a record every 10 updates; if its loss is a mean over them, its variance is that of "
            "a larger batch",
        )

    @pytest.mark.parametrize("first", [-3, 0, 1])
    def test_steps_that_count_from_0_begin_at_update_1(self, log, first):
        curve = make_curve("run", log(*[at(n) for n in range(first, first + 4)]), batch_size=2)
        assert curve.axes["updates"].tolist() == [1, 2, 3, 4]
        assert curve.axes["samples"].tolist() == [2, 4, 6, 8]

    def test_of_other_trainers(self, log):
        rows = [at(n, _timestamp=1e9 + 3 * n, consumed_samples=8 * n) for n in range(1, 4)]
        curve = make_curve("run", log(*rows))
        assert curve.axes["seconds"].tolist() == [0, 3, 6]
        assert curve.axes["samples"].tolist() == [8, 16, 24]
        assert "samples" not in make_curve("run", log(at(1))).axes

    def test_numbers_that_some_records_lack_are_like_the_others(self, log):
        rows = [at(1, effective_batch_size=4), at(2), at(3, effective_batch_size=-9)]
        assert make_curve("run", log(*rows)).axes["samples"].tolist() == [4, 8, 12]

    @pytest.mark.parametrize(
        ("record", "split"),
        [
            ((2, 16, 1, 32), "B 2 x K 16 x W 1 = 32"),
            ((4, 3, 2, 20), "B 4, K mostly 3 x W 2, effective batch 20"),
            ((None, 5, 1, 32), "K mostly 5 x W 1, effective batch 32"),
            ((None, None, None, 32), "effective batch 32"),
            ((None, None, None, None), ""),
        ],
    )
    def test_the_split_is_that_of_most_updates(self, log, record, split):
        names = ("physical_batch_size", "gradient_accumulation_steps", "world_size")
        row = dict(zip((*names, "effective_batch_size"), record, strict=True))
        tail = row | {"effective_batch_size": 3, "gradient_accumulation_steps": 1}
        tail = tail if record[3] else row
        found = make_curve("run", log(at(1, **row), at(2, **row), at(3, **row), at(4, **tail)))
        assert found.split == split
        assert found.batch == record[3]


def test_loss_at_a_place_is_the_mean_of_the_tenth_before_it_by_targets(log):
    rows = [at(n, float(n), num_targets=n, effective_batch_size=1) for n in range(1, 101)]
    curve = make_curve("run", log(*rows))
    chosen = range(46, 51)
    expected = sum(n * n for n in chosen) / sum(chosen)
    assert curve.loss_at("samples", 50) == pytest.approx(expected)
    assert make_curve("run", log(*[at(n, float(n)) for n in range(1, 101)])).loss_at(
        "updates", 100
    ) == pytest.approx(np.mean(range(91, 101)))
    assert curve.loss_at("samples", 0.5) is None
    assert curve.loss_at("seconds", 5) is None


def test_labels_tell_runs_apart(tmp_path):
    names = ["a/k1/metrics.jsonl", "b/k1/metrics.jsonl", "b/k2/metrics.jsonl", "theirs.jsonl"]
    assert labels_of([tmp_path / name for name in names]) == ["a/k1", "b/k1", "k2", "theirs"]
    strange = [tmp_path / name for name in ("x.jsonl", "x.json", "\x1b[31mred\n.jsonl")]
    root = "/".join(tmp_path.absolute().parts[1:])
    assert labels_of(strange) == [f"{root}/x (1)", f"{root}/x (2)", "?[31mred?"]


def test_a_folder_of_runs_stands_for_them(tmp_path):
    for name in ("b", "a16", "a2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(at(1)) + "\n")
    (tmp_path / "empty").mkdir()
    assert [curve.label for curve in read_curves([tmp_path])] == ["a2", "a16", "b"]
    with pytest.raises(ConfigError, match="is named twice; name each run once"):
        read_curves([tmp_path, tmp_path / "b"])
    with pytest.raises(ConfigError, match="is a folder without metrics.jsonl"):
        read_curves([tmp_path / "empty"])
