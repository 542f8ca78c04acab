"""A checkpoint folder under everything that can happen to its files: each fault is found, and what
was whole stays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accum_trainer.engine.own_parts import Part, WholeTensors
from accum_trainer.engine.ranks import Ranks
from accum_trainer.errors import AccumTrainerError, CheckpointError
from accum_trainer.train import durable
from accum_trainer.train.checkpoint import (
    MANIFEST,
    Snapshot,
    check_manifest,
    digest_of,
    load_checkpoint,
)
from accum_trainer.train.checkpoint_folder import find_checkpoint, list_checkpoints, newest_whole
from accum_trainer.train.checkpoint_writer import CheckpointWriter
from tests.launching import forked

PART = "part-00000-of-00001.safetensors"


def snapshot(value=1.0, *more):
    parts = [
        Part("model/w", (3,), 0, torch.full((3,), value)),
        Part("optimizer/w/m", (3,), 0, torch.zeros(3)),
        Part("optimizer/w/step", (), 0, torch.ones(1)),
        *more,
    ]
    rng = {"python": [3, [1, 2], None], "torch": torch.arange(4, dtype=torch.uint8)}
    return Snapshot(parts, rng, {"at": value, "optimizer_groups": [{"betas": (0.9, 0.99)}]})


def writer(run, keep, **options):
    ranks = Ranks()
    ranks.accelerator = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
    return CheckpointWriter(ranks, run, keep, **options)


def save(folder, step, value=1.0, keep=2):
    """Write a checkpoint of the run whose checkpoints are in `folder`."""
    saving = writer(folder.parent, keep)
    saving.save(step, snapshot(value))
    failure = saving.wait()
    assert not failure, failure
    return folder / f"step-{step:08d}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_saved_is_loaded(folder):
    found = load_checkpoint(save(folder, 3, 7.0))
    assert torch.equal(found.model["w"], torch.full((3,), 7.0))
    assert found.state["at"] == 7.0
    assert torch.equal(found.optimizer["state"]["w"]["m"], torch.zeros(3))
    assert torch.equal(found.optimizer["state"]["w"]["step"], torch.tensor(1.0))
    assert found.optimizer["groups"] == [{"betas": (0.9, 0.99)}]
    (rng,) = found.rng
    assert rng["python"] == [3, [1, 2], None]
    assert torch.equal(rng["torch"], torch.arange(4, dtype=torch.uint8))
    assert json.loads((folder.parent / "last-checkpoint.json").read_text()) == {
        "checkpoint": "checkpoints/step-00000003"
    }


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool),
        *(torch.complex64, torch.uint16, torch.uint64, torch.float8_e5m2),
    ],
)
def test_every_dtype_comes_back_to_the_bit(tmp_path, dtype):
    values = (torch.arange(1_000_003) % 7 - 3).to(torch.float32).to(dtype)
    saving = writer(tmp_path, 1)
    saving.save(1, snapshot(1.0, Part("model/v", values.shape, 0, values)))
    assert not saving.wait()
    found = load_checkpoint(tmp_path / "checkpoints" / "step-00000001").model["v"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


def held():
    """Bytes in memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_one_tensor_at_a_time_is_in_memory(folder):
    """Of 32 of 4 MB each, in whatever order they are read."""
    size = 1_000_000
    many = [Part(f"model/{i:02}", (size,), 0, torch.full((size,), float(i))) for i in range(32)]
    saving = writer(folder.parent, 1)
    saving.save(1, snapshot(1.0, *many))
    assert not saving.wait()
    del many
    before = most = held()
    found = load_checkpoint(folder / "step-00000001").model
    for name in [*found, *reversed([*found])]:
        tensor = found[name]
        most = max(most, held())
        assert name == "w" or tensor.eq(float(name)).all()
    assert len(found) == 33 and most - before < 16_000_000


def part(begin, count, shape=(2, 3)):
    return Part("model/w", shape, begin, torch.arange(begin, begin + count, dtype=torch.float32))


def test_parts_in_any_order_are_the_tensor():
    found = WholeTensors([part(4, 2), part(0, 1), part(1, 3)])["model/w"]
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "parts",
    [
        [part(0, 3)],
        [part(1, 5)],
        [part(0, 3), part(4, 2)],
        [part(0, 4), part(3, 3)],
        [part(0, 6), part(0, 6)],
        [part(0, 7)],
        [part(0, 3), part(3, 3, (3, 2))],
        [part(-1, 7)],
    ],
)
def test_parts_that_are_not_the_tensor_are_refused(parts):
    with pytest.raises(ValueError, match="model/w"):
        WholeTensors(parts)


