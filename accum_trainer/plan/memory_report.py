"""Memory and traffic of each engine, which of them fit a GPU and which to take, as lines of text.

Formats `footprint`'s numbers and computes none. Imports torch.
"""

from __future__ import annotations

from accum_trainer.batch_plan import BatchPlan
from accum_trainer.config import TrainConfig
from accum_trainer.plan.batch_report import line
from accum_trainer.plan.footprint import (
    RESERVED,
    Footprint,
    Footprints,
    footprints,
    recommend,
)
from accum_trainer.plan.job import DeepSpeedSizes


def memory_report(
    config: TrainConfig,
    plan: BatchPlan,
    gpu_memory: float | None,
    sizes: DeepSpeedSizes | None = None,
) -> list[str]:
    """A table of memory and traffic per engine, and a recommendation.

    Args:
        gpu_memory: memory of one GPU in GB (10^9 bytes); adds which engines fit, and which to take.
        sizes: DeepSpeed's buffers, if a file sets them.

    Raises:
        ConfigError: the model cannot be found or does not take these options.
    """
    limit = None if gpu_memory is None else gpu_memory * 1e9
    found = footprints(config, plan, sizes)
    precision = "float32" if found.precision == "no" else found.precision
    lines = [
        line("model", _described(config, found)),
        line("a micro-batch", f"{found.samples} x {config.max_seq_len} tokens, {precision}"),
        *_table(found.rows, limit),
        "other: buffers that reduce gradients and gather weights; sent: by one process in an "
        "update, with gradients exchanged once per window or with every micro-batch; weight_sync: "
        "when sharded weights are gathered, once per window keeping them whole through it",
    ]
    lines.append(line("16 bytes per parameter", _beside_the_usual(config, found)))
    lines += _host_table(found)
    if found.unknown is not None:
        lines.append(
            "activations, offloaded ones too, are unknown: the model cannot be run without values "
            f"({found.unknown})"
        )
    placing = dict.fromkeys(
        row.engine for row in found.rows if row.total is not None and row.total == row.start
    )
    lines += [
        f"{engine} needs most while the model is placed, before it is sharded" for engine in placing
    ]
    if found.between_groups is not None:
        lines.append(
            f"fsdp2 shards over groups of {config.shard_size} processes; of what one sends in an "
            f"update, {_short(found.between_groups)} go to other groups"
        )
    if config.engine is not None:
        lines.append(line("asked for", _asked_for(config.engine, found, limit)))
    if limit is not None:
        lines.append(line("recommended", _recommended(config, plan, found, limit)))
    return lines


def _described(config: TrainConfig, found: Footprints) -> str:
    s = found.shapes
    sizes = [
        f"{s.layers} layers" if s.layers is not None else "layers unknown",
        f"hidden size {s.hidden_size:,}" if s.hidden_size is not None else "hidden size unknown",
        f"vocabulary {s.vocabulary:,}" if s.vocabulary is not None else "vocabulary unknown",
    ]
    return f"{config.model}: {s.parameters:,} parameters, {s.trained:,} trained; {', '.join(sizes)}"


def _beside_the_usual(config: TrainConfig, found: Footprints) -> str:
    """The rule of thumb for mixed precision (Rajbhandari et al. 2020, section 3), and the first
    row beside it, which shards nothing."""
    s, row = found.shapes, found.rows[0]
    weights, gradients, optimizer = (
        size / s.parameters for size in (row.weights, row.gradients, row.optimizer)
    )
    why = "the same" if found.precision == "no" else "float32 weights with 16-bit copies beside"
    if s.trained < s.parameters:
        why = "only trained weights have gradients and optimizer state"
    elif config.accumulation_dtype == "bfloat16":
        why += " them; gradients in 16 bits" if found.precision != "no" else ", less 2 of gradients"
    elif found.precision != "no":
        why += " them, and float32 gradients"
    return (
        f"the usual figure (weights 2, gradients 2, optimizer 12; in float32 4, 4, 8) is "
        f"{_short(16 * s.parameters)} before activations and other; {row.engine} here has weights "
        f"{weights:.3g}, gradients {gradients:.3g}, optimizer {optimizer:.3g}: {why}"
    )


def _asked_for(engine: str, found: Footprints, limit: float | None) -> str:
    """The memory of the engine that `train` is to run on, under each policy."""
    needs = []
    for row in found.rows:
        if row.engine == engine:
            policies = [row.grad_sync, *([row.weight_sync] if row.weight_sync else [])]
            text = "unknown" if row.total is None else _short(row.total)
            if limit is not None and row.total is not None:
                text += " fits" if row.fits(limit) else " does not fit"
            needs.append(f"{text} ({', '.join(policies)})")
    return f"{engine}: {'; '.join(needs)}"


