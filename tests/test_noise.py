"""The noise scale: a closed form is found again, its interval holds, and runs say it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from accum_trainer import Accumulator
from accum_trainer.errors import ConfigError, DataError
from accum_trainer.noise import Fit, GradientNoise, WindowNorms
from accum_trainer.plan.advice import batch_size_advice
from accum_trainer.sources.dataset import PlannedSource
from accum_trainer.sources.options import SourceOptions
from accum_trainer.speed.noise_every import affordable_noise_every
from accum_trainer.train.records import read_records
from accum_trainer.window_plan import Cost, Cut
from tests.launching import cli, python, torchrun
from tests.noise_worker import closed_form


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_closed_form_is_found_within_a_tenth_padded_and_packed(processes, tmp_path):
    arguments = ("tests.noise_worker", tmp_path)
    run = python("-m", *arguments) if processes == 1 else torchrun(2, *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(processes)]
    assert all(found == ranks[0] for found in ranks)
    # Samples that differ in nothing but their number of targets are no noise: less than one.
    assert ranks[0].pop("alike")["samples"] < 0.2
    assert len(ranks[0]) == 4
    for name, found in ranks[0].items():
        assert found["samples"] == pytest.approx(closed_form(), rel=0.1), name
        assert found["low"] < closed_form() < found["high"]
        assert found["high"] / found["low"] < 1.4


def test_the_interval_holds_the_ratio_as_often_as_it_says():
    rng = np.random.RandomState(0)
    held = bounded = 0
    for _ in range(300):
        noise = GradientNoise()
        for _ in range(40):
            shared = rng.randn()
            noise.add(Fit(1 + 0.6 * rng.randn() + 0.4 * shared, 50 + 25 * shared, 3.0, 0.0))
        found = noise.estimate
        held += found.low is not None and found.low <= 50 <= (found.high or np.inf)
        bounded += found.high is not None
    assert bounded > 290
    assert 0.92 < held / 300 < 0.985


def test_nothing_is_said_until_the_gradient_stands_out():
    noise = GradientNoise()
    for signal in (1.0, -0.9, 0.8):
        noise.add(Fit(signal, 40.0 + signal, 3.0, 0.0))
    assert noise.estimate.samples is None and noise.estimate.low is None
    noise.add(Fit(-1.0, 41.0, 3.0, 0.0))
    assert noise.estimate.samples is None and noise.estimate.high is None
    assert noise.estimate.num_windows == 4


def test_smoothing_follows_training_and_goes_on_from_a_saved_state():
    noise = GradientNoise()
    rng = np.random.RandomState(0)
    for window in range(60):
        at = 10 if window < 20 else 100
        noise.add(Fit(1 + 0.1 * rng.randn(), at + rng.randn(), 3.0, 0.0))
    again = GradientNoise()
    again.load_state_dict(json.loads(json.dumps(noise.state_dict())))
    assert again.estimate == noise.estimate
    assert 85 < noise.estimate.samples < 100  # a third of the windows has a ninth of the weight


def test_micro_batches_of_a_random_cut_have_sizes_that_know_no_lengths():
    lengths = np.random.RandomState(0).randint(1, 100, 64)
    for cut, world_size in ((Cut(4), 1), (Cut(None, max_tokens=500), 3), (Cut(32), 2)):
        dealt = cut.assign_at_random(lengths, world_size)
        sizes = [[len(batch) for batch in own] for own in dealt]
        shuffled = cut.assign_at_random(np.sort(lengths), world_size)
        assert sizes == [[len(batch) for batch in own] for own in shuffled]
        assert np.concatenate([b for own in dealt for b in own]).tolist() == list(range(64))
        assert max(map(max, sizes)) <= (cut.micro_batch_size or 500 // lengths.max())
        assert sum(map(len, sizes)) >= 4
        assert world_size == 1 or all(own[-1] == 1 for own in sizes)
    even = Cut(8, equal_counts=True, rank_weights=(1, 3)).assign_at_random(lengths, 2)
    assert len(even[0]) == len(even[1]) and sum(map(len, even[1])) == 48
    assert Cut(4).assign_at_random(lengths[:3], 1) is None


def test_the_default_measures_as_often_as_it_costs_little():
    lengths = np.random.RandomState(0).randint(10, 200, 4000)
    small, large = Cost(fixed=32.0, square=0.0), Cost(fixed=2000.0, square=0.0)
    packed = affordable_noise_every(Cut(4, packed=True, cost=small), lengths, 32, 1)
    padded = affordable_noise_every(Cut(4, cost=small), lengths, 32, 1)
    cut_anew = affordable_noise_every(Cut(32, packed=True, cost=large), lengths, 32, 1)
    assert packed < padded < cut_anew
    assert affordable_noise_every(Cut(4), lengths, 3, 1) == 0
    assert affordable_noise_every(Cut(4), lengths[:10], 32, 1) == 0


def test_sources_that_are_no_random_samples_are_refused():
    rows = [torch.tensor([float(i)]) for i in range(32)]
    acc = Accumulator(micro_batch_size=4, gradient_accumulation_steps=2, cpu=True)
    with pytest.raises(DataError, match="shuffle=False keeps the data set's own order; pass"):
        acc.windows(rows, shuffle=False, noise_every=2)
    with pytest.raises(DataError, match="does not draw its batches at random"):
        acc.windows(DataLoader(rows, batch_size=4), noise_every=2)
    with pytest.raises(DataError, match="the order of a stream is not known"):
        acc.windows(iter(rows), noise_every=2)
    with pytest.raises(ConfigError, match="noise_every=-1 is not a number of windows; give 1"):
        acc.windows(rows, noise_every=-1)
    acc = Accumulator(micro_batch_size=4, cpu=True)
    with pytest.raises(DataError, match="cannot be cut, and K is 1"):
        acc.windows(DataLoader(rows, batch_size=4, shuffle=True), noise_every=2)


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(20))

    def forward(self, rows):
        return 0.5 * ((self.at - rows) ** 2).sum()


@pytest.mark.parametrize("kind", ["loader", "data set"])
def test_a_loop_of_ones_own_measures_a_shuffled_loader_or_data_set(kind):
    torch.manual_seed(0)
    rows = torch.randn(2000, 20) + 0.5  # |mu|^2 = 20 / 4, tr(Sigma) = 20
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    model = Mean()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    batches = acc.batches(
        loader if kind == "loader" else list(rows), count_targets=len, noise_every=3
    )
    for batch in batches:
        with acc.accumulate(model):
            acc.backward(model(batch), reduction="sum")
        optimizer.step()
    found = batches.windows.noise.estimate
    assert found.num_windows == 250 // 3
    assert found.samples == pytest.approx(4.0, rel=0.15)
    assert found.low < 4.0 < found.high


def test_windows_that_cannot_be_measured_say_why(monkeypatch):
    monkeypatch.setattr("accum_trainer.noise.free_bytes", lambda device: 10.0)
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    model = Mean()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    windows = acc.windows(list(torch.randn(64, 20)), count_targets=len, noise_every=1)
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(batch), reduction="sum")
        acc.step(optimizer)
    assert windows.noise.num_windows == 0
    assert windows.noise.obstacle == "a copy of the gradient takes 0.00 GB, 0.00 GB are free"


def test_processes_that_measure_other_windows_are_refused(tmp_path):
    """Not left to exchange rows of different lengths, nor to train on shares of other cuts."""
    run = torchrun(2, "tests.noise_worker", tmp_path, "differing")
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        said = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert "measured on some processes and not on others" in said
        assert said.endswith("give noise_every alike on all processes")
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    fingerprints = [
        next(
            PlannedSource(list(range(64)), acc.plan, 0, SourceOptions(noise_every=every)).shares(
                0, 0
            )
        ).fingerprint
        for every in (0, 1)
    ]
    assert fingerprints[0] != fingerprints[1]


def _measure(model, optimizer, acc, rows):
    windows = acc.windows(rows, count_targets=len, noise_every=2)
    updates = []
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(batch), reduction="sum")
        updates.append(acc.step(optimizer))
    return windows.noise, updates


class Two(Mean):
    """A second parameter, whose gradient is nine times as large."""

    def __init__(self):
        super().__init__()
        self.other = torch.nn.Parameter(torch.zeros(20))

    def forward(self, rows):
        return super().forward(rows) + 1.5 * ((self.other - 3 * rows) ** 2).sum()


def test_parameters_that_the_optimizer_does_not_step_are_no_part_of_the_noise():
    torch.manual_seed(0)
    rows = list(torch.randn(800, 20) + 0.5)
    found = []
    for model, names in ((Mean(), ["at"]), (Two(), ["at"]), (Two(), ["at", "other"])):
        acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
        parts = [torch.optim.SGD([getattr(model, name)], lr=0.0) for name in names]
        model, optimizer, *_ = acc.prepare(model, *parts)
        found.append(_measure(model, optimizer, acc, rows)[0])
    assert found[0].estimate.samples is not None
    assert found[1].estimate.samples == pytest.approx(found[0].estimate.samples, rel=1e-5)
    assert found[2].num_windows == 0
    assert found[2].obstacle.endswith("or several optimizers share it")


def test_memory_that_the_copy_of_the_gradient_takes_ends_no_run_and_cuts_no_later_window(
    monkeypatch,
):
    """A copy that does not fit leaves the window unmeasured. A micro-batch that does not fit beside
    the copy is run again without it, and its size is not taken for one that never fits."""
    rows, class_ = list(torch.randn(64, 20) + 0.5), WindowNorms
    held = []

    class Crowded(Mean):
        def forward(self, rows):
            if held and held[-1]._before and len(rows) == 2:  # noqa: SLF001
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(rows)

    def run(model, name, replaced):
        acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with monkeypatch.context() as patched:
            patched.setattr(class_, name, replaced)
            return _measure(model, optimizer, acc, rows)

    def no_room(self, *arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    take = class_.take

    def watched(self, *arguments):
        held.append(self)
        take(self, *arguments)

    plain, expected = run(Mean(), "take", lambda *_: None)
    full, updates = run(Mean(), "_square", no_room)
    assert full.num_windows == 0 and full.obstacle == "out of memory"
    assert updates == expected
    crowded, updates = run(Crowded(), "take", watched)
    assert crowded.num_windows == 0 and crowded.obstacle == "out of memory"
    assert [update.num_splits for update in updates] == [0, 1] * 4
    assert [u.loss for u in updates] == pytest.approx([u.loss for u in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (96.2, 60.4, 150.1, 16, 8, 1),
            "noise scale about 96 samples (60 to 150): B_eff 16 is noisy, beyond about 190 little "
            "is gained; K = 12 (B_eff 96) would do on this machine",
        ),
        (
            (96.2, 60.4, 150.1, 64, 8, 2),
            "noise scale about 96 samples (60 to 150): B_eff 64 suits it, beyond about 190 little "
            "is gained",
        ),
        (
            (9.62, 6.0, 15.0, 64, 8, 1),
            "noise scale about 9.6 samples (6 to 15): B_eff 64 is more than this model can use "
            "now, beyond about 19 little is gained; K = 3 (B_eff 24) would do on this machine",
        ),
        (
            (None, 40.0, None, 16, 8, 1),
            "noise scale above 40 samples: B_eff 16 is noisy; how much larger it should be is not "
            "known yet",
        ),
        ((None, None, None, 16, 8, 1), None),
    ],
)
def test_advice(numbers, said):
    assert batch_size_advice(*numbers) == said


def test_a_run_says_its_noise_scale_and_a_resumed_one_goes_on(tmp_path):
    """Rows with one of three completions: a gradient that stands out of some noise."""
    words = (" x", " one", " why")
    rows = [{"prompt": f"{n % 7}:", "completion": words[n % 3] * (1 + n % 5)} for n in range(96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--cpu", "--dataset-file", "rows.jsonl", "--batch-size", 2, "--lr", 1e-3]
    options += ["--global-batch-size", 12, "--noise-every", 2, "--scheduler", "constant"]

    def train(name, *more):
        run = cli("train", *options, "--output-dir", name, *more, cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout, read_records(tmp_path / name / "metrics.jsonl")

    said, whole = train("whole", "--steps", 16)
    train("halves", "--steps", 7)
    resumed_said, halves = train("halves", "--steps", 16)
    keys = ("noise_scale", "noise_scale_low", "noise_scale_high", "loss", "num_micro_batches")
    assert [[r[k] for k in keys] for r in whole] == [[r[k] for k in keys] for r in halves]
    # A window that is measured is cut at random, by B; the others are packed in its memory.
    assert [r["num_micro_batches"] for r in whole[1::2]] == [6] * 8
    assert all(1 < r["num_micro_batches"] < 6 for r in whole[::2])
    assert whole[6]["noise_scale"] is None  # three windows
    last = whole[-1]
    assert 0 <= last["noise_scale_low"] < last["noise_scale"] < last["noise_scale_high"] < 12
    assert f"noise scale about {last['noise_scale']:.1f}".removesuffix(".0") in said
    assert said.splitlines()[-1] == resumed_said.splitlines()[-1]
    assert json.loads((tmp_path / "whole/plan.json").read_text())["noise_every"] == 2
    off, records = train("off", "--steps", 8, "--noise-every", 0)
    assert "noise" not in off and records[-1]["noise_scale_low"] is None
