"""A new engine is one class and one entry in the registry; capabilities decide, never names."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool

import accum_trainer
from accum_trainer import Accumulator
from accum_trainer.config import engine as config_engine
from accum_trainer.engine import build, zero_config
from accum_trainer.engine.base import Engine
from accum_trainer.engine.ddp import DDPEngine
from accum_trainer.engine.fsdp import FSDPEngine
from accum_trainer.engine.fsdp_settings import offloads
from accum_trainer.engine.mesh import (
    parallelism_of,
    refuse_shared_samples,
    shard_mesh,
    shard_size_of,
)
from accum_trainer.engine.request import Request
from accum_trainer.engine.single import SingleEngine
from accum_trainer.engine.zero import STAGES, ZeroEngine
from accum_trainer.errors import ConfigError, EngineError
from accum_trainer.plan import footprint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
PACKAGE = Path(accum_trainer.__file__).parent


class MadeUpEngine(SingleEngine):
    name = "made-up"
    options = ("made_up",)
    can_compile = False

    @classmethod
    def is_asked_for(cls, request):
        return bool(request.options.get("made_up")) or request.names("made_up")

    @classmethod
    def drives(cls, accelerator, request):
        return cls.is_asked_for(request)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(build, "ENGINES", (MadeUpEngine, *build.ENGINES))


def test_an_option_of_a_registered_engine_asks_for_it(registered):
    assert Accumulator(micro_batch_size=1, cpu=True, made_up=True).engine.name == "made-up"
    assert Accumulator(micro_batch_size=1, cpu=True, made_up=False).engine.name == "single"


def test_a_launcher_asks_for_it(registered, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MADE_UP", "true")
    assert isinstance(Accumulator(micro_batch_size=1, cpu=True).engine, MadeUpEngine)


@pytest.mark.parametrize(
    "name, near",
    [
        ("grad_accum_steps", "did you mean gradient_accumulation_steps?"),
        ("batch_size", "did you mean micro_batch_size?"),
        ("zero_stages", "did you mean zero_stage?"),
        ("mixed_precison", "did you mean mixed_precision?"),
        ("made_up", "It takes micro_batch_size, "),
    ],
)
def test_an_argument_that_nothing_takes_is_refused_with_the_nearest_name(name, near):
    with pytest.raises(ConfigError) as refused:
        Accumulator(micro_batch_size=1, **{name: 1})
    assert f"Accumulator has no argument '{name}'" in str(refused.value)
    assert near in str(refused.value)


def test_a_value_that_accelerate_refuses_names_the_callers_arguments_only():
    with pytest.raises(EngineError, match="accelerate refuses mixed_precision: Unknown mixed_pr"):
        Accumulator(micro_batch_size=1, mixed_precision="bf15")


@pytest.mark.parametrize("written", [2, "2", "zero2"])
def test_a_zero_stage_may_be_written_as_on_the_command_line(written, monkeypatch):
    monkeypatch.setattr(zero_config, "_check_installed", lambda: None)
    plugin = SimpleNamespace(deepspeed_config={})
    zero_config.make_plugin(written, False, None, plugin)
    assert plugin.deepspeed_config["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("written", [4, "zero", "two", True])
def test_a_zero_stage_that_does_not_exist_is_refused(written):
    with pytest.raises(ConfigError, match=f"zero_stage={written!r} is not known; give 0, 1, 2"):
        zero_config.make_plugin(written, False, None, None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"engine": "ddp"}, "engine=ddp on 1 process: it averages gradients over two or more"),
        ({"engine": "deepspeed"}, "engine='deepspeed' is not known; give one of ddp, fsdp2, sing"),
        ({"engine": "single", "fsdp": True}, "engine=single, but fsdp=True asks for fsdp2"),
        ({"engine": "zero2", "zero_stage": 3}, "engine=zero2, but zero_stage=3; make them agree"),
        ({"engine": "zero2", "fsdp": True}, "engine=zero2, but fsdp=True asks for fsdp2"),
        ({"engine": "zero2", "shard_size": 2}, "engine=zero2, but shard_size=2 asks for fsdp2"),
        ({"engine": "fsdp2", "accelerator": object()}, "accelerator is given together with engine"),
        (
            {"cpu_offload": True},
            r"effect: single is in force; give engine \(fsdp2, zero1, zero2, z",
        ),
        ({"engine": "fsdp2", "cpu_offload": "no"}, "cpu_offload='no' is neither True nor False"),
    ],
)
def test_a_named_engine_that_cannot_be_in_force_is_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        Accumulator(micro_batch_size=1, gradient_accumulation_steps=1, **given)


def test_a_named_engine_is_in_force_or_an_error(monkeypatch):
    assert Accumulator(micro_batch_size=1, cpu=True, engine="single").engine.name == "single"
    monkeypatch.setattr(SingleEngine, "name", "another")
    with pytest.raises(EngineError, match="engine=single was asked for, but another is in force"):
        Accumulator(micro_batch_size=1, cpu=True, engine="single")


def test_every_engine_has_one_name_everywhere():
    asked_for = {name for kind in build.ENGINES for name in kind.asked_for_as}
    in_force = {SingleEngine.name, DDPEngine.name, FSDPEngine.name}
    assert asked_for == in_force | {kind.name for kind in STAGES.values()}
    assert {*config_engine.ENGINES, "zero0"} == asked_for
    assert set(config_engine.ENGINES) == set(footprint.ENGINE_NAMES)


def test_two_engines_are_refused(registered):
    with pytest.raises(ConfigError, match="made-up and fsdp2 are both asked for; choose one"):
        Accumulator(micro_batch_size=1, cpu=True, made_up=True, fsdp=True)


def test_an_engine_that_does_not_drive_what_runs_is_refused(registered, monkeypatch):
    monkeypatch.setattr(MadeUpEngine, "drives", classmethod(lambda *_: False))
    with pytest.raises(EngineError, match="made-up was asked for, but accelerate runs NO"):
        Accumulator(micro_batch_size=1, cpu=True, made_up=True)


def test_capabilities():
    engines = [SingleEngine, DDPEngine, FSDPEngine, *STAGES.values()]

    def those(capability):
        return {kind.name for kind in engines if getattr(kind, capability)}

    everything = {"single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"}
    assert those("runs_alone") == everything - {"fsdp2", "zero3"}
    assert those("can_compile") == everything - {"zero3"}
    assert those("can_change_trained") == {"single", "fsdp2"}
    assert those("shards_optimizer") == {"fsdp2", "zero1", "zero2", "zero3"}
    assert those("autocasts") == those("runs_plain_loops") == {"single", "ddp"}
    assert those("rounds_reduced_gradients") == {kind.name for kind in STAGES.values()}


@pytest.mark.parametrize(
    "capabilities, is_last, blocker",
    [
        ({}, True, ""),
        ({"runs_alone": False}, False, "gathers weights from all processes in every forward"),
        ({"equal_micro_batches": True}, False, "reduces each micro-batch on all processes"),
        ({"reduces_in_last_backward": True}, False, ""),
        ({"reduces_in_last_backward": True}, True, "it is the last of its window"),
    ],
)
def test_what_blocks_a_retry_follows_from_capabilities(capabilities, is_last, blocker):
    engine = Accumulator(micro_batch_size=1, cpu=True).engine
    engine.__class__ = type("Capable", (SingleEngine,), capabilities)
    found = engine.retry_blocker(is_last)
    assert blocker in found and bool(found) == bool(blocker)


def test_abstract_methods_are_what_an_engine_must_provide():
    assert Engine.__abstractmethods__ == {
        *("drives", "prepare", "microbatch", "backward", "finish"),
        *("discard_window_grads", "discard_local_grads"),
    }
    for kind in build.ENGINES:
        assert not kind.__abstractmethods__
    assert all(issubclass(kind, ZeroEngine) for kind in STAGES.values())


def test_nobody_compares_the_name_of_an_engine():
    """An engine in hand is asked for a capability. (Plans and launch files name engines that do
    not exist yet.)"""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                assert not [side for side in sides if side.endswith("engine.name")], path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert "engine.name.startswith" not in called, path
                if called == "isinstance":
                    assert not ast.unparse(node.args[-1]).endswith("Engine"), path


@pytest.mark.parametrize(
    "kind, processes, engine",
    [
        ("NO", 1, SingleEngine),
        ("MULTI_GPU", 1, SingleEngine),  # torchrun --nproc_per_node=1: accelerate wraps nothing
        ("MULTI_GPU", 2, DDPEngine),
        ("MULTI_CPU", 1, DDPEngine),  # wrapped
        ("MULTI_CPU", 2, DDPEngine),
    ],
)
def test_the_engine_is_that_of_what_accelerate_wraps(kind, processes, engine):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind], num_processes=processes, state=None
    )
    request = Request({}, {})
    assert [k for k in (DDPEngine, SingleEngine) if k.drives(accelerator, request)] == [engine]


@pytest.mark.parametrize(
    ("world_size", "size", "says"),
    [
        (6, 4, "shard_size=4 does not divide the 6 processes into equal groups"),
        (2, 4, "shard_size=4 does not divide the 2 processes"),
        (4, 1, "shard_size=1 gives every process the whole model; use engine=ddp"),
        (4, True, "shard_size=True does not divide"),
    ],
)
def test_groups_that_do_not_fit_are_refused(world_size, size, says):
    with pytest.raises(ConfigError, match=says):
        shard_mesh(0, world_size, size)


def test_the_launcher_may_ask_for_groups():
    asked = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    request = Request(accelerator_kwargs={"parallelism_config": asked})
    assert shard_size_of(request) == 4
    with pytest.raises(ConfigError, match="shard_size=2, but .* dp_shard_size=4; make them agree"):
        shard_size_of(Request({"shard_size": 2}, request.accelerator_kwargs))
    only_sharded = ParallelismConfig(dp_shard_size=4)
    assert shard_size_of(Request(accelerator_kwargs={"parallelism_config": only_sharded})) is None


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_processes_that_share_a_sample_are_refused(kind, monkeypatch):
    """Each would take its own samples, and accelerate would let it."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "2")
    with pytest.raises(EngineError, match=f"asks for {kind}_size=2: processes that share a sample"):
        refuse_shared_samples(parallelism_of(Request()))


@pytest.mark.parametrize("offload", [False, True])
def test_a_plugin_of_fsdp_says_whether_shards_are_offloaded(offload):
    """accelerate's plugin has a policy either way."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offload)
    assert offloads(Request({}, {"fsdp_plugin": plugin})) is offload


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "false", "0", "no"])
def test_a_launcher_says_it_in_the_words_that_accelerate_takes(monkeypatch, text):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", text)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", text)
    assert offloads(Request()) is bool(str_to_bool(text))


@pytest.mark.parametrize(
    ("size", "says"), [(2, "says zero_hpz_partition_size=2"), (1, ""), ("auto", ""), (None, "")]
)
def test_groups_with_second_copies_of_weights_decide_when_weights_are_gathered(size, says):
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}
    assert zero_config.weights_are_set(config).endswith(says)
    assert bool(zero_config.weights_are_set(config)) is bool(says)
