"""A checkpoint folder under everything that can happen to its files: each fault is found, and what
was whole stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch

from accum_trainer.errors import CheckpointError
from accum_trainer.train import durable
from accum_trainer.train.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_manifest,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)


def checkpoint(value=1.0, **model):
    weights = {"w": torch.full((3,), value)} | model
    return Checkpoint(weights, {"state": {"w": {"m": torch.zeros(3)}}}, [{}], {"at": value})


def save(folder, step, value=1.0, keep=2):
    return save_checkpoint(folder, step, checkpoint(value), keep)


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_saved_is_loaded(tmp_path):
    found = load_checkpoint(save(tmp_path, 3, 7.0))
    assert torch.equal(found.model["w"], torch.full((3,), 7.0))
    assert found.state == {"at": 7.0} and found.rng == [{}]
    assert torch.equal(found.optimizer["state"]["w"]["m"], torch.zeros(3))


def test_the_newest_is_the_one_written_last_not_the_highest_step(tmp_path):
    """A run that went back from step 9 to step 3 writes steps 4 and 5; these are kept."""
    for step in (3, 9):
        save(tmp_path, step)
    save(tmp_path, 4, value=4.0, keep=3)
    assert names(tmp_path)[-1] == "step-00000004"
    assert newest_whole(tmp_path).name == "step-00000004"
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_the_same_step_saved_again_is_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, value=5.0, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000002"]
    assert load_checkpoint(newest_whole(tmp_path)).state == {"at": 5.0}


def test_what_is_not_ours_is_neither_read_nor_deleted(tmp_path):
    users = [tmp_path / "step-00000001-good", tmp_path / "step-x.tar", tmp_path / "step-7"]
    users[0].mkdir()
    users[1].write_text("")
    users[2].mkdir()
    for step in range(1, 5):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000004"]
    assert all(path.exists() for path in users)


class Killed(BaseException):
    pass


def dies_at(number, monkeypatch):
    """Stop at the n-th thing that is brought to disk, as a killed process stops."""
    calls, real = [], durable.sync

    def sync(path):
        calls.append(path)
        if len(calls) == number:
            raise Killed
        real(path)

    monkeypatch.setattr(durable, "sync", sync)


@pytest.mark.parametrize("number", range(1, 8))
def test_killed_while_the_same_step_is_saved_again(tmp_path, monkeypatch, number):
    """Four files, the manifest, the folder; then the parent, when it is in place."""
    save(tmp_path, 1, value=1.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(number, patch)
        save(tmp_path, 1, value=2.0)
    assert load_checkpoint(newest_whole(tmp_path)).state == {"at": 2.0 if number == 7 else 1.0}
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    left = {path.name for path in tmp_path.iterdir()} - {*names(tmp_path)}
    assert not left


def test_killed_between_the_two_renames(tmp_path):
    """The old content lies aside and the new one is not there yet: the old one comes back."""
    step = save(tmp_path, 1, value=1.0)
    step.rename(tmp_path / ".replaced-step-00000001")
    durable.finish_replacing_in(tmp_path)
    assert load_checkpoint(step).state == {"at": 1.0}
    shutil.copytree(step, tmp_path / ".replaced-step-00000001")  # killed after the second rename
    durable.finish_replacing_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path):
    save(tmp_path, 1)
    # 40 TB that take no memory.
    large = checkpoint(large=torch.empty(10**13, device="meta"))
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(tmp_path, 2, large, keep=1)
    assert "it takes 4.08e+04 GB, and" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def is_refused(path):
    try:
        check_manifest(path)
    except CheckpointError:
        return True
    return False


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(tmp_path):
    path = save(tmp_path, 1)
    before = json.loads((path / MANIFEST).read_text())
    found = 0
    for file in sorted(path.iterdir()):
        data = bytearray(file.read_bytes())
        for bit in range(0, 8 * len(data), 1 if file.name == MANIFEST else 1 + len(data) // 50):
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            if is_refused(path):
                found += 1
            else:  # only spelled differently
                assert file.name == MANIFEST and json.loads(file.read_text()) == before
            data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    assert found > 4000


def test_every_truncation_is_found(tmp_path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 1, *range(0, len(data), 97)}:
            if file.name == MANIFEST and not data[length:].strip():
                continue
            file.write_bytes(data[:length])
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
        file.write_bytes(data)
    load_checkpoint(path)


def with_manifest(path, change):
    """Change a manifest and give it the digest that belongs to it, as one could who means harm."""
    from accum_trainer.train import checkpoint as module

    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    digest = module._digest_of(manifest)  # noqa: SLF001 - anyone can compute a SHA-256
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files={}),
        lambda m: m["files"].pop("rng.pt"),
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop("rng.pt")}),
        lambda m: m["files"].update({"../rng.pt": m["files"]["rng.pt"]}),
        lambda m: m.update(files=[1]),
        lambda m: m.update(files=None),
        lambda m: m["files"].update({"rng.pt": 5}),
        lambda m: m["files"].update({"rng.pt": {"size": "a", "sha256": 3}}),
        lambda m: m.pop("sequence"),
        lambda m: m.update(sequence="1"),
        lambda m: m.update(format=1),
        lambda m: m.update(format=[]),
    ],
)
def test_a_manifest_that_lists_something_else_is_refused(tmp_path, change):
    path = save(tmp_path, 1)
    with_manifest(path, change)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert newest_whole(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"files": {}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_pickle_with_the_right_digest_is_refused_and_runs_nothing(tmp_path):
    path = save(tmp_path, 1)
    pickle = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "broken") + b"'\ntR."
    (path / "optimizer.pt").write_bytes(pickle)
    entry = {"size": len(pickle), "sha256": hashlib.sha256(pickle).hexdigest()}
    with_manifest(path, lambda m: m["files"].update({"optimizer.pt": entry}))
    check_manifest(path)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert "was not written by accum_trainer" in str(refused.value)
    assert not (tmp_path / "broken").exists()


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    path = save(tmp_path, 1)
    (path / "rng.pt").unlink()
    (path / "rng.pt").mkdir()
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_auto_knows_a_run_whose_checkpoints_are_gone(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None  # nothing was saved yet
    (tmp_path / "last-checkpoint.json").write_text('{"checkpoint": "checkpoints/step-00000003"}')
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint("auto", tmp_path)
    assert "was saved (checkpoints/step-00000003), and none of its checkpoints is whole" in str(
        refused.value
    )
    assert find_checkpoint("anew", tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoint": 3}', "\x00"])
def test_a_damaged_note_of_the_last_checkpoint_still_says_that_there_was_one(tmp_path, text):
    (tmp_path / "last-checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError):
        find_checkpoint("auto", tmp_path)
    save(tmp_path / "checkpoints", 1)
    assert find_checkpoint("auto", tmp_path).name == "step-00000001"


def test_a_newest_checkpoint_that_is_gone_is_told(tmp_path, caplog):
    (tmp_path / "last-checkpoint.json").write_text('{"checkpoint": "checkpoints/step-00000003"}')
    save(tmp_path / "checkpoints", 2)
    assert find_checkpoint("auto", tmp_path).name == "step-00000002"
    assert "step-00000003 is gone; continuing from" in caplog.text
