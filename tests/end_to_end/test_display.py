"""What `train` shows while it trains: on a real terminal, and where there is none."""

from __future__ import annotations

import re
import sys

import pytest

from accum_trainer.train.records import read_records
from tests.launching import ROOT, environment, script, shell, stand_in, torchrun
from tests.made_runs import write_sums
from tests.terminal import Terminal

SMALL = ["train", "--cpu", "--batch-size", "4", "--gradient-accumulation-steps", "2"]
SMALL += ["--max-seq-len", "64", "--lr", "1e-3", "--output-dir", "run"]

# A program that trains while code of the user's own, and of a library, writes in every way.
NOISY = """
import logging, sys, warnings
import accum_trainer.train.loop as loop
early = logging.getLogger("a_library")
early.addHandler(logging.StreamHandler(sys.stderr))
loss_of, calls = loop.causal_lm_loss, 0
def noisy(model, batch):
    global calls
    calls += 1
    if calls == 3:
        print("printed by the user")
        print("to stderr by the user", file=sys.stderr)
        warnings.warn("warned by the user")
        early.error("logged by a library")
        logging.getLogger("mine").warning("logged by the user")
    return loss_of(model, batch)
loop.causal_lm_loss = noisy
from accum_trainer.cli import main
main(sys.argv[1:])
"""
WRITTEN = (
    *("printed by the user", "to stderr by the user", "warned by the user"),
    *("logged by a library", "logged by the user"),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "rows.jsonl", 70)


def on_terminal(folder, *argv, columns=100, lines=40, output=None, **env):
    program, environ = stand_in("accum-trainer", **env)
    return Terminal([program, *SMALL, *argv], environ, folder, columns, lines, output)


def test_a_terminal_shows_the_state_of_the_run(tmp_path, rows):
    seen = on_terminal(
        tmp_path,
        *("--dataset-file", rows, "--eval-file", rows, "--eval-every", "5"),
        *("--steps", "20", "--peak-tflops", "0.01", "--max-grad-norm", "0.5"),
    )
    assert seen.ended() == 0, seen.text
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    last, shown = records[-1], seen.text[seen.text.index("run directory") :]
    facts = [
        "20/20",
        f"epoch {last['epoch']:.2f}",
        "0:00:00 left",
        f"{last['loss']:.4f}",
        r"(falling|rising) [\d.e-]+ per 100 updates|level",
        f"evaluation {last['eval_loss']:.4f} after update 20",
        f"lr {last['lr']:.3g}",
        rf"gradient norm {last['grad_norm']:.3g}, (not )?clipped at 0.5",
        r"[\d,]+ useful   [\d,]+ without waiting for data   padding [\d.]+%\s+MFU [\d.]+%",
        rf"[\d.]+ GB in use   {last['peak_gb']:.2f} GB at most",
        "B 4 x K 2 x W 1   = effective batch 8",
    ]
    for fact in facts:
        assert re.search(fact, shown), f"{fact} is not in\n{shown}"
    assert seen.text.count("tokens/s") == 1, "an older state of the display stayed"
    assert "done: 20 updates" in shown
    assert "shards" not in shown and "%|" not in shown  # no bar of a library
    assert b"\x1b[?25l" not in seen.raw, "the cursor is hidden, and a killed run would leave it so"
    assert b"\x1b[?1049" not in seen.raw
    assert b"\x1b[1m" in seen.raw


def test_what_others_write_stays_above_the_display(tmp_path, rows):
    program, env = stand_in("python")
    seen = Terminal(
        [program, "-c", NOISY, *SMALL, "--dataset-file", rows, "--steps", "6"], env, tmp_path
    )
    assert seen.ended() == 0, seen.text
    above = seen.text[: seen.text.index("6/6")]
    for said in WRITTEN:
        assert seen.text.count(said) - seen.text.count(f'"{said}"') >= 1, seen.text
        assert said in above
    assert seen.text.count("tokens/s") == 1


