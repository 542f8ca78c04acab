"""`accum-trainer compare` and `report`: real runs, logs of other trainers, hostile folders."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import socket
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.train.loss_picture import draw_loss, thinned
from accum_trainer.train.records import read_records
from accum_trainer.train.run_lock import this_machine
from tests.browser import dom_of, needs_chromium
from tests.launching import cli
from tests.made_runs import small_llama

# B = 2 in all; R24 is measured with 100 updates by benchmarks/variance.py.
# Padded, K micro-batches are K; packed, fewer.
COMMON = (
    *("--cpu", "--batch-size", 2, "--max-seq-len", 32, "--lr", "1e-2", "--steps", 50),
    *("--layout", "padded"),
)
K = {"k1": 1, "k16": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of K = 1 and one of K = 16, on the embedded text."""
    folder, base = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(base)
    corpus_tokenizer().save_pretrained(base)
    for name, k in K.items():
        more = ("--gradient-accumulation-steps", k, "--output-dir", folder / name)
        ended = cli("train", *COMMON, "--model", base, *more)
        assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


def records(run):
    return read_records(run / "metrics.jsonl")


def by_hand(run):
    """The variance around the trend, where the updates are equally far apart."""
    losses = [record["loss"] for record in records(run)]
    return statistics.mean(
        (a / 2 - b + c / 2) ** 2 / 1.5
        for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)
    )


def cells(table, title):
    """The cells of one row of the printed table."""
    [line] = [line for line in table.splitlines() if line.startswith(f"{title}  ")]
    return re.split(r" {2,}", line.strip())[1:]


def test_r24_r38_the_larger_batch_halves_the_variance_in_table_and_picture(runs, tmp_path):
    files = ("--json", tmp_path / "all.json", "-o", tmp_path / "all.svg")
    said = cli("compare", runs / "k1", runs / "k16", *files)
    assert said.returncode == 0, said.stderr
    small, large = by_hand(runs / "k1"), by_hand(runs / "k16")
    fall = 1 - large / small
    assert fall >= 0.5

    found = json.loads((tmp_path / "all.json").read_text())
    assert found["baseline"] == "k1"
    assert [run["variance"] for run in found["runs"]] == pytest.approx([small, large])
    assert found["runs"][1]["variance_fall"] == pytest.approx(fall)
    low, high = found["runs"][1]["variance_fall_95"]
    assert low < fall < high and low >= 0.5
    assert found["runs"][1]["at_least_half"] == "yes"
    # 16 times the samples in as many updates: the first 100 samples would be 3 updates of k16.
    assert found["variance_range"]["axis"] == "updates"
    assert [run["samples"] for run in found["runs"]] == [100, 1600]
    for name, run in zip(K, found["runs"], strict=True):
        seconds = sum(record["step_time_sec"] for record in records(runs / name))
        assert run["seconds"] == pytest.approx(seconds)

    assert cells(said.stdout, "batch") == ["B 2 x K 1 x W 1 = 2", "B 2 x K 16 x W 1 = 32"]
    assert cells(said.stdout, "loss variance") == [f"{small:.3g}", f"{large:.3g}"]
    assert cells(said.stdout, "against the baseline") == ["-", f"{-fall:+.0%}"]
    assert "baseline: k1 (the smallest effective batch, 2)" in said.stdout
    assert re.search(rf"k16: loss variance lower by {fall:.0%} .* 50% lower: yes", said.stdout)

    drawn = " ".join(ElementTree.parse(tmp_path / "all.svg").getroot().itertext())
    assert f"({-fall:+.0%})" in drawn.replace("−", "-") and "(baseline)" in drawn
    for axis in ("optimizer updates", "samples", "seconds of training"):
        assert axis in drawn
    assert "k16: B 2 x K 16 x W 1 = 32" in drawn


