"""The global order and the cut, as properties over a grid of sizes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from accum_trainer.window_plan import Cost, Cut, cut_window, global_order, windows_of


def test_global_order_is_a_permutation_of_seed_and_epoch_alone():
    order = global_order(1000, seed=3, epoch=2)
    assert sorted(order) == list(range(1000))
    assert (order == global_order(1000, seed=3, epoch=2)).all()
    assert (order != global_order(1000, seed=3, epoch=3)).any()
    assert (order != global_order(1000, seed=4, epoch=2)).any()


def test_global_order_never_changes_between_versions():
    """A run continued years later must see the same windows: these numbers are part of the
    contract."""
    assert global_order(8, seed=0, epoch=0).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert global_order(8, seed=1, epoch=5).tolist() == [5, 6, 2, 7, 3, 0, 1, 4]


@pytest.mark.parametrize(
    ("samples", "batch", "start"), [(37, 12, 0), (36, 12, 0), (37, 12, 24), (5, 12, 0)]
)
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
    """Lengths 5 1 4 1 3 2 in pairs: (5 4) (3 2) (1 1); the longest pair to rank 0, the next two to
    rank 1."""
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


def cost_of(cut, lengths):
    """The stated cost of one micro-batch, written out: fixed + positions + square * sum of length
    squared."""
    padded = [-(-int(length) // cut.multiple) * cut.multiple for length in lengths]
    longest = max(padded)
    return cut.cost.fixed + len(padded) * longest + cut.cost.square * len(padded) * longest**2


def cheapest_by_trying_all(cut, lengths):
    """The least total cost over all contiguous cuts of the samples sorted by length."""
    ordered = sorted(lengths, reverse=True)

    @functools.cache
    def best(begin):
        if begin == len(ordered):
            return 0.0
        options = []
        for end in range(begin + 1, len(ordered) + 1):
            part = ordered[begin:end]
            padded = -(-int(part[0]) // cut.multiple) * cut.multiple
            if len(part) > 1 and (
                len(part) > (cut.micro_batch_size or len(part))
                or len(part) * padded > cut.max_tokens
            ):
                break
            options.append(cost_of(cut, part) + best(end))
        return min(options)

    return best(0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "cut",
    [
        Cut(max_tokens=200, cost=Cost(0.0, 0.0)),
        Cut(max_tokens=200, cost=Cost(50.0, 0.0)),
        Cut(max_tokens=300, cost=Cost(20.0, 0.05), multiple=8),
        Cut(micro_batch_size=3, max_tokens=400, cost=Cost(100.0, 0.01)),
    ],
)
def test_no_contiguous_cut_costs_less(cut, seed):
    lengths = np.random.RandomState(seed).lognormal(3, 1, 14).astype(int).clip(1, 200)
    dealt = cut.assign_to_ranks(lengths, 1)[0]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(14))
    for micro_batch in dealt:
        if len(micro_batch) > 1:
            assert len(micro_batch) * cut.padded(lengths[micro_batch]).max() <= cut.max_tokens
            assert len(micro_batch) <= (cut.micro_batch_size or 14)
    found = sum(cost_of(cut, lengths[micro_batch]) for micro_batch in dealt)
    assert found == pytest.approx(cheapest_by_trying_all(cut, tuple(lengths.tolist())), rel=1e-12)


def test_b_alone_makes_the_fewest_micro_batches_with_the_least_padding():
    """Seven samples in threes are three micro-batches, whatever they cost; the cheapest such cut is
    100 | 9 9 9 | 2 2 2."""
    lengths = np.array([9, 2, 100, 9, 2, 9, 2])
    cut = Cut(3, cost=Cost(0.0, 0.0)).assign_to_ranks(lengths, 1)[0]
    assert [sorted(lengths[micro_batch].tolist()) for micro_batch in cut] == [
        [100],
        [9, 9, 9],
        [2, 2, 2],
    ]


def tokens_of(lengths: np.ndarray, dealt: list) -> list[list[int]]:
    """Of each micro-batch of each rank; every sample must be in one."""
    taken = np.concatenate([micro_batch for rank in dealt for micro_batch in rank])
    assert sorted(taken.tolist()) == list(range(len(lengths)))
    return [[int(lengths[micro_batch].sum()) for micro_batch in rank] for rank in dealt]


def test_packed_micro_batches_are_as_few_as_fit_and_equal():
    lengths = np.array([10, 50, 40, 30, 20, 10])
    assert tokens_of(lengths, Cut(max_tokens=90, packed=True).assign_to_ranks(lengths, 1)) == [
        [80, 80]
    ]
    # B = 2 is the memory of 50 + 40 tokens.
    assert tokens_of(lengths, Cut(2, packed=True).assign_to_ranks(lengths, 1)) == [[80, 80]]
    assert tokens_of(lengths, Cut(2, 60, packed=True).assign_to_ranks(lengths, 1)) == [[60, 50, 50]]
    assert Cut(packed=True).positions(lengths) == 160
    assert Cut(multiple=8).positions(lengths) == 6 * 56


def test_packed_no_part_is_above_the_budget_where_equal_ones_would_be():
    """Longest first, 3 3 2 2 2 become 3 + 2 + 2 and 3 + 2: one above 6. In turn they fit; on two
    ranks that must have as many, four parts do."""
    lengths = np.array([3, 3, 2, 2, 2])
    found = tokens_of(lengths, Cut(max_tokens=6, packed=True).assign_to_ranks(lengths, 1))
    assert found == [[6, 6]]
    equal = Cut(max_tokens=6, packed=True, equal_counts=True)
    assert tokens_of(lengths, equal.assign_to_ranks(lengths, 2)) == [[4, 2], [3, 3]]


def test_packed_a_sample_above_the_budget_is_alone_and_equal_ones_keep_their_order():
    lengths = np.array([4, 100, 3, 2])
    assert tokens_of(lengths, Cut(max_tokens=9, packed=True).assign_to_ranks(lengths, 1)) == [
        [100, 9]
    ]
    same = Cut(3, packed=True).assign_to_ranks(np.full(8, 5), 1)[0]
    assert [part.tolist() for part in same] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_packed_shares_follow_the_weights_in_the_fewest_parts():
    """128 equal samples, in proportion to the shares as far as whole samples go."""
    weights = (1, 2, 1, 2, 1, 3, 3, 3)
    cut = Cut(None, 16384, packed=True, rank_weights=weights)
    found = tokens_of(np.full(128, 512), cut.assign_to_ranks(np.full(128, 512), 8))
    assert [sum(rank) // 512 for rank in found] == [8 * weight for weight in weights]
    assert [len(rank) for rank in found] == [1] * 8
    few = Cut(1, packed=True, rank_weights=(3, 1)).assign_to_ranks(np.array([5, 4]), 2)
    assert [len(rank) for rank in few] == [2, 0]  # one after the other, done before 4 of 1 are


def test_packed_samples_without_tokens_are_dealt_too():
    for weights in (None, (1, 2)):
        cut = Cut(2, packed=True, rank_weights=weights)
        for lengths in (np.zeros(4, int), np.array([0, 3, 0, 0, 2, 0])):
            found = cut.assign_to_ranks(lengths, 2)
            tokens_of(lengths, found)
            assert all(found)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("equal_counts", [False, True])
def test_packed_needs_no_more_memory_than_b_and_ends_together(world_size, equal_counts):
    """Windows of 8 x 16 samples: no micro-batch has more tokens than the eight longest samples, and
    the ranks' tokens differ by less than a tenth."""
    rng = np.random.RandomState(0)
    for _ in range(20):
        lengths = rng.lognormal(4.6, 0.8, 128).astype(int).clip(8, 512)
        cut = Cut(8, packed=True, equal_counts=equal_counts)
        found = tokens_of(lengths, cut.assign_to_ranks(lengths, world_size))
        budget = int(np.sort(lengths)[-8:].sum())
        assert max(max(rank) for rank in found) <= budget
        assert sum(map(len, found)) < 1.3 * lengths.sum() / budget + world_size
        assert not equal_counts or len({len(rank) for rank in found}) == 1
        of_ranks = [sum(rank) for rank in found]
        assert max(of_ranks) < 1.1 * min(of_ranks)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 3.0), (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("equal_counts", [False, True])
def test_r55_shares_follow_the_weights(weights, equal_counts):
    """Tokens of each rank over many windows, within 5 % of its share; every sample once."""
    rng, done = np.random.RandomState(0), np.zeros(len(weights))
    cut = Cut(4, rank_weights=weights, equal_counts=equal_counts)
    for _ in range(50):
        lengths = rng.lognormal(4.6, 0.5, 128).astype(int).clip(10, 400)
        dealt = cut.assign_to_ranks(lengths, len(weights))
        assert sorted(np.concatenate([m for rank in dealt for m in rank]).tolist()) == list(
            range(128)
        )
        assert max(len(m) for rank in dealt for m in rank) <= 4
        if equal_counts:
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1  # the last step may be short
        done += [sum(int(lengths[m].sum()) for m in rank) for rank in dealt]
    share = np.array(weights) / sum(weights)
    # Equal counts share out whole samples: 4 to 1.33 of them is 4 to 1.
    rounded = (
        np.maximum(1, np.round(4 * np.array(weights) / max(weights))) if equal_counts else share
    )
    assert np.abs(done / done.sum() / (rounded / rounded.sum()) - 1).max() < 0.05


@pytest.mark.parametrize(("samples", "world_size"), [(64, 2), (61, 2), (57, 4), (3, 4), (129, 8)])
@pytest.mark.parametrize(
    "cut", [Cut(8, equal_counts=True), Cut(max_tokens=1000, equal_counts=True)]
)
def test_equal_counts_where_there_are_samples_for_it(cut, samples, world_size):
    lengths = np.random.RandomState(samples).randint(1, 300, samples)
    counts = [len(rank) for rank in cut.assign_to_ranks(lengths, world_size)]
    assert max(counts) - min(counts) == (0 if samples >= world_size else 1)


def test_ranks_are_balanced():
    """Two ranks, 128 samples of skewed lengths: the slower rank's cost over the mean, on average
    over windows."""
    rng = np.random.RandomState(0)
    for cut in (Cut(8), Cut(max_tokens=2048, cost=Cost(32.0, 1e-3)), Cut(8, equal_counts=True)):
        over = []
        for _ in range(50):
            lengths = rng.lognormal(4.9, 0.5, 128).astype(int).clip(10, 512)
            costs = [
                sum(cost_of(cut, lengths[m]) for m in rank)
                for rank in cut.assign_to_ranks(lengths, 2)
            ]
            over.append(max(costs) / np.mean(costs))
        assert np.mean(over) < 1.03