# Process 1 writes to the terminal, past Python, while process 0 draws on it.
SHARED = """
import os, sys, time
import accum_trainer.train.loop as loop
loss_of, calls = loop.causal_lm_loss, 0
def noisy(model, batch):
    global calls
    calls += 1
    if calls in (4, 8) and os.environ["RANK"] == "1":
        time.sleep(0.6)
        os.write(2, "".join(f"line {n} of process 1 ({calls})\\n" for n in range(12)).encode())
        time.sleep(0.6)
    return loss_of(model, batch)
loop.causal_lm_loss = noisy
from accum_trainer.cli import main
main(sys.argv[1:])
"""


def test_a_limit_of_tokens_is_shown_as_the_plan_says_it(tmp_path, rows):
    program, environ = stand_in("accum-trainer")
    argv = ["--max-tokens-per-micro-batch", "256", "--global-batch-size", "8", "--steps", "3"]
    argv = ["train", "--cpu", "--max-seq-len", "64", "--dataset-file", rows, *argv]
    seen = Terminal([program, *argv, "--output-dir", "run"], environ, tmp_path)
    assert seen.ended() == 0, seen.text
    shown = seen.text[seen.text.index("run directory") :]
    assert "at most 256 tokens per micro-batch   W 1   effective batch 8" in shown, shown
    assert " x K " not in shown


