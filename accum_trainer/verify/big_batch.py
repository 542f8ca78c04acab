"""The reference that updates are compared with: one big batch in float64, by the definition alone.

It shares no loss, weight or cut with the rest of the package: a model's logits, a log-softmax, a
sum. It knows no engine and no loop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.errors import EngineError

IGNORE = -100
# Rows and tokens, with padding, in one chunk of the reference; any cut of it is exact.
_REFERENCE_ROWS, _REFERENCE_TOKENS = 4, 1024
_DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)

Row = Mapping[str, Sequence[int]]
Gradient = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """A batch's loss and gradient by the definition.

    Attributes:
        row_losses: summed loss of each row, in the order given, shape (rows,).
        num_targets: N, labels that are targets after the shift.
        gradient: of the summed losses (not divided by N), by parameter name, float64 on the CPU.
    """

    row_losses: torch.Tensor
    num_targets: int
    gradient: Gradient

    @property
    def loss(self) -> float:
        return float(self.row_losses.sum()) / self.num_targets

    @property
    def mean_gradient(self) -> Gradient:
        """The gradient of the mean over targets, which one update should see."""
        return {name: g / self.num_targets for name, g in self.gradient.items()}


class BigBatch:
    """A plain model in one process that gives the loss and gradient of any rows by the definition.

    Args:
        model: a causal language model that nobody else uses: its weights and dtype are changed.
            Only its logits are used.
        dtype: of its weights.
        device: where it runs.
        autocast: dtype of the autocast around its forward, or None.
        scale: multiplies the loss before the backward and divides the gradient; fp16 needs it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> None:
        self.model, self._device = model.to(device, dtype).train(), torch.device(device)
        self._autocast, self._scale = autocast, scale

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy whole weights by name; EngineError if the engine uses other names."""
        missing = {name for name, _ in self.model.named_parameters()} - set(weights)
        if missing:
            raise EngineError(
                f"the engine gave no weight named {', '.join(sorted(missing)[:3])}; nothing can be "
                "compared"
            )
        self.model.load_state_dict(weights, strict=False)

    def truth(self, rows: Sequence[Row], chunk: int | None = None) -> Truth:
        """Loss and gradient of `rows`, computed `chunk` rows at a time, by default few enough to
        take little memory; any cut of a sum is exact."""
        self.model.zero_grad()
        losses = torch.zeros(len(rows), dtype=torch.float64)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        with dropout_off(self.model):
            begin = 0
            while begin < len(rows):
                size = chunk or _chunk_size(len(rows[longest_first[begin]]["input_ids"]))
                chosen = longest_first[begin : begin + size]
                begin += size
                summed = self._row_losses([rows[i] for i in chosen])
                (summed.sum() * self._scale).backward()
                losses[chosen] = summed.detach().double().cpu()
        gradient = {
            name: p.grad.detach().double().cpu() / self._scale
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.model.zero_grad()
        return Truth(losses, sum(map(num_targets, rows)), gradient)

    def truth_of_one_batch(self, rows: Sequence[Row]) -> Truth:
        """The same in a single forward and backward; in two, four, ... if memory runs out."""
        chunk = len(rows)
        while True:
            try:
                return self.truth(rows, chunk)
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk = -(-chunk // 2)

    def _row_losses(self, rows: Sequence[Row]) -> torch.Tensor:
        """Summed loss of each row, shape (rows,): -log softmax(logits[t])[label[t + 1]] over the
        row's targets."""
        batch = {key: value.to(self._device) for key, value in pad(rows).items()}
        autocast = torch.autocast(
            self._device.type, self._autocast, enabled=self._autocast is not None
        )
        with autocast:
            output = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
        logits = (output.logits if hasattr(output, "logits") else output)[:, :-1]
        log_p = torch.log_softmax(
            logits if logits.dtype == torch.float64 else logits.float(), dim=-1
        )
        labels = batch["labels"][:, 1:]
        picked = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(picked * (labels != IGNORE)).sum(dim=1)


def _chunk_size(longest: int) -> int:
    return max(1, min(_REFERENCE_ROWS, _REFERENCE_TOKENS // max(1, longest)))


def pad(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of shape (rows, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return {
        "input_ids": filled("input_ids", pad_token_id),
        "attention_mask": mask,
        "labels": filled("labels", IGNORE),
    }


def num_targets(row: Row) -> int:
    """Targets of a row: its labels that are not -100, without the first, which the shift drops."""
    return sum(label != IGNORE for label in row["labels"][1:])


def relative_error(found: Gradient, exact: Gradient) -> float:
    """|found - exact| / |exact|, 2-norms over all parameters; a missing gradient counts as zero."""
    difference = sum(_square(found, exact, name) for name in found.keys() | exact.keys())
    size = sum(float((g.double() ** 2).sum()) for g in exact.values())
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def _square(found: Gradient, exact: Gradient, name: str) -> float:
    a, b = found.get(name), exact.get(name)
    difference = (
        a.double() - b.double() if a is not None and b is not None else (a if a is not None else b)
    )
    assert difference is not None
    return float((difference.double() ** 2).sum())


def worst_parameter(found: Gradient, exact: Gradient) -> str:
    """Name of the parameter with the largest share of the difference."""
    return max(sorted(found.keys() | exact.keys()), key=lambda name: _square(found, exact, name))


def norm_of(gradient: Gradient) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values()))


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """The factor by which one clip shortens a gradient of this norm; torch and DeepSpeed add the
    1e-6."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))


@contextlib.contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[int]:
    """Set every dropout rate in `model` to 0; yields the number of modules that had a higher one.

    Train mode stays on. Rates are the `p` of dropout modules and the attributes that modules pass
    to functional dropout (`attention_dropout`).
    """
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        is_dropout = isinstance(module, _DROPOUTS)
        for name, value in list(vars(module).items()):
            is_rate = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
            if is_rate and ("drop" in name or (is_dropout and name == "p")):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield len({id(module) for module, _, _ in before})
    finally:
        for module, name, value in before:
            setattr(module, name, value)
