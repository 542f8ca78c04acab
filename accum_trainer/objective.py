"""What a model's own loss sums over, found on the model and proven on one real batch.

transformers' models agree on a keyword, `labels`, and on little else: causal models shift them,
encoder-decoders and taggers do not, some losses average over samples, some are sums, a router adds
a term of its own. So nothing is read off a class name. A few forwards without a gradient, on a
batch whose halves hold unequal numbers of targets, tell which count n satisfies

    n(batch) * loss(batch) = n(half 1) * loss(half 1) + n(half 2) * loss(half 2)

for a mean, or the same without n for a sum. For integer labels the halves are also made by hiding
labels alone: then the logits are equal to the bit, and a 16-bit model is judged as sharply as a
float32 one. What satisfies neither cannot be cut, and is refused. Knows no engine and no window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accum_trainer.data.halving import halve
from accum_trainer.data.tokenizing import IGNORE
from accum_trainer.data.windows import Batch, is_packed, num_samples
from accum_trainer.errors import DataError
from accum_trainer.head import cross_entropy, undisturbed
from accum_trainer.outputs import own_loss, router_coefficient, router_loss
from accum_trainer.targets import SHIFTED, Counting, CountTargets, countings_of

MEAN, SUM = "mean", "sum"
REMEDY = "pass count_targets=function(batch) -> number of terms that your loss averages over"
# Relative. A forward of half the samples rounds differently; hidden labels change the loss alone.
_FLOAT32, _SIXTEEN_BIT = 1e-5, 3e-2
_FEWEST_TARGETS = 6  # of a batch whose labels are hidden in parts
_MORE_PADDING = 3  # columns, to see whether they change the loss
_ROUTER_TERMS = ("aux_loss", "z_loss", "encoder_aux_loss", "decoder_aux_loss")


@dataclass(frozen=True)
class Objective:
    """What a window's loss sums over.

    Attributes:
        counting: how targets are counted.
        reduction: what the model's own loss is over them, `mean` or `sum`; "" if that is not
            proven.
        reason: what the proof rests on, or why there is none.
        has_router_term: the model's own loss holds `router_coefficient * aux_loss` besides.
        one_length: padding changes the model's own loss, which is then the same in every cut only
            if all batches have this many columns; 0 if padding changes nothing.
        is_only_way: no other way of counting is known for such labels.
    """

    counting: Counting
    reduction: str = ""
    reason: str = ""
    has_router_term: bool = False
    one_length: int = 0
    is_only_way: bool = False

    @property
    def verdict(self) -> str:
        """What all processes must have found alike."""
        return f"{self.reduction} over {self.counting.name}, {self.has_router_term}, {self.one_length}"

    def describe(self) -> str:
        """One line for the record."""
        if not self.reduction:
            return f"targets counted as {self.counting.name}; the model's own loss: {self.reason}"
        router = ", and a router's loss per micro-batch" if self.has_router_term else ""
        length = f", all batches {self.one_length} columns wide" if self.one_length else ""
        return f"{self.reduction} over {self.counting.name}{router}{length} ({self.reason})"

    def check_length(self, batch: Batch) -> None:
        """Raise a DataError if padding changes the loss and `batch` is padded to another length."""
        if self.one_length and batch["input_ids"].shape[1] != self.one_length:
            raise DataError(
                f"a batch is {batch['input_ids'].shape[1]} columns wide and the first was "
                f"{self.one_length}: padding changes this model's own loss, so the update would "
                "depend on which samples share a micro-batch; pad all batches to one length "
                '(padding="max_length")'
            )


def batch_statistics(model: torch.nn.Module) -> list[str]:
    """Names of the modules that take statistics over each micro-batch (BatchNorm in train mode)."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [name for name, m in model.named_modules() if isinstance(m, kind) and m.training]


def unproven(batch: Batch, count_targets: CountTargets | None, reason: str, ignore: int = IGNORE) -> Objective:
    """The likeliest way to count, for a loss that is not the model's own.

    Raises:
        DataError: the batch has no labels that are known, and `count_targets` is None.
    """
    ways = _ways(batch, count_targets, ignore)
    return Objective(ways[0], reason=reason, is_only_way=len(ways) == 1)


def _ways(batch: Batch, count_targets: CountTargets | None, ignore: int) -> list[Counting]:
    if count_targets is not None:
        return [Counting("count_targets", count_targets)]
    return list(countings_of(batch, ignore))


