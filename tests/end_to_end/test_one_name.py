"""One thing has one name in all commands; a line of `train` can be planned; a shell completes it.

Completion is driven by a real bash, as a person's TAB drives it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from accum_trainer.cli import main
from accum_trainer.cli.plan import command as plan
from accum_trainer.cli.train import command as train
from tests.launching import ROOT

TRAIN = ["--batch-size", "2", "--global-batch-size", "16", "--lr", "1e-3", "--epochs", "2"]
TRAIN += ["--warmup", "10%"]
# What a plan of the batch does not depend on.
OTHERS = ["--engine", "zero2", "--precision", "bf16", "--output-dir", "runs/x"]
OTHERS += ["--resume", "never", "--report-to", "tensorboard", "--seed", "3"]
OTHERS += ["--checkpoint-every", "5", "--eval-every", "4", "--eval-file", "e.jsonl"]
OTHERS += ["--set", "log_every=2"]


@pytest.fixture
def said(capsys):
    def give(*argv: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in argv])
        shown = capsys.readouterr()
        assert not ended.value.code, shown.err
        return shown.out

    return give


def flags(command: click.Command) -> set[str]:
    return {f for p in command.params for f in (*p.opts, *p.secondary_opts) if f[0] == "-"}


def test_plan_takes_every_option_of_train():
    assert flags(train) <= flags(plan)


def test_plan_of_a_line_of_train_is_the_plan_of_its_batch(said):
    sizes = ("--processes", "2", "--num-samples", "100")
    shown = said("plan", *sizes, *TRAIN, *OTHERS)
    assert shown == said("plan", *sizes, *TRAIN)
    assert "B_eff  effective batch      16   (B 2 x K 4 x W 2" in shown
    assert "updates in all              14" in shown and "warm-up                     2 " in shown


def test_plan_shows_the_share_of_a_run_and_each_run_of_a_sweep(said):
    share = said("plan", "--num-samples", "100", "--shard", "2/3")
    assert "samples per epoch           33" in share
    runs = ("plan", "--num-samples", "100", "--parallel-independent")
    shares = said(*runs, "--cuda-ids", "0,1,2")
    assert "runs                        3, each on its own share" in shares
    assert "samples per epoch           34" in shares
    swept = said(*runs, "--vary", "lr=1e-4,3e-4; epochs=2")
    assert "run 1                       lr=3e-4  epochs=2" in swept
    assert re.findall("learning rate +(.*),", swept) == ["0.0001", "0.0003"]
    assert swept.count("updates in all              50") == 2


@pytest.mark.parametrize(
    ("argv", "one", "other"),
    [
        (["plan", "--batch-size", "2"], ["--processes", "3"], ["--gpus-per-node", "3"]),
        (
            ["plan", "--model", "tiny", "--max-seq-len", "32"],
            ["--mixed-precision", "bf16"],
            ["--precision", "bf16"],
        ),
        (
            ["config", "create", "multi-gpu", "-o", "a.yaml", "--force"],
            ["--gpus-per-node", "2", "--precision", "bf16"],
            ["--processes", "2", "--mixed-precision", "bf16"],
        ),
    ],
    ids=["processes", "precision", "config create"],
)
def test_two_names_for_one_thing(said, monkeypatch, tmp_path, argv, one, other):
    monkeypatch.chdir(tmp_path)
    first = said(*argv, *one)
    written = [file.read_text() for file in tmp_path.iterdir()]
    assert said(*argv, *other) == first
    assert [file.read_text() for file in tmp_path.iterdir()] == written
    assert argv[0] == "config" or first != said(*argv)
    for text in written:
        assert re.search("num_processes: 2 .*mixed_precision: bf16 ", text, re.DOTALL)


def test_help_shows_one_name(said):
    assert "--mixed-precision no|bf16|fp16 " in said("train", "--help")
    assert "--precision" not in said("train", "--help").replace("--mixed-precision", "")
    shown = said("plan", "--help")
    assert "--processes W" in shown and "--gpus-per-node" not in shown
    assert "--output-dir" not in shown


BASH = """
set -e
PATH={bin}:$PATH
source <(accum-trainer completion bash)
ask() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    {function} accum-trainer
    echo "${{COMPREPLY[*]}}"
}}
complete -p accum-trainer
"""
ANSWERS = {
    "comp": "compare completion",
    "train --gradient-acc": "--gradient-accumulation-steps",
    "train --engine z": "zero1 zero2 zero3",
    "train --lr 1 --no-use-p": "--no-use-peft",
    "config create multi": "multi-gpu",
    "config create multi-gpu --engine f": "fsdp2",
    "config create multi-gpu -- --scheduler co": "constant cosine",
    "launch a.yaml -- --global": "--global-batch-size",
    "launch a.yaml --max-re": "--max-restarts",
    "nothing --x": "",
}


def test_bash_completes_commands_options_and_values():
    """All in one bash, from the script that the command prints."""
    script = BASH.format(bin=Path(sys.executable).parent, function="_accum_trainer_completion")
    script += "".join(f"ask accum-trainer {words}\n" for words in ANSWERS)
    ran = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    installed, *answers = ran.stdout.splitlines()
    assert installed == "complete -o nosort -F _accum_trainer_completion accum-trainer"
    assert dict(zip(ANSWERS, (" ".join(sorted(a.split())) for a in answers), strict=True)) == {
        words: " ".join(sorted(answer.split())) for words, answer in ANSWERS.items()
    }


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_of_another_shell_is_one_that_it_can_read(said, shell, tmp_path):
    script = said("completion", shell)
    assert f"_ACCUM_TRAINER_COMPLETE={shell}_complete" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here to read it")
    file = tmp_path / "script"
    file.write_text(script)
    subprocess.run([shell, "--no-execute", str(file)], check=True, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        "train --dataset-file REA",
        "launch laun",
        "compare runs/a ru",
        "checkpoint export r",
        "verify --loop my",
        "merge a b -o o",
        "report ru",
        "launch a.yaml -- --output-dir ru",
        "sweep --from ru",
        "panel ru",
        "train --branch-from ru",
    ],
)
def test_values_that_are_paths_are_left_to_the_shell(monkeypatch, capsys, words):
    given = ["accum-trainer", *words.split()]
    monkeypatch.setenv("_ACCUM_TRAINER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(given))
    monkeypatch.setenv("COMP_CWORD", str(len(given) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.strip() == f"file,{given[-1]}"
