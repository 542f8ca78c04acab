"""Windows whose noise is measured: the same update, and norms as float64 finds them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import torch

from accum_trainer import causal_lm_loss
from accum_trainer.window_plan import Cut, Dealt
from tests.engine.cases.probing import Probe, accumulator, case, planned, world_size
from tests.engine.cases.reads import Reads
from tests.reference import equal, make_model, make_rows, num_targets, pad, relative_error

_MEASURED = 8  # samples of a window on each process


class _AtRandom(Cut):
    """The cut of measured windows in windows that are not measured."""

    def assign_to_ranks(self, lengths: np.ndarray, world_size: int) -> Dealt:
        found = self.assign_at_random(lengths, world_size)
        assert found is not None
        return found


def _square(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """|gradient of a batch's summed loss|^2 in float64."""
    exact = copy.deepcopy(model).double()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = exact(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    return sum((p.grad**2).sum().item() for p in exact.parameters() if p.grad is not None)


@case
def noise_is_measured() -> dict[str, Any]:
    """Two windows with their noise measured, and the same cut without."""
    size = _MEASURED * world_size()
    # A micro-batch without a target would not be measured.
    rows = [row for row in make_rows(8 * size) if num_targets([row])][: 2 * size]
    runs, result = [], {}
    for kind, every in ((Cut, 1), (_AtRandom, 0)):
        acc = accumulator(3, global_batch_size=size)
        probe = Probe(acc, make_model("llama"))
        cut = kind(3, equal_counts=acc.engine.equal_micro_batches)
        windows = acc.windows(rows, collate_fn=pad, cut=cut, noise_every=every)
        errors, norms = [], []
        for window, expected in zip(windows, planned(rows, size), strict=True):
            _, exact = probe.exact(expected)
            now = copy.deepcopy(probe.pristine)
            now.load_state_dict(probe.weights(), strict=False)
            batches, reads = [], Counter()
            for batch in window:
                batches.append({key: value.cpu() for key, value in batch.items()})
                with Reads() as inside, acc.accumulate(probe.model):
                    acc.backward(causal_lm_loss(probe.model, batch))
                reads += inside
            if every:
                measured, found, *_ = window.norms.to_row(0)
                by_hand = sum(_square(now, batch) for batch in batches[:-1])
                by_hand *= (acc.engine.gradient_divisor / window.num_targets) ** 2
                norms.append(abs(float(found) - by_hand) / by_hand if measured else None)
            probe.stepped.append(probe.gradient())
            with Reads() as in_step:
                acc.step(probe.optimizer)
            errors.append(relative_error(probe.stepped[-1], exact))
        runs.append(probe.stepped)
        if every:
            noise = windows.noise
            result = {"num_windows": noise.num_windows, "obstacle": noise.obstacle}
            result |= {"errors": errors, "norms": norms, "inside": reads, "step": in_step}
    return result | {"same": [equal(a, b) for a, b in zip(*runs, strict=True)]}
