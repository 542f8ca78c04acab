"""Choose a `Cut` from configuration, model and hardware.

Decides padded or packed, the largest micro-batch, the cost model and the shares of the processes.
Some of it is measured on all processes together, so each of them must call. Knows nothing of the
training loop.
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
from accum_trainer.lm.packed_attention import PACKED_SDPA, attend_inside_samples, has_varlen
from accum_trainer.losses.packing import attention_windows, find_packing, worst_of
from accum_trainer.losses.packing_proof import Packing
from accum_trainer.sources.collating import PaddingCollator
from accum_trainer.speed.batch_size import FoundBatchSize, find_batch_size
from accum_trainer.speed.cost import measured_cost, seconds_of
from accum_trainer.window_plan import Cost, Cut

# On a CPU starting a kernel costs little, so small micro-batches are worth it.
_CPU_COST = Cost(fixed=32.0, square=1e-3)


@dataclass(frozen=True)
class Cutting:
    """A cut and the reasons for it.

    Attributes:
        layout_reason: why samples are padded, or packed.
        found_batch_size: the result for `batch_size=auto`, else None.
    """

    cut: Cut
    layout_reason: str
    found_batch_size: FoundBatchSize | None


@dataclass(frozen=True)
class Layout:
    """The arrangement of samples in a micro-batch.

    Attributes:
        packed: end to end in one row; else padded to a rectangle.
        boundaries: keys that a packed batch gives the model beside `position_ids`.
    """

    packed: bool
    reason: str
    boundaries: tuple[str, ...] = ()


def decide_layout(
    config: TrainConfig, accumulator: Accumulator, model: Any, rows: TokenizedRows
) -> Layout:
    """Decide padded or packed. Collective.

    Packing pays if attention skips pairs of different samples, and is allowed only if a proof shows
    that the model keeps them apart. The kind of attention decides, not a timing, so that a
    continued run decides the same on another machine.

    Args:
        model: as `Accumulator.prepare` returned it, not compiled.

    Raises:
        ConfigError: `layout=packed`, but the model does not keep packed samples apart.
    """
    engine = accumulator.engine
    plain_model = engine.unwrap(model)
    if config.layout == "padded":
        return Layout(False, "asked for")
    if config.pad_to_multiple_of is not None:
        return Layout(False, "pad_to_multiple_of was asked for")
    longest = int(rows.lengths.max())
    before = _attention_of(plain_model)
    switched = _skips_other_samples(config, engine, plain_model, longest)
    attention = _attention_of(plain_model)
    skips = is_flash(attention) or attention in ("flex_attention", PACKED_SDPA)
    if config.layout == "auto" and not skips:
        return Layout(
            False,
            f"{attention} attention would compute, and mask, all pairs of samples in a packed row",
        )
    tokens = torch.tensor(
        [t for i in range(min(4, len(rows))) for t in rows[i]["input_ids"]], device=engine.device
    )

    def proven() -> Packing:
        return find_packing(
            plain_model,
            tokens,
            longest=longest,
            most=config.max_tokens_per_micro_batch or longest * accumulator.plan.micro_batch_size,
            is_16_bit=engine.mixed_precision != "no",
            backward=engine.runs_alone,
            agree=lambda found: worst_of(engine.gather_objects(found)),
        )

    found = proven()
    if switched and not found.holds:
        plain_model.set_attn_implementation(before)
        if config.layout == "packed":  # a model that reads its mask cannot read ours
            found = proven()
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
            f"each other: {found.reason}; use layout=padded"
        )
    return Layout(False, f"packed samples would see each other: {found.reason}")


def _attention_of(model: Any) -> str:
    """The implementation in force; transformers has no public name for it."""
    return getattr(model.config, "_attn_implementation", None) or "unknown"


def _skips_other_samples(config: TrainConfig, engine: Any, model: Any, longest: int) -> bool:
    """Switch to attention inside samples where it is faster; True if it was.

    On a CPU it is a loop over samples, at which compiled blocks would break. On a GPU it is one
    kernel, which needs 16 bits and knows no dropout. Beyond an attention window the whole row would
    be masked.
    """
    if config.attention is not None:
        return False
    if engine.device.type == "cpu":
        if config.compile:
            return False
    elif not runs_as_one_kernel(engine, model):
        return False
    if any(1 < size < longest for size in attention_windows(model)):
        return False
    return attend_inside_samples(model)


def runs_as_one_kernel(engine: Any, model: Any) -> bool:
    """Whether attention inside samples is one kernel on every rank's GPU. Collective."""
    config = model.config
    dropout = any(
        getattr(holder, name, 0.0)
        for holder in (config, config.get_text_config())
        for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )
    # What the forward computes in; its autocast is not on yet.
    is_16_bit = engine.mixed_precision != "no"
    dtype = torch.bfloat16 if is_16_bit else next(model.parameters()).dtype
    # GPUs may differ, and the proof that follows is one of all ranks.
    return all(engine.gather_objects(not dropout and has_varlen(engine.device, dtype)))


