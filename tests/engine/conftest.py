"""Runs all cases once per engine; the tests read what they returned."""

from __future__ import annotations

import json
import os

import pytest

from tests.launching import python, torchrun

# name -> (processes, what the worker asks of the Accumulator)
ENGINES = {
    "single": (1, {}),
    "ddp": (2, {}),
    "zero0": (2, {"zero_stage": 0}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "fsdp2": (2, {"fsdp": True}),
    "fsdp2-groups": (4, {"fsdp": True, "shard_size": 2}),
    "fsdp2-offload": (2, {"fsdp": True, "cpu_offload": True}),
}
# One engine instead, some of its cases, on another device (benchmarks/gpu/contract.py):
# {"engine": name, "processes": how many, "options": as above, "cases": names, "torchrun": for one
# process too}.
ONLY = json.loads(os.environ.get("ACCUM_TRAINER_CONTRACT", "null"))
if ONLY:
    ENGINES = {ONLY["engine"]: (ONLY["processes"], ONLY["options"])}


# Tests of cases that pass an Accelerator of their own, which runs single or DDP: not collected for
# the other engines.
OF_ACCELERATE = (
    "own_accelerator_with_k",
    "loader_sharded_by_accelerate",
    "test_i15_",
    "test_i46_",
    "under_a_scaler",
    "test_loop_of_accelerate",
    "test_two_players",
)
# Cases in which a sharded engine does nothing that it does not do in the others too: they vary the
# model's loss, the data source or the plan. Single and DDP run them; ZeRO-3 and FSDP2, which differ
# most from these, in the long grid.
OF_ANY_ENGINE = {
    "planned_gpt2",
    "planned_with_workers",
    "loader_llama_own_mean",
    "loader_lora_own_mean",
    "loader_gpt2_sum",
    "loader_shuffled_every_sample_once",
    "i2_three_against_three_hundred",
    "i3_kwargs_model_has_one_norm",
    "i4_own_loss_as_sum",
    "i4_own_loss_as_mean",
    "i5_splits_log_the_same_loss",
    "masked_prompt_of_first_label_is_not_counted",
    "i6_packed_samples",
    "i7_label_smoothing",
    "i8_sum_of_weights_is_the_denominator",
    "i9_each_term_of_two",
    "i17_odd_counts_every_sample_once",
    "i19_constant_gradient_is_one",
    "i21_order_of_micro_batches_does_not_matter",
    "i32_lr_knows_updates_only",
    "i36_fifty_updates",
    "i40_i41_packed_samples_that_see_each_other",
    "every_cut_gives_the_same_gradient",
    "ranks_that_end_at_different_windows",
    "rows_that_the_last_rank_has_longer",
    "reading_ahead_survives_breaks_epochs_and_resuming",
    "r52_global_batch_that_does_not_divide",
}
# Stage 0 is DDP inside DeepSpeed; stage 1 reduces as stage 0 and shards as stage 2. Of these two,
# only the cases in which a stage matters, in the long grid.
OF_A_STAGE = {
    "planned_llama",
    "planned_every_microbatch",
    "stream_unsized",
    "i10_no_target_anywhere",
    "i14_gradients_empty_at_every_window",
    "exchanges_per_window",
    "i22_i26_offload_by_policy",
    "i27_i28_parameters_that_some_micro_batches_use",
    "i30_gradients_accumulate_in_float32",
    "bf16_is_as_near_as_one_big_bf16_batch",
    "i31_one_clip_of_the_averaged_gradient",
    "i33_inf_is_dropped_everywhere",
    "a_parameter_with_inf_in_its_gradient_is_named",
    "i45_one_rank_leaves_out_what_another_uses",
    "state_survives_a_round_trip",
    "parts_of_all_ranks_are_the_whole_state",
}
# Two groups of processes that each shard the model: what sharding, or the exchange between groups,
# can change.
OF_GROUPS = OF_A_STAGE - {"stream_unsized"} | {
    "planned_lora",
    "planned_checkpointing",
    "i13_tail_window_is_the_mean_of_its_own",
    "i17_rank_without_a_sample",
    "a_model_that_the_last_micro_batch_leaves_out",
    "gathers_per_window",
    "position_survives_another_world",
    "trained_parameters_change_after_prepare",
    "weight_sync_changes_no_bit",
    "window_that_one_rank_cannot_read",
}
# Shards of FSDP2 that lie in host memory: who reads and writes them. Without ZeRO's own case.
OF_OFFLOAD = OF_GROUPS - {"i22_i26_offload_by_policy"}
# Much of ZeRO's time; what they show of sharded engines, FSDP2 shows in the short part.
SLOW_UNDER_ZERO = {
    "combinations",
    "weight_sync_changes_no_bit",
    "gathers_per_window",
    "a_window_starts_from_no_gradient",
    "logits_at_targets_in_chunks",
    "host_reads",
}
# The rest of three grids, of which another case has one point of each situation.
MORE_POINTS = {
    "more_combinations",
    "weight_sync_changes_no_bit_in_more_variants",
    "host_reads_of_packed_batches",
}


def _engine_of(item):
    return getattr(getattr(item, "callspec", None), "params", {}).get("engine_results", "single")


def _cases_of(item):
    """The cases that a test looks up: named in it, in its parameters, or made from these."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    names = {*item.function.__code__.co_consts, *map(str, given.values())}
    made = {f"i4_own_loss_as_{given['reduction']}"} if "reduction" in given else set()
    return names | made


def _is_long(item):
    engine, cases = _engine_of(item), _cases_of(item)
    if engine == "single":
        return False
    if engine in ("fsdp2-groups", "fsdp2-offload"):
        return True
    if cases & MORE_POINTS:
        return True
    if engine == "ddp":
        return False
    if engine in ("zero2", "zero3") and cases & SLOW_UNDER_ZERO:
        return True
    return engine in ("zero0", "zero1") or bool(cases & OF_ANY_ENGINE)


def _is_left_to_others(item):
    engine, cases = _engine_of(item), _cases_of(item)
    if engine in ("zero0", "zero1"):
        return not cases & OF_A_STAGE
    if engine == "fsdp2-groups":
        return not cases & OF_GROUPS
    if engine == "fsdp2-offload":
        return not cases & OF_OFFLOAD
    return engine == "zero2" and bool(cases & OF_ANY_ENGINE)


def pytest_itemcollected(item):
    if not ONLY and "engine_results" in item.fixturenames and _is_long(item):
        item.add_marker(pytest.mark.long)


def pytest_collection_modifyitems(config, items):
    def belongs(item):
        if ONLY and not _cases_of(item) & {*ONLY["cases"]}:
            return False
        if not ONLY and "engine_results" in item.fixturenames and _is_left_to_others(item):
            return False
        in_one = _engine_of(item) in ("single", "ddp")
        return in_one or not any(name in item.name for name in OF_ACCELERATE)

    dropped = [item for item in items if not belongs(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if belongs(item)]


@pytest.fixture(scope="session", params=list(ENGINES))
def engine_results(request, tmp_path_factory):
    """case name -> one result per rank, for one engine: the cases of the tests that are run."""
    out = tmp_path_factory.mktemp(request.param)
    processes, options = ENGINES[request.param]
    named = OF_ANY_ENGINE | OF_A_STAGE | OF_GROUPS | OF_OFFLOAD | SLOW_UNDER_ZERO | MORE_POINTS
    unknown = named - {*_all_cases()}
    assert not unknown, f"no cases have these names: {unknown}"
    using = [i for i in request.session.items if "engine_results" in getattr(i, "fixturenames", ())]
    asked = set().union(*(_cases_of(item) for item in using if _engine_of(item) == request.param))
    cases = ONLY["cases"] if ONLY else [name for name in _all_cases() if name in asked]
    arguments = ("tests.engine.worker", out, json.dumps(options), *cases)
    alone = processes == 1 and not (ONLY and ONLY["torchrun"])
    # A process that was forked after a library had looked for GPUs cannot use one.
    fresh = bool(ONLY) and not options.get("cpu", True)
    run = (
        python("-m", *arguments, fresh=fresh)
        if alone
        else torchrun(processes, *arguments, fresh=fresh)
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return {name: [results[name] for results in ranks] for name in ranks[0]}


def _all_cases():
    from tests.engine.cases import CASES

    return CASES


@pytest.fixture
def engine(request):
    return request.node.callspec.params["engine_results"]


@pytest.fixture
def world_size(engine_results):
    return len(next(iter(engine_results.values())))


@pytest.fixture
def case(engine_results):
    """Look up a case: its result on every rank; fails with the case's own traceback where it
    raised."""

    def results(name):
        found = engine_results[name]
        for rank, result in enumerate(found):
            assert "traceback" not in result, f"rank {rank}: {result['traceback']}"
        return found

    return results
