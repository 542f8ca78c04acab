"""The plan of a run: its choices before training, for plan.json and for people."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accum_trainer import __version__
from accum_trainer.lm.model import count_parameters
from accum_trainer.train.resume import BRANCHED_FROM
from accum_trainer.train.setup import Training


def run_plan(training: Training, resumed_from: Path | None) -> dict[str, Any]:
    """The contents of plan.json."""
    engine, config = training.accumulator.engine, training.config
    schedule, prepared = training.schedule, training.prepared
    plan, cut, fit = schedule.plan, prepared.cutting.cut, prepared.cutting.found_batch_size
    model = engine.unwrap(prepared.model)
    all_parameters, trained = count_parameters(model)
    return {
        "model": config.model,
        "revision": config.revision,
        # The commit that the hub gave for it.
        "model_commit": getattr(model.config, "_commit_hash", None),
        "trust_remote_code": config.trust_remote_code,
        "physical_batch_size": cut.micro_batch_size,
        "max_tokens_per_micro_batch": cut.max_tokens,
        "batch_size_found": fit.as_record() if fit is not None else None,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps
        if cut.max_tokens is None
        else None,
        "world_size": plan.world_size,
        "effective_batch_size": plan.global_batch_size,
        # Evaluation computes no gradient; recorded so that readers need not guess.
        "eval_gradient_accumulation_steps": 1,
        "num_samples": plan.num_samples,
        "updates_per_epoch": plan.updates_per_epoch,
        "tail_samples": plan.tail_samples,
        "total_updates": schedule.total_updates,
        "warmup_updates": schedule.warmup,
        "lr": schedule.peak_lr,
        "weight_decay": config.weight_decay,
        "scheduler": config.scheduler,
        "max_grad_norm": config.max_grad_norm,
        "layout": "packed" if cut.packed else "padded",
        "layout_reason": prepared.cutting.layout_reason,
        "pad_to_multiple_of": cut.multiple,
        "objective": prepared.objective,
        "loss_path": dataclasses.asdict(prepared.loss_path),
        "attention": getattr(model.config, "_attn_implementation", None),
        "compiled_blocks": prepared.compiled_blocks,
        "cost": dataclasses.asdict(cut.cost),
        "rank_weights": cut.rank_weights,
        "noise_every": training.noise_every,
        "engine": engine.name,
        "shard_size": engine.shard_size,
        "offloaded": engine.offloaded,
        "grad_sync": engine.grad_sync,
        "grad_sync_reason": engine.grad_sync_reason,
        "weight_sync": engine.weight_sync,
        "weight_sync_reason": engine.weight_sync_reason,
        "accumulation_dtype": config.accumulation_dtype,
        "mixed_precision": engine.mixed_precision,
        "device": str(engine.device.type),
        "parameters": all_parameters,
        "trained_parameters": trained,
        "initial_weights": prepared.initial_weights,
        "seed": config.seed,
        "data": training.identity["data"],
        "skipped_rows": training.data.train.num_skipped,
        "skipped_eval_rows": getattr(training.data.evaluation, "num_skipped", None),
        "shard": config.shard,
        "branched_from": training.identity.get(BRANCHED_FROM),
        "resumed_from": str(resumed_from) if resumed_from else None,
        "versions": {
            "accum_trainer": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "accelerate": version("accelerate"),
            "transformers": version("transformers"),
            **({"peft": version("peft")} if config.use_peft else {}),
        },
    }


def describe_split(plan: dict[str, Any], training: Training) -> str:
    """How the effective batch is cut and spread: `B 2 x K 16 x W 1 = effective batch 32`, or the
    limit of tokens in force.

    Args:
        plan: `run_plan(training, ...)`.
    """
    batch = training.schedule.plan.describe()
    if plan["max_tokens_per_micro_batch"] is not None:
        limit = f"at most {plan['max_tokens_per_micro_batch']:,} tokens per micro-batch"
        batch = f"{limit}, W {plan['world_size']}, effective batch {plan['effective_batch_size']}"
    elif plan["layout"] == "packed" and plan["gradient_accumulation_steps"] > 1:
        batch += ", packed"
    if plan["rank_weights"] is not None:
        shares = ", ".join(f"{weight:g}" for weight in plan["rank_weights"])
        batch += f"; shares of the processes {shares}"
    return batch


def describe_plan(plan: dict[str, Any], training: Training) -> str:
    """The lines that are shown before training.

    Args:
        plan: `run_plan(training, ...)`.
    """
    sized = f"{plan['updates_per_epoch']} updates per epoch of {plan['num_samples']} samples"
    tail = f", the last of {plan['tail_samples']} samples" if plan["tail_samples"] else ""
    syncs = f"grad_sync {plan['grad_sync']}"
    if plan["weight_sync"] is not None:
        syncs += f", weight_sync {plan['weight_sync']}"
    groups = f" over groups of {plan['shard_size']}" if plan["shard_size"] else ""
    offloaded = f", {plan['offloaded']}" if plan["offloaded"] else ""
    lines = [
        describe_split(plan, training),
        f"{sized}{tail}; {plan['total_updates']} updates in all, {plan['warmup_updates']} of them "
        f"warm-up, lr {plan['lr']:g}",
        f"engine {plan['engine']}{groups}{offloaded}, {syncs}, {plan['device']}, precision "
        f"{plan['mixed_precision']}; "
        f"{plan['trained_parameters']:,} of {plan['parameters']:,} parameters trained",
        f"loss: {training.prepared.objective}",
        *(f"note: {note}" for note in training.notes),
    ]
    return "\n".join(lines)
