"""A worker of test_zero_settings: ZeRO-3 of a DeepSpeed file, trained with weights that are set and
an evaluation in between; numbers that a process gathers in its last window, by how many share them.

torchrun -m tests.second_copies OUT.json KIND
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from accum_trainer import Accumulator, causal_lm_loss
from tests.reference import make_model, make_rows, pad


def main(out: str, kind: str) -> None:
    acc = Accumulator(
        micro_batch_size=1, gradient_accumulation_steps=3, zero_stage=3, cpu=True, max_grad_norm=0.5
    )
    gathered: Counter[int] = Counter()
    _count_gathers(gathered)
    model = make_model(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = acc.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    begun_with, seen = acc.engine.full_weights(model), []
    for number, window in enumerate(acc.windows(make_rows(5 * 3 * 4), collate_fn=pad)):
        if number == 2:  # as a checkpoint that is loaded; forwards have made the copies
            acc.engine.load_full_weights(model, begun_with)
        gathered.clear()
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        update = acc.step(optimizer)
        in_window = dict(gathered)
        seen.append((update.loss, update.grad_norm))
        if number < 3:  # before the last window no forward makes the copies
            with torch.no_grad():
                seen.append(float(causal_lm_loss(model, pad(make_rows(3)))))
    weights = acc.engine.full_weights(model)
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for _, w in sorted(weights.items())))
    if acc.engine.is_main:
        size = sum(w.numel() for w in weights.values())
        found = {"weights": digest.hexdigest(), "seen": seen, "gathered": in_window, "size": size}
        Path(out).write_text(json.dumps(found))


def _count_gathers(gathered: Counter[int]) -> None:
    from deepspeed.comm.torch import TorchBackend

    own = TorchBackend.all_gather_into_tensor

    def counting(*args: object, **kwargs: object) -> object:
        given = dict(zip(("self", "output_tensor", "input_tensor", "group"), args, strict=False))
        given |= kwargs
        processes = dist.get_world_size(given.get("group"))
        gathered[processes] += given["output_tensor"].numel()
        return own(*args, **kwargs)

    TorchBackend.all_gather_into_tensor = counting


if __name__ == "__main__":
    main(*sys.argv[1:])
