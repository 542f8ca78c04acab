"""`train` as users run it: records, run directory, launchers, evaluation, precision, data
formats."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml

from accum_trainer.train.records import read_records
from tests.launching import python, run, torchrun
from tests.made_runs import write_sums

RUN_37 = [
    "--batch-size",
    "4",
    "--gradient-accumulation-steps",
    "8",
    "--max-seq-len",
    "64",
    "--lr",
    "1e-3",
]


@pytest.fixture
def tiny_rows(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "rows.jsonl", 70)


def records_of(folder):
    return read_records(folder / "metrics.jsonl")


def test_r5_r11_r27_r28_r37_records_of_a_run(train, tmp_path, tiny_rows):
    finished = train(
        *RUN_37,
        "--dataset-file",
        tiny_rows,
        "--epochs",
        "2",
        "--output-dir",
        "run",
        "--log-file",
        "log.jsonl",
    )
    assert finished.status == 0, finished.err
    assert "B 4 x K 8 x W 1 = effective batch 32" in finished.err
    assert (
        "3 updates per epoch of 70 samples, the last of 6 samples; 6 updates in all" in finished.err
    )
    records = records_of(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["gradient_accumulation_steps"] for r in records] == [8, 8, 2] * 2
    assert [r["effective_batch_size"] for r in records] == [32, 32, 6] * 2
    assert {r["physical_batch_size"] for r in records} == {4}
    assert [r["batch_idx"] for r in records] == [8, 16, 18, 26, 34, 36]
    assert [r["epoch"] for r in records] == pytest.approx(
        [32 / 70, 64 / 70, 1, 1 + 32 / 70, 1 + 64 / 70, 2]
    )
    assert not any(r["skipped"] for r in records)
    assert all(0 < r["memory_gb"] <= r["peak_gb"] for r in records)
    assert all(0.5 < r["padding_efficiency"] <= 1 for r in records)
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    expected = {
        "physical_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "world_size": 1,
        "effective_batch_size": 32,
        "eval_gradient_accumulation_steps": 1,
        "updates_per_epoch": 3,
        "tail_samples": 6,
        "total_updates": 6,
        "engine": "single",
        "device": "cpu",
    }
    assert expected.items() <= plan.items()


def test_r29_composed_configuration_repeats_the_run(train, tmp_path, tiny_rows):
    argv = [*RUN_37, "--dataset-file", tiny_rows, "--steps", "3", "--warmup", "2"]
    assert train(*argv, "--output-dir", "first").status == 0
    saved = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert (
        saved["gradient_accumulation_steps"] == 8
        and saved["scheduler"] == "cosine"
        and saved["warmup"] == "2"
    )
    again = train("--config", "first/config.yaml", "--output-dir", "second")
    assert again.status == 0, again.err
    losses = [[r["loss"] for r in records_of(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == losses[1]


def test_overridden_values_are_shown(train, tmp_path, tiny_rows, rows_file):
    config = rows_file("run.yaml", "batch_size: 2\nepochs: 9\n")
    finished = train(
        "--config",
        config,
        "--batch-size",
        "4",
        "--steps",
        "1",
        "--dataset-file",
        tiny_rows,
        "--dry-run",
    )
    assert finished.status == 0
    assert f"note: batch_size=4 (command line) over 2 ({config})" in finished.err
    assert (
        f"note: epochs=9 ({config}) is dropped; the command line gives an alternative"
        in finished.err
    )
    assert "nothing written" in finished.err
    assert not list(tmp_path.iterdir())


def test_r9_r10_r30_lr_against_updates(train, tmp_path, tiny_rows):
    """Warm-up of half an epoch is 2 of 3 updates (rounded up); then linear to 0 at update 6."""
    argv = [
        *RUN_37,
        "--dataset-file",
        tiny_rows,
        "--epochs",
        "2",
        "--warmup",
        "0.5ep",
        "--scheduler",
        "linear",
    ]
    assert train(*argv, "--output-dir", "run").status == 0
    lrs = [r["lr"] for r in records_of(tmp_path / "run")]
    assert lrs == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_r19_r21_evaluation_on_the_cadence_of_updates(train, tmp_path, tiny_rows):
    argv = [
        *RUN_37,
        "--dataset-file",
        tiny_rows,
        "--eval-file",
        tiny_rows,
        "--eval-every",
        "2",
        "--steps",
        "5",
    ]
    assert train(*argv, "--output-dir", "run").status == 0
    records = records_of(tmp_path / "run")
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4, 5]
    # Independent of the run: the saved model's mean loss per target over the file, row by row in
    # float64.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    total = count = 0.0
    for line in tiny_rows.read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (tokenizer(row[key]).input_ids for key in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        log_p = (
            model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        )
        total, count = total - log_p.sum().item(), count + len(log_p)
    assert records[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    # Without a cadence, at the end only, and the same.
    assert (
        train(*argv[: argv.index("--eval-every")], "--steps", "5", "--output-dir", "end").status
        == 0
    )
    at_end = records_of(tmp_path / "end")
    assert [r["step"] for r in at_end if "eval_loss" in r] == [5]
    assert at_end[-1]["eval_loss"] == records[-1]["eval_loss"]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["--amp"], marks=pytest.mark.long, id="amp"),
        pytest.param(
            ["--mixed-precision", "bf16", "--gradient-checkpointing"],
            marks=pytest.mark.long,
            id="bf16+checkpointing",
        ),
        pytest.param(["--use-peft", "--lora-r", "4", "--amp"], id="lora+amp"),
    ],
)
def test_r16_r17_r18_twenty_updates(train, tmp_path, tiny_rows, extra):
    argv = [
        *RUN_37,
        "--dataset-file",
        tiny_rows,
        "--steps",
        "20",
        "--lr",
        "1e-2",
        "--output-dir",
        "run",
    ]
    assert train(*argv, *extra).status == 0
    records = records_of(tmp_path / "run")
    assert len(records) == 20 and not any(r["skipped"] for r in records)
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["mixed_precision"] == "bf16"


def test_r18_lora_saves_an_adapter_that_peft_loads(train, tmp_path, tiny_rows):
    argv = [
        "--dataset-file",
        tiny_rows,
        "--steps",
        "2",
        "--use-peft",
        "--lora-target-modules",
        "q_proj,v_proj",
    ]
    assert train(*argv, "--output-dir", "run").status == 0
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "library_name: peft" in card and "| LoRA | rank 16, alpha 32," in card
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["trained_parameters"] == 4 * 2 * (128 * 16 + 16 * 128)  # layers x modules x (A + B)


def test_r42_smoke_profile_is_deterministic(train, tmp_path):
    argv = ["--batch-size", "1", "--steps", "2"]
    losses = []
    for name in ("a", "b"):
        assert train(*argv, "--output-dir", name).status == 0
        losses.append([r["loss"] for r in records_of(tmp_path / name)])
    assert losses[0] == losses[1]


def test_k_from_the_environment(train, tmp_path, tiny_rows):
    argv = ["--dataset-file", tiny_rows, "--steps", "1", "--output-dir", "run"]
    assert train(*argv, ACCUM_TRAINER_GRADIENT_ACCUMULATION_STEPS="3").status == 0
    assert records_of(tmp_path / "run")[0]["gradient_accumulation_steps"] == 3


LAUNCHERS = {
    "python -m": lambda argv: python("-m", "accum_trainer.train", *argv, fresh=True),
    "accum-trainer": lambda argv: python("-m", "accum_trainer", "train", *argv, fresh=True),
    "torchrun": lambda argv: torchrun(2, "accum_trainer.train", *argv, fresh=True),
    "accelerate launch": lambda argv: run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                "2",
            ),
            *(
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--main_process_port",
                "0",
            ),
            *("-m", "accum_trainer.train", *argv),
        ]
    ),
}


@pytest.mark.long
def test_r12_r13_one_program_under_every_launcher(tmp_path, tiny_rows):
    curves = {}
    for name, launch in LAUNCHERS.items():
        folder = tmp_path / name.replace(" ", "-")
        argv = [
            "--cpu",
            "--dataset-file",
            tiny_rows,
            "--batch-size",
            "2",
            "--global-batch-size",
            "16",
            "--epochs",
            "1",
        ]
        finished = launch([*argv, "--output-dir", folder])
        assert finished.returncode == 0, finished.stderr[-3000:]
        curves[name] = [r["loss"] for r in records_of(folder)]
        plan = json.loads((folder / "plan.json").read_text())
        two = name in ("torchrun", "accelerate launch")
        assert (plan["engine"], plan["world_size"]) == (("ddp", 2) if two else ("single", 1))
    assert len(curves["python -m"]) == 5
    for curve in curves.values():
        assert curve == pytest.approx(curves["python -m"], rel=1e-5)


def test_lost_processes_are_an_error(tmp_path):
    """A launcher that says two processes while accelerate sees one (I23b)."""
    program = "from accelerate import Accelerator; from accum_trainer import Accumulator; "
    program += "Accumulator(micro_batch_size=1, accelerator=Accelerator())"
    finished = python("-c", program, WORLD_SIZE="2")
    assert (
        "EngineError: 2 processes were launched (WORLD_SIZE), but accelerate sees 1"
        in finished.stderr
    )


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_file_formats_give_the_same_training(train, tmp_path, rows_file, suffix):
    texts = [f"row {n} says {'something ' * (n % 4)}".strip() for n in range(12)]
    path = rows_file(f"rows{suffix}", "")
    if suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif suffix == ".csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)
    finished = train("--dataset-file", path, "--epochs", "1", "--lr", "1e-9", "--output-dir", "run")
    assert finished.status == 0, finished.err
    found = [
        (r["num_targets"], r["num_samples"] if "num_samples" in r else r["effective_batch_size"])
        for r in records_of(tmp_path / "run")
    ]
    reference = tmp_path.parent / "formats-reference.json"
    if reference.exists():
        assert found == [tuple(pair) for pair in json.loads(reference.read_text())]
    reference.write_text(json.dumps(found))
    assert [samples for _, samples in found] == [4, 4, 4]


def test_r35_help_is_complete_and_has_an_example():
    for command in ("train", "plan"):
        finished = python("-m", "accum_trainer", command, "--help")
        assert finished.returncode == 0 and f"Example: accum-trainer {command}" in finished.stdout
    shown = python("-m", "accum_trainer", "train", "--help").stdout
    for option in (
        "--gradient-accumulation-steps",
        "--global-batch-size",
        "--resume",
        "--lora-target-modules",
        "--warmup",
    ):
        assert option in shown


def test_r36_k_is_in_help_and_in_the_configuration(train, tmp_path):
    assert train("--steps", "1", "--output-dir", "run").status == 0
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())[
            "gradient_accumulation_steps"
        ]
        == 1
    )


def test_cpu_time_of_help_and_plan():
    """--help takes at most 0.3 s of CPU, plan 0.4 s; the CPU's own account of the process, not the
    clock."""
    measure = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'accum_trainer', "
        "*sys.argv[1:]], check=True);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print('CPU', u.ru_utime + u.ru_stime)"
    )
    for limit, argv in ((0.3, ["--help"]), (0.4, ["plan", "--num-samples", "1000"])):
        used = min(float(python("-c", measure, *argv).stdout.split()[-1]) for _ in range(3))
        assert used <= limit, f"{argv}: {used} s"


def test_breaking_out_saves_the_run(tmp_path):
    program = (
        "from accum_trainer import TrainConfig\nfrom accum_trainer.train import updates\nfor r in "
        f"updates(TrainConfig(steps=50, cpu=True, output_dir={str(tmp_path / 'run')!r})):\n    if "
        "r['step'] == 3: break\n"
    )
    finished = python("-c", program)
    assert finished.returncode == 0, finished.stderr
    assert len(records_of(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_columns_and_chat_template_are_part_of_the_run(train, tmp_path):
    """Trained on the columns and under the template that are named; a continued run cannot take
    others."""
    (tmp_path / "rows.csv").write_text(
        "q,a,b\n" + "".join(f"{i} + 1 = ,{i + 1},{i + 2}\n" for i in range(8))
    )
    argv = [
        "--cpu",
        "--dataset-file",
        "rows.csv",
        "--prompt-column",
        "q",
        "--steps",
        "1",
        "--output-dir",
        "run",
    ]
    assert train(*argv, "--completion-column", "a", cwd=tmp_path).status == 0
    other = train(*argv, "--completion-column", "b", cwd=tmp_path)
    assert other.status == 2 and "rows.csv (content" in other.error
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    argv = ["--cpu", "--dataset-file", "talk.jsonl", "--steps", "1"]
    without = train(*argv, "--output-dir", "chat", cwd=tmp_path)
    assert (
        without.status == 2
        and "talk.jsonl row 1 has messages, but the tokenizer has no chat template" in without.error
    )
    argv += ["--chat-template", "plain.jinja"]
    assert train(*argv, "--output-dir", "chat", cwd=tmp_path).status == 0
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "chat" / "model")
    assert (
        saved.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        == "[user] a\n"
    )
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}")
    wrong = train(*argv, "--output-dir", "wrong", cwd=tmp_path)
    assert wrong.status == 2 and "chat_template=plain.jinja line 1 is not Jinja" in wrong.error


def test_step_time_counts_waiting_for_data_and_not_evaluation(
    tmp_path, fresh_accelerate, monkeypatch
):
    """Rows that take 0.05 s each to read: lower bounds only, so a slow machine changes nothing."""
    import time

    from accum_trainer import TrainConfig
    from accum_trainer.data.tokenizing import TokenizedRows
    from accum_trainer.train import updates

    read, slow, rows = TokenizedRows.__getitem__, 0.05, tmp_path / "rows.txt"
    rows.write_text("".join(f"row {i}\n" for i in range(12)))

    def read_slowly(self, index):
        time.sleep(slow)
        return read(self, index)

    monkeypatch.setattr(TokenizedRows, "__getitem__", read_slowly)
    options = {"cpu": True, "batch_size": 2, "global_batch_size": 4, "steps": 3, "eval_every": 1}
    config = TrainConfig(
        dataset_file=str(rows), eval_file=str(rows), output_dir=str(tmp_path / "run"), **options
    )
    began = time.perf_counter()
    records = list(updates(config))
    elapsed = time.perf_counter() - began
    assert records[0]["data_wait_sec"] >= 4 * slow, "nothing can be read ahead of the first window"
    for record in records:
        assert 0 <= record["data_wait_sec"] < record["step_time_sec"]
        assert record["tokens_per_sec"] == pytest.approx(
            record["num_tokens"] / record["step_time_sec"]
        )
        assert record["samples_per_sec"] == pytest.approx(4 / record["step_time_sec"])
    assert sum(record["step_time_sec"] for record in records) <= elapsed - 3 * 12 * slow


def test_r52_any_effective_batch(train, tmp_path, tiny_rows):
    """B_eff 10 at B 4: every update but the last sees 10 samples, each once."""
    argv = [
        "--dataset-file",
        tiny_rows,
        "--batch-size",
        "4",
        "--global-batch-size",
        "10",
        "--epochs",
        "1",
        "--output-dir",
        "run",
    ]
    assert train(*argv, cwd=tmp_path).status == 0
    seen = [record["effective_batch_size"] for record in records_of(tmp_path / "run")]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    whole, rest = divmod(plan["num_samples"], 10)
    assert whole and seen == [10] * whole + [rest] * bool(rest)
