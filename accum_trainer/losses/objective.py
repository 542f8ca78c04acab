"""Find the terms that a model's own loss sums over, and prove them on one real batch.

Models of transformers share a keyword, `labels`, and little else: causal models shift them,
encoder-decoders and taggers do not, some losses are means over samples, some are sums, a router
adds a term. So nothing is read off a class name. A few forwards without a gradient, on a batch
whose halves hold unequal numbers of targets, show which count n satisfies

    n(batch) * loss(batch) = n(half 1) * loss(half 1) + n(half 2) * loss(half 2)

for a mean, or the same without n for a sum. For integer labels, halves are also made by hiding
labels: the logits are then bit-equal, and a 16-bit model is judged as sharply as a float32 one. A
loss that satisfies neither cannot be split, and is refused.

`probe` makes the batches and `trial` runs them. Knows no engine and no window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from accum_trainer.batch import IGNORE, Batch, num_samples
from accum_trainer.errors import DataError
from accum_trainer.losses.outputs import router_coefficient
from accum_trainer.losses.probe import Probe, ignored_label, is_padded_left, length_of, probe_of
from accum_trainer.losses.targets import SHIFTED, Counting, CountTargets, countings_of
from accum_trainer.losses.trial import SIXTEEN_BIT, Seen, device_of, own_forward, run_probe

MEAN, SUM = "mean", "sum"
REMEDY = "pass count_targets=function(batch) -> number of terms that your loss averages over"
# Relative tolerances. A forward of half the samples rounds differently; hidden labels change only
# the loss.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-5, 3e-2


@dataclass(frozen=True)
class Objective:
    """The terms that a window's loss sums over.

    Attributes:
        counting: how targets are counted.
        reduction: of the model's own loss over them, `mean` or `sum`; "" if neither is proven.
        reason: evidence of the proof, or why there is none.
        has_router_term: the model's own loss also contains `router_coefficient * aux_loss`.
        one_length: (key, shape of a sample) of the first batch, if padding changes the model's own
            loss: then all batches must have this length. None if it does not.
        is_only_way: such labels can be counted in no other way.
        is_disproven: the loss cannot be split by this count.
    """

    counting: Counting
    reduction: str = ""
    reason: str = ""
    has_router_term: bool = False
    one_length: tuple[str, tuple[int, ...]] | None = None
    is_only_way: bool = False
    is_disproven: bool = False

    @property
    def verdict(self) -> str:
        """Must be equal on all processes."""
        return (
            f"{self.reduction} over {self.counting.name}, {self.has_router_term}, {self.one_length}"
        )

    def describe(self) -> str:
        """One line for the record."""
        if not self.reduction:
            return f"targets counted as {self.counting.name}; the model's own loss: {self.reason}"
        router = (
            ", and a router's loss as a mean over micro-batches" if self.has_router_term else ""
        )
        length = ", all batches of one length" if self.one_length else ""
        return f"{self.reduction} over {self.counting.name}{router}{length} ({self.reason})"

    def check_length(self, batch: Batch) -> None:
        """Check that the padding of `batch` leaves the loss as proven.

        Raises:
            DataError: padding changes the loss, and `batch` has another length than the first; or
                padding on the left turns a row's first token into a target.
        """
        found = length_of(batch) if self.one_length is not None else None
        if self.one_length is not None and found != self.one_length:
            raise DataError(
                f"a batch has {found}, and the first had {self.one_length}: padding changes this "
                "model's own loss, so the update would depend on which samples share a "
                'micro-batch; pad all batches to one length (padding="max_length"), on the right '
                "and with an attention_mask if the model takes one"
            )
        if self.counting == SHIFTED:
            _check_left_padding(batch)


def _check_left_padding(batch: Batch) -> None:
    """Raise a DataError if padding on the left turns a row's first token into a target."""
    mask, labels = (
        batch.get(key) if isinstance(batch, Mapping) else None
        for key in ("attention_mask", "labels")
    )
    if not isinstance(mask, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return
    on_host = mask.device.type == labels.device.type == "cpu"
    if mask.ndim != 2 or mask.shape != labels.shape or not on_host:
        return
    is_token, is_target = mask.numpy() != 0, labels.numpy() != IGNORE
    if (is_token[:, 1:] & ~is_token[:, :-1] & is_target[:, 1:]).any():
        raise DataError(
            "a row is padded on the left and the label of its first token is not -100: after the "
            "shift, the padding before it predicts it, and in a batch without that padding "
            "nothing does. Set it to -100 in collate_fn, or pad on the right"
        )


def batch_statistics(model: torch.nn.Module) -> list[str]:
    """Names of the modules that normalise over each micro-batch: BatchNorm in training mode."""
    modules = model.named_modules()
    return [name for name, m in modules if isinstance(m, _BatchNorm) and m.training]


def moving_estimates(model: torch.nn.Module) -> list[str]:
    """Names of the modules whose weight depends on how many forwards there were: spectral norm in
    training mode, which takes a step of its power iteration in each."""
    modules = dict(model.named_modules())
    found = [name for name, m in modules.items() if isinstance(m, _SpectralNorm) and m.training]
    for name, m in modules.items():
        hooks = m._forward_pre_hooks.values()  # noqa: SLF001 - torch has no public name
        if m.training and any(isinstance(hook, SpectralNorm) for hook in hooks):
            found.append(name)
    return found


def unproven(
    batch: Batch, count_targets: CountTargets | None, reason: str, ignore: int = IGNORE
) -> Objective:
    """The likeliest way to count, without a proof.

    Raises:
        DataError: the batch has no known labels, and `count_targets` is None.
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
    """Find and prove what the model's own loss sums over; at most eight forwards in eval mode.

    The random state and the model's modes are restored. The batch alone decides which forwards
    run, so processes that gather weights in each stay in step.

    Args:
        model: without the engine's wrapper, on the device of `batch`.
        batch: a real micro-batch, with labels.
        count_targets: the user's count, to be proven; None to find it.
        is_16_bit: the forward runs under 16-bit autocast.

    Raises:
        DataError: the batch has no known labels, and `count_targets` is None.
    """
    ignore = ignored_label(model)
    candidates = _ways(batch, count_targets, ignore)
    likeliest = unproven(batch, count_targets, "", ignore)
    has_16_bit_weights = any(p.dtype in SIXTEEN_BIT for p in model.parameters())
    # accelerate replaces the model's forward by one under autocast, and keeps the original.
    plain = model.__dict__.get("_original_forward") if not has_16_bit_weights else None
    is_16_bit = has_16_bit_weights or (is_16_bit and plain is None)
    if device_of(batch).type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        is_16_bit = True  # TF32 products round as coarsely as 16-bit ones
    try:
        probe = probe_of(model, batch, ignore)
    except DataError as error:
        return replace(likeliest, reason=f"cannot be proven: {error}")
    try:
        with own_forward(model, plain):
            seen = run_probe(model, probe)
    except torch.OutOfMemoryError:
        return replace(likeliest, reason="cannot be proven: its forward ran out of memory")
    except Exception as error:  # of any type: the model's own code
        words = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return replace(likeliest, reason=f"cannot be proven: {words}")
    if seen is None:
        return replace(
            likeliest, reason="is not there: the model returned no loss, as without labels"
        )
    if count_targets is None:
        candidates = _without_shift_or_with(candidates, probe, seen)
        likeliest = replace(likeliest, counting=candidates[0], is_only_way=len(candidates) == 1)
    coefficient = _router_part(model, candidates[0], probe, seen)
    if coefficient is None:
        reason = "contains a router's loss that cannot be told apart from the rest"
        return replace(likeliest, reason=reason)
    seen = {name: s.without_router(coefficient) for name, s in seen.items()}
    for reduction in (MEAN, SUM):
        for counting in candidates:
            if _holds(counting, reduction, probe, seen, is_16_bit):
                reason = f"proven on {num_samples(batch)} samples"
                one_length = _length_that_matters(probe, seen, is_16_bit)
                return Objective(counting, reduction, reason, coefficient > 0, one_length)
    over = " or ".join(c.name for c in candidates)
    reason = f"is neither a mean nor a sum over {over}: a batch's loss is not that of its halves"
    return replace(likeliest, reason=reason, is_disproven=True)


# --- judging the losses ---


def _without_shift_or_with(
    candidates: list[Counting], probe: Probe, seen: dict[str, Seen]
) -> list[Counting]:
    """Drop the shifted or the unshifted count: a shift leaves no target in the first column."""
    if probe.first_column is None or SHIFTED not in candidates:
        return candidates
    alone = seen["first_column"]
    counts_first = math.isfinite(alone.loss) and alone.loss - alone.router != 0
    # Some losses return 0 for a mean over no target; the router's loss is then all that remains.
    if counts_first and alone.router_terms:
        whole = seen["whole"]
        counts_first = abs(alone.loss) > 0.1 * abs(whole.loss)
    dropped = SHIFTED.name if counts_first else "labels"
    return [counting for counting in candidates if counting.name != dropped]


def _router_part(
    model: torch.nn.Module, counting: Counting, probe: Probe, seen: dict[str, Seen]
) -> float | None:
    """The router's coefficient in the model's own loss: 0 if there is none, None if unknown."""
    whole = seen["whole"]
    if not whole.router_terms:
        return 0.0
    coefficient = router_coefficient(model) or 0.0
    if whole.router_terms != ("aux_loss",) or whole.cross_entropy is None or counting != SHIFTED:
        return None
    tolerance = _TOLERANCE_16_BIT if whole.is_16_bit else _TOLERANCE
    for factor in (coefficient, 0.0):
        if _near(whole.loss - factor * whole.router, whole.cross_entropy, tolerance):
            return factor
    return None


def _length_that_matters(
    probe: Probe, seen: dict[str, Seen], is_16_bit: bool
) -> tuple[str, tuple[int, ...]] | None:
    """The batch's length if more padding changes the loss or the logits, else None."""
    if probe.wider is None:
        return None
    tolerance = _TOLERANCE_16_BIT if is_16_bit else _TOLERANCE
    is_same = "wider" in seen and _near(seen["wider"].loss, seen["whole"].loss, tolerance)
    if is_same and _same_logits(probe, seen["whole"].logits, seen["wider"].logits, 10 * tolerance):
        return None
    return length_of(probe.whole)


def _same_logits(
    probe: Probe, whole: torch.Tensor | None, wider: torch.Tensor | None, tolerance: float
) -> bool:
    """Whether more padding leaves the other logits unchanged; True if they cannot be compared.

    Sharper than the loss, which is nearly the same for every target while the head is untrained.
    """
    if whole is None or wider is None:
        return True
    if whole.shape != wider.shape:
        more = wider.shape[1] - whole.shape[1] if whole.ndim > 2 and wider.ndim == whole.ndim else 0
        if more <= 0:
            return True
        length = whole.shape[1]
        on_left = is_padded_left(probe.whole.get("attention_mask"))
        wider = wider[:, more:] if on_left else wider[:, :length]
    mask = probe.whole.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == whole.shape[:2]:
        whole, wider = whole[mask != 0], wider[mask != 0]
    if whole.numel() == 0:
        return True
    return bool((whole - wider).abs().max() <= tolerance * whole.abs().max())


def _near(a: float, b: float, tolerance: float) -> bool:
    return math.isfinite(a) and abs(a - b) <= tolerance * max(abs(a), abs(b))


def _holds(
    counting: Counting,
    reduction: str,
    probe: Probe,
    seen: dict[str, Seen],
    is_16_bit: bool,
) -> bool:
    """Whether the model's loss is this reduction over this count, in every way it was split."""

    def summed(name: str, batch: Batch) -> float:
        count = counting.count(batch)
        return (count if reduction == MEAN else 1.0) * seen[name].loss if count else 0.0

    # Hidden labels leave the logits unchanged: only the loss itself may round.
    rounds = {"halves": is_16_bit, "hidden": seen["whole"].is_16_bit}
    was_split = False
    for name, is_coarse in rounds.items():
        parts: tuple[Batch, Batch] | None = getattr(probe, name)
        if parts is None or (name == "hidden" and not _follows_labels(counting, probe)):
            continue
        total = summed("noisy", probe.whole)
        found = sum(summed(f"{name}{index}", part) for index, part in enumerate(parts))
        if not _near(found, total, _TOLERANCE_16_BIT if is_coarse else _TOLERANCE):
            return False
        was_split = was_split or all(map(counting.count, parts))
    return was_split


def _follows_labels(counting: Counting, probe: Probe) -> bool:
    """Whether this count leaves out a hidden label."""
    if counting.reads_labels or probe.hidden is None:
        return counting.reads_labels
    try:
        return sum(map(counting.count, probe.hidden)) == counting.count(probe.whole) and all(
            map(counting.count, probe.hidden)
        )
    except Exception:  # the user's function may not know such a batch
        return False
