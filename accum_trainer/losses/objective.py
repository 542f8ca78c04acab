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

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accum_trainer.batch import IGNORE, Batch, num_samples
from accum_trainer.errors import DataError
from accum_trainer.losses.head import cross_entropy, is_compiled, undisturbed
from accum_trainer.losses.outputs import own_loss, router_coefficient, router_loss
from accum_trainer.losses.probe import Probe, ignored_label, is_padded_left, length_of, probe_of
from accum_trainer.losses.targets import SHIFTED, Counting, CountTargets, countings_of

MEAN, SUM = "mean", "sum"
REMEDY = "pass count_targets=function(batch) -> number of terms that your loss averages over"
# Relative. A forward of half the samples rounds differently; hidden labels change the loss alone.
_FLOAT32, _SIXTEEN_BIT = 1e-5, 3e-2
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
            if all batches are as long as the first, (key, shape of a sample); None if it does not.
        is_only_way: no other way of counting is known for such labels.
        is_disproven: the loss is none that can be cut by this count.
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
        """What all processes must have found alike."""
        return (
            f"{self.reduction} over {self.counting.name}, {self.has_router_term}, {self.one_length}"
        )

    def describe(self) -> str:
        """One line for the record."""
        if not self.reduction:
            return f"targets counted as {self.counting.name}; the model's own loss: {self.reason}"
        router = ", and a router's loss per micro-batch" if self.has_router_term else ""
        length = ", all batches of one length" if self.one_length else ""
        return f"{self.reduction} over {self.counting.name}{router}{length} ({self.reason})"

    def check_length(self, batch: Batch) -> None:
        """Raise a DataError if padding changes the loss and `batch` is padded to another length."""
        found = length_of(batch) if self.one_length is not None else None
        if self.one_length is not None and found != self.one_length:
            raise DataError(
                f"a batch has {found}, and the first had {self.one_length}: padding changes this "
                "model's own loss, so the update would depend on which samples share a "
                "micro-batch; "
                'pad all batches to one length (padding="max_length"), on the right and with an '
                "attention_mask if the model takes one"
            )
        if self.counting == SHIFTED:
            _check_left_padding(batch)


