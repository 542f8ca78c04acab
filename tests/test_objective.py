"""What a loss sums over: found from the model, proven, or refused.

The truth is one float64 big batch under the model's own loss (`benchmarks/families.py`), or
arithmetic by hand.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accum_trainer import (
    AccumTrainerError,
    Accumulator,
    DataError,
    EngineError,
    TrainConfig,
    causal_lm_loss,
)
from accum_trainer.losses.objective import find_objective
from accum_trainer.train import updates
from benchmarks.families import LOOPS, cells_of, measure
from benchmarks.families_models import FAMILIES
from benchmarks.families_rows import VOCABULARY

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OWN, OURS, LOADER, _ = LOOPS
# One of each way to count, and of each architecture that the proof treats differently.
SHORT = {
    ("causal", "Llama"),
    ("causal", "Llama, LoRA"),
    ("causal", "Mixtral, router"),
    ("encoder-decoder", "T5"),
    ("masked", "BERT"),
    ("token classes", "Llama"),
    ("one class", "BERT, labels (B, 1)"),
    ("regression", "BERT"),
    ("several classes", "BERT"),
    ("answers", "BERT"),
    ("pictures", "ViT"),
    ("pictures", "ResNet"),
    ("segmentation", "Segformer, frozen norm"),
    ("speech", "wav2vec2"),
    ("speech", "wav2vec2, CTC mean"),
    ("speech", "Whisper"),
    ("pictures and text", "PaliGemma"),
    ("pictures and text", "Qwen2-VL"),
}
REFUSED = {
    ("answers", "BERT"): "padding changes this model's own loss",
    ("pictures", "ResNet"): "BatchNorm modules in train mode",
    ("speech", "wav2vec2"): "must divide it by something",
}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def short_table(request):
    """The short form of the table of families, in one process and in two."""
    families = [f for f in FAMILIES if (f.kind, f.name) in SHORT]
    assert len(families) == len(SHORT)
    asked = [cell for cell in cells_of(families) if cell[2] in (OWN, OURS)]
    return measure(asked, request.param)


def test_i38_i39_every_family_is_exact_or_refused(short_table):
    bad = [(c.kind, c.family, c.loop, c.error, c.failed) for c in short_table if not c.is_good]
    assert not bad


def test_i38_i39_the_models_own_mean_is_exact(short_table):
    """Only what must be refused is refused, with a message that names the reason."""
    for cell in short_table:
        if cell.loop == OWN:
            reason = REFUSED.get((cell.kind, cell.family))
            assert (reason in cell.refused) if reason else (cell.error is not None), cell


def test_i38_our_loss_is_exact_where_labels_shift_and_refused_elsewhere(short_table):
    shifts = {(f.kind, f.name) for f in FAMILIES if f.shifts}
    for cell in short_table:
        if cell.loop == OURS:
            assert (cell.error is not None) == ((cell.kind, cell.family) in shifts), cell


# --- the proof, on losses whose answer is known by hand ---


class Lookup(nn.Module):
    """Logits from a table, any loss: (logits, labels) -> loss."""

    def __init__(self, loss, classes: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(31, classes)
        self.dropout = nn.Dropout(0.5)
        self._loss = loss

    def forward(self, input_ids, labels=None):
        logits = self.dropout(self.table(input_ids))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": self._loss(logits, labels), "logits": logits}
        )


def mean(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def shifted(logits, labels):
    return mean(logits[:, :-1], labels[:, 1:])


def mean_of_means(logits, labels):
    return torch.stack(
        [mean(row, targets) for row, targets in zip(logits, labels, strict=True)]
    ).mean()


def weighted(logits, labels):
    return mean(logits, labels, weight=torch.linspace(0.1, 2, 11))


def entangled(logits, labels):
    return shifted(logits, labels) + 0.01 * logits.var()


def ids_and_labels(rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 11, (rows, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return {"input_ids": torch.randint(0, 31, labels.shape, generator=generator), "labels": labels}


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (mean, "mean over labels"),
        (shifted, "mean over shifted labels"),
        (lambda logits, labels: mean(logits, labels, reduction="sum"), "sum over labels"),
        (lambda logits, labels: shifted(logits, labels) + 0.7, "mean over shifted labels"),
        (mean_of_means, "mean over samples"),  # a sum over samples all the same
        (weighted, ""),
        (entangled, ""),
        (lambda logits, labels: shifted(logits, labels) * labels.numel(), ""),
    ],
)
def test_proof_tells_what_a_loss_is(loss, found):
    objective = find_objective(Lookup(loss), ids_and_labels())
    assert objective.describe().startswith(f"{found} (") if found else not objective.reduction


def test_proof_needs_no_lucky_batch():
    """A batch without targets, with one target, or of one sample proves as much as any other."""
    nothing, one = ids_and_labels(), ids_and_labels()
    nothing["labels"][:] = -100
    one["labels"][:] = -100
    one["labels"][2, 5] = 4
    single = {key: value[:1] for key, value in ids_and_labels().items()}
    for batch in (nothing, one, single):
        for loss, name in ((shifted, "shifted labels"), (mean, "labels")):
            model = Lookup(loss)
            # torch's mean over no target is nan. Only for transformers' models, which know -100,
            # are labels filled up.
            model.loss_function = None
            objective = find_objective(model, batch)
            assert (objective.reduction, objective.counting.name) == ("mean", name)


@pytest.mark.parametrize(("loss", "name"), [(shifted, "shifted labels"), (mean, "labels")])
def test_proof_holds_wherever_the_targets_of_a_batch_are(loss, name):
    """Every number of targets, 0 included, in each of three and four rows: masked prompts."""
    for rows in (3, 4):
        for numbers in itertools.product((0, 1, 4), repeat=rows):
            batch = ids_and_labels(rows, 8)
            labels = batch["labels"].clamp(min=0)
            for row, number in zip(labels, numbers, strict=True):
                row[: len(row) - number] = -100
            model = Lookup(loss)
            model.loss_function = None
            objective = find_objective(model, batch | {"labels": labels})
            assert (objective.reduction, objective.counting.name) == ("mean", name), numbers


def test_proof_of_the_users_own_count():
    weights = torch.linspace(0.1, 2, 11)

    def count(batch):
        labels = batch["labels"]
        return float(weights[labels[labels != -100]].sum())

    assert find_objective(Lookup(weighted), ids_and_labels(), count).reduction == "mean"
    assert find_objective(Lookup(mean), ids_and_labels(), count).reduction == ""


def test_proof_leaves_no_trace():
    model, batch = Lookup(mean), ids_and_labels()
    model.dropout.eval()
    kept = copy.deepcopy(batch)
    state = torch.get_rng_state()
    find_objective(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.dropout.training
    assert all(torch.equal(batch[key], kept[key]) for key in batch)
    assert model.table.weight.grad is None


# --- what a loop passes to backward ---


def train_one_window(model, batches, loss, **options):
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=len(batches), cpu=True)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for window in acc.windows(iter(batches), **options):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(*loss(model, batch))
        return acc.step(optimizer)


def own(model, batch):
    return (model(**batch)["loss"],)


def test_i38_a_mean_is_known_for_one_without_being_said():
    """The logged loss is the mean over all labels, by hand; a sum would be that over the number."""
    batches = [ids_and_labels(2, 5), ids_and_labels(2, 9)]
    model = Lookup(mean).eval()
    found = train_one_window(model, batches, own)
    logits = [model(b["input_ids"])["logits"].double() for b in batches]
    losses = [mean(x, b["labels"], reduction="sum") for x, b in zip(logits, batches, strict=True)]
    count = sum(int((b["labels"] != -100).sum()) for b in batches)
    assert found.num_targets == count
    assert found.loss == pytest.approx(float(sum(losses)) / count, rel=1e-6)


@pytest.mark.parametrize(
    ("model_loss", "loss", "says"),
    [
        (
            mean,
            lambda m, b: (m(**b)["loss"], "sum"),
            "reduction='sum', but the model's own loss is a mean over labels",
        ),
        (
            mean,
            lambda m, b: (m(**b)["loss"] * 2,),
            "the model's own loss, divided or multiplied by a number",
        ),
        (
            mean,
            lambda m, b: (m(**b)["loss"] + 1,),
            "neither causal_lm_loss nor what the model returned",
        ),
        (mean, lambda m, b: (m(**b)["loss"] + 1, "mean"), "it is not known what it averages over"),
        (
            mean,
            lambda m, b: (causal_lm_loss(m, b),),
            "shifts the labels by one, but this model's own loss is a mean",
        ),
        (
            shifted,
            lambda m, b: (causal_lm_loss(m, b), "mean"),
            "causal_lm_loss is a sum over targets",
        ),
        (entangled, own, "not known to be a mean over targets, for it is neither a mean nor a sum"),
        (
            entangled,
            lambda m, b: (m(**b)["logits"].sum(), "sum"),
            "it is not known how many targets it sums over",
        ),
    ],
)
def test_loss_that_is_not_what_it_seems_is_refused(model_loss, loss, says):
    class AsModelsAre(Lookup):
        def forward(self, input_ids, labels=None):
            outputs = super().forward(input_ids, labels)
            return Outputs(outputs) if labels is None else outputs

    class Outputs(dict):
        logits = property(lambda self: self["logits"])

    with pytest.raises((AccumTrainerError, DataError), match=says):
        train_one_window(AsModelsAre(model_loss), [ids_and_labels(2, 5)], loss)


def test_batch_norm_is_refused_unless_frozen_or_accepted():
    def model():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def attempt(model, **options):
        acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, cpu=True, **options)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for window in acc.windows(iter([torch.randn(2, 3)] * 2), count_targets=len):
            for x in window:
                with acc.accumulate(model):
                    acc.backward(model(x).sum(), reduction="sum")
            acc.step(optimizer)

    with pytest.raises(EngineError, match=r"1 BatchNorm modules in train mode \(1\)"):
        attempt(model())
    attempt(model(), allow_batch_norm=True)
    frozen = model()
    frozen[1].eval()
    attempt(frozen)


@pytest.mark.parametrize(
    "spectral", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_spectral_norm_is_refused_unless_frozen_or_accepted(spectral):
    def attempt(freeze=False, **options):
        acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, cpu=True, **options)
        model = nn.Sequential(spectral(nn.Linear(3, 4)), nn.Linear(4, 1))
        if freeze:
            model[0].eval()
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for window in acc.windows(iter([torch.randn(2, 3)] * 2), count_targets=len):
            for x in window:
                with acc.accumulate(model):
                    acc.backward(model(x).sum(), reduction="sum")
            acc.step(optimizer)

    with pytest.raises(EngineError, match="1 modules with spectral norm in train mode"):
        attempt()
    attempt(allow_batch_norm=True)
    attempt(freeze=True)


def test_labels_that_nobody_can_count_are_refused():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x)

    with pytest.raises(DataError, match="pass count_targets"):
        train_one_window(
            Logits(), [{"x": torch.randn(2, 3)}], lambda m, b: (m(b["x"]).sum(), "sum")
        )


# --- schedulers ---


@pytest.mark.parametrize("name", ["LinearLR", "StepLR"])
def test_scheduler_that_was_not_prepared_is_an_error(name):
    """StepLR(8) at K = 4 would change the rate at window ends only, each second one: its steps are
    seen, not its rate."""
    model = Lookup(mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_iters": 10} if name == "LinearLR" else {"step_size": 8}
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    model, prepared = acc.prepare(model, optimizer)
    with pytest.raises(
        AccumTrainerError, match="a scheduler that acc.prepare\\(\\) did not return"
    ):
        for batch in acc.batches(iter([ids_and_labels(2)] * 8)):
            with acc.accumulate(model):
                acc.backward(model(**batch)["loss"])
            prepared.step()
            scheduler.step()


def test_scheduler_that_steps_once_per_window_may_stay_unprepared():
    model = Lookup(mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=4, cpu=True)
    model, prepared = acc.prepare(model, optimizer)
    for window in acc.windows(iter([ids_and_labels(2)] * 8)):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(model(**batch)["loss"])
        acc.step(prepared)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


# --- a router's loss under `train` ---


def test_i48_router_loss_is_part_of_the_objective_under_train(tmp_path):
    """The norm of the first update, against one float64 batch under the model's own loss."""
    from accum_trainer.data.embedded import corpus_tokenizer

    tokenizer = corpus_tokenizer()
    family = next(f for f in FAMILIES if f.name == "Mixtral, router")
    config = copy.deepcopy(family.build().config)
    config.update(
        {"vocab_size": len(tokenizer), "router_aux_loss_coef": 0.5, "output_router_logits": False}
    )
    torch.manual_seed(0)
    model = type(family.build())(config)
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    assert len(tokenizer) != VOCABULARY
    rows = ["a b c d e", "to be or not", "one two three four five six", "x"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    ids = [
        [*tokenizer(row, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for row in rows
    ]
    longest = max(map(len, ids))
    filled = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])

    def norm(router: bool) -> float:
        exact = copy.deepcopy(model).double()
        outputs = exact(
            input_ids=filled,
            attention_mask=mask,
            labels=filled.masked_fill(mask == 0, -100),
            output_router_logits=router,
        )
        outputs.loss.backward()
        return float(
            torch.stack([p.grad.norm() for p in exact.parameters() if p.grad is not None]).norm()
        )

    for choice, router in (("auto", True), ("off", False)):
        trained = TrainConfig(
            model=str(tmp_path / "moe"),
            dataset_file=str(tmp_path / "rows.jsonl"),
            batch_size=4,
            steps=1,
            lr=1e-3,
            cpu=True,
            router_loss=choice,
            max_grad_norm=1e9,
            max_seq_len=32,
            output_dir=str(tmp_path / choice),
        )
        record = next(iter(updates(trained)))
        assert record["grad_norm"] == pytest.approx(norm(router), rel=2e-6)
        assert ("a router's loss" in (tmp_path / choice / "plan.json").read_text()) == router
    assert norm(True) != pytest.approx(norm(False), rel=1e-3)
