"""`accum-trainer plan`."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any

import click

from accum_trainer.batch_plan import BatchPlan, lr_factor, scale_lr, warmup_updates
from accum_trainer.cli.options import SectionedCommand, config_options, sized_plan
from accum_trainer.config import TrainConfig, compose
from accum_trainer.errors import ConfigError

if TYPE_CHECKING:
    from accum_trainer.plan.footprint import DeepSpeedSizes, Footprint, Footprints

_USED = (
    "batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "grad_sync",
    "accumulation_dtype",
    "steps",
    "epochs",
    "dataset_file",
    "lr",
    "lr_scaling",
    "lr_base_batch_size",
    "scheduler",
    "warmup",
    "model",
    "max_seq_len",
    "mixed_precision",
    "amp",
    "gradient_checkpointing",
    "attention",
    "use_peft",
    "lora_r",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "zero_stage",
    "cpu_offload",
    "cpu",
)
_ASK_FOR = {
    "single": "one process",
    "ddp": "torchrun, or `config create multi-gpu --engine ddp`",
    "fsdp2": "`config create multi-gpu --engine fsdp2`",
}


@click.command(
    "plan",
    cls=SectionedCommand,
    epilog="Example: accum-trainer plan --global-batch-size 64 --batch-size 4 --processes 2 "
    "--num-samples 7473 --epochs 3 --warmup 5%",
)
@click.option("--config", "config_file", metavar="FILE", help="YAML with the options of `train`.")
@click.option(
    "--processes",
    default=1,
    show_default=True,
    metavar="W",
    help="Processes that share the gradient.",
)
@click.option(
    "--num-samples",
    default=None,
    type=int,
    metavar="N",
    help="Samples in an epoch, where no --dataset-file says it.",
)
@click.option(
    "--gpu-memory",
    default=None,
    metavar="GB",
    help="Memory of one GPU, 10^9 bytes: say which engines fit. Needs --model.",
)
@config_options(_USED)
def command(
    config_file: str | None,
    processes: int,
    num_samples: int | None,
    gpu_memory: str | None,
    **given: Any,
) -> None:
    """Print what a run would be: B, K, W, effective batch, updates per epoch, tail, warm-up,
    learning rate.

    Pure arithmetic: nothing is loaded, and no GPU is needed. With --dataset-file each row counts as
    one sample (a `text` row longer than the model's length becomes several when trained on).

    With --model also what each engine needs on a GPU and sends between GPUs, found from the model's
    configuration: its weights are not read, and nothing is allocated.
    """
    named = {name: value for name, value in given.items() if value is not None}
    config = compose(named, (), config_file, os.environ).config
    plan = sized_plan(config, processes, num_samples)
    rows = plan_rows(plan, config)
    needs: list[str] = []
    if "model" in named or (gpu_memory is not None and config.model != TrainConfig.model):
        needs = footprint_lines(config, plan, gpu_memory)
    elif gpu_memory is not None:
        raise ConfigError(
            f"gpu_memory={gpu_memory} is compared with what a model needs; give --model too"
        )
    for name, value in rows:
        click.echo(_line(name, value))
    for line in needs:
        click.echo(line)


def _line(name: str, value: str) -> str:
    return f"{name:<28}{value}"


def plan_rows(plan: BatchPlan, config: Any) -> list[tuple[str, str]]:
    """Names and values of the batch arithmetic, in the order to print them; ConfigError where the
    parts do not fit."""
    lr = scale_lr(config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size)
    limit = config.max_tokens_per_micro_batch
    rows = [
        (
            "B   micro-batch",
            f"{plan.micro_batch_size}" if limit is None else f"at most {limit:,} tokens",
        ),
        (
            "K   accumulation steps",
            f"{plan.gradient_accumulation_steps}" if limit is None else "as the samples need",
        ),
        ("W   processes", f"{plan.world_size}"),
        (
            "B_eff  effective batch",
            f"{plan.global_batch_size}" + (f"   ({plan.describe()})" if limit is None else ""),
        ),
    ]
    if plan.num_samples is not None:
        tail = (
            f"{plan.tail_samples} samples in the last window"
            if plan.tail_samples
            else "none, all windows are whole"
        )
        rows += [
            ("samples per epoch", f"{plan.num_samples}"),
            ("updates per epoch", f"{plan.updates_per_epoch}"),
            ("tail", tail),
        ]
    scaled = (
        ""
        if config.lr_scaling == "none"
        else f"   ({config.lr_scaling} from {config.lr:g} at {config.lr_base_batch_size})"
    )
    total = config.steps or (
        plan.updates_per_epoch * config.epochs if plan.updates_per_epoch else None
    )
    if total is None:
        return [
            *rows,
            ("learning rate", f"{lr:g}{scaled}"),
            ("updates", "unknown: give --steps, --num-samples or --dataset-file"),
        ]
    warmup = warmup_updates(config.warmup, total, plan.updates_per_epoch)
    lr_factor(config.scheduler, warmup, total)
    return [
        *rows,
        ("updates in all", f"{total}"),
        ("warm-up", f"{warmup} updates   (from {config.warmup})"),
        ("learning rate", f"{lr:g}{scaled}, {config.scheduler}"),
    ]


def footprint_lines(
    config: TrainConfig,
    plan: BatchPlan,
    gpu_memory: str | float | None,
    sizes: DeepSpeedSizes | None = None,
) -> list[str]:
    """What each engine needs and sends, as lines to print, and with `gpu_memory` (in GB) which fit
    and which to take.

    Imports torch. `sizes` says DeepSpeed's buffers where a file sets them.

    Raises:
        ConfigError: `gpu_memory` is no size, or the model cannot be found or does not take these
            options.
    """
    limit = None if gpu_memory is None else _gigabytes(gpu_memory) * 1e9
    from accum_trainer.plan.footprint import footprints

    found = footprints(config, plan, sizes)
    precision = "float32" if found.precision == "no" else found.precision
    lines = [
        _line("model", _described(config, found)),
        _line("a micro-batch", f"{found.samples} x {config.max_seq_len} tokens, {precision}"),
        *_table(found.rows, limit),
        "other: buffers to reduce gradients and gather weights; sent: by a process in an update, "
        "gradients exchanged once per "
        "window or with every micro-batch",
    ]
    if found.unknown is not None:
        lines.append(
            f"activations are unknown: the model cannot be run without values ({found.unknown})"
        )
    placing = dict.fromkeys(
        row.engine for row in found.rows if row.total is not None and row.total == row.start
    )
    lines += [
        f"{engine} needs most while the model is placed, before it is sharded" for engine in placing
    ]
    if limit is not None:
        lines.append(_line("recommended", _recommended(config, plan, found, limit)))
    return lines


def _gigabytes(text: str | float) -> float:
    match = re.fullmatch(
        r"\s*([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)\s*(?:GB|G)?\s*", str(text), re.IGNORECASE
    )
    if match is None:
        raise ConfigError(
            f"gpu_memory={text} is not a size; give the memory of one GPU in GB, such as 80 or 80GB"
        )
    value = float(match[1])
    if not value > 0 or not math.isfinite(value):
        raise ConfigError(
            f"gpu_memory={text} must be above 0; give the memory of one GPU in GB, such as 80"
        )
    return value


def _described(config: TrainConfig, found: Footprints) -> str:
    s = found.shapes
    sizes = [
        f"{s.layers} layers" if s.layers is not None else "layers unknown",
        f"hidden size {s.hidden_size:,}" if s.hidden_size is not None else "hidden size unknown",
        f"vocabulary {s.vocabulary:,}" if s.vocabulary is not None else "vocabulary unknown",
    ]
    return f"{config.model}: {s.parameters:,} parameters, {s.trained:,} trained; {', '.join(sizes)}"


def _table(rows: list[Footprint], limit: float | None) -> list[str]:
    """One line per engine and policy, sizes in GB."""
    digits = 2 if max(row.total or row.weights for row in rows) >= 1e9 else 4

    def size(value: int | None) -> str:
        return "unknown" if value is None else f"{value / 1e9:.{digits}f}"

    titles = [
        "GB per process",
        "grad_sync",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "other",
        "total",
    ]
    titles += [] if limit is None else [f"fits {limit / 1e9:g}"]
    titles += ["sent once", "sent every"]
    table = [titles]
    for row in rows:
        cells = [row.engine, row.grad_sync]
        cells += [
            size(v)
            for v in (
                row.weights,
                row.gradients,
                row.optimizer,
                row.activations,
                row.other,
                row.total,
            )
        ]
        cells += (
            [] if limit is None else [{True: "yes", False: "no", None: "unknown"}[row.fits(limit)]]
        )
        table.append([*cells, *(size(sent) for sent in row.traffic.values())])
    widths = [max(len(line[column]) for line in table) for column in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _recommended(config: TrainConfig, plan: BatchPlan, found: Footprints, limit: float) -> str:
    from accum_trainer.plan.footprint import RESERVED, recommend

    if all(row.total is None for row in found.rows):
        return "nothing, since what the activations need is unknown"
    best = recommend(found.rows, limit)
    room = f"{limit / 1e9:g} GB, of which {RESERVED:.0%} are left to the driver and NCCL"
    if best is None:
        least = min(
            (row for row in found.rows if row.total is not None), key=lambda row: row.total or 0
        )
        assert least.total is not None
        return (
            f"nothing: the least, {least.engine} ({least.grad_sync}), needs {_short(least.total)}, "
            f"more than fits {room}; "
            f"{', or '.join(_remedies(config, plan))}"
        )
    fitting = sum(bool(row.fits(limit)) for row in found.rows)
    ask = _ASK_FOR.get(best.engine, f"--zero-stage {best.engine}")
    if best.engine in ("zero2", "zero3", "fsdp2"):  # the others need the same memory under both
        ask += f", --grad-sync {best.grad_sync}"
    why = "it fits"
    if fitting > 1:
        waits = best.engine in ("zero3", "fsdp2")
        why = f"of the {fitting} that fit it sends least" + (
            "" if waits else ", and gathers no weights in the forward"
        )
    return (
        f"{best.engine}, {best.grad_sync} ({ask}): {why} "
        f"({_short(best.traffic[best.grad_sync])} per update); {room}"
    )


def _short(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def _remedies(config: TrainConfig, plan: BatchPlan) -> list[str]:
    """What would need less and is not asked for yet, cheapest first."""
    remedies = []
    if not config.gradient_checkpointing:
        remedies.append("give --gradient-checkpointing")
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
        remedies.append(
            "keep the optimizer's state in host memory (--zero-stage zero2 --cpu-offload)"
        )
    remedies.append(f"use more than {plan.world_size} process{'es' if plan.world_size > 1 else ''}")
    return remedies
