"""The global order and the cut, as properties over a grid of sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from accum_trainer.window_plan import cut_window, global_order, windows_of


def test_global_order_is_a_permutation_of_seed_and_epoch_alone():
    order = global_order(1000, seed=3, epoch=2)
    assert sorted(order) == list(range(1000))
    assert (order == global_order(1000, seed=3, epoch=2)).all()
    assert (order != global_order(1000, seed=3, epoch=3)).any()
    assert (order != global_order(1000, seed=4, epoch=2)).any()


def test_global_order_never_changes_between_versions():
    """A run continued years later must see the same windows: these numbers are part of the contract."""
    assert global_order(8, seed=0, epoch=0).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert global_order(8, seed=1, epoch=5).tolist() == [5, 6, 2, 7, 3, 0, 1, 4]


@pytest.mark.parametrize(("samples", "batch", "start"), [(37, 12, 0), (36, 12, 0), (37, 12, 24), (5, 12, 0)])
def test_windows_use_every_sample_once(samples, batch, start):
    order = global_order(samples, 0, 0)
    windows = list(windows_of(order, batch, start))
    assert np.concatenate(windows).tolist() == order[start:].tolist()
    assert all(len(window) == batch for window in windows[:-1])


GRID = list(itertools.product([1, 2, 7, 16, 33], [1, 2, 4], [1, 2, 3, 8]))


@pytest.mark.parametrize(("samples", "micro_batch_size", "world_size"), GRID)
def test_cut_deals_every_sample_once_within_bounds(samples, micro_batch_size, world_size):
    lengths = np.random.RandomState(samples).randint(1, 500, samples)
    cut = cut_window(lengths, micro_batch_size, world_size)
    assert len(cut) == world_size
    dealt = [position for rank in cut for micro_batch in rank for position in micro_batch]
    assert sorted(dealt) == list(range(samples))
    assert all(0 < len(micro_batch) <= micro_batch_size for rank in cut for micro_batch in rank)
    most = -(-samples // micro_batch_size)
    assert max(len(rank) for rank in cut) == -(-most // world_size)


def test_cut_by_hand():
    """Lengths 5 1 4 1 3 2 in pairs: (5 4) (3 2) (1 1); the longest pair to rank 0, the next two to rank 1."""
    cut = cut_window(np.array([5, 1, 4, 1, 3, 2]), micro_batch_size=2, world_size=2)
    assert [[mb.tolist() for mb in rank] for rank in cut] == [[[0, 2]], [[4, 5], [1, 3]]]


def test_cut_pads_little():
    lengths = np.random.RandomState(0).lognormal(4, 1, 512).astype(int) + 1

    def padded(micro_batches):
        return sum(len(mb) * lengths[mb].max() for mb in micro_batches)

    cut = [mb for rank in cut_window(lengths, 8, 1) for mb in rank]
    in_order = np.split(np.arange(512), 64)
    assert lengths.sum() / padded(cut) > 0.9
    assert lengths.sum() / padded(in_order) < 0.5
