"""Any numbers and any configuration: the arithmetic of batches, windows and their cuts, options.

Each example is drawn by hypothesis; `derandomize` draws the same ones in each run.
tests/test_fuzz_files.py has files of any content.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from accum_trainer import BatchPlan, TrainConfig
from accum_trainer.batch_plan import (
    SCHEDULES,
    lr_factor,
    parse_rank_weights,
    parse_shard,
    parse_warmup,
    scale_lr,
    warmup_updates,
)
from accum_trainer.config import compose
from accum_trainer.config.train_config import OPTIONS
from accum_trainer.errors import ConfigError
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.sources.dataset import CountedRows, PlannedSource
from accum_trainer.sources.options import SourceOptions
from accum_trainer.window_plan import Cost, Cut, global_order, windows_of


def drawn(examples):
    """The same `examples` in each run, with no limit on the time of one on a busy machine."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


counts = st.integers(1, 10_000)
maybe = st.none() | counts


class TestPlan:
    @drawn(300)
    @given(maybe, maybe, maybe, maybe, maybe)
    def test_what_is_given_is_kept_and_what_follows_is_whole(self, b, k, w, b_eff, samples):
        try:
            plan = BatchPlan(b, k, w, b_eff, samples)
        except ConfigError as refused:
            assert k is not None or b == b_eff is None  # rounding K up solves the rest
            if b_eff is not None:
                assert all(str(n) in str(refused) for n in (b, k, w, b_eff) if n is not None)
            return
        solved = (
            *(plan.micro_batch_size, plan.gradient_accumulation_steps),
            *(plan.world_size, plan.global_batch_size),
        )
        for wanted, found in zip((b, k, w, b_eff), solved, strict=True):
            assert found >= 1 and wanted in (None, found)
        most = math.prod(solved[:3])
        assert 0 <= most - plan.global_batch_size < plan.micro_batch_size * plan.world_size
        assert plan.is_whole == (most == plan.global_batch_size)
        if samples is not None:
            whole = samples // plan.global_batch_size
            assert plan.tail_samples == samples - whole * plan.global_batch_size
            assert plan.updates_per_epoch == whole + bool(plan.tail_samples)

    @drawn(200)
    @given(st.text() | st.integers() | st.floats().map(str), counts, maybe)
    @example("1e400", 10, 10)
    @example("1e308ep", 10, 10)
    @example("1e308ep", 10**10, 10)
    def test_any_warm_up_fits_the_run_or_is_refused(self, warmup, total, per_epoch):
        try:
            found = warmup_updates(warmup, total, per_epoch)
        except ConfigError as refused:
            assert "warmup=" in str(refused)
        else:
            assert 0 <= found <= total

    @drawn(200)
    @given(st.sampled_from(SCHEDULES), st.integers(0, 500), counts)
    def test_the_rate_rises_then_never_does(self, schedule, warmup, total):
        assume(warmup <= total)
        factor = lr_factor(schedule, warmup, total)
        rates = [factor(update) for update in range(min(total, 700))]
        assert all(0 <= rate <= 1 for rate in rates)
        top = min(warmup, len(rates))
        assert rates[:top] == sorted(rates[:top])
        assert rates[top:] == sorted(rates[top:], reverse=True)

    @drawn(200)
    @given(st.text() | st.from_regex(r"\s?\d*[/,:. ]\d*\s?", fullmatch=True))
    @example("²/³")
    @example("0/9\x1f")
    @example("9" * 5000 + "/" + "9" * 5001)
    @example(",".join(["1"] * 3))
    def test_any_shard_and_any_shares(self, text):
        for parse in (parse_shard, parse_rank_weights, parse_warmup):
            try:
                found = parse(text)
            except ConfigError as refused:
                assert str(refused)
            else:
                assert found is not None or text == "auto"

    @drawn(100)
    @given(st.floats(1e-12, 1e3), st.sampled_from(["none", "linear", "sqrt"]), counts, counts)
    def test_a_scaled_rate_is_that_of_its_ratio(self, lr, scaling, b_eff, base):
        found = scale_lr(lr, scaling, b_eff, base)
        power = {"none": 0, "linear": 1, "sqrt": 0.5}[scaling]
        assert math.isclose(found, lr * (b_eff / base) ** power, rel_tol=1e-12)


lengths_of_samples = st.lists(
    st.integers(1, 40) | st.integers(1, 5000) | st.integers(1, 10**6), min_size=1, max_size=70
).map(lambda found: np.array(found, dtype=np.int64))


