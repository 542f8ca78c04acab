"""`verify`: right trainings and loops pass on every engine, and each planted fault fails by its
name."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from accum_trainer import Accumulator, BatchPlan, DataError
from accum_trainer.cli import main
from accum_trainer.verify.big_batch import dropout_off
from accum_trainer.verify.loop import verify_loop
from accum_trainer.verify.loop_update import Update, measure_movement, update_check
from accum_trainer.verify.loop_windows import windows_for
from accum_trainer.verify.training import Subject, verify
from tests.grids import thinned
from tests.launching import ROOT, cli, python, torchrun
from tests.reference import make_model, make_rows, pad

# Two processes of several threads each would fight for few cores.
ONE_THREAD = {"OMP_NUM_THREADS": 1}
FAULTY = "tests/verify_loops/faults.py"
SMALL = (
    "--cpu",
    "--batch-size",
    2,
    "--gradient-accumulation-steps",
    4,
    "--max-seq-len",
    64,
    "--windows",
    2,
)


def checks_of(report: dict) -> dict[str, dict]:
    return {check["name"]: check for check in report["checks"]}


def failed(report: dict) -> list[str]:
    return [check["name"] for check in report["checks"] if check["result"] == "FAIL"]


def line_of(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(name))


# --- the package's own loop, on every engine ---


def test_single_process_and_its_report(tmp_path):
    options = ["--json", "report.json", "--use-peft", "--lora-dropout", "0.1"]
    run = cli("verify", *SMALL, *options, cwd=tmp_path, **ONE_THREAD)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], (
        "something else was written"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    checks = checks_of(report)
    assert report["passed"]
    assert report["subject"]["engine"] == "single"
    for name in ("update = one big batch", "tail window", "logged loss"):
        assert checks[name]["result"] == "PASS"
        assert 0 < checks[name]["error"] <= 2e-6 == checks[name]["tolerance"]
    assert "28 modules" in checks["dropout"]["meaning"]
    assert "PASS" in line_of(run.stdout, "separable loss")
    assert run.stdout.splitlines()[-1] == "PASS: 5 checks passed, 0 failed"


def test_ddp_exchanges_once():
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--main_process_port",
        0,
    )
    run = python(*launcher, "-m", "accum_trainer.verify", *SMALL, **ONE_THREAD)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ddp on cpu" in line_of(run.stdout, "engine in force")
    assert "counted: 1 per window" in line_of(run.stdout, "gradient exchanges")
    assert "PASS" in line_of(run.stdout, "equal weights")
    assert run.stdout.count("engine in force") == 1, "one process speaks"


@pytest.mark.parametrize("stage", thinned(["zero1", "zero2", "zero3"], ["zero2"]))
def test_zero(stage):
    run = torchrun(2, "accum_trainer.verify", *SMALL, "--zero-stage", stage, **ONE_THREAD)
    assert run.returncode == 0, run.stdout + run.stderr
    assert stage in line_of(run.stdout, "engine in force")
    assert "clipped once" in line_of(run.stdout, "norm and clipping")


@pytest.mark.long
def test_fsdp2_in_bf16():
    options = {"ACCELERATE_USE_FSDP": "true"} | ONE_THREAD
    run = torchrun(2, "accum_trainer.verify", *SMALL, "--mixed-precision", "bf16", **options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "fsdp2 on cpu, precision bf16" in line_of(run.stdout, "engine in force")
    assert "times what one big batch in bf16 is off" in line_of(
        run.stdout, "update = one big batch"
    )
    assert run.stdout.count("off, one big batch in bf16") == 4 + 4, (
        "each window and each tail is shown"
    )


@pytest.mark.parametrize("source", ["environment", "deepspeed"])
def test_i23_sources_of_k_that_differ_are_wrong_input(source, tmp_path):
    if source == "environment":
        run = cli("verify", *SMALL, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8)
    else:
        (tmp_path / "ds.json").write_text(
            json.dumps({"gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2}})
        )
        launcher = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": tmp_path / "ds.json",
        }
        run = torchrun(1, "accum_trainer.verify", *SMALL, **launcher)
    assert "gradient_accumulation_steps=4" in run.stderr
    assert "=8" in run.stderr
    assert run.returncode != 0
    if source == "environment":  # torchrun makes every status 1
        assert run.returncode == 2


# --- trainings that cannot be right, through Python ---


def subject_of(make, rows=None, **options) -> Subject:
    rows = rows or make_rows(14)
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=3, cpu=True, **options)
    plain = make()
    model, optimizer = acc.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    return Subject(acc, model, optimizer, acc.windows(rows, collate_fn=pad), rows, make)


class Layered(torch.nn.Module):
    """Embedding, one layer of the caller's, and a head; returns logits."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = torch.nn.Embedding(97, 8), layer, torch.nn.Linear(8, 97)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        return self.head(self.layer(hidden.transpose(1, 2)).transpose(1, 2))


