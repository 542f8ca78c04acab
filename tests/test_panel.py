"""The panel's parts that need no page: what a form means, its command line, the state that is kept,
curves, and what a run directory says."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accum_trainer.cli.train import parse
from accum_trainer.config import OPTIONS, TrainConfig
from accum_trainer.config.engine import ENGINES
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.launch.process import start_of
from accum_trainer.launch.quoting import words
from accum_trainer.panel.commands import Command
from accum_trainer.panel.curves import RecordReader, points, smoothed
from accum_trainer.panel.form import (
    ACCUMULATION_STEPS,
    ENGINE,
    FIELDS,
    OWN,
    PROCESSES,
    RUN_NAME,
    Form,
    k_help,
    other_fields,
)
from accum_trainer.panel.preview import preview
from accum_trainer.panel.processes import (
    LOG,
    Start,
    changed,
    how_to_continue,
    note_of,
    read_start,
    start,
    start_again,
    stop_now,
)
from accum_trainer.panel.row_counts import RowCounts
from accum_trainer.panel.run_view import RunView, find_groups, find_runs, sendable
from accum_trainer.panel.terminal import as_printed
from accum_trainer.train.run_lock import RunLock, owner_of
from tests.made_runs import list_runs, make_run, write_sums


@pytest.fixture(autouse=True, scope="module")
def notes_of_these_tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path_factory.mktemp("cache") / "new"))
        yield


@pytest.fixture(autouse=True)
def no_options_in_the_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ACCUM_TRAINER_") and name != "ACCUM_TRAINER_CACHE":
            monkeypatch.delenv(name)


def shown(tmp_path, **values):
    rows = write_sums(tmp_path / "rows.jsonl", 70)
    typed = Form(tmp_path / "state.json").values | {"dataset_file": str(rows)} | values
    return preview(typed, tmp_path, RowCounts(lambda: None))


class TestTheBatch:
    @pytest.mark.parametrize(
        ("sizes", "effective"), [((8, 4, 1), 32), ((16, 4, 1), 64), ((8, 4, 2), 64), ((1, 1, 1), 1)]
    )
    def test_r32_is_the_product(self, tmp_path, sizes, effective):
        batch, steps, processes = map(str, sizes)
        found = shown(
            tmp_path, batch_size=batch, gradient_accumulation_steps=steps, cpu=True,
            **{PROCESSES: processes},
        )  # fmt: skip
        assert found.effective == effective and not found.error

    def test_it_is_shown_though_something_else_is_wrong(self, tmp_path):
        found = shown(tmp_path, batch_size="8", gradient_accumulation_steps="4", lr="none of it")
        assert found.effective == 32 and found.at == "lr" and found.command is None

    def test_r31_every_choice_has_a_tooltip(self):
        assert ACCUMULATION_STEPS == (1, 2, 4, 8, 16, 32)
        assert len({k_help(steps) for steps in ACCUMULATION_STEPS}) == 6
        assert all(field.help for field in FIELDS.values())


class TestTheCommand:
    def test_r2_k_is_named_only_above_1(self, tmp_path):
        one = shown(tmp_path, gradient_accumulation_steps="1").command
        two = shown(tmp_path, gradient_accumulation_steps="2").command
        assert "--gradient-accumulation-steps" not in one.words
        assert "gradient_accumulation_steps" not in one.yaml
        at = two.words.index("--gradient-accumulation-steps")
        assert two.words[at + 1] == "2"

    def test_defaults_are_not_named(self, tmp_path):
        found = shown(tmp_path).command
        assert found.words[:3] == ["accum-trainer", "train", "--dataset-file"]
        assert found.words[4] == "--output-dir" and len(found.words) == 6

    def test_what_the_environment_sets_is_a_default(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCUM_TRAINER_SEED", "7")
        words = shown(tmp_path, seed="0").command.words
        assert words[words.index("--seed") + 1] == "0"
        assert "--seed" not in shown(tmp_path, seed="7").command.words

    def test_any_value_is_the_same_in_bash(self):
        """Also in a locale that is not UTF-8, and of a path whose bytes are no text."""
        given = ["a 'b' \"c\" $x `y` !z", "two\nlines\t", "no\u200bspace\n", "ä\x7f0a", "-x \\n"]
        given += [os.fsdecode(b"path \xff\xe4"), "", "\U0001f600\x01"]
        command = f"printf '%s\\0' {words(given)}"
        for locale in ("C", "C.UTF-8"):
            printed = subprocess.run(
                ["bash", "-c", command], env={"LC_ALL": locale}, stdout=subprocess.PIPE
            )
            assert printed.stdout == b"".join(os.fsencode(text) + b"\0" for text in given)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_it_composes_to_what_the_form_composes_to(self, tmp_path_factory, data):
        """Any values of any fields: the words, read by the shell and by `train`, and the YAML give
        the configuration that was shown."""
        tmp_path = tmp_path_factory.mktemp("form")
        values = {
            name: data.draw(_value(name), name)
            for name in data.draw(st.sets(st.sampled_from(_DRAWN), max_size=6), "names")
        }
        found = shown(tmp_path, **values)
        if found.command is None:
            assert found.error
            return
        words = shlex.split(found.command.lines[-1])
        assert words == found.command.words
        arguments = words[4:] if found.command.launch else words[2:]
        again = parse(arguments).config
        decided = {"output_dir"}
        if found.command.launch:
            decided |= {"mixed_precision", "engine", "zero_stage", "cpu_offload"}
        for name in set(OPTIONS) - decided:
            assert getattr(again, name) == getattr(found.config, name), name
        spec = found.command.launch and found.command.launch[0]
        assert (spec.precision if spec else again.mixed_precision or "no") == (
            found.config.mixed_precision or "no"
        )
        of_file = TrainConfig(**(yaml.safe_load(found.command.yaml) or {}))
        for name in set(OPTIONS) - decided - {"trust_remote_code"}:
            assert getattr(of_file, name) == getattr(found.config, name), name


_DRAWN = sorted(set(FIELDS) - {"dataset", "dataset_file", "model", RUN_NAME, "chat_template"})


def _value(name):
    field = FIELDS[name]
    if field.kind == "switch":
        return st.booleans()
    if field.choices:
        return st.sampled_from(sorted(field.choices))
    if field.kind == "number":
        return st.sampled_from(["1", "2", "3", "0.5", "1e-3", "8", "", " 4 ", "-1", "x", "0.1"])
    return st.sampled_from(["", "a", "5%", "it's $HOME", "-x", "0", "q_proj,v_proj", "ä b"])


class TestIndependentRuns:
    def test_are_planned_as_one_of_them(self, tmp_path):
        runs = dict(parallel_independent=True, cpu=True, batch_size="4")
        found = shown(tmp_path, **runs, cuda_ids="0,1,2")
        assert dict(found.figures)["Runs"] == "3, each on its share of the rows"
        assert dict(found.figures)["Updates per epoch"] == "6, all whole"  # 24 of 70 rows
        found = shown(tmp_path, **runs, cuda_ids="0", vary="lr=1e-3,2e-3; seed=0,1")
        assert dict(found.figures)["Runs"] == "4, which differ in lr, seed"
        assert dict(found.figures)["Updates per epoch"].startswith("18, ")
        words = found.command.words
        assert words[words.index("--vary") + 1] == "lr=1e-3,2e-3; seed=0,1"
        found = shown(tmp_path, parallel_independent=True)  # on as many GPUs as there are
        assert dict(found.figures)["Runs"].startswith("one on each GPU")
        assert "Updates per epoch" not in dict(found.figures)

    @pytest.mark.parametrize(
        ("values", "at", "said"),
        [
            ({}, "cuda_ids", "parallel_independent on a CPU needs cuda_ids"),
            ({"cuda_ids": "0,0"}, "cuda_ids", "cuda_ids=0,0 names a device twice"),
            ({"cuda_ids": "0", "vary": "shard=0/2,1/2"}, "vary", "shard cannot differ"),
            ({"cuda_ids": "0", "vary": "lr=1e-3,fast"}, "lr", "lr='fast' is not a number"),
            ({"cuda_ids": "0,1", PROCESSES: "2"}, PROCESSES, "processes=2 share a gradient"),
            ({"cuda_ids": "0,1", ENGINE: "fsdp2"}, ENGINE, "engine=fsdp2 shares a gradient"),
        ],
    )
    def test_that_cannot_be_are_said_at_their_field(self, tmp_path, values, at, said):
        found = shown(tmp_path, parallel_independent=True, cpu=True, **values)
        assert found.at == at and said in found.error

    def test_of_a_hidden_part_are_not_asked_for(self, tmp_path):
        found = shown(tmp_path, cuda_ids="0,1", vary="lr=1e-3,2e-3", lora_r="4")
        assert not {"--cuda-ids", "--vary", "--lora-r"} & set(found.command.words)

    def test_are_one_run_to_a_proof(self, tmp_path):
        found = shown(tmp_path, parallel_independent=True, cpu=True, cuda_ids="0,1", lr="1e-3")
        words = ["accum-trainer", "verify", "--dataset-file", str(tmp_path / "rows.jsonl"), "--cpu"]
        assert sorted(found.proof) == sorted(
            [*words, "--lr", "0.001", "--json", str(tmp_path / ".verify.json")]
        )

    def test_are_not_taken_for_one_run(self, tmp_path):
        list_runs(tmp_path / "held", "part-0")
        again = shown(
            tmp_path, parallel_independent=True, cpu=True, cuda_ids="0", **{RUN_NAME: "held"}
        )
        assert again.continues and "holds runs already" in again.warnings[0]
        found = shown(tmp_path, **{RUN_NAME: "held"})
        assert found.at == RUN_NAME and "holds independent runs, not a single run" in found.error


class TestTheState:
    def test_r33_is_written_and_read(self, tmp_path):
        form = Form(tmp_path / "runs" / ".panel.json")
        heard = []
        form.on_change(heard.append)
        form.set("batch_size", "8")
        form.set("batch_size", "8")
        form.set("use_peft", True)
        assert heard == ["batch_size", "use_peft"]
        again = Form(tmp_path / "runs" / ".panel.json")
        assert again.values == form.values and again.values["batch_size"] == "8"
        form.set_view("smoothing", 0.9)
        again = Form(tmp_path / "runs" / ".panel.json")
        assert again.values == form.values and again.view["smoothing"] == 0.9

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"values": 3}', '{"values": {"lr": 3}, "view": []}', "[" * 9999]
    )
    def test_a_damaged_file_is_as_none(self, tmp_path, text):
        (tmp_path / "state.json").write_text(text)
        assert Form(tmp_path / "state.json").values == Form(tmp_path / "none.json").values

    def test_what_this_version_does_not_know_is_left_out(self, tmp_path):
        values = {"lr": "1e-2", "gone": "1", "cpu": "yes", ENGINE: "magic"}
        (tmp_path / "state.json").write_text(json.dumps({"values": values, "view": {"a": 1}}))
        form = Form(tmp_path / "state.json")
        assert form.values["lr"] == "1e-2" and "gone" not in form.values
        assert form.values["cpu"] is False and form.values[ENGINE] == "ddp"

    def test_the_panels_own_controls_have_names_that_no_option_can_have(self):
        assert set(OWN) <= set(FIELDS)
        assert not any(name.isidentifier() for name in OWN)
        assert all(name.isidentifier() for name in OPTIONS)

    def test_every_engine_can_be_chosen(self):
        assert {*FIELDS[ENGINE].choices, "single"} == set(ENGINES)

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            (PROCESSES, "0", "processes=0 is below 1"),
            (RUN_NAME, "../out", "run_name=../out is no name of a run"),
            (ENGINE, "zero2", "engine=zero2 shards over processes"),
        ],
    )
    def test_a_message_is_shown_at_the_control_that_it_is_about(self, tmp_path, name, value, said):
        found = shown(tmp_path, **{name: value})
        assert found.at == name and found.error.startswith(said)

    def test_every_option_is_on_the_page_or_decided_by_it(self):
        folded = {field.name for fields in other_fields().values() for field in fields}
        left_out = set(OPTIONS) - set(FIELDS)
        assert {"zero_stage", "steps", "epochs", "output_dir", "dry_run"} <= left_out
        assert {"weight_decay", "seed", "eval_every", "layout"} <= folded
        assert "lr" not in folded and len(left_out) < 20


class TestCurves:
    def test_records_are_read_as_they_come(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        reader = RecordReader(path)
        assert not reader.read()
        lines = [json.dumps({"step": n, "loss": 1 / n, "mfu": 0.5}) + "\n" for n in range(1, 6)]
        path.write_text("".join(lines[:2]) + lines[2][:9])
        assert reader.read() and len(reader) == 2 and not reader.read()
        with open(path, "a") as file:
            file.write(lines[2][9:] + "not json\n[1]\n" + '{"step": null}\n' + lines[3])
        assert reader.read() and reader.columns["step"] == [1, 2, 3, 4]
        assert reader.last["mfu"] == 0.5 and reader.columns["grad_norm"] == [None] * 4
        path.write_text(lines[0])  # the run went back to an earlier checkpoint
        assert reader.read() and reader.columns["loss"] == [1.0]
        path.unlink()
        assert reader.read() and len(reader) == 0

    def test_a_replaced_file_of_the_same_length_is_read_anew(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 1}\n')
        reader = RecordReader(path)
        reader.read()
        (tmp_path / "new").write_text('{"step": 1, "loss": 2}\n')
        (tmp_path / "new").replace(path)
        assert reader.read() and reader.columns["loss"] == [2.0]

    def test_a_long_file_is_taken_in_over_several_reads(self, tmp_path, monkeypatch):
        monkeypatch.setattr("accum_trainer.panel.curves._MOST_BYTES", 1000)
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(f'{{"step": {n}, "loss": 1}}\n' for n in range(1, 101)))
        reader = RecordReader(path)
        reader.read_last()
        assert reader.last["step"] == 100 and len(reader) == 0
        reads = 0
        while reader.read():
            reads += 1
        assert reads > 1 and reader.columns["step"] == [*range(1, 101)]

    def test_numbers_that_are_none_leave_gaps(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(
            '{"step": 1, "loss": "x"}\n{"step": 2, "loss": 1e999}\n{"step": 3, "loss": true}\n'
        )
        reader = RecordReader(path)
        reader.read()
        assert reader.columns["loss"] == [None] * 3

    def test_smoothing_has_no_bias(self):
        assert smoothed([2.0, None, 2.0, 2.0], 0.9) == pytest.approx([2, None, 2, 2])
        assert smoothed([1.0, 3.0], 0.5) == pytest.approx([1, (0.25 * 1 + 0.5 * 3) / 0.75])
        assert smoothed([1.0, 3.0], 0.0) == [1, 3]

    def test_a_long_curve_is_means_of_stretches(self):
        steps, values = [*range(1, 1001)], [float(n % 2) for n in range(1000)]
        found = points(steps, values, most=100)
        assert len(found) == 100 and found[0] == [10, 0.5] and found[-1] == [1000, 0.5]
        assert points([1, 2], [None, 3.0]) == [[2, 3.0]]
        with_gaps = points([1, 2, 3], [1.0, None, 3.0], with_gaps=True)
        assert with_gaps == [[1, 1.0], [2, None], [3, 3.0]]


class TestRuns:
    def state(self, folder):
        view = RunView(folder, folder.name)
        view.refresh()
        return view.state, view.message

    def started(self, folder, log="", **more):
        gone = subprocess.Popen([sys.executable, "-c", ""])
        start = start_of(gone.pid)
        gone.wait()
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / LOG).write_text(log)
        words = ["accum-trainer", "train"]
        before = [changed(folder / name) for name in ("plan.json", "result.json")]
        known = Start(str(folder), gone.pid, start, words, ["x"], 0, before)
        note_of(folder).write_text(json.dumps(vars(known) | more))

    def test_are_found_with_those_in_their_folders(self, tmp_path):
        make_run(tmp_path / "a")
        make_run(tmp_path / "group" / "b")
        make_run(tmp_path / "group" / "deep" / "c")
        self.started(tmp_path / "refused")
        (tmp_path / "launch-files").mkdir()
        os.utime(tmp_path / "a" / "plan.json", (1, 1))
        assert sorted(find_runs(tmp_path)) == ["a", "group/b", "refused"]
        assert find_runs(tmp_path)[-1] == "a" and find_runs(tmp_path / "none") == []

    def test_of_one_folder_are_a_group(self, tmp_path):
        for name in ("part-0", "part-1", "merged"):
            (tmp_path / "shares" / name).mkdir(parents=True)
        list_runs(tmp_path / "shares", "part-0", "part-1")
        shutil.rmtree(tmp_path / "shares" / "part-0")
        make_run(tmp_path / "shares" / "part-0")
        (tmp_path / "deep").mkdir()
        list_runs(tmp_path / "deep" / "er", "part-0")
        self.started(tmp_path / "shares")
        assert find_runs(tmp_path) == ["shares/part-0"]
        assert find_groups(tmp_path) == ["deep/er", "shares"]

    def test_of_a_group_are_not_started_while_one_of_them_trains(self, tmp_path):
        group = list_runs(tmp_path / "shares", "part-0", "part-1")
        run = make_run(group / "part-1")
        lock = RunLock.take(run)
        with pytest.raises(ConfigError, match=f"{run} is training already: process {os.getpid()}"):
            start(Command(["accum-trainer", "plan"], None, ""), group)
        lock.release()

    def test_that_are_done_or_stopped_say_so(self, tmp_path):
        state, message = self.state(make_run(tmp_path / "a", loss=1.5))
        assert (state, message) == ("done", "Done after 10 updates. Last loss 1.5000.")
        stopped = make_run(tmp_path / "b", done=False, stopped_by="SIGTERM")
        assert self.state(stopped)[0] == "stopped"
        assert "Stopped by SIGTERM after 10 updates, and saved" in self.state(stopped)[1]

    def test_that_diverged_have_failed(self, tmp_path):
        run = make_run(tmp_path / "a", done=False, stopped_by="divergence")
        assert self.state(run)[0] == "failed"

    def test_that_were_killed_have_ended(self, tmp_path):
        run = make_run(tmp_path / "a")
        (run / "result.json").unlink()
        assert self.state(run)[0] == "ended"

    def test_that_were_refused_show_the_last_start_s_error(self, tmp_path):
        run = make_run(tmp_path / "a")  # it was done once, and was started again
        earlier = "error: an earlier start\n"
        self.started(run, earlier + "a note\nerror: data file x does not exist\n", log_begins=24)
        assert self.state(run) == ("failed", "error: data file x does not exist")

    def test_that_a_signal_killed_say_which(self, tmp_path):
        self.started(tmp_path / "a", status=-9)
        assert self.state(tmp_path / "a")[1].startswith("Killed by signal 9, as the kernel does")

    @pytest.mark.parametrize("text", ["", "[]", '{"process": "x"}', '{"a": 1}'])
    def test_with_a_damaged_note_are_as_started_elsewhere(self, tmp_path, text):
        run = make_run(tmp_path / "a")
        note_of(run).write_text(text)
        assert self.state(run)[0] == "done"

    def test_cannot_name_a_process_or_a_command(self, tmp_path):
        """A directory of others, with all that a panel writes and could be taken to read."""
        run = make_run(tmp_path / "a")
        (run / "plan.json").write_text('{"world_size": 1}')
        mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        theirs = {
            "process": mine.pid,
            "started": start_of(mine.pid),
            "log_begins": 0,
            "before": [0, 0],
        }
        theirs |= {"folder": str(run), "lines": ["evil"], "words": ["accum-trainer", "evil"]}
        lock = theirs | {"host": socket.gethostname(), "since": "now", "machine": "theirs"}
        (run / "logs").mkdir()
        for place in (run / "panel.json", run / "logs" / "panel.json", run.parent / ".panel.json"):
            place.write_text(json.dumps(theirs))
        (run / "run.lock").write_text(json.dumps(lock))
        os.utime(run / "run.lock", (1, 1))
        words, _ = how_to_continue(run)
        assert words[:2] == ["accum-trainer", "train"] and "--trust-remote-code" not in words
        with pytest.raises(ConfigError, match="does not run, so there is nothing to stop"):
            stop_now(run)
        assert mine.poll() is None
        mine.kill()
        mine.wait()

    def test_that_cannot_be_noted_are_not_left_running(self, tmp_path, monkeypatch):
        """A full disk, a read-only home: no panel would know the process that it started."""
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path / "file"))
        before = psutil.Process().children()
        command = Command(["accum-trainer", "plan"], None, "")
        with pytest.raises(ConfigError, match="was not started: its process cannot be noted in"):
            start(command, tmp_path / "runs" / "a")
        assert psutil.Process().children() == before

    def test_with_a_log_of_one_long_line_are_read_at_once(self, tmp_path):
        """The page waits meanwhile: it was seconds, at each look."""
        began = time.process_time()
        assert as_printed("x" * 64_000) == "x" * 64_000
        assert as_printed("\x1b[" + "1" * 64_000)[-1] == "1"
        assert time.process_time() - began < 0.5
        assert as_printed("\x1b[1;31mred\x1b[0m\r\n10%\r20%\n30%\r40%\r") == "red\n20%\n40%"

    def test_say_in_words_what_the_noise_is_to_the_batch(self, tmp_path):
        run = make_run(tmp_path / "a")
        view = RunView(run, "a")
        view.refresh()
        assert view.noise_advice == ""
        plan = {"max_tokens_per_micro_batch": None, "effective_batch_size": 8, "noise_every": 4}
        plan |= {"physical_batch_size": 2, "world_size": 1}
        (run / "plan.json").write_text(json.dumps(plan))
        view.refresh(at_most_every_sec=0)
        assert view.noise_advice.startswith("noise scale not known yet: one window in 4 is")
        (run / "plan.json").write_text(json.dumps(plan | {"noise_every": 0}))
        view.refresh(at_most_every_sec=0)
        assert view.noise_advice.startswith("noise scale not measured: noise_every=0")
        (run / "plan.json").write_text(json.dumps(plan))
        record = {"step": 99, "noise_scale": 64.0, "noise_scale_low": 50, "noise_scale_high": 80}
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        view.refresh(at_most_every_sec=0)
        assert view.noise_advice.endswith("K = 32 (B_eff 64) would do on this machine")
        for of_others in ("<b>", [], 10**400, float("nan")):
            for key in plan:
                (run / "plan.json").write_text(json.dumps(plan | {key: of_others}))
                view.refresh(at_most_every_sec=0)
                assert len(view.noise_advice) < 1000

    def test_of_half_characters_can_be_sent(self, tmp_path):
        run = make_run(tmp_path / "a", done=False, stopped_by="\ud800")
        (run / "plan.json").write_text('{"a": ["\\ud800"], "\\udfff": {"b": "\\ud83d\\ude00"}}')
        view = RunView(run, "a")
        view.refresh()
        json.dumps([view.message, view.plan], ensure_ascii=False).encode()
        assert view.plan == {"a": ["?"], "?": {"b": "\U0001f600"}}
        assert sendable(os.fsdecode(b"a\xff")) == "a?"

    def test_whose_log_leads_out_are_not_started(self, tmp_path):
        run = make_run(tmp_path / "a")
        (run / "plan.json").write_text('{"world_size": 1}')
        (tmp_path / "mine").write_text("mine")
        (run / "logs").mkdir()
        (run / "logs" / LOG).symlink_to(tmp_path / "mine")
        with pytest.raises(CheckpointError, match="is a link to .*mine, outside"):
            start_again(run)
        assert (tmp_path / "mine").read_text() == "mine"

    def test_that_are_gone_leave_no_notes(self, tmp_path):
        self.started(tmp_path / "gone")
        note = note_of(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        run = make_run(tmp_path / "refused")
        (run / "config.yaml").write_text("batch_size: 0\n")
        (run / "plan.json").write_text('{"world_size": 1}')
        start_again(run)
        assert not note.exists() and note_of(run).exists()
        while (start := read_start(run)) is None or start.status is None:
            time.sleep(0.05)
        assert start.status == 2
        assert self.state(run)[1].endswith(
            "batch_size=0 is below 1; give a whole number of at least 1"
        )

    def test_of_elsewhere_continue_by_their_configuration(self, tmp_path):
        run = make_run(tmp_path / "a")
        (run / "plan.json").write_text('{"world_size": 1}')
        words, _ = how_to_continue(run)
        assert parse(words[2:]).config.output_dir == str(run)
        (run / "plan.json").write_text('{"world_size": 2}')
        with pytest.raises(ConfigError, match="was started elsewhere, on several processes"):
            how_to_continue(run)


def test_the_owner_of_a_lock_is_told_without_a_wait(tmp_path):
    assert owner_of(tmp_path) is None
    lock = RunLock.take(tmp_path)
    owner = owner_of(tmp_path)
    assert owner is not None and owner.process == os.getpid() and owner.is_here
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "run.lock").write_text((tmp_path / "run.lock").read_text())
    assert owner_of(tmp_path / "copy") is None
    lock.release()
    assert owner_of(tmp_path) is None
    (tmp_path / "run.lock").write_text("[]")
    assert owner_of(tmp_path) is None
