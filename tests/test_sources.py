"""What sources of windows refuse, and what they give over several epochs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import default_collate

from accum_trainer import Accumulator, DataError
from tests.launching import torchrun


def test_i43_the_same_stream_on_every_rank_is_refused_and_equal_batches_are_not(tmp_path):
    run = torchrun(2, "tests.streams", tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    # Two different batches and eight different samples are the least that tells: the first window at K=4, the fourth at K=1.
    refused = {"the same, K=4": 0, "the same, K=1": 3, "the same dictionaries": 0}
    # 12 batches, split or not, in windows of K on each rank.
    whole = {
        "split": 3,
        "split, equal masks": 3,
        "one batch again and again": 3,
        "constant": 2,
        "tiny": 3,
        "equal at first": 6,
    }
    for name, updates in {**refused, **whole}.items():
        found = ranks[0][name]
        assert found["updates"] == updates, (name, found)
        if name in refused:
            assert "processes 0 and 1 read the same batches" in found["raised"]
            assert "itertools.islice(stream, rank, None, 2)" in found["raised"]
        else:
            assert found["raised"] == "", name


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": torch.ones(4, 12, dtype=torch.long), "labels": torch.ones(4, 12, dtype=torch.long)}] * 3,
        [{"input_ids": torch.ones(1, 12, dtype=torch.long)}] * 3,
        [torch.ones(4, 3), torch.ones(4, 3), torch.ones(2, 3)],
        [(torch.ones(4, 3), torch.ones(4)), (torch.ones(4, 3), torch.ones(4))],
        [{"x": torch.ones(4, 3), "y": torch.ones(4)}] * 2,
    ],
)
def test_i43_a_list_of_ready_batches_is_no_data_set(batches):
    acc = Accumulator(micro_batch_size=4, cpu=True)
    with pytest.raises(DataError, match=r"holds batches, not samples.*iter\(batches\).*default_collate"):
        acc.windows(batches)
    assert len(acc.windows(batches, collate_fn=default_collate)) == 1  # who says how samples are collated is believed


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "samples",
    [
        [{"input_ids": torch.ones(4, dtype=torch.long), "labels": torch.ones(4, dtype=torch.long)}] * 4,
        [torch.ones(3, 4)] * 4,
        [torch.ones(4)] * 4,
        [(torch.ones(4, 3), torch.tensor(1))] * 4,
        [(torch.ones(4, 3), torch.ones(5))] * 4,
        [(torch.ones(4, 3), 1)] * 4,
        [{"input_ids": [1, 2, 3, 4]}] * 4,
    ],
)
def test_i43_a_list_of_samples_is_a_data_set(samples):
    assert len(Accumulator(micro_batch_size=4, cpu=True).windows(samples)) == 1
