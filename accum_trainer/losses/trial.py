"""Run a model on the batches of a probe and record the losses that it returns.

`probe` makes the batches, `objective` judges what was seen. Knows how models of transformers return
losses and logits; judges nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from accum_trainer.batch import IGNORE, Batch, num_samples
from accum_trainer.losses.dry_run import is_compiled, undisturbed
from accum_trainer.losses.outputs import own_loss, router_loss
from accum_trainer.losses.patched_head import cross_entropy
from accum_trainer.losses.probe import Probe
from accum_trainer.losses.targets import SHIFTED

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_ROUTER_TERMS = ("aux_loss", "z_loss", "encoder_aux_loss", "decoder_aux_loss")
# Most classes whose logits are kept for a comparison.
_MOST_CLASSES = 64


@dataclass(frozen=True)
class Seen:
    """The outcome of one probe batch.

    Attributes:
        loss: the model's own.
        router: the router's loss, without its coefficient; 0 if there is none.
        is_16_bit: the loss is float16 or bfloat16.
        router_terms: names of the router's losses in the output.
        cross_entropy: mean over the shifted labels, from the logits; None without a router's loss
            or without logits.
        logits: of some classes, float32; of `whole` and `wider` only.
    """

    loss: float
    router: float = 0.0
    is_16_bit: bool = False
    router_terms: tuple[str, ...] = ()
    cross_entropy: float | None = None
    logits: torch.Tensor | None = None

    def without_router(self, coefficient: float) -> Seen:
        return replace(self, loss=self.loss - coefficient * self.router)


def run_probe(model: torch.nn.Module, probe: Probe) -> dict[str, Seen] | None:
    """The outcome of each probe batch by its name; None if the model returns no loss.

    `wider` is missing if the model accepts one length only. The model's modes and the random state
    are restored.
    """
    seen: dict[str, Seen] = {}
    size = num_samples(probe.whole)
    with undisturbed(model, device_of(probe.whole)):
        for name, batch in probe.batches():
            has_noise = not probe.is_row and name not in ("whole", "first_column", "wider")
            offset = num_samples(probe.halves[0]) if name == "halves1" and probe.halves else 0
            noise = _noisy_head(model, (size, num_samples(batch)), offset)
            try:
                with noise if has_noise else contextlib.nullcontext():
                    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
            except Exception:
                if name != "wider":
                    raise
                continue
            loss = own_loss(outputs)
            if loss is None:
                return None
            aux = router_loss(outputs)
            seen[name] = Seen(
                loss=float(loss),
                router=0.0 if aux is None else float(aux),
                is_16_bit=loss.dtype in SIXTEEN_BIT,
                router_terms=tuple(
                    t for t in _ROUTER_TERMS if isinstance(getattr(outputs, t, None), torch.Tensor)
                ),
                cross_entropy=_shifted_cross_entropy(outputs, batch) if aux is not None else None,
                logits=_some_logits(outputs) if name in ("whole", "wider") else None,
            )
    return seen


@contextlib.contextmanager
def own_forward(model: torch.nn.Module, plain: Any) -> Iterator[None]:
    """Run `plain`, the model's own forward, without the autocast that was put around it.

    Args:
        plain: None changes nothing.
    """
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


def device_of(batch: Batch) -> torch.device:
    """The device of a batch's first tensor; the CPU if it has none."""
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


@contextlib.contextmanager
def _noisy_head(model: torch.nn.Module, sizes: tuple[int, int], offset: int) -> Iterator[None]:
    """Add noise to the output of the model's last linear layer, the same to the same sample.

    A head that is still all zero gives every target the same loss, and wrong weights would cancel
    out.

    Args:
        sizes: samples of the whole batch, and of this one.
        offset: index of this batch's first sample in the whole.
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
    # A compiled graph may run a hook in one call and not in another.
    if head is None or was_compiled:
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


def _some_logits(outputs: Any) -> torch.Tensor | None:
    logits = (
        outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    )
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        return None
    return logits[..., :: max(1, logits.shape[-1] // _MOST_CLASSES)].float()


def _shifted_cross_entropy(outputs: Any, batch: Mapping[str, Any]) -> float | None:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != batch["labels"].shape:
        return None
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[..., 1:]
    count = SHIFTED.count(batch)
    return float(cross_entropy(logits, targets, 0.0)) / count if count else None