def find_objective(
    model: torch.nn.Module,
    batch: Batch,
    count_targets: CountTargets | None = None,
    is_16_bit: bool = False,
) -> Objective:
    """Find and prove what the model's own loss sums over; at most seven forwards in eval mode.

    The random state and the model's modes are left as they were. Which forwards run depends on the
    batch alone, so processes that gather weights in each stay together.

    Args:
        model: as one process calls it, on the device of `batch`.
        batch: a real micro-batch, with labels.
        count_targets: the user's own count, to be proven; None to find it.
        is_16_bit: the forward runs under 16-bit autocast.

    Raises:
        DataError: the batch has no labels that are known, and `count_targets` is None.
    """
    ignore = _ignored_label(model)
    candidates = _ways(batch, count_targets, ignore)
    likeliest = unproven(batch, count_targets, "", ignore)
    sixteen_bit = (torch.float16, torch.bfloat16)
    is_16_bit = is_16_bit or any(p.dtype in sixteen_bit for p in model.parameters())
    if _device_of(batch).type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        is_16_bit = True  # products in TF32 round as coarsely as 16-bit ones
    try:
        probe = _probe_of(model, batch, ignore)
    except DataError as error:
        return replace(likeliest, reason=f"cannot be proven: {error}")
    try:
        seen = _run(model, probe)
    except torch.OutOfMemoryError:
        return replace(likeliest, reason="cannot be proven: its forward ran out of memory")
    except Exception as error:  # of any type: it is the model's own code
        words = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return replace(likeliest, reason=f"cannot be proven: {words}")
    if seen is None:
        return replace(likeliest, reason="the model returns none")
    if count_targets is None:
        candidates = _without_shift_or_with(candidates, probe, seen)
        likeliest = replace(likeliest, counting=candidates[0], is_only_way=len(candidates) == 1)
    coefficient = _router_part(model, candidates[0], probe, seen)
    if coefficient is None:
        reason = "holds a router's loss that cannot be told apart from the rest"
        return replace(likeliest, reason=reason)
    seen = {name: s.without_router(coefficient) for name, s in seen.items()}
    for reduction in (MEAN, SUM):
        for counting in candidates:
            if _holds(counting, reduction, probe, seen, is_16_bit):
                reason = f"proven on a micro-batch of {num_samples(batch)} samples"
                one_length = _length_that_matters(probe, seen, is_16_bit)
                return Objective(counting, reduction, reason, coefficient > 0, one_length)
    over = " or ".join(c.name for c in candidates)
    reason = f"is neither a mean nor a sum over {over}: a batch does not have its halves' loss"
    return replace(likeliest, reason=reason)


# --- the probe: one batch with unequal halves, its halves, and the same by hidden labels ---


