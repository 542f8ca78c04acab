"""Summed cross-entropy of a linear head without the logits of all targets at once.

The largest tensor of a causal model is its logits. Here they exist for a few targets at a time,
and the gradient is computed while they do. Knows tensors only: no model, no engine, no window.

torch 2.13's `F.linear_cross_entropy(options=)` does not replace it. Its chunked path has no label
smoothing, rounds the sum in bf16 (error 3e-3, here 1e-5), accumulates the weight's gradient in bf16
and takes 1.6 times as long there on a CPU; in float32 the two are equal. torch 2.11 lacks it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept
from torch.autograd.function import once_differentiable

# Most logits at a time: 128 MiB in float32, held twice. Measured on a CPU with a vocabulary of
# 49,152 and 960 targets: chunks of a quarter take 6 % more time in head and loss, larger chunks
# save nothing.
CHUNK = 2**25


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sum the cross-entropy of `hidden @ weight.T + bias`, CHUNK logits at a time.

    Args:
        hidden: shape (targets, hidden).
        weight: shape (vocabulary, hidden).
        bias: shape (vocabulary,), or None.
        targets: shape (targets,), int64; every entry is a class, none is an ignored label.
        label_smoothing: share of each target spread evenly over the vocabulary, 0 to 1.
        dtype: of the matrix products; log-softmax and sums are float32, or float64 for float64.

    Returns:
        Shape (1, 1, 1), like logits, so that a model can return it; differentiable once.
    """
    tensors = (hidden, weight, bias)
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    apply: Any = _ChunkedLoss.apply
    loss: torch.Tensor = apply(*tensors, targets, label_smoothing, dtype, wants)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Compute the gradient together with the loss, while a chunk's logits exist.

    The gradient of a sum needs only one factor from the backward. Liger Kernel does the same
    (liger_kernel/ops/fused_linear_cross_entropy.py); recomputing the logits in the backward took
    1.33 times as long. With p = softmax(logits) and label smoothing s over V classes

        loss = -(1 - s) log p[target] - s/V sum(log p)
        d loss / d logits = p - (1 - s) onehot(target) - s/V

    The weight's gradient is accumulated in float32, whatever the dtype of the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
        wants: list[bool],
    ) -> torch.Tensor:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        vocabulary = weight.shape[0]
        rows = max(1, CHUNK // vocabulary)
        total = hidden.new_zeros((1, 1, 1), dtype=precise)
        gradients = [
            t.new_zeros(t.shape, dtype=precise) if wanted and t is not None else None
            for t, wanted in zip((hidden, weight, bias), wants, strict=True)
        ]
        of_hidden, of_weight, of_bias = gradients
        weight = weight.to(dtype)
        for begin in range(0, len(hidden), rows):
            h = hidden[begin : begin + rows].to(dtype)
            target = targets[begin : begin + rows].unsqueeze(1)
            logits = h @ weight.T
            if bias is not None:
                logits += bias.to(dtype)
            log_p = torch.log_softmax(logits, dim=-1, dtype=precise)
            del logits
            total -= (1 - label_smoothing) * log_p.gather(1, target).sum()
            if label_smoothing:
                total -= label_smoothing / vocabulary * log_p.sum()
            if not any(wants):
                continue
            p = log_p.exp_()
            p.scatter_(1, target, p.gather(1, target) - (1 - label_smoothing))
            if label_smoothing:
                p -= label_smoothing / vocabulary
            p = p.to(dtype)
            if of_hidden is not None:
                of_hidden[begin : begin + rows] = p @ weight
            if of_weight is not None:
                add_product(of_weight, p.T, h)
            if of_bias is not None:
                of_bias += p.sum(0, dtype=precise)
            del log_p, p
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        # Scale in place, since the weight's gradient is as large as the weight. If the caller
        # retains the graph, another backward needs the unscaled gradient.
        is_kept, factor = graph_is_kept(), factor.reshape(())
        of_hidden, of_weight, of_bias = (
            g if g is None else g * factor if is_kept else g.mul_(factor) for g in ctx.saved_tensors
        )
        return of_hidden, of_weight, of_bias, None, None, None, None


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add `a @ b` to `total` in place, in the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
