"""When a checkpoint is due: on all processes after the same window, whatever their clocks say."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from accum_trainer.train import save_times
from accum_trainer.train.save_times import SaveTimes

MINUTES, WINDOW_SEC = 1.0, 7.0


def two(monkeypatch, rates, every=10**9):
    """The `SaveTimes` of two processes, each with a function that sets the time to its clock's, and
    the requests of rank 0 and rank 1."""
    now, asked, made = [0.0], [[], []], []
    monkeypatch.setattr(save_times, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for rank, rate in enumerate(rates):
        accumulator = SimpleNamespace(
            engine=SimpleNamespace(is_main=rank == 0),
            request_save=lambda rank=rank: asked[rank].append(True),
        )
        one = SaveTimes(accumulator, every=every, minutes=MINUTES)
        made.append((one, lambda at, rate=rate: now.__setitem__(0, rate * at)))
    return made, asked


@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.7), (1.0, 1.4)])
def test_all_save_after_the_same_windows(monkeypatch, rates):
    rng, (processes, asked) = random.Random(0), two(monkeypatch, rates)
    saves, step = [], 0
    for window in range(1, 301):
        is_skipped = rng.random() < 0.3
        step += not is_skipped
        due, update = {}, SimpleNamespace(step=step, save_requested=bool(asked[0]))
        asked[0].clear()
        for rank in rng.sample([0, 1], 2):  # either may be first; neither is a window ahead
            times, set_clock = processes[rank]
            set_clock(window * WINDOW_SEC + rng.random())
            due[rank] = times.is_due(update)
        assert due[0] == due[1], window
        if due[0] and not is_skipped:
            saves.append(window)
            for times, set_clock in processes:
                set_clock(window * WINDOW_SEC + 2)
                times.saved()
    gaps = [later - earlier for earlier, later in itertools.pairwise(saves)]
    assert not asked[1]
    # 60 s are nine windows; one more for the announcement, and some that gave no update.
    assert len(saves) > 15 and min(gaps) >= 9 and sorted(gaps)[len(gaps) // 2] <= 11


def test_a_save_that_is_due_is_due_once(monkeypatch):
    """By updates or by time, whichever is first; the time begins anew with each."""
    [(times, set_clock), _], [asked, _] = two(monkeypatch, (1.0, 1.0), every=10)

    def is_due(step, at):
        set_clock(at)
        update = SimpleNamespace(step=step, save_requested=bool(asked))
        asked.clear()
        return times.is_due(update)

    assert not is_due(9, 59) and is_due(10, 61)
    times.saved()
    assert not is_due(11, 62) and not is_due(12, 121) and is_due(13, 122)
    times.saved()
    assert not is_due(14, 123)