@dataclass(frozen=True)
class _Probe:
    """Batches to run.

    Attributes:
        whole: the batch, with unequal halves.
        halves: its samples in two; None if it cannot be cut.
        hidden: `whole` with all labels but those of one half hidden, twice; None if none can be.
        first_column: `whole` with the first label of each row alone, which a shift drops.
        wider: `whole` with more columns of padding.
    """

    whole: Batch
    halves: tuple[Batch, Batch] | None = None
    hidden: tuple[Batch, Batch] | None = None
    first_column: Batch | None = None
    wider: Batch | None = None

    def batches(self) -> Iterator[tuple[str, Batch]]:
        yield "whole", self.whole
        for name in ("halves", "hidden"):
            for index, batch in enumerate(getattr(self, name) or ()):
                yield f"{name}{index}", batch
        for name in ("first_column", "wider"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def _probe_of(model: Any, batch: Batch, ignore: int) -> _Probe:
    """Raises DataError if there is nothing to cut and nothing to hide."""
    is_row = isinstance(batch, Mapping) and is_packed(batch)
    if not is_row and num_samples(batch) == 1:
        batch = _twice(batch)
    if not isinstance(batch, Mapping):
        return _Probe(batch, halve(batch))
    labels = batch.get("labels")
    if _can_hide(model, labels, ignore):
        labels = _filled_up(batch, ignore)
        batch = _with_decoder_inputs(model, {**batch, "labels": labels})
        first = _first_half(labels, ignore)
        thinned = _thinned(labels, first, ignore)
        whole = {**batch, "labels": thinned}
        hidden = (
            {**whole, "labels": thinned.masked_fill(~first, ignore)},
            {**whole, "labels": thinned.masked_fill(first, ignore)},
        )
        only_first = torch.full_like(labels, ignore)
        some_label = labels[labels != ignore][0]
        column = labels[..., 0]
        only_first[..., 0] = torch.where(column == ignore, some_label, column)
        alone = {**batch, "labels": only_first}
        return _Probe(whole, _halves_or_none(whole), hidden, alone, _wider(model, whole, ignore))
    return _Probe(batch, halve(batch), wider=_wider(model, batch, ignore))


def _can_hide(model: Any, labels: Any, ignore: int) -> bool:
    """Whether `ignore` is sure to mean "no target": on a GPU a wrong label ends the process."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return False
    if labels.shape[-1] < 2:
        return False
    return hasattr(model, "loss_function") or bool((labels == ignore).any())


def _filled_up(batch: Mapping[str, Any], ignore: int) -> torch.Tensor:
    """The labels; if hardly any is a target, with class 0, which every loss knows, in the gaps."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    if int((labels != ignore).sum()) >= _FEWEST_TARGETS:
        return labels
    filled = labels.masked_fill(labels == ignore, 0)
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        return filled.masked_fill(mask == 0, ignore)
    return filled


def _wider(model: Any, batch: Mapping[str, Any], ignore: int) -> Batch | None:
    """The batch with more padding on the right; None if it has no mask that would hide it."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    if ids.ndim != 2 or mask.shape != ids.shape or "position_ids" in batch:
        return None
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None)
    fillings = {"input_ids": pad_token if isinstance(pad_token, int) else 0, "labels": ignore}

    def widened(key: str, value: Any) -> Any:
        along = isinstance(value, torch.Tensor) and value.shape == ids.shape
        of_decoder = key.startswith("decoder_") or (key == "labels" and "decoder_input_ids" in batch)
        if not along or of_decoder:
            return value
        return torch.nn.functional.pad(value, (0, _MORE_PADDING), value=fillings.get(key, 0))

    return {key: widened(key, value) for key, value in batch.items()}


def _first_half(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """True on the first rows, up to half of the targets; inside a row if only one has any."""
    first = torch.zeros_like(labels, dtype=torch.bool)
    is_target = labels != ignore
    by_row = is_target.flatten(1).sum(1).cumsum(0)
    rows = int((by_row <= by_row[-1] // 2).sum())
    if 0 < rows < len(labels) and by_row[rows - 1] > 0:
        first[:rows] = True
        return first
    targets = is_target.flatten().nonzero().flatten()
    first.view(-1)[: int(targets[len(targets) // 2])] = True
    return first


def _thinned(labels: torch.Tensor, first: torch.Tensor, ignore: int) -> torch.Tensor:
    """The labels with two of three targets of the first half hidden: the halves are unequal."""
    flat = labels.flatten().clone()
    targets = ((flat != ignore) & first.flatten()).nonzero().flatten()
    kept = targets[2::3] if len(targets) > 2 else targets
    hidden = torch.ones_like(targets, dtype=torch.bool)
    hidden[torch.isin(targets, kept)] = False
    flat[targets[hidden]] = ignore
    return flat.view_as(labels)


def _halves_or_none(batch: Batch) -> tuple[Batch, Batch] | None:
    try:
        return halve(batch)
    except DataError:
        return None


def _twice(batch: Batch) -> Batch:
    """A batch of one sample as a batch of two, both the same."""

    def twice(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.cat([value, value]) if value.ndim else value
        if isinstance(value, Mapping):
            return {key: twice(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return value * 2
        if isinstance(value, tuple):
            return tuple(twice(entry) for entry in value)
        raise DataError(f"a batch of one sample holds a {type(value).__name__}, which has no half")

    return twice(batch)


def _with_decoder_inputs(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Encoder-decoders make their decoder's input from the labels: hiding some must not change it."""
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return batch
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = batch["labels"]
    if shift is not None:
        return {**batch, "decoder_input_ids": shift(labels)}
    start = torch.full_like(labels[:, :1], int(getattr(config, "decoder_start_token_id", 0) or 0))
    pad = int(getattr(config, "pad_token_id", 0) or 0)
    return {**batch, "decoder_input_ids": torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, pad)], 1)}


def _ignored_label(model: Any) -> int:
    found = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
    return found if isinstance(found, int) and _segments(model) else IGNORE


def _segments(model: Any) -> bool:
    return "SemanticSegmentation" in str(getattr(model, "loss_type", "")) + type(model).__name__


# --- running it ---


@dataclass(frozen=True)
class _Seen:
    """The loss of one probe batch, and what a router adds to it."""

    loss: float
    router: float = 0.0
    is_16_bit: bool = False
    router_terms: tuple[str, ...] = field(default=())
    cross_entropy: float | None = None

    def without_router(self, coefficient: float) -> _Seen:
        return replace(self, loss=self.loss - coefficient * self.router)