@st.composite
def cuts(draw, world_size):
    """Any cut that a configuration can ask for."""
    b = draw(st.none() | st.integers(1, 80))
    tokens = draw(st.none() | st.integers(1, 10_000))
    shares = st.lists(st.floats(1e-3, 1e3), min_size=world_size, max_size=world_size)
    return Cut(
        b,
        tokens,
        multiple=draw(st.sampled_from([1, 2, 8, 64, 1000])),
        packed=draw(st.booleans()),
        cost=Cost(draw(st.sampled_from([0.0, 1.0, 2000.0])), draw(st.sampled_from([0.0, 1e-4]))),
        equal_counts=draw(st.booleans()),
        rank_weights=draw(st.none() | shares.map(tuple)),
    )


class TestWindows:
    @drawn(300)
    @given(st.data(), lengths_of_samples, st.integers(1, 17))
    def test_a_cut_deals_each_sample_once_within_the_limits(self, data, lengths, world_size):
        cut = data.draw(cuts(world_size))
        dealt = cut.assign_to_ranks(lengths, world_size)
        assert len(dealt) == world_size
        micro_batches = [micro_batch for rank in dealt for micro_batch in rank]
        positions = np.concatenate(micro_batches)
        assert sorted(positions.tolist()) == list(range(len(lengths)))
        for micro_batch in micro_batches:
            most = cut.micro_batch_size or len(lengths)
            if cut.packed:  # B is the memory of the B longest
                longest = np.sort(lengths)[-most:].sum()
                assert lengths[micro_batch].sum() <= longest
            else:
                assert 0 < len(micro_batch) <= most
            # Padding to a multiple counts where the user's limit is that of a real batch.
            if cut.max_tokens is not None and len(micro_batch) > 1 and not cut.packed:
                assert cut.positions(lengths[micro_batch]) <= cut.max_tokens
            if cut.max_tokens is not None and len(micro_batch) > 1 and cut.packed:
                assert lengths[micro_batch].sum() <= cut.max_tokens
        if cut.equal_counts and cut.rank_weights is None and len(micro_batches) >= world_size:
            each = {len(rank) for rank in dealt}
            assert len(each) == 1 or len(micro_batches) == len(lengths), each

    @drawn(200)
    @given(
        st.integers(1, 400), st.integers(1, 90), st.integers(0, 2**64), st.integers(0, 2**40),
        st.integers(0, 500),
    )  # fmt: skip
    def test_windows_have_each_sample_once_from_any_start(self, samples, size, seed, epoch, start):
        order = global_order(samples, seed % 2**64, epoch)
        assert sorted(order.tolist()) == list(range(samples))
        windows = list(windows_of(order, size, start))
        assert [i for window in windows for i in window] == order[start:].tolist()
        assert all(len(window) == size for window in windows[:-1])

    @drawn(60)
    @given(
        st.data(), lengths_of_samples, st.integers(1, 5), st.integers(1, 20), st.integers(1, 40),
        st.integers(0, 3), st.booleans(),
    )  # fmt: skip
    def test_ranks_know_the_same_totals_and_read_each_sample_once(
        self, data, lengths, world_size, b, b_eff, epoch, shuffle
    ):
        """Through the source as training reads it, on each rank alone."""
        lengths = lengths.clip(1, 50)
        cut = data.draw(cuts(world_size))
        first, every = data.draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]))
        assume(first < len(lengths))
        plan = BatchPlan(b, world_size=world_size, global_batch_size=b_eff)
        rows = _Rows(lengths)
        options = SourceOptions(
            collate_fn=PaddingCollator(0, cut.multiple),
            shuffle=shuffle,
            shard=(first, every),
            cut=cut,
        )
        ranks = [
            list(PlannedSource(rows, plan, rank, options).shares(epoch, 0))
            for rank in range(world_size)
        ]
        order = global_order(len(lengths), 0, epoch) if shuffle else np.arange(len(lengths))
        windows = list(windows_of(order[first::every], b_eff))
        assert {len(shares) for shares in ranks} == {len(windows)}
        ends = accumulate(map(len, windows))
        for window, end, *shares in zip(windows, ends, *ranks, strict=True):
            read = [
                int(row[0])
                for share in shares
                for batch in share.batches
                for row in batch["input_ids"]
            ]
            assert sorted(read) == sorted(window.tolist())
            assert {share.consumed for share in shares} == {end}
            assert len({share.fingerprint for share in shares}) == 1
            assert all(share.counts == shares[0].counts for share in shares)
            counts_of_ranks = shares[0].counts
            assert sum(c.num_samples for c in counts_of_ranks) == len(window)
            assert sum(c.num_targets for c in counts_of_ranks) == rows.num_targets[window].sum()
            assert sum(c.num_tokens for c in counts_of_ranks) == lengths[window].sum()
            for share, count in zip(shares, counts_of_ranks, strict=True):
                assert len(share.batches) == count.num_micro_batches
                assert share.batches or share.filler is not None