class Noise(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rand_like(hidden)


class AcrossRows(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (lambda: torch.nn.BatchNorm1d(8), "1 BatchNorm modules (layer)"),
        (AcrossRows, "an in-batch loss"),
        (Noise, "draws random numbers besides dropout"),
    ],
)
def test_model_that_nobody_can_split_is_named(layer, cause, fresh_accelerate):
    report = verify(subject_of(lambda: Layered(layer()))).to_dict()
    assert "separable loss" in failed(report)
    assert cause in checks_of(report)["separable loss"]["meaning"]


def test_dropout_is_put_off_and_back_on(fresh_accelerate):
    subject = subject_of(lambda: Layered(torch.nn.Dropout(0.3)))
    report = verify(subject)
    assert report.passed, report
    assert any("1 modules" in check.meaning for check in report.checks if check.name == "dropout")
    assert subject.model.layer.p == 0.3
    with dropout_off(make_model("gpt2")) as modules:
        assert modules == 0


def test_gradient_that_is_wrong_in_one_parameter_names_it(fresh_accelerate):
    subject = subject_of(lambda: make_model("llama"))
    subject.model.lm_head.weight.register_hook(lambda gradient: gradient * 1.001)
    report = verify(subject).to_dict()
    assert "update = one big batch" in failed(report)
    assert "lm_head.weight" in checks_of(report)["update = one big batch"]["meaning"]
    assert checks_of(report)["logged loss"]["result"] == "PASS"


@pytest.mark.parametrize("factor", [1.0, 1.0045])
def test_low_precision_is_judged_by_the_root_mean_square_over_windows(factor, fresh_accelerate):
    """A weight 0.45 percent too large is 1.7 times what one big batch in bf16 is off, in every
    window."""
    subject = subject_of(lambda: make_model("llama"), mixed_precision="bf16")
    for p in subject.model.parameters():
        p.register_hook(lambda gradient: gradient * factor)
    report = verify(subject, windows=1).to_dict()
    checks = checks_of(report)
    for name in ("update = one big batch", "tail window"):
        check = checks[name]
        lines = [line.split() for line in check["details"]]
        assert [line[0] for line in lines] == ["window"] * 4
        squares = [
            sum(float(line[place].strip(",")) ** 2 for line in lines) / 4 for place in (2, 9)
        ]
        assert check["error"] == pytest.approx(squares[0] ** 0.5, rel=0.01)
        assert check["tolerance"] == pytest.approx(1.1 * squares[1] ** 0.5, rel=0.01)
        assert check["result"] == ("PASS" if factor == 1 else "FAIL"), check
        assert check["error"] < 2 * squares[1] ** 0.5, "a bound of 2 would let it pass"


def test_i31_gradient_that_is_clipped_wrongly(fresh_accelerate):
    """Something after the clip scales what the optimizer gets: seen there, where the update is
    made."""
    subject = subject_of(lambda: make_model("llama"), max_grad_norm=0.5)

    def halve(optimizer, *_):
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(0.5)

    subject.optimizer.optimizer.register_step_pre_hook(halve)
    assert failed(verify(subject).to_dict()) == ["norm and clipping"]


def test_rows_without_a_target_are_refused(fresh_accelerate):
    with pytest.raises(DataError, match="none of the 4 samples has a target"):
        verify(subject_of(lambda: make_model("llama"), make_rows(4, all_masked=(0, 1, 2, 3))))


# --- loops of others ---

