"""I42: another seed, rank or epoch draws other numbers; the same ones repeat bit by bit."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from accum_trainer.seeds import seed_of
from tests.drawing import SEEDS, SIZE, SOURCES
from tests.launching import torchrun


def test_i42_low_32_bits_of_a_seed_tell_everything_apart():
    """torch's CPU generator uses only these: all 64 bits of each argument must affect them."""
    values = (0, 1, 2, 1 << 32, 1 << 48)
    seeds = [seed_of("a", 0), seed_of("b", 0), seed_of("a", -1)]
    seeds += [seed_of("a", value) for value in values[1:]]
    for name in ("epoch", "rank", "shard", "position"):
        seeds += [seed_of("a", 0, **{name: value}) for value in values[1:]]
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)
    assert len(
        {torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}
    ) == len(seeds)
    assert seed_of("a", 3, epoch=2, rank=1) == seed_of("a", 3, epoch=2, rank=1)


@pytest.mark.long
def test_i42_seed_rank_and_epoch_reach_order_dropout_and_augmentation(tmp_path):
    run = torchrun(2, "tests.drawing", tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    drawn = [rank["dropout"][str(seed)] for rank in ranks for seed in SEEDS]
    assert all(
        a[0] != b[0] for a, b in combinations(drawn, 2)
    )  # other rank, other seed: other dropout
    for rank in ranks:
        first, again = rank["dropout"]["0"]
        assert first == again

    for name in SOURCES:
        runs = [rank["reading"][name] for rank in ranks]
        orders = []
        for seed in map(str, SEEDS):
            for epoch in (0, 1):
                parts = [one[seed][0][epoch] for one in runs]
                assert sorted(int(row[0]) for part in parts for row in part) == list(range(SIZE)), (
                    name
                )
                orders.append([int(row[0]) for part in parts for row in part])
        assert all(a != b for a, b in combinations(orders, 2)), (
            name
        )  # other seed, other epoch: other order
        numbers = [
            n
            for one in runs
            for s in map(str, SEEDS)
            for e in one[s][0]
            for row in e
            for n in row[1:]
        ]
        # No two of these draws are equal: each rank, seed, epoch and sample has its own.
        assert len(set(numbers)) == 2 * 3 * SIZE * 3, name
        for one in runs:
            first, again = one["0"]
            assert first == again, name
            assert one["resumed"] == [first[1][SIZE // 6 :]], name
            assert one["training draws as without reading"], name
    # The reader does not matter: equal bits without workers, with two, and with persistent ones.
    for rank in ranks:
        readings = rank["reading"]
        assert readings["loader"]["0"] == readings["loader, workers"]["0"]
        assert readings["loader"]["0"] == readings["loader, persistent workers"]["0"]
        assert readings["data set"]["0"] == readings["data set, workers"]["0"]
