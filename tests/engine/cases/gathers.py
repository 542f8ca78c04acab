"""When sharded weights are gathered, and that it changes nothing else."""

from __future__ import annotations

from typing import Any

import torch

from accum_trainer import AccumTrainerError, causal_lm_loss
from accum_trainer.engine import sync
from accum_trainer.engine.own_parts import WholeTensors
from benchmarks.collectives import Recorder
from tests.engine.cases.probing import (
    ENGINE,
    Probe,
    accumulator,
    case,
    forget_accelerate,
    rank,
    world_size,
)
from tests.reference import equal, make_model, make_rows, pad

ONCE, EVERY = "once-per-window", "every-microbatch"


@case
def gathers_per_window() -> dict[str, Any]:
    """Gathers of weights in the last window (ZeRO-3 watches two micro-batches first), the step
    included, and what they gather, as a multiple of the model."""
    found: dict[str, Any] = {}
    for kind in ("llama", "lora"):
        for policy in (ONCE, EVERY):
            for k in (1, 8):
                acc = accumulator(1, gradient_accumulation_steps=k, weight_sync=policy)
                probe = Probe(acc, make_model(kind))
                if acc.engine.weight_sync is None:
                    return {"found": found, "shards_weights": False}
                windows = 3 if k == 1 else 2
                for window in acc.windows(make_rows(windows * k * world_size()), collate_fn=pad):
                    with Recorder() as seen:
                        for batch in window:
                            with acc.accumulate(probe.model):
                                acc.backward(causal_lm_loss(probe.model, batch))
                        acc.step(probe.optimizer)
                gathered = [c.numbers for c in seen.collectives if c.kind == "weights"]
                whole = sum(p.numel() for p in probe.pristine.parameters())
                found[f"{kind} {policy} K={k}"] = [len(gathered), sum(gathered) / whole]
    return {"found": found, "shards_weights": True}


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"kind": "llama"},
    "bf16, reduced each time": {"kind": "llama", "mixed_precision": "bf16", "grad_sync": EVERY},
    "LoRA, checkpointed": {"kind": "lora", "checkpointing": True},
    "tied": {"kind": "gpt2"},
}
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "K=1": {"kind": "llama", "micro": 8},
    "reduced each time": {"kind": "llama", "grad_sync": EVERY},
    "bf16, checkpointed": {"kind": "llama", "mixed_precision": "bf16", "checkpointing": True},
}


@case
def weight_sync_changes_no_bit() -> dict[str, Any]:
    return _under_both_policies(VARIANTS)


@case
def weight_sync_changes_no_bit_in_more_variants() -> dict[str, Any]:
    return _under_both_policies(MORE_VARIANTS)


def _under_both_policies(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Clipped training under both policies: a window that is broken off, an evaluation, parts as
    they are saved, weights that are set, a tail."""
    found: dict[str, Any] = {}
    for name, options in variants.items():
        once, every = (_trained(weight_sync=policy, **options) for policy in (ONCE, EVERY))
        found[name] = {
            "updates": len(once["gradients"]),
            "policies": [once["policy"], every["policy"]],
            "gradients": all(map(equal, once["gradients"], every["gradients"])),
            "losses": once["losses"] == every["losses"],
            "weights": equal(once["weights"], every["weights"]),
            "saved": all(once["saved"]) and all(every["saved"]),
        }
        if once["policy"] is None:
            break  # nothing is sharded
    return found


def _trained(
    kind: str, weight_sync: str, micro: int = 2, checkpointing: bool = False, **options: Any
) -> dict[str, Any]:
    if "zero_stage" not in ENGINE:
        forget_accelerate()
    options |= {"weight_sync": weight_sync, "max_grad_norm": 0.5}
    acc = accumulator(micro, global_batch_size=8 * world_size(), **options)
    model = make_model(kind)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe = Probe(acc, model.train())
    begun_with = probe.weights()
    windows = acc.windows(make_rows(20 * world_size()), collate_fn=pad)
    losses, saved = [], []

    def train(batch: Any) -> None:
        with acc.accumulate(probe.model):
            acc.backward(causal_lm_loss(probe.model, batch))

    def between() -> None:
        with torch.no_grad():
            losses.append(float(causal_lm_loss(probe.model, pad(make_rows(3)))))
        parts = acc.engine.own_parts(probe.model, probe.optimizer.accelerated)
        everyones = acc.engine.gather_objects([part.on_host() for part in parts])
        whole = WholeTensors(part for own in everyones for part in own)
        saved.append(
            all(torch.equal(whole[f"model/{name}"], w) for name, w in probe.weights().items())
        )
        with torch.no_grad():
            probe.model(**pad(make_rows(2)))
        if rank() == 0 and acc.engine.name == "fsdp2":
            probe.model.state_dict()  # on one process: its outermost weights are sharded again

    for window in windows:
        for batch in window:
            train(batch)
            break
        break
    between()
    for number, window in enumerate(windows):
        if number == 1:  # as one who swaps averaged weights in
            acc.engine.load_full_weights(probe.model, begun_with)
        for batch in window:
            train(batch)
        probe.step()
        between()
    return {
        "policy": acc.engine.weight_sync,
        "gradients": probe.stepped,
        "weights": probe.weights(),
        "losses": losses,
        "saved": saved,
    }


@case
def weight_sync_is_chosen() -> dict[str, Any]:
    """The policy in force and its reason: asked for, by K and by memory."""
    found = {}
    free = sync.free_bytes
    for name, k, asked, memory in (
        ("asked for", 1, ONCE, free),
        ("K=1", 1, "auto", free),
        ("room", 2, "auto", lambda device: 1e9),
        ("no room", 2, "auto", lambda device: 1e5),
    ):
        sync.free_bytes = memory
        try:
            acc = accumulator(2, gradient_accumulation_steps=k, weight_sync=asked)
            Probe(acc, make_model("llama"))
        finally:
            sync.free_bytes = free
        found[name] = [acc.engine.weight_sync, acc.engine.weight_sync_reason]
    return found


@case
def weights_that_a_deepspeed_file_keeps() -> dict[str, Any]:
    """A file that says which weights ZeRO-3 keeps, beside `weight_sync`."""
    found: dict[str, Any] = {}
    if ENGINE.get("zero_stage") != 3:
        return found
    from accelerate.utils import DeepSpeedPlugin

    for name, zero in {
        "threshold": {"stage3_param_persistence_threshold": 50},
        "auto": {"stage3_param_persistence_threshold": "auto"},
        "host": {"offload_param": {"device": "cpu"}},
    }.items():
        for asked in (ONCE, "auto"):
            config = {"zero_optimization": {"stage": 3} | zero} | dict.fromkeys(
                ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"), "auto"
            )
            try:
                acc = accumulator(
                    2,
                    gradient_accumulation_steps=2,
                    weight_sync=asked,
                    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
                )
                Probe(acc, make_model("llama"))
                said = [acc.engine.weight_sync, acc.engine.weight_sync_reason]
            except AccumTrainerError as error:
                said = [type(error).__name__, str(error)]
            found[f"{name}, {asked}"] = said
    return found
