"""`torchrun -m tests.engine.dealing`: FSDP2 with weights that process 0 alone has, beside weights
that all have. Three processes, so that rows do not divide evenly. Prints one line of JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from accum_trainer import AccumTrainerError, Accumulator, causal_lm_loss
from tests.reference import equal, make_model, make_rows, pad


def built(kind: str, dealt: bool) -> torch.nn.Module:
    if not dealt or dist.get_rank() == 0:
        return make_model(kind)
    with torch.device("meta"):
        return make_model(kind)


def trained(kind: str, dealt: bool) -> dict[str, Any]:
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, fsdp=True, cpu=True)
    model = built(kind, dealt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model, optimizer = acc.prepare(model, optimizer)
    begun = acc.engine.full_weights(model)
    for window in acc.windows(make_rows(24), collate_fn=pad):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        acc.step(optimizer)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"begun": begun, "buffers": buffers, "ended": acc.engine.full_weights(model)}


def refusal(build: Any) -> str:
    acc = Accumulator(micro_batch_size=2, gradient_accumulation_steps=2, fsdp=True, cpu=True)
    try:
        acc.prepare(build())
    except AccumTrainerError as error:
        return str(error)
    return ""


def on_meta_but(rank: int) -> torch.nn.Module:
    """Whole on this rank alone."""
    with torch.device("meta" if dist.get_rank() != rank else "cpu"):
        return make_model("llama")


def another() -> torch.nn.Module:
    if dist.get_rank() == 0:
        return make_model("llama")
    with torch.device("meta"):
        return make_model("gpt2")


def main() -> None:
    found = {}
    for kind in ("llama", "gpt2", "lora"):
        whole, dealt = trained(kind, False), trained(kind, True)
        found[kind] = {name: equal(whole[name], dealt[name]) for name in whole}
        begun = make_model(kind).state_dict()
        found[kind]["loaded"] = all(torch.equal(begun[n], w) for n, w in dealt["begun"].items())
    said = [refusal(lambda: on_meta_but(1)), refusal(another)]
    if dist.get_rank() == 0:
        print(json.dumps({"found": found, "said": said}))


if __name__ == "__main__":
    main()