RIGHT = [
    "update",
    "update_clipped",
    "update_by_hand",
    "update_clipped_by_a_hook",
    "update_in_a_closure",
    "update_with_its_own_rate",
]
# loop -> (check that fails, what it says)
# The faults of docs/verify.md, for one process and for two.
FAULTS_OF_ANY = {
    "mean_of_means": ("ragged window", "mean of means"),
    "own_loss_of_the_model": ("ragged window", "mean of means"),
    "counts_first_labels": ("ragged window", "first labels are counted"),
    "weighs_by_first_labels": ("ragged window", "first labels are weighed"),
    "means_over_first_labels": (
        "ragged window",
        "however many targets it holds AND first labels are counted",
    ),
    "zero_over_zero": ("a micro-batch without a target", "a mean over no target is 0/0"),
    "divided_by_k_twice": ("ragged window", "division by K twice"),
    "tail_divided_by_k": ("tail window", "the tail is divided by K"),
    "summed_over_micro_batches": ("ragged window", "summed, not averaged, over micro-batches"),
    "clip_per_micro_step": ("ragged window", "clip per micro-step"),
    "clipped_to_another_norm": (
        "ragged window",
        "its norm is 0.01; a loop may clip to max_grad_norm=0.3",
    ),
    "too_long": ("ragged window", "right direction but 1.7 times the right length"),
    "scheduler_per_micro_step": (
        "scheduler per update",
        "scheduler stepped per micro-step: 3 times",
    ),
    "step_per_micro_batch": ("one optimizer step", "steps per micro-batch, so nothing accumulates"),
    "zero_grad_per_micro_step": ("ragged window", "zero_grad per micro-step"),
    "no_zero_grad": ("tail window", "zero_grad is missing"),
    "accumulated_in_bf16": ("ragged window", "accumulated in bf16"),
    "scheduler_before_optimizer": (
        "update = lr x gradient",
        "0.9 times as far: scheduler.step() runs before optimizer.step()",
    ),
    "rate_per_micro_batch": (
        "update = lr x gradient",
        "0.729 times as far: the learning rate at the step is 0.0729, the schedule's after 3 "
        "updates, and the schedule has 0.1 there",
    ),
    "rate_times_micro_batches": (
        "update = lr x gradient",
        "3 times as far: the learning rate at the step is 0.3, and the schedule has 0.1 there",
    ),
    "decays_weights_by_hand": (
        "update = lr x gradient",
        "the weights are also multiplied by 0.5",
    ),
    "update_thrown_away": (
        "update = lr x gradient",
        "0 times as far: the update is thrown away",
    ),
    "second_optimizer": (
        "update = lr x gradient",
        "2 times as far: the gradient is applied 2 times",
    ),
    "moves_one_weight": (
        "update = lr x gradient",
        "most of the difference is in lm_head.weight",
    ),
    "hook_changes_gradient": (
        "ragged window",
        "right when optimizer.step() begins and wrong when it ends",
    ),
    "cuts_long_rows": ("a long row", "only this window has a row of 120 tokens"),
    "wrong_after_first_calls": (
        "ragged window again",
        "the same window was right in an earlier call",
    ),
    "wrong_in_its_own_way": ("ragged window", "none of the known faults"),
    "does_nothing": ("ragged window", "the optimizer stepped 0 times"),
    "model_that_nobody_can_split": ("separable loss", "1 BatchNorm modules (norm)"),
}
FAULTS_OF_TWO = FAULTS_OF_ANY | {
    "normalised_per_rank": ("uneven ranks", "normalised per rank"),
    "per_rank_over_first_labels": (
        "uneven ranks",
        "all ranks have the same weight AND first labels are counted",
    ),
    "not_times_processes": ("ragged window", "not multiplied by the number of processes"),
    "left_out_of_the_exchange": ("equal weights", "hold different weights of model.norm.weight"),
    "never_exchanged": ("equal weights", "left out of the exchange"),
    "steps_on_the_main_process_only": (
        "one optimizer step",
        "1 times on rank 0, 0 times on rank 1",
    ),
    "training_that_parts_the_ranks": ("equal weights", "hold different weights of lm_head.weight"),
}


