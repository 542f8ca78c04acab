"""Wrong input ends with status 2, one message that names the thing, no traceback, and nothing
written."""

from __future__ import annotations

import json
import shutil

import pytest

from accum_trainer import TrainConfig
from accum_trainer.errors import ConfigError

GOOD = [{"prompt": f"What is {n}?\n", "completion": f"It is {n}."} for n in range(20)]


def snapshot(folder):
    return sorted(
        (str(path.relative_to(folder)), path.is_file() and path.stat().st_size)
        for path in folder.rglob("*")
    )


def refused(run, folder, *argv, says, **env):
    """Run `train` with wrong input in `folder`; check status, message and that nothing changed."""
    before = snapshot(folder)
    finished = run(*argv, cwd=folder, **env)
    assert finished.status == 2, finished.err
    for part in says if isinstance(says, tuple) else (says,):
        assert part in finished.error, finished.error
    assert ".;" not in finished.error  # another library's sentence inside ours
    assert snapshot(folder) == before


OPTIONS = {
    "K zero": (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0 is below 1"),
    "K word": (
        ["--gradient-accumulation-steps", "two"],
        "gradient_accumulation_steps='two' is not an integer",
    ),
    "K fraction": (
        ["--gradient-accumulation-steps", "2.5"],
        "gradient_accumulation_steps='2.5' is not an integer",
    ),
    "B negative": (["--batch-size", "-1"], "batch_size=-1 is below 1"),
    "lr zero": (["--lr", "0"], "lr=0 must be above 0"),
    "lr word": (["--lr", "fast"], "lr='fast' is not a number"),
    "lr nan": (["--lr", "nan"], "lr=nan is not a finite number"),
    "scheduler": (
        ["--scheduler", "cosin"],
        ("scheduler=cosin is not known", "did you mean cosine?"),
    ),
    "warmup": (["--warmup", "lots"], "warmup='lots' is not a warm-up"),
    "warmup too long": (
        ["--steps", "5", "--warmup", "9"],
        "warmup=9 is 9 updates, but the run has only 5",
    ),
    "steps and epochs": (
        ["--steps", "5", "--epochs", "1"],
        "steps=5 and epochs=1 both say how long",
    ),
    "lr scaling": (["--lr-scaling", "linear"], "lr_scaling=linear needs lr_base_batch_size"),
    "set unknown": (
        ["--set", "batchsize=4"],
        ("unknown option 'batchsize'", "did you mean batch_size?"),
    ),
    "set without value": (["--set", "lr"], "--set lr is not key=value"),
    "set twice": (["--lr", "0.1", "--set", "lr=0.2"], "lr is given twice on the command line"),
    "name of a Trainer": (
        ["--learning-rate", "1"],
        "No such option '--learning-rate'. Did you mean '--lr'?",
    ),
    "its batch": (["--per_device_train_batch_size", "4"], "Did you mean '--batch-size'?"),
    "its epochs": (["--num-train-epochs=3"], "Did you mean '--epochs'?"),
    "its updates": (["--max-steps", "5"], "Did you mean '--steps'?"),
    "its name in a setting": (
        ["--set", "learning_rate=1"],
        ("unknown option 'learning_rate'", "did you mean lr?"),
    ),
    "a slip": (["--batch-sise", "4"], "Did you mean '--batch-size'?"),
    "unknown option": (["--grad-acum-steps", "4"], "No such option '--grad-acum-steps'"),
    "K and B_eff beside the default B": (
        ["--gradient-accumulation-steps", "3", "--global-batch-size", "10"],
        (
            "global_batch_size=10 contradicts micro_batch_size=4",
            "leave gradient_accumulation_steps out (it would be 3)",
        ),
    ),
    "K against B_eff": (
        ["--batch-size", "4", "--gradient-accumulation-steps", "8", "--global-batch-size", "64"],
        "global_batch_size=64 contradicts micro_batch_size=4 x gradient_accumulation_steps=8",
    ),
    "amp twice": (["--amp", "--mixed-precision", "bf16"], "mixed_precision=bf16 is given too"),
    "fp16 on a CPU": (["--mixed-precision", "fp16"], "mixed_precision=fp16 needs a GPU"),
    "attention unknown": (
        ["--attention", "sdpaa"],
        ("attention=sdpaa cannot be used with model=tiny", "use sdpa or eager"),
    ),
    "flash in float32": (
        ["--attention", "flash_attention_2"],
        "attention=flash_attention_2 ",
    ),  # or it is not installed
    "flex on a CPU": (
        ["--attention", "flex_attention"],
        "attention=flex_attention gives no gradient on a CPU",
    ),
    "offload of nothing": (["--cpu-offload"], "give zero_stage (zero1 to zero3) too"),
    "tracker of no kind": (
        ["--report-to", "tensorboard,wandbb"],
        "report_to=tensorboard,wandbb: wandbb is no tracker; give one or several of tensorboard",
    ),
    "project of nothing": (
        ["--report-project", "mine"],
        "report_project=mine has an effect only with report_to",
    ),
    "peak of nothing": (["--peak-tflops", "0"], "peak_tflops=0 must be above 0"),
    "lines of nothing": (["--log-every", "0"], "log_every=0 is below 1"),
    "shares of two": (
        ["--rank-weights", "2,1"],
        "rank_weights=2,1 are 2 shares, but there is 1 process",
    ),
    "share of nothing": (["--rank-weights", "2,0"], "rank_weights=2,0 are not shares"),
    "share of words": (["--rank-weights", "big,small"], "rank_weights=big,small are not shares"),
    "B and tokens": (
        ["--batch-size", "4", "--max-tokens-per-micro-batch", "4096", "--global-batch-size", "64"],
        "batch_size=4 and max_tokens_per_micro_batch=4096 both say how large a micro-batch may be",
    ),
    "tokens without a window": (["--max-tokens-per-micro-batch", "4096"], "give global_batch_size"),
    "tokens and K": (
        ["--max-tokens-per-micro-batch", "4096", "--gradient-accumulation-steps", "8"],
        "give global_batch_size, and leave gradient_accumulation_steps out",
    ),
    "too few tokens": (
        ["--max-tokens-per-micro-batch", "100", "--global-batch-size", "8"],
        "max_tokens_per_micro_batch=100 is below max_seq_len=512",
    ),
    "auto without a window": (
        ["--batch-size", "auto"],
        "batch_size=auto makes as many micro-batches",
    ),
    "B of another word": (["--batch-size", "largest"], "batch_size='largest' is not an integer"),
    "layout": (["--layout", "paced"], ("layout=paced is not known", "did you mean packed?")),
    "multiple": (["--pad-to-multiple-of", "0"], "pad_to_multiple_of=0 is below 1"),
    "lora dropout": (["--use-peft", "--lora-dropout", "1.0"], "lora_dropout=1 must be below 1"),
    "lora modules": (
        ["--use-peft", "--lora-target-modules", "q_prog"],
        ("lora_target_modules=q_prog", "q_proj"),
    ),
    "rank of no adapter": (
        ["--lora-r", "8"],
        ("lora_r=8 has an effect only with use_peft", "use_peft is off"),
    ),
    "alpha of no adapter": (
        ["--lora-alpha", "8"],
        "lora_alpha=8.0 has an effect only with use_peft",
    ),
    "dropout of no adapter": (
        ["--lora-dropout", "0.1"],
        "lora_dropout=0.1 has an effect only with use_peft",
    ),
    "targets of no adapter": (
        ["--set", "lora_target_modules=q_proj"],
        "lora_target_modules=q_proj has an effect only",
    ),
    "modules of no adapter": (
        ["--lora-modules-to-save", "lm_head"],
        "lora_modules_to_save=lm_head has an effect only",
    ),
    "adapter that is not": (["--no-use-peft", "--merge-adapter"], "give use_peft too"),
    "base of no scaling": (
        ["--lr-base-batch-size", "8"],
        ("lr_base_batch_size=8 has an effect only with lr_scaling", "lr_scaling is none"),
    ),
    "restarts of no runs": (
        ["--max-restarts", "5"],
        "max_restarts=5 has an effect only with parallel_independent",
    ),
    "padding of packed rows": (
        ["--layout", "packed", "--pad-to-multiple-of", "8"],
        "pad_to_multiple_of=8 has no effect with layout=packed",
    ),
    "devices of no runs": (["--cuda-ids", "0,1"], "cuda_ids=0,1 is for independent runs"),
    "half of the columns": (
        ["--prompt-column", "q"],
        "prompt_column=q and completion_column=None belong together",
    ),
    "two kinds of columns": (
        ["--prompt-column", "q", "--completion-column", "a", "--text-column", "t"],
        "prompt_column=q and text_column=t both say",
    ),
    "columns of no data": (
        ["--text-column", "t"],
        "text_column=t has no effect without data of yours",
    ),
    "template missing": (
        ["--chat-template", "no.jinja"],
        "chat_template=no.jinja cannot be read: No such file",
    ),
    "sequence too long": (
        ["--max-seq-len", "4096"],
        "max_seq_len=4096 is more than the 2048 positions of model=tiny",
    ),
    "unknown model": (["--model", "no/such-model"], "model=no/such-model"),
    "missing file": (["--dataset-file", "nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
    "missing config": (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    "two data sets": (
        ["--dataset", "a", "--dataset-file", "b.jsonl"],
        "both name the training data",
    ),
    "unreachable hub": (
        ["--dataset", "no/such-data"],
        "dataset no/such-data cannot be loaded from the hub",
    ),
    "resume nowhere": (["--resume", "nowhere"], "resume=nowhere is no folder"),
    "evaluation without rows": (
        ["--dataset-file", "b.jsonl", "--eval-every", "5"],
        "eval_every=5 needs eval_file",
    ),
}


@pytest.mark.parametrize("written", ["2", 2, "zero2"])
def test_a_zero_stage_may_be_written_as_in_python(written):
    assert TrainConfig(zero_stage=written).zero_stage == "zero2"


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="zero_stage=4 is not known; give one of none, zero1"):
        TrainConfig(zero_stage="4")


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_option(train, tmp_path, name):
    argv, says = OPTIONS[name]
    refused(train, tmp_path, "--output-dir", "run", *argv, says=says)


FILES = {
    "empty": ("rows.jsonl", "", "rows.jsonl is empty"),
    "blank": ("rows.txt", "\n\n  \n", "rows.txt has no rows"),
    "malformed line": (
        "rows.jsonl",
        "".join(json.dumps(row) + "\n" for row in GOOD[:6])
        + '{"prompt": "x", \n'
        + json.dumps(GOOD[7])
        + "\n",
        "rows.jsonl line 7 is not JSON",
    ),
    "malformed json": (
        "rows.json",
        '[{"text": "a"},\n {"text": }]',
        "rows.json line 2 is not JSON",
    ),
    "not objects": (
        "rows.jsonl",
        '{"text": "a"}\n[1, 2]\n',
        "rows.jsonl line 2 is not a JSON object",
    ),
    "no column": (
        "rows.jsonl",
        '{"body": "a", "title": "b"}\n',
        ("row 1 has the columns ['body', 'title']", "expected text;"),
    ),
    "csv columns": ("rows.csv", "a,b\n1,2\n", "row 1 has the columns ['a', 'b']"),
    "one row short": (
        "rows.jsonl",
        json.dumps(GOOD[0]) + "\n" + '{"prompt": "x"}\n',
        "row 2: null value in column completion",
    ),
    "not text": (
        "rows.jsonl",
        '{"prompt": [3], "completion": 4}\n',
        "rows.jsonl row 1: prompt=[3] is a list, not text",
    ),
    "messages": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        "the tokenizer has no chat template",
    ),
    "suffix": ("rows.tsv", "a\tb\n", "ends in '.tsv'"),
    "no target": ("rows.jsonl", '{"text": ""}\n', "has no target in any of its 1 samples"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_data(train, tmp_path, rows_file, name):
    file, content, says = FILES[name]
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--dataset-file",
        rows_file(file, content),
        says=says,
    )


def test_not_utf8(train, tmp_path, rows_file):
    path = rows_file("rows.jsonl", "")
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    refused(
        train, tmp_path, "--output-dir", "run", "--dataset-file", path, says="is not UTF-8 text"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("batch_sise: 4\n", ("unknown option 'batch_sise'", "did you mean batch_size?")),
        ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps=0 is below 1"),
        (
            "gradient_accumulation_steps: true\n",
            "gradient_accumulation_steps=True is not an integer",
        ),
        ("lr: [1\n", "line 2 is not YAML"),
        ("lr: 1\nseed: 2\nlr: 3\n", "line 3 is not YAML: lr has two values; give it once"),
        ("lr: 2001-99-99\n", "line 1 is not YAML: '2001-99-99' is no timestamp (month must be"),
        ("model: " + "[" * 5000, "cannot be read: its values are nested too deeply"),
        (f"seed: {1 << 64}\n", f"seed={1 << 64} is beyond 64 bits"),
        ("- lr\n", "holds a list, not `option: value` lines"),
    ],
)
def test_wrong_yaml(train, tmp_path, rows_file, content, says):
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--config",
        file := rows_file("run.yaml", content),
        says=(*((says,) if isinstance(says, str) else says), str(file)),
    )


def test_wrong_environment(train, tmp_path):
    says = "environment: unknown option 'batchsize'; did you mean batch_size?"
    refused(train, tmp_path, "--output-dir", "run", says=says, ACCUM_TRAINER_BATCHSIZE=4)


def test_i23_k_of_the_launcher_must_agree(train, tmp_path):
    refused(
        train,
        tmp_path,
        *("--output-dir", "run", "--gradient-accumulation-steps", "8"),
        says="gradient_accumulation_steps=8, but the environment says "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4,
    )


def test_precision_of_the_launcher_must_agree(train, tmp_path):
    refused(
        train,
        tmp_path,
        *("--output-dir", "run", "--mixed-precision", "bf16"),
        says="mixed_precision=bf16, but the launcher says ACCELERATE_MIXED_PRECISION=fp16",
        ACCELERATE_MIXED_PRECISION="fp16",
    )


def test_output_dir_under_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train, tmp_path, "--output-dir", "file/run", says="file is a file, not a folder")