def _table(rows: list[Footprint], limit: float | None) -> list[str]:
    """One line per engine and policy, sizes in GB."""
    digits = 2 if max(row.total or row.weights for row in rows) >= 1e9 else 4
    parts = ("weights", "gradients", "optimizer", "activations", "other", "total")
    fits = [] if limit is None else [f"fits {limit / 1e9:g}"]
    table = [
        ["GB per process", "grad_sync", "weight_sync", *parts, *fits, "sent once", "sent every"]
    ]
    for row in rows:
        needs = [getattr(row, part) for part in parts]
        cells = ["unknown" if n is None else f"{n / 1e9:.{digits}f}" for n in needs]
        if limit is not None:
            cells.append({True: "yes", False: "no", None: "unknown"}[row.fits(limit)])
        sent = [f"{value / 1e9:.{digits}f}" for value in row.traffic.values()]
        table.append([row.engine, row.grad_sync, row.weight_sync or "-", *cells, *sent])
    return _columns(table, left=3)


def _host_table(found: Footprints) -> list[str]:
    """One line per engine: host memory of a machine that runs all processes, sizes in GB."""
    digits = 2 if max(need.total for need in found.host.values()) >= 1e9 else 4
    table = [["GB of host memory", "reading the model", "training", "and a checkpoint", "at most"]]
    for engine, need in found.host.items():
        sizes = (need.reading, need.beside, need.writing, need.total)
        table.append([engine, *(f"{size / 1e9:.{digits}f}" for size in sizes)])
    return [
        *_columns(table, left=1),
        "of a machine that runs all processes. Left out: Python and its libraries; the run's end, "
        "which gathers the model, and with --merge-adapter loads it once more; on a GPU, the "
        "rounding of a checkpoint's copies up to powers of two",
    ]


def _columns(table: list[list[str]], left: int) -> list[str]:
    """Lines whose cells stand below each other, the first `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    ]


def _recommended(config: TrainConfig, plan: BatchPlan, found: Footprints, limit: float) -> str:
    if all(row.total is None for row in found.rows):
        return "nothing, since what the activations need is unknown"
    best = recommend(found.rows, limit)
    room = f"{limit / 1e9:g} GB, of which {RESERVED:.0%} are left to the driver and NCCL"
    if best is None:
        total, least = min(
            ((row.total, row) for row in found.rows if row.total is not None),
            key=lambda pair: pair[0],
        )
        return (
            f"nothing: the least, {least.engine} ({least.grad_sync}), needs {_short(total)}, "
            f"more than fits {room}; {', or '.join(_remedies(config, plan))}"
        )
    fitting = sum(bool(row.fits(limit)) for row in found.rows)
    ask = f"--engine {best.engine}"
    if best.policy_matters:
        ask += f", --grad-sync {best.grad_sync}"
    if best.weight_sync is not None:
        ask += f", --weight-sync {best.weight_sync}"
    why = "it fits"
    if fitting > 1:
        why = f"of the {fitting} that fit "
        why += "it sends least" if best.shards else "it alone shards nothing"
        if best.shards and not best.gathers_in_forward:
            why += ", and gathers no weights in the forward"
    return (
        f"{best.engine}, {best.grad_sync} ({ask}): {why} "
        f"({_short(best.traffic[best.grad_sync])} per update); {room}"
    )


def _short(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def _remedies(config: TrainConfig, plan: BatchPlan) -> list[str]:
    """Changes that need less memory and are not in the configuration yet, cheapest first."""
    remedies = []
    if not config.gradient_checkpointing:
        remedies.append("give --gradient-checkpointing")
    elif not config.activation_offload and not config.compile:
        remedies.append("give --activation-offload")
    if plan.micro_batch_size > 1 and config.max_tokens_per_micro_batch is None:
        half = plan.micro_batch_size // 2 if plan.micro_batch_size % 2 == 0 else 1
        remedies.append(
            f"halve B (--batch-size {half} --global-batch-size {plan.global_batch_size}, the same "
            "update)"
        )
    if config.mixed_precision is None and not config.amp:
        remedies.append("give --mixed-precision bf16")
    if not config.use_peft:
        remedies.append("train adapters (--use-peft)")
    if not config.cpu_offload:
        remedies.append("keep the optimizer's state in host memory (--engine zero2 --cpu-offload)")
    remedies.append(f"use more than {plan.world_size} process{'es' if plan.world_size > 1 else ''}")
    return remedies