def test_a_folder_of_runs_another_baseline_and_the_samples_that_all_have_seen(runs, tmp_path):
    said = cli("compare", runs, "--baseline", "2", "--json", "all.json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"k1: loss variance higher by \d+% .* 50% lower: no", said.stdout)
    again = cli("compare", runs, "--no-picture", "--json", "all.json", cwd=tmp_path)
    assert again.returncode == 0 and "picture" not in again.stdout
    assert json.loads((tmp_path / "all.json").read_text())["baseline"] == "k1"  # replaced
    on_samples = cli("compare", runs, "--no-picture", "--axis", "samples", cwd=tmp_path)
    assert "samples up to 100 of each run (chosen)" in on_samples.stdout
    assert "k16: no variance to compare" in on_samples.stdout  # of three updates


def test_logs_of_other_trainers_beside_a_run(runs, tmp_path):
    """A log every 5 updates with bad lines, NaN, a gap and a restart, still being written."""
    rows = [{"step": 5 * n, "loss": 9 - n / 10, "lr": 1e-4} for n in range(1, 31)]
    lines = [json.dumps(row) for row in rows]
    lines[3], lines[7] = "Traceback (most recent call last):", '{"step": 40, "loss": NaN}'
    del lines[20:22]
    lines += [json.dumps({"step": 145, "loss": 6.1}), '{"step": 150, "lo']
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    said = cli("compare", "theirs.jsonl", runs / "k16", "--no-picture", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert cells(said.stdout, "updates") == ["145", "50"]
    assert cells(said.stdout, "samples") == ["-", "1,600"]
    assert "loss at 50 updates" in said.stdout and "loss at 1" not in said.stdout
    for note in (
        "lines that are no JSON object: 1",
        "losses that are not finite or beyond 1e15: 1",
        "a record every 5 updates",
        "goes back to an earlier step, to 145",
        "baseline: theirs (named first; not all logs tell their batch)",
    ):
        assert note in said.stdout
    told = cli(
        *("compare", "theirs.jsonl", runs / "k16", "--no-picture"),
        *("--effective-batch-size", "4,32"),
        cwd=tmp_path,
    )
    assert cells(told.stdout, "samples") == ["580", "1,600"]
    assert "baseline: theirs (the smallest effective batch, 4)" in told.stdout


class Elements(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_report_of_a_run_has_its_figures_and_loads_nothing(runs):
    said = cli("report", runs / "k16")
    assert said.returncode == 0, said.stderr
    text = (runs / "k16" / "report.html").read_text()
    page = Elements(text)
    words = " ".join(" ".join(page.text).split())
    for part in (
        *("B 2 x K 16 x W 1 = 32", "single on cpu", "embedded (content", "mean over shifted"),
        *(" parameters ", " trained of ", "torch", "by samples", "Learning rate"),
        *(
            "options differ from their defaults",
            "gradient_accumulation_steps 16",
            "None: every window gave",
        ),
        f"last loss {records(runs / 'k16')[-1]['loss']:.4f}",
    ):
        assert part in words, part
    # No script, and no address but of parts of the page itself.
    assert not {"script", "img", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "default-src 'none'" in text
    again = cli("report", runs / "k16")  # its own file is replaced
    assert again.returncode == 0


LOCK = {
    "host": socket.gethostname(),
    "machine": this_machine(),
    "process": 1,
    "started": 1,
    "since": "now",
}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "ended without a result"),
        ({"run.lock": LOCK | {"host": "another"}}, "training"),
        ({"run.lock": LOCK | {"process": 1 << 30}}, "no sign of life"),
        ({"result.json": {"done": False, "stopped_by": "SIGTERM"}}, "stopped by SIGTERM"),
        ({"result.json": "{", "config.yaml": "lr: [1"}, "ended without a result"),
    ],
)
def test_report_of_a_run_that_trains_or_was_cut_off(runs, tmp_path, files, state):
    run = tmp_path / "run"
    shutil.copytree(runs / "k1", run, ignore=shutil.ignore_patterns("checkpoints", "model"))
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    for name, content in files.items():
        (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    said = cli("report", run)
    assert said.returncode == 0, said.stderr
    words = " ".join(" ".join(Elements((run / "report.html").read_text()).text).split())
    assert re.search(rf"run {state} update 2\d,", words), words[:200]
    for name in ("result.json", "config.yaml"):
        assert (f"{name} cannot be read" in words or f"{name} line 1 is not YAML" in words) == (
            files.get(name) in ("{", "lr: [1")
        )


HOSTILE = "<img src=x onerror=\"document.title='RAN'\">"
SCRIPT = "</style></script><script>document.title='RAN'</script>"


@pytest.fixture
def hostile(runs, tmp_path):
    """A run whose every text wants to become a part of the page, and whose name is a formula; its
    configuration is a link to another file."""
    run = tmp_path / f"_$\\frac{{${HOSTILE}"
    run.mkdir()
    plan = json.loads((runs / "k1" / "plan.json").read_text())
    plan |= {"model": SCRIPT, "engine": HOSTILE, "data": [SCRIPT, HOSTILE], HOSTILE: {SCRIPT: 1}}
    plan |= {"versions": {SCRIPT: HOSTILE}, "resumed_from": SCRIPT, "num_samples": "many"}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "result.json").write_text(json.dumps({"stopped_by": SCRIPT}))
    secret = tmp_path / "secret.yaml"
    secret.write_text("token: hunter2\n")
    (run / "config.yaml").symlink_to(secret)
    rows = records(runs / "k1")
    rows.insert(5, rows[4] | {"skipped": True, "skip_reason": SCRIPT})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_hostile_text_stays_text(runs, hostile, tmp_path):
    said = cli("report", hostile, runs / "k16", "-o", tmp_path / "both.html")
    assert said.returncode == 0, said.stderr
    text = (tmp_path / "both.html").read_text()
    page = Elements(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    words = " ".join(page.text)
    assert SCRIPT in words and HOSTILE in words  # shown as they are
    assert hostile.name in words  # in legends too, though it begins with an underscore
    assert "hunter2" not in text and "is a link to" in words
    picture = cli("compare", hostile, runs / "k16", "-o", tmp_path / "both.svg")
    assert picture.returncode == 0, picture.stderr
    assert "_$\\frac{$" in "".join(ElementTree.parse(tmp_path / "both.svg").getroot().itertext())


def framed(page):
    """A frame of a phone's width around a page that may run scripts."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    return f'<iframe width="390" height="800" srcdoc="{html.escape(text)}"></iframe>'


@needs_chromium
def test_a_browser_runs_nothing_of_it_and_it_fits_a_phone(runs, hostile, tmp_path):
    """Without the page's own policy, so that the escaping alone is seen; a page with a real script
    beside it shows that one would run."""
    cli("report", hostile, runs / "k16", "-o", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text().replace("<details>", "<details open>")
    bad = text.replace("<main>", f"<main>{HOSTILE}")
    guarded = bad.replace("<h1>", "<h1>guarded ")
    measure = (
        "<script>onload = () => setTimeout(() => { document.title = JSON.stringify("
        "[...document.querySelectorAll('iframe')].map(({contentDocument: page}) => "
        "[page.title, page.documentElement.scrollWidth, page.querySelectorAll('svg').length, "
        "[...page.querySelectorAll('figure svg')].filter(one => one.getBoundingClientRect().width)"
        ".length])) }, 500)</script>"
    )
    own_policy = f'<iframe width="390" srcdoc="{html.escape(guarded)}"></iframe>'
    (tmp_path / "frames.html").write_text(framed(text) + framed(bad) + own_policy + measure)
    title = re.search(r"<title>(\[.*?\])</title>", dom_of(tmp_path / "frames.html"))[1]
    mine, run, refused = json.loads(html.unescape(title))
    assert mine[0] == "2 runs compared"
    assert run[0] == "RAN"  # the control
    assert refused[0] == "2 runs compared"  # the policy alone is enough, too
    assert mine[1] <= 390
    assert mine[2] >= 20
    assert mine[3] == 1  # one axis in one width is seen


def test_loss_png_takes_any_name_and_loses_no_spike(tmp_path):
    rows = [
        {"step": n, "skipped": n == 3, "loss": None if n == 5 else 9.0 - n, "lr": 1e-3}
        | ({"eval_loss": 4.0} if n == 4 else {})
        for n in range(1, 8)
    ]
    names = ["_hidden", "$\\frac{$", "日本 <b>"]
    draw_loss(dict.fromkeys(names, rows), tmp_path / "loss.svg", "a_$\\title{$")
    drawn = "".join(ElementTree.parse(tmp_path / "loss.svg").getroot().itertext())
    for text in [*names, *(f"{name}, evaluation" for name in names), "a_$\\title{$"]:
        assert text in drawn
    y = np.zeros(100_000)
    y[77_777], y[5] = 9, -4
    x, kept = thinned(np.arange(100_000), y, 100)
    assert len(x) <= 100 and (kept.max(), kept.min()) == (9, -4)
    assert x[kept.argmax()] == 77_777


@pytest.mark.long
def test_a_million_records_take_bounded_time_and_memory(runs, tmp_path):
    row = records(runs / "k1")[0]
    with open(tmp_path / "big.jsonl", "w") as file:
        for step in range(1, 1_000_001):
            row |= {"step": step, "loss": 3 + (step % 7) / 10 + 5 * (step == 500_000)}
            file.write(json.dumps(row) + "\n")
    said = cli("report", "big.jsonl", "-o", "big.html", cwd=tmp_path, timeout=240)
    assert said.returncode == 0, said.stderr
    assert os.path.getsize(tmp_path / "big.html") < 3_000_000
    assert "at step 500000" in (tmp_path / "big.html").read_text()