def decide_cut(
    config: TrainConfig,
    accumulator: Accumulator,
    model: Any,
    optimizer: Any,
    rows: TokenizedRows,
    layout: Layout,
) -> Cutting:
    """The cut that `config` asks for, or the fastest on this machine. Collective.

    Args:
        model, optimizer: as `Accumulator.prepare` returned them.

    Raises:
        ConfigError: the number of shares is not that of processes, or not even one sample fits.
    """
    engine = accumulator.engine
    plain_model = engine.unwrap(model)
    multiple = config.pad_to_multiple_of or (8 if engine.device.type == "cuda" else 1)
    found, batch_size, max_tokens = None, None, config.max_tokens_per_micro_batch
    if isinstance(config.batch_size, str):  # auto
        found = _find(accumulator, model, optimizer, rows, multiple)
        max_tokens = found.max_tokens
    else:
        batch_size = config.batch_size
    cut = Cut(
        batch_size,
        max_tokens,
        1 if layout.packed else multiple,
        layout.packed,
        _cost(config, engine, plain_model, max_tokens),
        engine.equal_micro_batches,
        _rank_weights(config, engine, plain_model),
    )
    return Cutting(cut, layout.reason, found)


def _find(
    accumulator: Accumulator,
    model: Any,
    optimizer: Any,
    rows: TokenizedRows,
    multiple: int,
) -> FoundBatchSize:
    """The largest micro-batch that fits, tried with padded samples of the longest length."""
    longest = -(-int(rows.lengths.max()) // multiple) * multiple
    most = accumulator.plan.micro_batch_size  # under `auto`, the whole share of a process
    collate = PaddingCollator(0, multiple)
    return find_batch_size(accumulator.engine, model, optimizer, collate, longest, most)


def _cost(config: TrainConfig, engine: Any, model: Any, max_tokens: int | None) -> Cost:
    """The cost model of micro-batches: measured if the cut depends on it and one process can run
    the model alone."""
    if max_tokens is None or not engine.runs_alone:
        return _CPU_COST if engine.device.type == "cpu" else Cost()
    found = measured_cost(model, max_tokens, config.max_seq_len, engine.mixed_precision)
    return engine.gather_objects(found)[0]


def _rank_weights(config: TrainConfig, engine: Any, model: Any) -> tuple[float, ...] | None:
    """Shares per process, as given or by measured speed; None if they are equal."""
    weights = parse_rank_weights(config.rank_weights)
    if config.rank_weights is None or engine.world_size == 1:
        if weights is not None and len(weights) != 1:
            raise ConfigError(
                f"rank_weights={config.rank_weights} are {len(weights)} shares, but there is 1 "
                "process"
            )
        return None
    if weights is None:
        if not engine.runs_alone:
            raise ConfigError(
                f"rank_weights=auto times each process alone, which {engine.name} with its sharded "
                "weights cannot run; give the shares as numbers"
            )
        engine.barrier()  # all at once, so that shared resources slow them as in training
        speeds = 1 / engine.all_gather_floats([seconds_of(model, 1, config.max_seq_len)])[:, 0]
        return tuple(round(float(speed), 2) for speed in speeds / speeds.min())
    if len(weights) != engine.world_size:
        raise ConfigError(
            f"rank_weights={config.rank_weights} are {len(weights)} shares, but there are "
            f"{engine.world_size} processes"
        )
    return weights
