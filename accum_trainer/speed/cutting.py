"""How windows become micro-batches here: from the configuration, the model and this machine to a
`Cut`.

Padded or packed, the micro-batch that fits, what micro-batches cost, the processes' shares. Some of
it is measured on all processes together, so each of them must call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accum_trainer.accumulator import Accumulator
from accum_trainer.batch_plan import parse_rank_weights
from accum_trainer.config import TrainConfig
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.errors import ConfigError
from accum_trainer.lm.model import is_flash
from accum_trainer.losses.packing import find_packing, worst_of
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.speed.batch_size import Fit, find_batch_size
from accum_trainer.speed.cost import measured_cost, seconds_of
from accum_trainer.window_plan import Cost, Cut

# Without a GPU launching a kernel costs little, and a micro-batch need not be large to be worth it.
_CPU_COST = Cost(fixed=32.0, square=1e-3)


@dataclass(frozen=True)
class Cutting:
    """A cut and how it came about.

    Attributes:
        cut: how windows become micro-batches.
        layout_reason: why samples are padded, or packed.
        fit: the micro-batch that was found for `batch_size=auto`.
    """

    cut: Cut
    layout_reason: str
    fit: Fit | None


@dataclass(frozen=True)
class Layout:
    """How samples lie in a micro-batch.

    Attributes:
        packed: end to end in one row; else padded to a rectangle.
        reason: why.
        boundaries: what a packed batch gives the model beside `position_ids`.
    """

    packed: bool
    reason: str
    boundaries: tuple[str, ...] = ()


def decide_layout(
    config: TrainConfig, accumulator: Accumulator, model: Any, rows: TokenizedRows
) -> Layout:
    """Padded or packed. Packed pays where attention skips what is between samples; and only a proof
    allows it. Collective.

    By the kind of attention, not by a timing: the same on every machine that a run is continued on.

    Args:
        model: as `Accumulator.prepare` returned it, not compiled.

    Raises:
        ConfigError: `layout=packed`, and the model does not keep packed samples apart.
    """
    engine = accumulator.engine
    plain_model = engine.unwrap(model)
    attention = getattr(plain_model.config, "_attn_implementation", None) or "unknown"
    if config.layout == "padded":
        return Layout(False, "asked for")
    if config.layout == "auto" and not (is_flash(attention) or attention == "flex_attention"):
        return Layout(
            False,
            f"{attention} attention would compute, and mask, all pairs of samples in a packed row",
        )
    longest = int(rows.lengths.max())
    found = find_packing(
        plain_model,
        torch.tensor(
            [t for i in range(min(4, len(rows))) for t in rows[i]["input_ids"]],
            device=engine.device,
        ),
        longest=longest,
        most=config.max_tokens_per_micro_batch or longest * accumulator.plan.micro_batch_size,
        is_16_bit=engine.mixed_precision != "no",
        backward=not engine.shards_weights,
        agree=lambda found: worst_of(engine.gather_objects(found)),
    )
    if found.holds:
        reason = (
            "asked for"
            if config.layout == "packed"
            else f"{attention} computes no attention between samples"
        )
        return Layout(True, f"{reason}; proven: {found.reason}", found.boundaries)
    if config.layout == "packed":
        raise ConfigError(
            f"layout=packed cannot be used with model={config.model}, whose packed samples see "
            f"each other: {found.reason}; "
            "use layout=padded"
        )
    return Layout(False, f"packed samples would see each other: {found.reason}")


def decide_cut(
    config: TrainConfig,
    accumulator: Accumulator,
    model: Any,
    optimizer: Any,
    rows: TokenizedRows,
    layout: Layout,
) -> Cutting:
    """The cut that `config` asks for, or that is fastest on this machine. Collective.

    Args:
        model, optimizer: as `Accumulator.prepare` returned them.

    Raises:
        ConfigError: shares that are not one per process, or not even one sample that fits.
    """
    engine = accumulator.engine
    plain_model = engine.unwrap(model)
    if layout.packed and config.pad_to_multiple_of is not None:
        raise ConfigError(
            f"pad_to_multiple_of={config.pad_to_multiple_of} has no effect here: samples are "
            "packed and nothing is padded "
            f"({layout.reason}); leave it out, or use layout=padded"
        )
    multiple = config.pad_to_multiple_of or (8 if engine.device.type == "cuda" else 1)
    fit = (
        _find_fit(config, accumulator, model, optimizer, rows, multiple)
        if config.batch_size == "auto"
        else None
    )
    max_tokens = fit.max_tokens if fit is not None else config.max_tokens_per_micro_batch
    cut = Cut(
        None if fit is not None else config.batch_size,  # type: ignore[arg-type]
        max_tokens,
        1 if layout.packed else multiple,
        layout.packed,
        _cost(config, engine, plain_model, max_tokens),
        engine.equal_micro_batches,
        _rank_weights(config, engine, plain_model),
    )
    return Cutting(cut, layout.reason, fit)


def _find_fit(
    config: TrainConfig,
    accumulator: Accumulator,
    model: Any,
    optimizer: Any,
    rows: TokenizedRows,
    multiple: int,
) -> Fit:
    """The largest micro-batch that fits the device, tried with padded samples of the longest
    length."""
    longest = -(-int(rows.lengths.max()) // multiple) * multiple
    most = accumulator.plan.micro_batch_size  # of the whole share of a process at once
    collate = PaddingCollator(0, multiple)
    return find_batch_size(accumulator.engine, model, optimizer, collate, longest, most)


def _cost(config: TrainConfig, engine: Any, model: Any, max_tokens: int | None) -> Cost:
    """Of micro-batches, measured where the cut depends on it and one process can run the model by
    itself."""
    if max_tokens is None or engine.shards_weights:
        return _CPU_COST if engine.device.type == "cpu" else Cost()
    found = measured_cost(model, max_tokens, config.max_seq_len, engine.mixed_precision)
    return engine.gather_objects(found)[0]


def _rank_weights(config: TrainConfig, engine: Any, model: Any) -> tuple[float, ...] | None:
    """Shares per process, as given or by measured speed; None where they are equal."""
    weights = parse_rank_weights(config.rank_weights)
    if config.rank_weights is None or engine.world_size == 1:
        if weights is not None and len(weights) != 1:
            raise ConfigError(
                f"rank_weights={config.rank_weights} are {len(weights)} shares, but there is 1 "
                "process"
            )
        return None
    if weights is None:
        if engine.shards_weights:
            raise ConfigError(
                f"rank_weights=auto times each process by itself, which {engine.name} with its "
                "shared weights cannot run; "
                "give the shares as numbers"
            )
        engine.barrier()  # all at once: what they share slows them as it will in training
        speeds = 1 / engine.all_gather_floats([seconds_of(model, 1, config.max_seq_len)])[:, 0]
        return tuple(round(float(speed), 2) for speed in speeds / speeds.min())
    if len(weights) != engine.world_size:
        raise ConfigError(
            f"rank_weights={config.rank_weights} are {len(weights)} shares, but there are "
            f"{engine.world_size} processes"
        )
    return weights