def _check_left_padding(batch: Batch) -> None:
    """Raise a DataError if padding on the left makes a target of a row's first token."""
    mask, labels = (
        batch.get(key) if isinstance(batch, Mapping) else None
        for key in ("attention_mask", "labels")
    )
    if not isinstance(mask, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return
    if mask.ndim != 2 or mask.shape != labels.shape or mask.is_cuda:
        return
    begins = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if bool((begins & (labels[:, 1:] != IGNORE)).any()):
        raise DataError(
            "a row is padded on the left and the label of its first token is no -100: shifted, it "
            "is a "
            "target of the padding before it, and of nothing in a batch without that padding. Set "
            "it to "
            "-100 in collate_fn, or pad on the right"
        )


def batch_statistics(model: torch.nn.Module) -> list[str]:
    """Names of the modules that take statistics over each micro-batch (BatchNorm in train mode)."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [name for name, m in model.named_modules() if isinstance(m, kind) and m.training]


def unproven(
    batch: Batch, count_targets: CountTargets | None, reason: str, ignore: int = IGNORE
) -> Objective:
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
    """Find and prove what the model's own loss sums over; at most eight forwards in eval mode.

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
    ignore = ignored_label(model)
    candidates = _ways(batch, count_targets, ignore)
    likeliest = unproven(batch, count_targets, "", ignore)
    sixteen_bit = (torch.float16, torch.bfloat16)
    has_16_bit_weights = any(p.dtype in sixteen_bit for p in model.parameters())
    # accelerate's autocast lies in the forward that it put in the place of the model's own.
    plain = model.__dict__.get("_original_forward") if not has_16_bit_weights else None
    is_16_bit = has_16_bit_weights or (is_16_bit and plain is None)
    if _device_of(batch).type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        is_16_bit = True  # products in TF32 round as coarsely as 16-bit ones
    try:
        probe = probe_of(model, batch, ignore)
    except DataError as error:
        return replace(likeliest, reason=f"cannot be proven: {error}")
    try:
        with _own_forward(model, plain):
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
    return replace(likeliest, reason=reason, is_disproven=True)


# --- running it ---


@dataclass(frozen=True)
class _Seen:
    """The loss of one probe batch, and what a router adds to it."""

    loss: float
    router: float = 0.0
    is_16_bit: bool = False
    router_terms: tuple[str, ...] = field(default=())
    cross_entropy: float | None = None
    logits: torch.Tensor | None = None

    def without_router(self, coefficient: float) -> _Seen:
        return replace(self, loss=self.loss - coefficient * self.router)


@contextlib.contextmanager
def _own_forward(model: torch.nn.Module, plain: Any) -> Iterator[None]:
    """The model's own forward, if `plain` is one, without the autocast around it."""
    if plain is None:
        yield
        return
    wrapped = model.forward
    model.forward = plain
    try:
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            yield
    finally:
        model.forward = wrapped


@contextlib.contextmanager
def _noisy_head(model: torch.nn.Module, sizes: tuple[int, int], offset: int) -> Iterator[None]:
    """Add noise to what the model's last linear layer gives: the same to the same sample, whatever
    it is batched with.

    A head that is still all zero gives every target the same loss, and any weights would cancel
    out.

    Args:
        sizes: samples of the whole batch, and of this one.
        offset: where this one begins in the whole.
    """
    head = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, torch.nn.Module):
        head = next(
            (m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear)), None
        )
    was_compiled = any(map(is_compiled, model.modules())) or hasattr(
        model.forward, "_torchdynamo_orig_callable"
    )
    if (
        head is None or was_compiled
    ):  # a compiled graph may leave a hook out in one call and not in another
        yield
        return

    def disturb(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if (
            not isinstance(output, torch.Tensor)
            or not output.is_floating_point()
            or len(output) % sizes[1]
        ):
            return output
        each = len(output) // sizes[1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((sizes[0] * each, *output.shape[1:]), generator=generator)
        noise = noise[offset * each : (offset + sizes[1]) * each]
        return output + noise.to(output.device, output.dtype)

    handle = head.register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


def _run(model: torch.nn.Module, probe: Probe) -> dict[str, _Seen] | None:
    """The losses of all probe batches; None if the model returns none."""
    seen: dict[str, _Seen] = {}
    size = num_samples(probe.whole)
    with undisturbed(model, _device_of(probe.whole)):
        for name, batch in probe.batches():
            is_plain = probe.is_row or name in ("whole", "first_column", "wider")
            offset = num_samples(probe.halves[0]) if name == "halves1" and probe.halves else 0
            noise = _noisy_head(model, (size, num_samples(batch)), offset)
            try:
                with contextlib.nullcontext() if is_plain else noise:
                    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
            except Exception:
                if name != "wider":
                    raise
                continue  # a model of one length: then it is this batch's
            loss = own_loss(outputs)
            if loss is None:
                return None
            aux = router_loss(outputs)
            seen[name] = _Seen(
                loss=float(loss),
                router=0.0 if aux is None else float(aux),
                is_16_bit=loss.dtype in (torch.float16, torch.bfloat16),
                router_terms=tuple(
                    t for t in _ROUTER_TERMS if isinstance(getattr(outputs, t, None), torch.Tensor)
                ),
                cross_entropy=_shifted_cross_entropy(outputs, batch) if aux is not None else None,
                logits=_some_logits(outputs) if name in ("whole", "wider") else None,
            )
    return seen


def _some_logits(outputs: Any) -> torch.Tensor | None:
    """Logits in float32, at most 64 of the classes; None if the model gives none."""
    logits = (
        outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    )
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        return None
    return logits[..., :: max(1, logits.shape[-1] // 64)].float()


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


def _without_shift_or_with(
    candidates: list[Counting], probe: Probe, seen: dict[str, _Seen]
) -> list[Counting]:
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


def _router_part(
    model: torch.nn.Module, counting: Counting, probe: Probe, seen: dict[str, _Seen]
) -> float | None:
    """The coefficient of the router's loss in the model's own: 0 if it has none, None if
    unknown."""
    whole = seen["whole"]
    if not whole.router_terms:
        return 0.0
    coefficient = router_coefficient(model) or 0.0
    if whole.router_terms != ("aux_loss",) or whole.cross_entropy is None or counting != SHIFTED:
        return None
    tolerance = _SIXTEEN_BIT if whole.is_16_bit else _FLOAT32
    for factor in (coefficient, 0.0):
        if _near(whole.loss - factor * whole.router, whole.cross_entropy, tolerance):
            return factor
    return None


def _length_that_matters(
    probe: Probe, seen: dict[str, _Seen], is_16_bit: bool
) -> tuple[str, tuple[int, ...]] | None:
    """The batch's length if more padding changes the loss, else None."""
    if probe.wider is None:
        return None
    tolerance = _SIXTEEN_BIT if is_16_bit else _FLOAT32
    is_same = "wider" in seen and _near(seen["wider"].loss, seen["whole"].loss, tolerance)
    if is_same and _same_logits(probe, seen["whole"].logits, seen["wider"].logits, 10 * tolerance):
        return None
    return length_of(probe.whole)


def _same_logits(
    probe: Probe, whole: torch.Tensor | None, wider: torch.Tensor | None, tolerance: float
) -> bool:
    """Whether more padding leaves the logits of what is no padding alone; True if they cannot be
    compared.

    Sharper than the loss, which an untrained head makes nearly the same for everything.
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
        if parts is None or (name == "hidden" and not _follows_labels(counting, probe)):
            continue
        total = summed("noisy", probe.whole)
        found = sum(summed(f"{name}{index}", part) for index, part in enumerate(parts))
        if not _near(found, total, _SIXTEEN_BIT if is_coarse else _FLOAT32):
            return False
        was_cut = was_cut or all(map(counting.count, parts))
    return was_cut


def _follows_labels(counting: Counting, probe: Probe) -> bool:
    """Whether a label that is hidden is not counted."""
    if counting.reads_labels or probe.hidden is None:
        return counting.reads_labels
    try:
        return sum(map(counting.count, probe.hidden)) == counting.count(probe.whole) and all(
            map(counting.count, probe.hidden)
        )
    except Exception:  # the user's own function, on a batch that it may not know
        return False
