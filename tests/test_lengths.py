"""Lengths of samples are found without asking, and only change who shares a micro-batch."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.sources.build import as_source
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.sources.lengths import find_lengths
from accum_trainer.sources.options import SourceOptions

LENGTHS = [5, 2, 9, 3, 7, 2, 4, 8, 1, 6]
SAMPLES = [
    {"input_ids": [i + 1] * length, "labels": [i + 1] * length} for i, length in enumerate(LENGTHS)
]


def micro_batches(data, **options):
    """The samples of each micro-batch of one epoch, named by their token."""
    options = SourceOptions(collate_fn=PaddingCollator(pad_token_id=0), **options)
    source = as_source(data, BatchPlan(2, 4, 1, None), 0, options)
    batches = [batch for share in source.shares(0, 0) for batch in share.batches]
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("kind", [list, tuple, datasets.Dataset.from_list])
def test_the_cut_is_as_with_lengths(kind):
    expected = micro_batches(Asked(), lengths=np.array(LENGTHS))
    assert micro_batches(kind(SAMPLES)) == expected
    assert micro_batches(Asked()) != expected  # whose lengths nobody knows


class Asked(torch.utils.data.Dataset):
    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, index):
        return SAMPLES[index]


def test_lengths_of_samples_in_memory():
    rows = [{"input_ids": torch.ones(n)} for n in (3, 1)] + [{"input_ids": np.ones(2)}]
    assert find_lengths(rows).tolist() == [3, 1, 2]
    assert find_lengths([{"input_ids": []}]).tolist() == [1]  # as a padded row has one position
    for others in ([1, 2], [{"pixels": [1]}], [{"input_ids": 3}], [[1, 2]], [*SAMPLES, None]):
        assert find_lengths(others) is None, others
    assert find_lengths(Asked()) is None
    own = Asked()
    own.lengths = LENGTHS
    assert find_lengths(own).tolist() == LENGTHS


class Drawn(list):
    """Samples of a length that is drawn when they are read."""

    def __getitem__(self, index):
        return {"input_ids": torch.ones(int(torch.randint(1, 9, ())))}

    def __iter__(self):
        return (self[index] for index in range(len(self)))


class Unreadable(dict):
    def __getitem__(self, key):
        raise OSError("the disk is gone")


def test_samples_that_are_made_when_they_are_read_are_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert find_lengths(Drawn(range(4))) is None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert find_lengths([Unreadable(input_ids=[1])]) is None


@pytest.mark.parametrize("other", [7, {"min": 1}, "long", lambda: [1, 2], ["a", "b"]])
def test_an_attribute_that_means_something_else(other):
    own = Asked()
    own.lengths = other
    assert find_lengths(own) is None


def test_lengths_of_a_table_follow_its_rows():
    """Shuffled, selected, split and joined; as arrays, lists of fixed size or large lists."""
    table = datasets.Dataset.from_list(SAMPLES)
    assert find_lengths(table).tolist() == LENGTHS
    parts = [
        table.shuffle(seed=1),
        table.select([7, 1, 3]),
        table.shard(2, 1),
    ]
    parts += [datasets.concatenate_datasets([table, table.shuffle(seed=2)])]
    parts += [table.with_format("torch"), table.filter(lambda row: len(row["labels"]) > 3)]
    for part in parts:
        assert find_lengths(part).tolist() == [len(row["input_ids"]) for row in part]
    sequence = datasets.Features({"input_ids": datasets.LargeList(datasets.Value("int32"))})
    assert find_lengths(table.select_columns(["input_ids"]).cast(sequence)).tolist() == LENGTHS
    by_column = table.map(lambda row: {"length": len(row["labels"])}).remove_columns(["input_ids"])
    assert find_lengths(by_column).tolist() == LENGTHS


def test_a_table_that_says_nothing_of_its_samples():
    table = datasets.Dataset.from_list(SAMPLES)
    for other in (
        table.with_transform(lambda rows: {"input_ids": [[1]] * len(rows["labels"])}),
        table.select_columns(["labels"]),
        datasets.Dataset.from_dict({"length": ["long", "short"]}),
        datasets.Dataset.from_dict({"length": [1, None]}),
        datasets.Dataset.from_dict({"input_ids": [[1], None]}),
    ):
        assert find_lengths(other) is None
    assert find_lengths(table) is not None
    table.set_transform(lambda rows: {"input_ids": [[1]] * len(rows["labels"])})  # in place
    assert find_lengths(table) is None
