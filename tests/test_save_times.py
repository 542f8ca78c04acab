"""When a checkpoint is due: on all processes after the same window, whatever their clocks say."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from accum_trainer.train import save_times
from accum_trainer.train.save_times import SaveTimes

MINUTES, WINDOW_SEC = 1.0, 7.0


class Rank:
    """One of two processes, with the store that both share."""

    def __init__(self, rank, store):
        self.world_size, self.is_main = 2, rank == 0
        self._store = store

    def post_once(self, key, note):
        self._store.setdefault(key, note)

    def posted_once(self, key):
        return self._store.get(key)


def two(monkeypatch, rates):
    """The `SaveTimes` of two processes, each with a function that sets the time to its clock's."""
    now, store, made = [0.0], {}, []
    monkeypatch.setattr(save_times, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for rank, rate in enumerate(rates):
        # As in two processes, of which each has made as many before.
        monkeypatch.setattr(save_times, "_MADE", iter([0]))
        one = SaveTimes(Rank(rank, store), every=10**9, minutes=MINUTES)
        made.append((one, lambda at, rate=rate: now.__setitem__(0, rate * at)))
    return made


@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.7), (1.0, 1.4)])
def test_all_save_after_the_same_windows(monkeypatch, rates):
    rng, processes = random.Random(0), two(monkeypatch, rates)
    saves, step = [], 0
    for window in range(1, 301):
        is_skipped = rng.random() < 0.3
        step += not is_skipped
        due = {}
        for rank in rng.sample([0, 1], 2):  # either may be first; neither is a window ahead
            times, set_clock = processes[rank]
            set_clock(window * WINDOW_SEC + rng.random())
            due[rank] = times.is_due(step, window)
        assert due[0] == due[1], window
        if due[0] and not is_skipped:
            saves.append(window)
            for times, set_clock in processes:
                set_clock(window * WINDOW_SEC + 2)
                times.saved()
    gaps = [later - earlier for earlier, later in itertools.pairwise(saves)]
    # 60 s are nine windows; one more for the announcement, and some that gave no update.
    assert len(saves) > 15 and min(gaps) >= 9 and sorted(gaps)[len(gaps) // 2] <= 11


def test_one_process_saves_when_the_time_has_passed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(save_times, "time", SimpleNamespace(monotonic=lambda: now[0]))
    times = SaveTimes(SimpleNamespace(world_size=1), every=100, minutes=MINUTES)
    now[0] = 59.0
    assert not times.is_due(1, 1) and times.is_due(100, 100)
    now[0] = 60.0
    assert times.is_due(2, 2)
    times.saved()
    assert not times.is_due(3, 3)