# Loops that fail one check, at any number of processes.
ONLY = {
    loop: check
    for loop, (check, _) in FAULTS_OF_ANY.items()
    if check in ("update = lr x gradient", "a long row")
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """processes -> loop -> report; one process and one launch for all of them."""
    out = tmp_path_factory.mktemp("loops")
    worker = "tests.verify_loops.worker"
    one = python("-m", worker, out / "1.json", *RIGHT, *FAULTS_OF_ANY, **ONE_THREAD)
    assert one.returncode == 0, one.stderr[-4000:]
    two = torchrun(2, worker, out / "2.json", *RIGHT, *FAULTS_OF_TWO, **ONE_THREAD)
    assert two.returncode == 0, two.stderr[-4000:]
    return {processes: json.loads((out / f"{processes}.json").read_text()) for processes in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("loop", RIGHT)
def test_right_loop_passes(loop, processes, reports):
    report = reports[processes][loop]
    assert report["passed"], failed(report)
    windows = [check for check in report["checks"] if check["error"] is not None]
    assert len(windows) == 6 + processes, "separability, every window and the update were measured"
    assert all(check["error"] <= check["tolerance"] for check in windows)


@pytest.mark.parametrize(
    ("processes", "loop"),
    [(1, loop) for loop in FAULTS_OF_ANY] + [(2, loop) for loop in FAULTS_OF_TWO],
)
def test_fault_is_named(processes, loop, reports):
    report = reports[processes][loop]
    name, phrase = FAULTS_OF_TWO[loop]
    assert not report["passed"]
    assert name in failed(report)
    assert phrase in checks_of(report)[name]["meaning"]


def test_fault_shows_the_right_formula_and_the_weights_found(reports):
    details = checks_of(reports[1]["divided_by_k_twice"])["ragged window"]["details"]
    assert details[:2] == [
        "right: weight = gradient_divisor / N for every micro-batch's summed loss, N = targets of "
        "the whole window",
        "loop:  g / K",
    ]
    assert len(details) == 2 + 3
    assert all("weight found   0.3333 / N, right 1 / N" in line for line in details[2:])


def test_one_fault_is_not_taken_for_another(reports):
    """A loop whose only fault is in the tail, or in the scheduler, passes every other check."""
    assert failed(reports[1]["tail_divided_by_k"]) == ["tail window"]
    assert failed(reports[1]["scheduler_per_micro_step"]) == ["scheduler per update"]
    for processes, (loop, check) in itertools.product((1, 2), ONLY.items()):
        assert failed(reports[processes][loop]) == [check], (processes, loop)
    assert failed(reports[2]["left_out_of_the_exchange"]) == ["equal weights"]
    assert failed(reports[2]["training_that_parts_the_ranks"]) == ["equal weights"]
    tail = checks_of(reports[1]["mean_of_means"])["tail window"]["meaning"]
    assert "mean of means" in tail
    assert "AND the tail is divided by K" in tail


def test_update_is_shown_beside_the_right_one(reports):
    check = checks_of(reports[1]["decays_weights_by_hand"])["update = lr x gradient"]
    assert check["details"][:3] == [
        "right: weights = start - lr(u) * g, g the gradient at the optimizer's step",
        "  ragged window: weights = 0.5 * start - 0.05 * g, right start - 0.1 * g",
        "  tail window: weights = 0.5 * start - 0.045 * g, right start - 0.09 * g",
    ]


def test_a_small_weight_decay_is_shown_with_its_size():
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 50, generator=generator)
    after = start - 0.1 * (gradient + 1e-4 * start)
    movement = measure_movement({"w": start}, {"w": after}, {"w": gradient})
    check = update_check([Update("ragged window", movement, 0, 0, 1, 0.1)], lambda _: 0.1)
    assert "the weights are also multiplied by (1 - 1e-05)" in check.meaning
    assert "weights = (1 - 1e-05) * start - 0.1 * g" in check.details[1]


def test_rate_that_the_loop_sets_is_said_and_not_judged(reports):
    check = checks_of(reports[1]["update_with_its_own_rate"])["update = lr x gradient"]
    assert check["result"] == "PASS"
    assert "the rates are not judged: 0, 0.02, 0.04, 0.06, 0.08" in check["meaning"]


def test_command_names_the_fault_of_a_loop():
    loop = "tests/verify_loops/faults.py:mean_of_means"
    run = cli("verify", "--loop", loop, *SMALL, **ONE_THREAD)
    assert run.returncode == 1, run.stderr
    assert "FAIL" in line_of(run.stdout, "ragged window")
    assert "mean of means: every micro-batch has the same weight" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("FAIL: ")
    assert "Traceback" not in run.stderr


@pytest.mark.long
def test_loop_in_low_precision(fresh_accelerate):
    """A right loop passes, one that is 6 percent off in every window fails by its fault's name."""
    from accum_trainer.verify.plain_accelerate import plain_engine
    from tests.verify_loops import correct, faults

    engine = plain_engine(3, cpu=True, mixed_precision="bf16")
    arguments = (engine, lambda: make_model("llama"), make_rows(40), BatchPlan(2, 3))
    report = verify_loop(correct.update, *arguments).to_dict()
    assert report["passed"], failed(report)
    for name in ("ragged window", "tail window", "a long row", "ragged window again"):
        assert len(checks_of(report)[name]["details"]) == 4, "each window of its kind is shown"
    report = verify_loop(faults.update_thrown_away, *arguments).to_dict()
    assert failed(report) == ["update = lr x gradient"]
    report = verify_loop(faults.counts_first_labels, *arguments).to_dict()
    assert "first labels are counted" in checks_of(report)["ragged window"]["meaning"]


@pytest.mark.parametrize("processes", [1, 2])
def test_model_that_nobody_can_split_is_all_that_is_judged(processes, reports):
    assert failed(reports[processes]["model_that_nobody_can_split"]) == ["separable loss"]


def test_i50_loop_that_counts_first_labels_fails_in_every_window(reports):
    """N in place of N + F, F rows with a first label, makes the gradient N / (N + F) of the right
    one."""
    for processes, count in ((1, 5), (2, 6)):
        report = reports[processes]["counts_first_labels"]
        assert len(failed(report)) == count, failed(report)
        for name in failed(report):
            check = checks_of(report)[name]
            assert check["meaning"].startswith("first labels are counted"), check["meaning"]
            assert " AND " not in check["meaning"] and "; or " not in check["meaning"]
            # The weights found are all the same, 1 - error of the right ones.
            lines = [line for line in check["details"] if "weight found" in line]
            weights = {line.split("weight found")[1].split("/")[0].strip() for line in lines}
            assert weights == {f"{1 - check['error']:.4f}"}, (weights, check["error"])


def test_i50_every_window_has_rows_with_a_first_label_and_without():
    """In numbers that differ between micro-batches and ranks, at any K and W; no target and no loss
    changes."""
    rows = make_rows(40)
    for steps, ranks in itertools.product((2, 3, 4), (1, 2, 3)):
        for window in windows_for(rows, BatchPlan(2, steps, ranks)):
            firsts = [
                [[row["labels"][0] != -100 for row in rows] for rows in rank]
                for rank in window.ranks
            ]
            assert any(map(any, itertools.chain(*firsts))), window.name
            if max(map(len, firsts)) > 1:
                counts = [sum(micro_batch) for micro_batch in firsts[0]]
                assert 0 in counts and max(counts) > 0, (window.name, counts)
            per_rank = [sum(map(sum, rank)) for rank in firsts]
            assert ranks == 1 or len(set(per_rank)) > 1, (window.name, per_rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loop", "no_such.py:update"], "there is no file no_such.py"),
        (["--loop", "update"], "give FILE.py:function"),
        (["--loop", f"{__file__}:nothing"], "has no function nothing; it has "),
        (
            ["--loop", "tests/verify_loops/correct.py:update", "--batch-size", "2"],
            "accumulates nothing",
        ),
        (
            ["--loop", f"{FAULTY}:takes_too_few"],
            "takes_too_few(accelerator, model, optimizer, batches) cannot be called with "
            "(accelerator, model, optimizer, scheduler, batches): too many positional arguments",
        ),
        (["--loop", f"{FAULTY}:takes_too_many"], "missing a required argument: 'steps'"),
        (["--loop", f"{FAULTY}:wants_a_keyword"], "missing a required"),
        (
            ["--loop", f"{FAULTY}:takes_another_order"],
            "its parameter 1 is model, not accelerator",
        ),
        (["--json", "no/such/folder/report.json"], "there is no folder no/such/folder"),
        (["--windows", "0"], "--windows"),
        (["--batch-size", "0"], "batch_size=0"),
    ],
)
def test_wrong_input_is_one_message(options, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--cpu", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_loop_that_raises_is_one_message():
    """Its file, line and words; on two processes also where one of them alone raises, and nothing
    hangs."""
    run = cli("verify", "--loop", f"{FAULTY}:raises", *SMALL, **ONE_THREAD)
    assert run.returncode == 2, run.stderr
    line = next(
        n
        for n, text in enumerate((ROOT / FAULTY).read_text().splitlines(), 1)
        if 'batch["attention"]' in text
    )
    errors = [text for text in run.stderr.splitlines() if text.startswith("error")]
    assert len(errors) == 1
    assert f"faults.py:{line}: KeyError: 'attention'" in errors[0]
    assert "Traceback" not in run.stderr
    run = torchrun(
        2, "accum_trainer.verify", "--loop", f"{FAULTY}:raises_on_one_rank", *SMALL, **ONE_THREAD
    )
    assert run.returncode != 0
    assert "error (process 1): the loop raised in its ragged window" in run.stderr
    assert "ValueError: only here" in run.stderr


def test_help_does_not_import_torch():
    program = (
        "import atexit, sys; atexit.register(lambda: print('HEAVY', 'torch' in sys.modules));"
        "from accum_trainer.cli import main; main(['verify', '--help'])"
    )
    run = python("-c", program)
    assert run.returncode == 0, run.stderr
    assert "--loop" in run.stdout
    assert "HEAVY False" in run.stdout