@pytest.mark.long
def test_what_other_processes_write_is_not_erased(tmp_path, rows):
    (tmp_path / "shared.py").write_text(SHARED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    argv = [*SMALL, "--global-batch-size", "16", "--dataset-file", rows, "--steps", "10"]
    argv = [part for part in argv if part not in ("--gradient-accumulation-steps", "2")]
    seen = Terminal(
        [*torchrun, "--standalone", "shared.py", *argv],
        environment(OMP_NUM_THREADS=1, PYTHONPATH=ROOT),
        tmp_path,
    )
    assert seen.ended() == 0, seen.text
    for calls in (4, 8):
        lines = [f"line {n} of process 1 ({calls})" for n in range(12)]
        assert [line for line in lines if line not in seen.text] == [], seen.text
    assert seen.text.rstrip().splitlines()[-1].startswith("done: 10 updates")
    last = seen.text[seen.text.rindex("update    10/10") :]
    assert last.count("tokens/s") == 1 and "effective batch 16" in last
    assert not seen.screen.cursor.hidden


def test_standard_output_in_a_file_is_what_the_program_writes(tmp_path, rows):
    program, env = stand_in("python")
    command = [program, "-c", NOISY, *SMALL, "--dataset-file", rows, "--steps", "6"]
    seen = Terminal(command, env, tmp_path, output=tmp_path / "out")
    assert seen.ended() == 0, seen.text
    out = (tmp_path / "out").read_text().splitlines()
    assert out[0] == WRITTEN[0] and out[1].startswith("done: 6 updates") and len(out) == 2


def test_narrow_without_colour_and_dumb(tmp_path, rows):
    argv = ["--dataset-file", rows, "--steps", "10"]
    seen = on_terminal(tmp_path, *argv, columns=44, NO_COLOR=1)
    assert seen.ended() == 0, seen.text
    shown = seen.text[seen.text.index("run directory") :]
    assert all(len(line) <= 44 for line in shown.splitlines())
    assert "10/10" in shown and "effective batch 8" in shown and "…" not in shown
    assert not re.search(rb"\x1b\[(3[0-7]|9[0-7]|38;)", seen.raw), "coloured despite NO_COLOR"
    dumb = on_terminal(tmp_path, *argv, "--resume", "anew", TERM="dumb")
    assert dumb.ended() == 0
    assert b"\x1b" not in dumb.raw and "update 10/10  loss" in dumb.text


@pytest.mark.long
def test_of_ten_columns_without_utf_8(tmp_path, rows):
    """An ellipsis was written as six characters there, and the display as two lines for one."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0}
    argv = ["--dataset-file", rows, "--steps", "10"]
    command = [sys.executable, "-m", "accum_trainer", *SMALL, *argv]
    seen = Terminal(command, environment(OMP_NUM_THREADS=1, **plain), tmp_path, columns=10)
    assert seen.ended() == 0, seen.text
    shown = seen.text[seen.text.rindex("update ") :]
    assert shown.startswith("update 10/\n#####\nepoch") and "u2026" not in seen.text
    assert seen.text.count("tokens/s") == 1, "an older state of the display stayed"


def test_closed_streams_end_nothing(tmp_path, rows):
    """And no file of the run takes the place of one of them."""
    words = " ".join(map(str, [*SMALL, "--dataset-file", rows, "--steps", "3"]))
    run = shell(f"{sys.executable} -m accum_trainer {words} <&- >&- 2>&-", tmp_path, 120)
    assert run.returncode == 0
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3]


@pytest.mark.long
def test_resized_and_interrupted_by_a_key(tmp_path, rows):
    """A fresh process, whose terminal sends it what a person types."""
    command = [sys.executable, "-m", "accum_trainer", *SMALL, "--dataset-file", rows]
    seen = Terminal([*command, "--epochs", "999"], environment(OMP_NUM_THREADS=1), tmp_path)
    seen.until(lambda: re.search(r"\b[1-9]\d*/8991", seen.text))
    seen.resize(60, 30)
    sent = len(seen.raw)
    seen.until(lambda: seen.raw.count(b"effective batch", sent) > 2)
    drawn = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"\n", seen.raw[sent:]).decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line]
    assert max(len(line) for line in lines[len(lines) // 2 :]) <= 60
    seen.type("\x03")
    assert seen.ended() == 75, seen.text
    assert "stopping  after this window, and saving (SIGINT)" in seen.text
    assert "stopped by SIGINT after" in seen.text and "Traceback" not in seen.text
    assert not seen.screen.cursor.hidden


def test_a_killed_run_leaves_the_terminal_usable(tmp_path, rows):
    """Nobody puts the terminal back: what follows has a cursor, echo and lines."""
    program, env = stand_in("accum-trainer")
    train = " ".join(map(str, [program, *SMALL, "--dataset-file", rows, "--epochs", "999"]))
    kill = 'while [ ! -s run/metrics.jsonl ]; do sleep 0.1; done; sleep 1; kill -9 "$pid"'
    shell = f'{train} & pid=$!; {kill}; wait "$pid"; stty -a; echo; echo "prompt \\$"'
    seen = Terminal(["bash", "-c", shell], env, tmp_path)
    assert seen.ended() == 0, seen.text
    assert not seen.screen.cursor.hidden
    assert seen.text.rstrip().endswith("prompt $")
    assert " echo" in seen.text and " icanon" in seen.text


def test_without_a_terminal_there_are_lines(train, tmp_path, rows):
    argv = ["--batch-size", "4", "--max-seq-len", "64", "--dataset-file", rows, "--steps", "20"]
    usual = train(*argv, "--output-dir", "a")
    assert usual.status == 0, usual.err
    lines = [line for line in usual.err.splitlines() if line.startswith("update ")]
    assert [line.split()[1] for line in lines] == [f"{n}/20" for n in range(2, 21, 2)]
    pattern = (
        r"update 18/20  loss [\d.]+  lr [\d.e-]+  norm [\d.]+  [\d,]+ tokens/s  0:\d\d:\d\d left"
    )
    assert re.fullmatch(pattern, lines[-2]), lines[-2]
    assert "\x1b" not in usual.err + usual.out
    asked = train(*argv, "--output-dir", "b", "--log-every", "7")
    shown = [line.split()[1] for line in asked.err.splitlines() if line.startswith("update ")]
    assert shown == ["7/20", "14/20", "20/20"]


def test_other_processes_are_silent(tmp_path, rows):
    ended = torchrun(2, "accum_trainer.train", *SMALL[1:], "--dataset-file", rows, "--steps", "4",
                     cwd=tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("update 4/4") == 1
    assert ended.stdout.count("done: 4 updates") == 1


def test_a_program_of_the_users_own_has_no_display(tmp_path, rows):
    code = (
        "from accum_trainer import TrainConfig\nfrom accum_trainer.train import updates\n"
        f"config = TrainConfig(cpu=True, steps=2, dataset_file={str(rows)!r}, output_dir='run')\n"
        "print([record['step'] for record in updates(config)])"
    )
    ended = script(code, tmp_path)
    assert ended.stdout == "[1, 2]\n" and "update 2/2" not in ended.stderr