def test_the_newest_is_the_one_written_last_not_the_highest_step(folder):
    """A run that went back from step 9 to step 3 writes steps 4 and 5; these are kept."""
    for step in (3, 9):
        save(folder, step)
    save(folder, 4, value=4.0, keep=3)
    assert names(folder)[-1] == "step-00000004"
    assert newest_whole(folder).name == "step-00000004"
    save(folder, 5, keep=2)
    assert names(folder) == ["step-00000004", "step-00000005"]


def test_the_same_step_saved_again_is_the_newest(folder):
    for step in (1, 2, 3):
        save(folder, step, keep=3)
    save(folder, 2, value=5.0, keep=2)
    assert names(folder) == ["step-00000003", "step-00000002"]
    assert load_checkpoint(newest_whole(folder)).state["at"] == 5.0


def test_what_is_not_ours_is_neither_read_nor_deleted(folder):
    users = [folder / "step-00000001-good", folder / "step-x.tar", folder / "step-7"]
    users[0].mkdir(parents=True)
    users[1].write_text("")
    users[2].mkdir()
    for step in range(1, 5):
        save(folder, step, keep=1)
    assert names(folder) == ["step-00000004"]
    assert all(path.exists() for path in users)


class Killed(BaseException):
    pass


def dies_at(number, monkeypatch):
    """Stop at the n-th sync, as a killed process does; return the list of syncs."""
    calls, real = [], durable.sync

    def sync(path):
        calls.append(path)
        if len(calls) >= number:
            raise Killed
        real(path)

    monkeypatch.setattr(durable, "sync", sync)
    # The thread's end is what is wanted; pytest would warn of it.
    monkeypatch.setattr(threading, "excepthook", lambda died: None)
    return calls


@pytest.mark.parametrize("number", range(1, 8))
def test_killed_while_the_same_step_is_saved_again(folder, monkeypatch, number):
    """The part; the part, the state, the manifest and the folder; then the parent, when it is in
    place; then the note of it."""
    save(folder, 1, value=1.0)
    with monkeypatch.context() as patch:
        synced = dies_at(number, patch)
        save(folder, 1, value=2.0)
    assert len(synced) == number  # it got there, and no further
    expected = 2.0 if number >= 6 else 1.0
    assert load_checkpoint(newest_whole(folder)).state["at"] == expected
    save(folder, 2)
    assert names(folder) == ["step-00000001", "step-00000002"]
    left = {path.name for path in folder.iterdir()} - {*names(folder)}
    assert not left


def test_killed_between_the_two_renames(folder):
    """The old content lies aside and the new one is not there yet: the old one comes back."""
    step = save(folder, 1, value=1.0)
    step.rename(folder / ".replaced-step-00000001")
    durable.finish_replacing_in(folder)
    assert load_checkpoint(step).state["at"] == 1.0
    shutil.copytree(step, folder / ".replaced-step-00000001")  # killed after the second rename
    durable.finish_replacing_in(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_too_little_space_is_found_before_anything_is_written(folder, caplog):
    save(folder, 1)
    # 40 TB that take no memory.
    large = Part("model/large", (10**13,), 0, torch.empty(10**13, device="meta"))
    saving = writer(folder.parent, 1)
    saving.save(2, snapshot(1.0, large))
    said = saving.wait()
    assert "step-00000002 could not be written: it takes 4.08e+04 GB, and" in said
    assert f"{said}; training goes on, and it is tried again" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_what_cannot_be_written_leaves_the_one_before(folder, caplog):
    save(folder, 1)
    unknown = Part("model/z", (2,), 0, torch.zeros(2, dtype=torch.complex128))
    saving = writer(folder.parent, 1)
    saving.save(2, snapshot(1.0, unknown), is_last=True)
    assert "step-00000002 could not be written: model/z is torch.complex128, which" in saving.wait()
    assert not caplog.text  # whoever asks is told
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    saving.save(2, snapshot())
    assert saving.wait() == "" and names(folder) == ["step-00000002"]


def test_a_run_that_was_taken_over_writes_no_checkpoint(folder):
    def taken_over():
        raise AccumTrainerError("taken over")

    saving = writer(folder.parent, 1, before_write=taken_over)
    with pytest.raises(AccumTrainerError, match="taken over"):
        saving.save(1, snapshot())
    assert not folder.exists()


def is_refused(path):
    try:
        check_manifest(path)
    except CheckpointError:
        return True
    return False


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(folder):
    path = save(folder, 1)
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
    assert found > 3500


def test_every_truncation_is_found(folder):
    path = save(folder, 1)
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
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files={}),
        lambda m: m["files"].pop(PART),
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop(PART)}),
        lambda m: m["files"].update({f"../{PART}": m["files"][PART]}),
        lambda m: m["files"].update({"part-00001-of-00002.safetensors": m["files"].pop(PART)}),
        lambda m: m["files"].update({"part-00000-of-99999.safetensors": m["files"].pop(PART)}),
        lambda m: m.update(files=[1]),
        lambda m: m.update(files=None),
        lambda m: m["files"].update({PART: 5}),
        lambda m: m["files"].update({PART: {"size": "a", "sha256": 3}}),
        lambda m: m.pop("sequence"),
        lambda m: m.update(sequence="1"),
        lambda m: m.update(format=1),
        lambda m: m.update(format=[]),
    ],
)
def test_a_manifest_that_lists_something_else_is_refused(folder, change):
    path = save(folder, 1)
    with_manifest(path, change)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert newest_whole(folder) is None


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"files": {}}'])
def test_a_manifest_that_is_none_is_refused(folder, text):
    path = save(folder, 1)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_pickle_with_the_right_digest_is_refused_and_runs_nothing(tmp_path, folder):
    path = save(folder, 1)
    pickle = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "broken") + b"'\ntR."
    (path / PART).write_bytes(pickle)
    entry = {"size": len(pickle), "sha256": hashlib.sha256(pickle).hexdigest()}
    with_manifest(path, lambda m: m["files"].update({PART: entry}))
    check_manifest(path)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert "was not written by accum_trainer" in str(refused.value)
    assert not (tmp_path / "broken").exists()


