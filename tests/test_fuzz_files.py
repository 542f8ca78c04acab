"""Files of any content: rows, manifests, launch files, and what a merge reads. Each is read, or
refused with the error of its kind; no content brings another exception."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from accum_trainer.cli import cli
from accum_trainer.data.counting import count_rows
from accum_trainer.data.files import read_file, without_bad_lines
from accum_trainer.data.rows import NEEDED, TEXT_COLUMNS, spans_of
from accum_trainer.data.skipped import Skipped
from accum_trainer.errors import AccumTrainerError, CheckpointError, ConfigError, DataError
from accum_trainer.launch.launch_file import read_launch_file
from accum_trainer.runs.merge_inputs import find_merge_inputs
from accum_trainer.runs.saved_model import SavedModel
from accum_trainer.train.checkpoint import MANIFEST, digest_of, load_checkpoint
from accum_trainer.train.checkpoint_folder import find_checkpoint, list_checkpoints, newest_whole
from accum_trainer.train.records import read_records
from tests.made_runs import list_runs, make_run
from tests.test_checkpoint import save
from tests.test_fuzz import drawn, json_values, scalars, yaml_texts

BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


# --- rows ---

texts = st.text(max_size=12) | st.sampled_from(["a,b", 'a"b', "a\nb", "\ufeff", "\0", "NA", "007"])
columns = st.sampled_from(["text", "prompt", "completion", "messages", "id", "", "text "])
rows = st.lists(st.dictionaries(columns, texts | json_values, max_size=3), min_size=1, max_size=4)
pieces = st.lists(
    st.sampled_from(
        [
            *(b'{"text": "a"}', b'{"text": 1}', b"{}", b"[]", b"null", b'"a"', b"text,id", b"a,1"),
            *(b"\n", b"\r\n", b"\r", b"\0", BOM, b"\xff", b'"', b",", b"{", b"[", b":", b"text"),
            *(b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b"[" * 70, b"{" * 3000),
            *(b'{"text": NaN}', b'{"text": 1e999}', b"\xe2\x80\xa8", b"\xc2\x85", b"\x1a", b"\x0c"),
            *(b'{"a": ' * 70 + b"1" + b"}" * 70, b'{"text": ' + b"9" * 5000 + b"}", b"id,text,id"),
        ]
    )
    | st.binary(max_size=6),
    max_size=8,
).map(b"".join)


def as_csv(found):
    names = sorted({name for row in found for name in row})
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue().encode("utf-8", "surrogatepass")


files = (
    pieces
    | rows.map(lambda found: "\n".join(map(json.dumps, found)).encode())
    | rows.map(lambda found: json.dumps(found).encode())
    | rows.map(as_csv)
)


class TestRows:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
    def test_any_bytes_are_rows_or_refused_by_line(self, folder, suffix):
        path = folder / f"rows{suffix}"

        @drawn(60)
        @given(files)
        def check(content):
            path.write_bytes(content)
            try:
                found = read_file(path)
            except DataError as refused:
                said = str(refused)
                assert str(path) in said
                whole = ("has no rows", "is empty", "of several kinds", "the header", "as csv")
                assert " line " in said or " row " in said or any(w in said for w in whole), said
            else:
                assert 0 < len(found) == count_rows(path)
                if suffix == ".txt":
                    text = content.decode("utf-8-sig")
                    lines = [line for line in io.StringIO(text, newline=None) if line.strip()]
                    assert list(found["text"]) == [line.removesuffix("\n") for line in lines]

        check()

    @drawn(120)
    @given(st.sampled_from([".jsonl", ".txt"]), pieces)
    def test_what_is_left_of_any_bytes_can_be_read(self, folder, suffix, content):
        path = folder / f"left{suffix}"
        path.write_bytes(content)
        try:
            good = without_bad_lines(path, Skipped())
            read_file(good)
        except DataError as refused:
            assert "no line that can be read" in str(refused) or any(
                words in str(refused) for words in ("has no rows", "is empty", "of several kinds")
            ), refused

    @drawn(300)
    @given(
        st.dictionaries(st.sampled_from([*TEXT_COLUMNS, *NEEDED]), json_values, max_size=4)
        | st.fixed_dictionaries({"messages": st.lists(json_values | st.fixed_dictionaries(
            {"role": json_values | st.sampled_from(["user", "assistant"])},
            optional={"content": json_values}), max_size=3)})
        | st.fixed_dictionaries({"conversations": st.lists(json_values | st.fixed_dictionaries(
            {"from": json_values | st.sampled_from(["human", "gpt"]), "value": json_values}
        ), max_size=3)})
    )  # fmt: skip
    def test_any_row_is_spans_or_refused(self, row):
        def template(turns, tokenize, add_generation_prompt=False):
            text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
            return text + "<assistant>" * add_generation_prompt

        try:
            spans = spans_of(row, "rows.jsonl row 1", template)
        except DataError as refused:
            assert str(refused).startswith("rows.jsonl row 1")
        else:
            assert all(isinstance(text, str) and type(told) is bool for text, told in spans)


# --- checkpoints ---

some_json = json_values | st.sampled_from([[], {}, 0, -1, 1.5, "", None, True, 10**30])


class TestCheckpoints:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        run = tmp_path_factory.mktemp("run")
        for step in (1, 2):
            save(run / "checkpoints", step)
        return run

    def check(self, run, path):
        """`path`, the newest checkpoint, is read or refused; whatever is in it, the run has one."""
        try:
            load_checkpoint(path)
        except CheckpointError as refused:
            assert str(path) in str(refused)
            assert newest_whole(run / "checkpoints") in (path, path.with_name("step-00000001"))
        assert len(list_checkpoints(run / "checkpoints")) == 2
        assert find_checkpoint("auto", run) is not None

    @drawn(150)
    @given(st.binary() | json_values.map(json.dumps).map(str.encode))
    @example(b"[" * 100_000)
    @example(b'{"format": 3, "sequence": ' + b"9" * 5000 + b"}")
    def test_any_manifest(self, run, content):
        path = run / "checkpoints" / "step-00000002"
        good = (path / MANIFEST).read_bytes()
        try:
            (path / MANIFEST).write_bytes(content)
            self.check(run, path)
        finally:
            (path / MANIFEST).write_bytes(good)

    @drawn(250)
    @given(st.lists(st.tuples(st.integers(0, 6), some_json), min_size=1, max_size=3))
    def test_any_values_under_the_right_digest(self, run, changes):
        path = run / "checkpoints" / "step-00000002"
        good = (path / MANIFEST).read_bytes()
        manifest = json.loads(good)
        del manifest["sha256"]
        for place, value in changes:
            name = ["format", "sequence", "files"][min(place, 2)]
            if place > 2 and isinstance(manifest.get("files"), dict) and manifest["files"]:
                file = sorted(manifest["files"])[0 if place % 2 else -1]
                if place > 4 and isinstance(manifest["files"][file], dict):
                    manifest["files"][file]["size" if place % 2 else "sha256"] = value
                else:
                    manifest["files"][file] = value
            else:
                manifest[name] = value
        try:
            text = json.dumps(manifest | {"sha256": digest_of(manifest)})
            (path / MANIFEST).write_text(text)
            self.check(run, path)
        finally:
            (path / MANIFEST).write_bytes(good)

    @drawn(60)
    @given(st.binary(max_size=60) | json_values.map(json.dumps).map(str.encode))
    def test_any_note_of_the_last_one(self, run, content):
        (run / "last-checkpoint.json").write_bytes(content)
        assert find_checkpoint("auto", run) is not None

    @drawn(100)
    @given(pieces | st.lists(json_values.map(json.dumps)).map("\n".join).map(str.encode))
    def test_any_records(self, run, content):
        (run / "metrics.jsonl").write_bytes(content)
        assert all(isinstance(record, dict) for record in read_records(run / "metrics.jsonl"))


# --- launch files ---

keys = st.sampled_from(
    [
        *("distributed_type", "num_processes", "num_machines", "machine_rank", "use_cpu"),
        *("main_process_port", "deepspeed_config", "fsdp_config", "mixed_precision", "debug"),
        *("compute_environment", "main_process_ip", "parallel_independent", "cuda_ids", "lr"),
        *("rdzv_backend", "gpu_ids", "dynamo_config", "tpu_env", "same_network", "warp"),
    ]
)
kinds = st.sampled_from(["NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP", "TPU", "multi_gpu"])
values = json_values | kinds | st.integers(-3, 5)
launch_files = (
    st.dictionaries(keys, values, max_size=5).map(yaml.safe_dump)
    | st.dictionaries(keys, values, max_size=4).map(
        lambda more: yaml.safe_dump(
            {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"} | more
        )
    )
    | st.lists(st.tuples(keys, scalars), max_size=4).map(
        lambda found: (
            "distributed_type: MULTI_GPU\n" + "".join(f"{name}: {value}\n" for name, value in found)
        )
    )
    | yaml_texts
)


class TestLaunchFiles:
    @drawn(300)
    @given(launch_files)
    @example("distributed_type: MULTI_GPU\nnum_processes: two\n")
    @example("distributed_type: DEEPSPEED\ndeepspeed_config: [1]\n")
    def test_any_file_is_read_or_refused(self, folder, text):
        path = folder / "launch.yaml"
        path.write_text(text, encoding="utf-8", errors="replace")
        try:
            found = read_launch_file(path, cpu=True)
        except ConfigError as refused:
            assert str(path) in str(refused) and len(str(refused).splitlines()) == 1
        else:
            assert 1 <= found.processes_here <= (os.cpu_count() or 1)

    @drawn(150)
    @given(launch_files)
    def test_any_file_given_to_the_command(self, folder, text):
        """Where it is accepted, the run directory is refused, so that nothing starts."""
        (folder / "given.yaml").write_text(text, encoding="utf-8", errors="replace")
        (folder / "mine.txt").write_text("mine")
        arguments = ["launch", str(folder / "given.yaml"), "--", "--cpu", "--output-dir"]
        ran = CliRunner().invoke(cli, [*arguments, str(folder / "mine.txt")])
        assert isinstance(ran.exception, AccumTrainerError) or ran.exit_code == 2, (
            ran.exc_info,
            ran.output,
        )


# --- what a merge reads ---


class TestMerge:
    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory):
        place = list_runs(tmp_path_factory.mktemp("set"), "a", "b")
        for name in "ab":
            make_run(place / name)
            (place / name / "model").mkdir()
        return place

    def check(self, place):
        try:
            inputs, notes = find_merge_inputs([place])
        except (ConfigError, CheckpointError) as refused:
            assert len(str(refused)) > 10
        else:
            assert [one.folder.parent for one in inputs] == [place] * len(inputs)
            assert all(isinstance(note, str) for note in notes)

    @drawn(200)
    @given(
        st.binary(max_size=40)
        | json_values.map(json.dumps).map(str.encode)
        | st.fixed_dictionaries(
            {
                "runs": st.lists(
                    json_values
                    | st.fixed_dictionaries(
                        {"name": json_values | st.sampled_from(["a", "b", "..", "a/../b", "/"])},
                        optional={"settings": json_values},
                    ),
                    max_size=3,
                )
            }
        ).map(lambda index: json.dumps(index).encode())
    )
    def test_any_index_of_runs(self, made, content):
        path = made / "independent.json"
        good = path.read_bytes()
        try:
            path.write_bytes(content)
            self.check(made)
        finally:
            path.write_bytes(good)

    @drawn(250)
    @given(
        st.sampled_from(["plan.json", "result.json"]),
        st.dictionaries(
            st.sampled_from(
                ["initial_weights", "shard", "total_updates", "done", "num_samples", "updates"]
            ),
            some_json | st.sampled_from(["0/2", "1/0", "x"]),
        ),
        st.none() | st.binary(max_size=30),
    )
    def test_any_plan_and_result(self, made, name, values, content):
        path = made / "a" / name
        good = path.read_bytes()
        try:
            whole = json.dumps(json.loads(good) | values).encode()
            path.write_bytes(whole if content is None else content)
            self.check(made)
        finally:
            path.write_bytes(good)

    @drawn(200)
    @given(
        st.sampled_from(["model.safetensors.index.json", "adapter_config.json"]),
        st.binary(max_size=40)
        | json_values.map(json.dumps).map(str.encode)
        | st.dictionaries(texts, json_values | st.sampled_from(["m.safetensors", "../x", "a\0"]))
        .map(lambda found: {"weight_map": found})
        .map(json.dumps)
        .map(str.encode),
    )
    def test_any_index_of_weights(self, folder, name, content):
        place = folder / "weights"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        try:
            with pytest.raises(CheckpointError):  # there are no weights
                SavedModel(place, "a")
        finally:
            (place / name).unlink()
