"""Options that are two names of one choice, and defaults that are written and read back."""

from __future__ import annotations

import pytest

from accum_trainer import TrainConfig
from accum_trainer.config import compose
from accum_trainer.errors import ConfigError


@pytest.mark.parametrize("written", ["2", 2, "zero2"])
def test_a_zero_stage_may_be_written_as_in_python(written):
    assert TrainConfig(zero_stage=written).zero_stage == "zero2"


def test_the_engine_and_the_zero_stage_are_one_choice(tmp_path):
    assert TrainConfig(zero_stage=3).engine == TrainConfig(engine="zero3").zero_stage == "zero3"
    assert TrainConfig(engine="fsdp2").zero_stage == "none"
    # A written configuration has both; either of them alone replaces them.
    written = tmp_path / "config.yaml"
    written.write_text(TrainConfig(engine="zero2").to_yaml())
    for given, expected in (
        ({}, ("zero2", "zero2")),
        ({"engine": "ddp"}, ("ddp", "none")),
        ({"engine": "zero1"}, ("zero1", "zero1")),
        ({"zero_stage": "none"}, (None, "none")),
        ({"zero_stage": "3"}, ("zero3", "zero3")),
    ):
        config = compose(given, config_file=written).config
        assert (config.engine, config.zero_stage) == expected
    assert TrainConfig(engine="zero2").varied(["engine=single"]).zero_stage == "none"


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="zero_stage=4 is not known; give one of none, zero1"):
        TrainConfig(zero_stage="4")


def test_options_at_their_defaults_are_silent(tmp_path):
    """A written configuration holds all of them, and is read back; what shapes adapters goes with
    them."""
    for config in (
        TrainConfig(),
        TrainConfig(use_peft=True, lora_r=8, lora_dropout=0.1, merge_adapter=True),
    ):
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config
    plain = config.without_peft()
    shaping = (plain.use_peft, plain.lora_r, plain.lora_dropout, plain.merge_adapter)
    assert shaping == (False, 16, 0.0, False)