def test_output_dir_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train, tmp_path, "--output-dir", "file", says="file is a file, not a folder")


def test_output_dir_holds_something_else(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused(train, tmp_path, "--output-dir", "run", says="holds other files and no run")


def test_log_file_holds_something_else(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--log-file",
        "notes.txt",
        says="does not hold records",
    )


def test_model_folder_without_a_model(train, tmp_path):
    (tmp_path / "model").mkdir()
    refused(
        train,
        tmp_path,
        "--output-dir",
        "run",
        "--model",
        "model",
        says="model=model gives no tokenizer",
    )


def test_a_mistyped_command_is_answered_with_the_nearest(command, tmp_path):
    finished = command("trian", cwd=tmp_path)
    assert finished.status == 2
    assert "No such command 'trian'. Did you mean 'train'?" in finished.error


def test_messages_are_not_mixed_up_with_a_missing_plan_file(command, tmp_path):
    finished = command("plan", "--dataset-file", "nowhere.jsonl", cwd=tmp_path)
    assert finished.status == 2
    assert "data file nowhere.jsonl does not exist" in finished.error


def test_plan_of_contradicting_sizes(command, tmp_path):
    finished = command("plan", "--dataset-file", "x.jsonl", "--num-samples", "5", cwd=tmp_path)
    assert finished.status == 2
    assert "both say how much data" in finished.error
    finished = command("plan", "--processes", "0", cwd=tmp_path)
    assert finished.status == 2
    assert "world_size=0 is below 1" in finished.error


class TestResume:
    """Continuing what is not the same run."""

    @pytest.fixture
    def folder(self, train, tmp_path, rows_file):
        self.data = rows_file("rows.jsonl", GOOD)
        self.argv = [
            "--dataset-file",
            self.data,
            "--batch-size",
            "4",
            "--steps",
            "2",
            "--output-dir",
            "run",
        ]
        finished = train(*self.argv)
        assert finished.status == 0, finished.err
        return tmp_path

    def test_other_effective_batch(self, train, folder):
        says = "trained with global_batch_size=4, this run has global_batch_size=8"
        refused(train, folder, *self.argv, "--gradient-accumulation-steps", "2", says=says)

    def test_other_data(self, train, folder):
        self.data.write_text("".join(json.dumps(row) + "\n" for row in reversed(GOOD)))
        refused(train, folder, *self.argv, says=("trained with data=", "this run has data="))

    def test_other_seed(self, train, folder):
        refused(
            train,
            folder,
            *self.argv,
            "--seed",
            "7",
            says="trained with seed=0, this run has seed=7",
        )

    def test_never(self, train, folder):
        refused(
            train,
            folder,
            *self.argv,
            "--resume",
            "never",
            says="already holds a run and resume=never",
        )

    def test_foreign_folder(self, train, folder):
        (folder / "elsewhere").mkdir()
        argv = [*self.argv[:-1], "fresh", "--resume", "elsewhere"]
        refused(
            train,
            folder,
            *argv,
            says="elsewhere is not a whole checkpoint: its manifest.json is missing; give a run "
            "directory, or a checkpoint in it (RUN/checkpoints/step-N)",
        )

    def test_damaged_checkpoint(self, train, folder):
        step = folder / "run" / "checkpoints" / "step-00000002"
        part = step / "part-00000-of-00001.safetensors"
        part.write_bytes(b"x" * part.stat().st_size)
        argv = [*self.argv[:-1], "fresh", "--resume", step]
        refused(train, folder, *argv, says=f"damaged: {part.name} is not what its manifest lists")

    def test_run_without_checkpoints(self, train, folder):
        for path in (folder / "run" / "checkpoints").iterdir():
            shutil.rmtree(path)
        argv = [*self.argv[:-1], "fresh", "--resume", "run"]
        refused(train, folder, *argv, says="resume=run is a run without a whole checkpoint")


def test_i40_packed_samples_of_a_model_that_mixes_them(train, tmp_path):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from accum_trainer.data.embedded import corpus_tokenizer

    tokenizer = corpus_tokenizer()
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    )
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(
        tmp_path / "mamba"
    )
    tokenizer.save_pretrained(tmp_path / "mamba")
    says = (
        "layout=packed cannot be used with model=mamba, whose packed samples see each other: "
        "logits of a packed sample differ from those of it alone by ",
        "use layout=padded",
    )
    options = (
        "--model",
        "mamba",
        "--batch-size",
        "4",
        "--max-seq-len",
        "32",
        "--steps",
        "1",
        "--cpu",
    )
    refused(train, tmp_path, "--output-dir", "run", *options, "--layout", "packed", says=says)
    assert (
        train("--output-dir", "run", *options, cwd=tmp_path).status == 0
    )  # padded, as it is by default


def test_options_at_their_defaults_are_silent(tmp_path):
    """A written configuration holds all of them, and is read back; what shapes adapters goes with
    them."""
    from accum_trainer import TrainConfig

    for config in (
        TrainConfig(),
        TrainConfig(use_peft=True, lora_r=8, lora_dropout=0.1, merge_adapter=True),
    ):
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config
    plain = config.without_peft()
    assert (plain.use_peft, plain.lora_r, plain.lora_dropout, plain.merge_adapter) == (
        False,
        16,
        0.0,
        False,
    )