def _run(model: torch.nn.Module, probe: _Probe) -> dict[str, _Seen] | None:
    """The losses of all probe batches; None if the model returns none."""
    call: Callable[[Batch], Any] = (lambda b: model(**b)) if isinstance(probe.whole, Mapping) else model
    seen: dict[str, _Seen] = {}
    with undisturbed(model, _device_of(probe.whole)):
        for name, batch in probe.batches():
            outputs = call(batch)
            loss = own_loss(outputs)
            if loss is None:
                return None
            aux = router_loss(outputs)
            seen[name] = _Seen(
                loss=float(loss),
                router=0.0 if aux is None else float(aux),
                is_16_bit=loss.dtype in (torch.float16, torch.bfloat16),
                router_terms=tuple(t for t in _ROUTER_TERMS if isinstance(getattr(outputs, t, None), torch.Tensor)),
                cross_entropy=_shifted_cross_entropy(outputs, batch) if aux is not None else None,
            )
    return seen


def _device_of(batch: Batch) -> torch.device:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _shifted_cross_entropy(outputs: Any, batch: Mapping[str, Any]) -> float | None:
    """Mean cross-entropy of the shifted labels, from the logits."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != batch["labels"].shape:
        return None
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[..., 1:]
    count = SHIFTED.count(batch)
    return float(cross_entropy(logits, targets, 0.0)) / count if count else None


def _without_shift_or_with(candidates: list[Counting], probe: _Probe, seen: dict[str, _Seen]) -> list[Counting]:
    """Drop the shifted count or the unshifted one: a shift leaves no target in the first column."""
    if probe.first_column is None or SHIFTED not in candidates:
        return candidates
    alone = seen["first_column"]
    counts_first = math.isfinite(alone.loss) and alone.loss - alone.router != 0
    # A guarded mean over no target is 0, and what a router adds is then all there is.
    if counts_first and alone.router_terms:
        whole = seen["whole"]
        counts_first = abs(alone.loss) > 0.1 * abs(whole.loss)
    dropped = SHIFTED.name if counts_first else "labels"
    return [counting for counting in candidates if counting.name != dropped]


def _router_part(model: torch.nn.Module, counting: Counting, probe: _Probe, seen: dict[str, _Seen]) -> float | None:
    """The coefficient of the router's loss in the model's own: 0 if it has none, None if unknown."""
    whole = seen["whole"]
    if not whole.router_terms:
        return 0.0
    coefficient = router_coefficient(model)
    if whole.router_terms != ("aux_loss",) or whole.cross_entropy is None or counting != SHIFTED:
        return None
    tolerance = _SIXTEEN_BIT if whole.is_16_bit else _FLOAT32
    for factor in (coefficient, 0.0):
        if _near(whole.loss - factor * whole.router, whole.cross_entropy, tolerance):
            return factor
    return None


def _length_that_matters(probe: _Probe, seen: dict[str, _Seen], is_16_bit: bool) -> int:
    """The batch's number of columns if more padding changes the loss, else 0."""
    if probe.wider is None:
        return 0
    tolerance = _SIXTEEN_BIT if is_16_bit else _FLOAT32
    if _near(seen["wider"].loss, seen["whole"].loss, tolerance):
        return 0
    return int(probe.whole["input_ids"].shape[1])


def _near(a: float, b: float, tolerance: float) -> bool:
    return math.isfinite(a) and abs(a - b) <= tolerance * max(abs(a), abs(b))


def _holds(
    counting: Counting,
    reduction: str,
    probe: _Probe,
    seen: dict[str, _Seen],
    is_16_bit: bool,
) -> bool:
    """Whether the model's loss is this reduction over this count, in every way it was cut."""

    def summed(name: str, batch: Batch) -> float:
        count = counting.count(batch)
        return (count if reduction == MEAN else 1.0) * seen[name].loss if count else 0.0

    # Hidden labels leave the logits as they are: only the loss itself may round.
    rounds = {"halves": is_16_bit, "hidden": seen["whole"].is_16_bit}
    was_cut = False
    for name, is_coarse in rounds.items():
        parts: tuple[Batch, Batch] | None = getattr(probe, name)
        if parts is None or (name == "hidden" and not counting.reads_labels):
            continue
        total = summed("whole", probe.whole)
        found = sum(summed(f"{name}{index}", part) for index, part in enumerate(parts))
        if not _near(found, total, _SIXTEEN_BIT if is_coarse else _FLOAT32):
            return False
        was_cut = was_cut or all(map(counting.count, parts))
    return was_cut
