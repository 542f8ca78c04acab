"""The whole weights that a run's end writes: from memory or through files, the same model."""

from __future__ import annotations

import json

import pytest

from accum_trainer import AccumTrainerError, TrainConfig
from accum_trainer.train import gathered_weights, updates
from tests.grids import thinned


def train(folder, **options):
    list(updates(TrainConfig(cpu=True, steps=1, max_seq_len=32, output_dir=str(folder), **options)))
    return folder


@pytest.mark.parametrize(
    "options",
    thinned([{}, {"save_dtype": "bfloat16"}, {"use_peft": True}], [{"save_dtype": "bfloat16"}]),
)
def test_weights_that_went_through_files_are_the_same_model(tmp_path, monkeypatch, options):
    whole = train(tmp_path / "whole", **options)
    monkeypatch.setattr(gathered_weights, "_BUFFER_BYTES", 100_000)  # the embedding is 2 MB
    files = []
    save_file = gathered_weights.save_file
    monkeypatch.setattr(
        gathered_weights, "save_file", lambda *args: (files.append(args[1]), save_file(*args))
    )
    run = train(tmp_path / "run", **options)
    assert len(files) >= 2
    assert not files[0].parent.exists()
    [name] = [path.name for path in (whole / "model").glob("*.safetensors")]
    assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_weights_that_cannot_be_written_are_said_and_the_run_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(gathered_weights, "_BUFFER_BYTES", 100_000)
    run = tmp_path / "run"
    run.mkdir()
    config = TrainConfig(cpu=True, steps=1, max_seq_len=32, output_dir=str(run))
    training = updates(config)
    next(training)
    (run / ".gathered-weights").write_text("in the way")
    with pytest.raises(AccumTrainerError, match="not all of it could be saved: .*gathered-weights"):
        list(training)
    assert not (run / "model").exists() and not (run / "result.json").exists()
    saved = json.loads((run / "last-checkpoint.json").read_text())
    assert saved["checkpoint"].endswith("step-00000001")
    (run / ".gathered-weights").unlink()
    list(updates(config))  # nothing is left to train
    assert (run / "model" / "model.safetensors").exists()
