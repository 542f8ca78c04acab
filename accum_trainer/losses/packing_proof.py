"""The proof that a model keeps packed samples apart: a few small runs of the model.

Packed samples lie end to end in one row. Four comparisons:

    apart      a packed sample's logits equal those of the sample alone, as padding would give it
    other      other tokens in the earlier samples change no bit of the last sample's logits; as a
               control, other tokens in the last sample change none of the first sample's
    elsewhere  the last sample's loss has no gradient at the earlier sample, and the earlier
               sample's tokens do not change the gradient of that loss
    gradient   the row's gradient equals the sum of its samples' gradients, each run alone

The second and third need no tolerance for rounding, so they also see a small leak in 16 bits. They
run in the model's current mode, since fused kernels differ between training and evaluation, with
one seed for dropout. Knows the collator's rows, but no configuration and no window.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F

from accum_trainer.losses.dry_run import (
    buffers_kept,
    in_modes,
    inside_wrapper,
    modes_of,
    undisturbed,
    without_checkpointing,
)
from accum_trainer.losses.head import logits_at
from accum_trainer.sources.collating import PackingCollator

# Relative to the largest logit. Products of different shapes round differently; the first sample,
# which sees no other, shows how much, up to _ROUNDING (TF32 keeps 10 bits of a float32).
_APART, _APART_16_BIT = 1e-5, 1e-2
_ROUNDING, _ROUNDING_16_BIT = 1e-3, 5e-2
# Between rows of one shape. Experts regroup their tokens and may round differently; the control
# shows how much.
_OTHER = 1e-6
# Between packed and separate gradients, whose kernels run on different shapes.
_SAME_GRADIENT, _SAME_GRADIENT_16_BIT = 1e-4, 1e-1
# Tokens at each end of a sample whose logits are compared.
_EDGE = 16


@dataclass(frozen=True)
class Packing:
    """The verdict on packed samples of a model.

    Attributes:
        holds: they do not see each other.
        reason: evidence of the proof, or the measured difference.
        boundaries: keys that the batch must hold besides `position_ids`.
        without_cache: it holds only with `use_cache=False`.
        remedy: boundaries that the batch lacks and that would make it hold.
    """

    holds: bool
    reason: str
    boundaries: tuple[str, ...] = ()
    without_cache: bool = False
    remedy: tuple[str, ...] = ()


def accepts(model: torch.nn.Module, name: str) -> bool:
    """Whether the forward takes this argument, of the model and of one inside an adapter."""
    inside = getattr(model, "get_base_model", None)
    for module in (model, inside() if callable(inside) else model):
        parameters = inspect.signature(module.forward).parameters
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return True


class Proof:
    """Compares rows of one model.

    Args:
        model: as one process calls it.
        tokens: any tokens of the model, int64, on its device; repeated to fill the samples.
        lengths: of the samples of the row, in tokens.
        is_16_bit: the forward runs under 16-bit autocast; 16-bit weights are seen without it.
        backward: also compare gradients.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        is_16_bit: bool,
        backward: bool,
    ) -> None:
        self._model = model
        self._embeddings = _embeddings_of(model) if backward else None
        self._device = tokens.device
        sixteen_bit = (torch.float16, torch.bfloat16)
        self._is_16_bit = is_16_bit or any(p.dtype in sixteen_bit for p in model.parameters())
        known = tokens.flatten().tolist()
        repeated = iter(known * -(-sum(lengths) // len(known)))
        self._samples = [list(islice(repeated, length)) for length in lengths]
        self._options: dict[str, Any] = {}
        self._boundaries: tuple[str, ...] = ()

    def run(self, boundaries: tuple[str, ...], use_cache: bool | None = None) -> Packing:
        """Try a row with these boundaries; failures of the model become a verdict, not an error.

        Every forward that may wait for other processes runs, whatever the others show.

        Args:
            boundaries: keys of the row besides `position_ids`.
            use_cache: passed to the model; None passes nothing.
        """
        self._boundaries = boundaries
        self._options = {} if use_cache is None else {"use_cache": use_cache}
        if not accepts(inside_wrapper(self._model), "position_ids"):
            return Packing(False, "its forward takes no position_ids")
        modes = modes_of(self._model)
        try:
            with (
                buffers_kept(self._model),
                without_checkpointing(self._model),
                undisturbed(self._model, self._device),
            ):
                problems = [*self._apart()]
                with in_modes(modes):
                    problems += self._other()
                if self._embeddings is not None and not problems:
                    with in_modes(modes):
                        problems += self._gradient_elsewhere()
                    problems += self._gradient()
        except torch.OutOfMemoryError:
            problems = [f"a row of {sum(map(len, self._samples))} tokens ran out of memory"]
        except Exception as error:  # of any type: the model's own code
            problems = [f"it cannot be tried: {type(error).__name__}: {str(error).strip()[:200]}"]
        if problems:
            return Packing(False, problems[0], boundaries)
        compared = "logits" if self._embeddings is None else "logits and gradient"
        return Packing(
            True,
            f"{compared} of packed samples are those of each alone",
            boundaries,
            use_cache is False,
        )

    def _apart(self) -> Iterator[str]:
        first, last = self._samples[0], self._samples[-1]
        packed_first, packed_last = self._ends_of(self._samples)
        alone_first, alone_last = self._alone(first), self._alone(last)
        if self._embeddings is None and not alone_last.any():
            yield "all its logits are 0, so they show nothing"
        noise = _difference(packed_first, alone_first)
        if not noise <= (_ROUNDING_16_BIT if self._is_16_bit else _ROUNDING):
            yield (
                "logits of a packed row's first sample differ from those of it alone by "
                f"{noise:.1g} relative"
            )
        apart = _difference(packed_last, alone_last)
        if not apart <= max(_APART_16_BIT if self._is_16_bit else _APART, 8 * noise):
            yield f"logits of a packed sample differ from those of it alone by {apart:.1g} relative"

    def _other(self) -> Iterator[str]:
        *before, last = self._samples
        first, own = self._ends_of(self._samples)
        _, seen = self._ends_of([*map(_others, before), last])
        control, _ = self._ends_of([*before, _others(last)])
        regrouped = _difference(control, first)
        if not regrouped <= (_APART_16_BIT if self._is_16_bit else _APART):
            yield (
                f"a sample's logits change by {regrouped:.1g} relative with tokens of a later "
                "sample"
            )
        leak = _difference(seen, own)
        if not leak <= max(_OTHER, 4 * regrouped):
            yield (
                f"a sample's logits change by {leak:.1g} relative with tokens of the sample "
                "before it"
            )

    def _gradient_elsewhere(self) -> Iterator[str]:
        """The last sample's loss has no gradient from the sample before it."""
        first, last = self._short()
        embedded, *trained = self._gradients([first, last], begin=len(first))
        elsewhere = embedded[:, : len(first)].norm()
        if not elsewhere <= _OTHER * embedded.norm():
            ratio = float(elsewhere / embedded.norm())
            yield f"a sample's loss has a gradient at the sample before it, {ratio:.1g} of all"
        # Kernels that add in any order do not return the same bits twice.
        again = self._gradients([first, last], begin=len(first))[1:]
        seen = self._gradients([_others(first), last], begin=len(first))[1:]
        leak = _distance(seen, trained)
        if not leak <= max(_OTHER, 4 * _distance(again, trained)):
            yield (
                f"a sample's gradient changes by {leak:.1g} relative with tokens of the sample "
                "before it"
            )

    def _gradient(self) -> Iterator[str]:
        samples = self._short()
        packed = self._gradients(samples)
        parts = [self._gradients([sample], alone=True) for sample in samples]
        embedded = torch.cat([part[0] for part in parts], dim=1)
        trained = [
            torch.stack(gradients).sum(0)
            for gradients in zip(*(part[1:] for part in parts), strict=True)
        ]
        error = _distance(packed, [embedded, *trained])
        if not error <= (_SAME_GRADIENT_16_BIT if self._is_16_bit else _SAME_GRADIENT):
            yield f"the gradient of a packed row differs from its samples' by {error:.1g} relative"

    # --- running the model ---

    def _row(self, samples: Sequence[Sequence[int]], alone: bool = False) -> dict[str, Any]:
        """A packed row as the collator makes it; or one sample, as padding would give it."""
        columns = [{"input_ids": ids, "labels": ids} for ids in samples]
        row = PackingCollator(self._boundaries)(columns)
        del row["labels"]
        if alone:
            ids = cast(torch.Tensor, row["input_ids"])
            row = {"input_ids": ids}
            if accepts(inside_wrapper(self._model), "attention_mask"):
                row["attention_mask"] = torch.ones_like(ids)
        on_device = {
            k: v.to(self._device) if isinstance(v, torch.Tensor) else v for k, v in row.items()
        }
        return on_device | self._options

    def _logits(self, row: Mapping[str, Any], positions: Sequence[int]) -> torch.Tensor:
        """Shape (positions, vocabulary), float32."""
        torch.manual_seed(0)  # rows of one shape get the same dropout
        return logits_at(
            self._model, row, torch.tensor(list(positions), device=self._device)
        ).float()

    def _ends_of(self, samples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the edges of a row's first and of its last sample."""
        begin = sum(map(len, samples[:-1]))
        first, last = _edges(len(samples[0])), [begin + i for i in _edges(len(samples[-1]))]
        logits = self._logits(self._row(samples), first + last)
        return logits[: len(first)], logits[len(first) :]

    def _alone(self, sample: Sequence[int]) -> torch.Tensor:
        return self._logits(self._row([sample], alone=True), _edges(len(sample)))

    def _short(self) -> list[list[int]]:
        """Two samples of few tokens: a backward with its activations must fit in memory."""
        return [self._samples[0][: 2 * _EDGE], self._samples[-1][: 2 * _EDGE]]

    def _gradients(
        self, samples: Sequence[Sequence[int]], begin: int = 0, alone: bool = False
    ) -> list[torch.Tensor]:
        """Gradients of the loss from token `begin` on, at the embeddings and some parameters.

        These are vectors and convolutions, whose gradient a kernel computes, and matrices that are
        still 0, behind which logits show nothing. The gradient of another matrix follows from its
        inputs and outputs. `autograd.grad` leaves `.grad` and the engine's hooks alone.
        """
        embedded: list[torch.Tensor] = []

        def stand_in(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        row = self._row(samples, alone)
        ids = row["input_ids"][0]
        assert self._embeddings is not None
        handle = self._embeddings.register_forward_hook(stand_in)
        try:
            with torch.enable_grad():
                logits = self._logits(row, range(begin, len(ids)))
                loss = F.cross_entropy(logits, ids[begin:], reduction="sum")
                trained = [
                    p
                    for p in self._model.parameters()
                    if p.requires_grad and (p.ndim != 2 or not p.any())
                ]
                found = torch.autograd.grad(loss, [embedded[0], *trained], allow_unused=True)
        finally:
            handle.remove()
        leaves = [embedded[0], *trained]
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]


def _embeddings_of(model: torch.nn.Module) -> torch.nn.Module | None:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, torch.nn.Module) else None


def _edges(length: int) -> list[int]:
    return [i for i in range(length) if i < _EDGE or i >= length - _EDGE]


def _others(sample: Sequence[int]) -> list[int]:
    """Another token of the vocabulary at every position."""
    return [token - 1 if token > 0 else 1 for token in sample]


def _difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit; nan if either contains nan."""
    difference = float((found - exact).abs().max())
    return difference / float(exact.abs().max()) if difference else 0.0


def _distance(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The norm of the difference over all tensors, relative to that of `exact`."""
    difference, norm = (
        sum(float(t.double().square().sum()) for t in tensors) ** 0.5
        for tensors in ([a - b for a, b in zip(found, exact, strict=True)], exact)
    )
    return difference / norm if difference else 0.0