class _Rows(CountedRows):
    """Rows whose first token is their number."""

    def __init__(self, lengths):
        self.lengths, self.num_targets = lengths, np.maximum(lengths - 1, 0)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = [int(index)] * int(self.lengths[index])
        return {"input_ids": ids, "labels": list(ids)}


# --- configuration ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
# What YAML makes of bare words, and the ends of what numbers can be.
scalars = st.sampled_from(
    [
        *("", "~", "null", "none", "no", "yes", "off", "auto", "tiny", "0", "1", "-1", "2.5"),
        *("1e-3", "1e999", "-.inf", ".nan", "0x10", "0b2", "1_000", "1:30", "=", "<<", "1e5"),
        *("2001-02-03", "2001-99-99", "2001-02-03 25:61:61", "9" * 400, "9" * 5000, "'a", "&a *a"),
        *("!!int x", "!!int ''", "!!float x", "!!binary x", "!!set {a}", "!!timestamp x"),
        *("!!python/name:os.system", "[a, b]", "[1, 2]", "[[]]", "{a: 1}", "{[a]: 1}", "{{a}: b}"),
        *("zero2", "bf16", "0/4", "5%", "0.5ep", "2,1", "lr=1,2", "runs/first", '"\\ud800"'),
        *('"a\\u0000b"', "|\n  a", "*b", "&b [*b]", "- a", "@", "%", "\t", "\u2028", "!!bool x"),
    ]
)
names = st.sampled_from([*OPTIONS, "lr ", "batch-size", "learning_rate", "1", "null", "2001-99-99"])
lines = st.lists(st.tuples(names, scalars | st.text(max_size=8)), max_size=4).map(
    lambda found: "".join(f"{name}: {value}\n" for name, value in found)
)
yaml_texts = lines | st.text() | json_values.map(yaml.safe_dump) | st.text(":-[]{}&*!|>'\"\n #ab1")


def check_config(config, path):
    """It is read back as it is from its own file."""
    path.write_text(config.to_yaml(), encoding="utf-8")
    back = TrainConfig.from_yaml(path, trust_remote_code=config.trust_remote_code)
    assert back == config


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "run.yaml"


class TestConfiguration:
    @drawn(600)
    @given(st.dictionaries(names.filter(OPTIONS.__contains__), json_values | scalars, max_size=4))
    @example({"lr": 10**400})
    @example({"steps": "9" * 5000})
    @example({"steps": 10**5000})
    @example({"batch_size": "9" * 400})
    @example({"lr_scaling": 10**5000})
    @example({"resume": "none"})
    @example({"model": "a\x85b"})
    @example({"model": "\ud800"})
    @example({"log_file": " none"})
    def test_any_values_are_a_configuration_or_refused(self, path, values):
        try:
            config = TrainConfig(**values)
        except ConfigError as refused:
            assert len(str(refused)) > 10
        else:
            check_config(config, path)

    @drawn(600)
    @given(yaml_texts)
    @example("a: " + "[" * 100_000)
    @example("lr: 2001-99-99\n")
    @example("? {a: b}\n: c\n")
    @example("&a [*a, *a]: 1\n")
    @example("model: &a [*a]\n")
    @example("model: !!int ''\n")
    @example("lr: 1" + "0" * 400 + "\n")
    def test_any_yaml_is_a_configuration_or_refused(self, path, text):
        path.write_text(text, encoding="utf-8", errors="replace")
        try:
            config = TrainConfig.from_yaml(path)
        except ConfigError as refused:
            assert len(str(refused)) > 10
        else:
            check_config(config, path)

    @drawn(200)
    @given(st.binary() | st.sampled_from(["utf-16", "utf-32", "latin-1"]).map("lr: 1é".encode))
    def test_any_bytes_are_a_configuration_or_refused(self, path, content):
        path.write_bytes(content)
        try:
            config = TrainConfig.from_yaml(path)
        except ConfigError as refused:
            assert str(path) in str(refused)
        else:
            check_config(config, path)

    @drawn(300)
    @given(
        st.lists(st.tuples(names, scalars).map("=".join) | st.text(max_size=8), max_size=3),
        st.dictionaries(
            (names | st.text(max_size=5)).map(lambda n: f"ACCUM_TRAINER_{n.upper()}"), scalars
        ),
    )
    def test_any_settings_and_variables(self, path, texts, environment):
        try:
            config = compose(settings=texts, environment=environment).config
        except ConfigError as refused:
            assert len(str(refused)) > 10
        else:
            check_config(config, path)
