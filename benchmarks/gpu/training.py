"""What `train` gives in 16 bits and compiled, against float32 as it is: the same data, order and
updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Result, Setting, Table

UPDATES = 20
# Largest difference of an update's loss, as a share of how far the loss falls in float32: one
# update in 20 that is lost is about so much.
SIXTEEN_BIT = 0.05
# Compiled code fuses and so rounds anew.
COMPILED = 1e-4


def train(setting: Setting, name: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """The records of a training of the tiny model on the embedded corpus, through
    `accum_trainer.train.updates`."""
    from accelerate.state import AcceleratorState, GradientState

    from accum_trainer import TrainConfig
    from accum_trainer.train import updates

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sizes = (
        {"global_batch_size": 8, "max_seq_len": 64} if setting.small else {"global_batch_size": 32}
    )
    common = {"batch_size": 2 if setting.small else 8, "cpu": setting.cpu, "steps": steps, **sizes}
    return list(
        updates(TrainConfig(**(common | options | {"output_dir": str(place(setting, name))})))
    )


def place(setting: Setting, name: str) -> Path:
    """The run directory of a training of this name."""
    return Path(setting.folder) / name


def worst_difference(found: list[dict[str, Any]], exact: list[dict[str, Any]], key: str) -> float:
    """The largest relative difference of a number over all updates; nan counts as infinite."""
    worst = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, exact, strict=True))
    return worst if worst == worst else float("inf")


def precision(setting: Setting) -> Result:
    from accum_trainer.train.checkpoint import load_checkpoint
    from accum_trainer.train.checkpoint_folder import newest_whole

    header = [
        "precision",
        "first loss",
        "last loss",
        "worst difference / fall in float32",
        "skipped",
        "loss scale",
    ]
    result = Result(Table(header, []))
    curves: dict[str, list[float]] = {}
    for kind in ("no", "bf16") if setting.cpu else ("no", "bf16", "fp16"):
        records = train(setting, kind, UPDATES, mixed_precision=kind, lr=2e-3)
        curve = curves[kind] = [record["loss"] for record in records]
        newest = newest_whole(place(setting, kind) / "checkpoints")
        assert newest is not None
        scale = load_checkpoint(newest).state["accumulator"]["engine"].get("scale", "-")
        exact = curves["no"]
        worst = max(abs(a - b) for a, b in zip(curve, exact, strict=True)) / (exact[0] - exact[-1])
        skipped = sum(record["skipped"] for record in records)
        result.table.rows.append([kind, curve[0], curve[-1], worst, skipped, scale])
        result.check(
            f"{kind}: the loss falls", curve[-1] < curve[0], f"{curve[0]:.3f} to {curve[-1]:.3f}"
        )
        if kind != "no":
            result.at_most(f"{kind}: worst difference", worst, SIXTEEN_BIT)
            result.check(
                f"{kind} is in force",
                curve != exact,
                "its losses are not those of float32 to the bit",
            )
        if kind == "fp16":
            words = f"{skipped} skipped, scale {scale}"
            result.check("fp16: has a scaler", isinstance(scale, float) and scale > 0, words)
            result.check("fp16: at most 2 updates were skipped", skipped <= 2, words)
    result.notes.append(
        f"{UPDATES} updates of the tiny model through `accum_trainer.train.updates`."
    )
    result.needs_gpu(setting, "fp16")
    return result


def compiled(setting: Setting) -> Result:
    import torch
    from torch._dynamo.utils import counters

    steps = 2 if setting.small else 8
    # The smallest model that meets all that is compiled: several samples with and without padding,
    # one sample.
    sizes = {"batch_size": None, "max_tokens_per_micro_batch": 128 if setting.small else 2048}
    plain = train(setting, "plain", steps, **sizes)
    torch._dynamo.reset()
    counters.clear()
    found = train(setting, "compiled", steps, compile=True, **sizes)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    # Without the first update, which compiles.
    plain_time, compiled_time = (
        sorted(r["step_time_sec"] for r in rs[1:])[(steps - 1) // 2] for rs in (plain, found)
    )
    loss, norm = (worst_difference(found, plain, key) for key in ("loss", "grad_norm"))
    header = [
        "updates",
        "worst difference of loss",
        "of gradient norm",
        "graphs",
        "graph breaks",
        "time, over uncompiled",
    ]
    result = Result(
        Table(header, [[steps, loss, norm, graphs, breaks, compiled_time / plain_time]])
    )
    result.at_most("loss, compiled against uncompiled", loss, COMPILED)
    result.at_most("gradient norm, compiled against uncompiled", norm, 10 * COMPILED)
    # Three in training and the compiler's trial.
    result.check(
        "few compilations serve all sizes", 1 <= graphs <= 7, f"{graphs} graphs, at most 7"
    )
    result.check(
        "no graph breaks", breaks == 0, str(dict(counters["graph_break"])) if breaks else "none"
    )
    result.notes.append(
        "The tiny model in float32, micro-batches by a token budget, so that they have many sizes."
    )
    return result