def test_a_folder_in_place_of_a_file_is_refused(folder):
    path = save(folder, 1)
    (path / PART).unlink()
    (path / PART).mkdir()
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
    save(tmp_path / "checkpoints", 2)
    (tmp_path / "last-checkpoint.json").write_text('{"checkpoint": "checkpoints/step-00000003"}')
    assert find_checkpoint("auto", tmp_path).name == "step-00000002"
    assert "step-00000003 is gone; continuing from" in caplog.text


def test_a_link_in_place_of_a_folder_is_replaced_and_what_it_names_stays(tmp_path):
    elsewhere, target, partial = (tmp_path / name for name in ("elsewhere", "model", "partial"))
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("")
    target.symlink_to(elsewhere)
    partial.mkdir()
    (partial / "new").write_text("")
    durable.put_in_place(partial, target)
    assert (target / "new").exists() and not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]
    assert (elsewhere / "mine").exists()


QUOTA = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from accum_trainer.engine.own_parts import Part
from accum_trainer.engine.ranks import Ranks
from accum_trainer.train import checkpoint_writer
from accum_trainer.train.checkpoint import Snapshot

ranks = Ranks()
ranks.accelerator = Accelerator(cpu=True)
checkpoint_writer._check_space = lambda *_: None  # free space does not show a quota
saving = checkpoint_writer.CheckpointWriter(ranks, Path(sys.argv[1]), 2)
for step, size in enumerate((1 << 20, 1), start=1):
    count = size if ranks.rank else 1
    saving.save(step, Snapshot([Part(f"model/{ranks.rank}", (count,), 0, torch.ones(count))], {},
                               {"optimizer_groups": []}), is_last=True)
    failure = saving.wait()
    ranks.barrier()
    if ranks.is_main:
        print(failure or "written", flush=True)
"""


def test_a_process_that_has_no_room_for_its_part_is_not_waited_for(tmp_path):
    """Its part filled the disk, so there was no room to say so, either."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        done = forked(2, "-c", QUOTA, tmp_path, launcher=True, timeout=60)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "could not be written: process 1: " in first and "No space left" in first
    assert second == "written"


@pytest.mark.usefixtures("fresh_accelerate")
def test_one_copy_of_the_trained_state_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """On a disk that is slower than training, the next copy waits for the last one."""
    from accum_trainer import TrainConfig
    from accum_trainer.train import checkpoint_writer, loop, updates

    being_written, copied = threading.Event(), []
    write_part, capture = checkpoint_writer.write_part, loop.capture

    def slowly(*arguments):
        being_written.set()
        time.sleep(0.3)
        found = write_part(*arguments)
        being_written.clear()
        return found

    def copy(*arguments):
        copied.append(being_written.is_set())
        return capture(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_part", slowly)
    monkeypatch.setattr(loop, "capture", copy)
    sizes = {"batch_size": 1, "max_seq_len": 16, "steps": 3, "checkpoint_every": 1}
    list(updates(TrainConfig(cpu=True, output_dir=str(tmp_path / "run"), **sizes)))
    assert len(copied) >= 3 and not any(copied)
