"""Find the largest micro-batch that fits in memory, by trial.

All ranks run windows of two micro-batches together: one sample, which leaves its gradient in
memory, and n copies of the longest sample. The peak memory grows linearly with n:

    needed(n) = held + n * activations of a sample

so each trial predicts the next. No n is tried that the prediction rules out: only some engines
survive running out of memory, and on a CPU the system kills the process. All ranks try the same n;
the rank with the least memory decides. A search leaves nothing behind: no gradient, no memory, no
random number drawn. Knows engines and causal models; nothing of data sets and configuration.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from accum_trainer.batch import Batch, num_positions
from accum_trainer.engine.base import Engine
from accum_trainer.engine.memory import free_bytes, memory_gb, peak_gb, reset_peak
from accum_trainer.errors import ConfigError, EngineError
from accum_trainer.losses.causal_lm import causal_lm_loss

# Share of the memory to keep free for fragmentation and other libraries. A judgement, as is
# RESERVED in `footprint`.
MARGIN = 0.08


@dataclass(frozen=True)
class FoundBatchSize:
    """The result of `find_batch_size`. A GB is 10^9 bytes.

    Attributes:
        micro_batch_size: samples of `longest` tokens in one forward and backward.
        longest: tokens of the longest sample.
        max_tokens: positions of that micro-batch, padding counted.
        needed_gb: memory it takes, optimizer state included, on the rank that needs most.
        limit_gb: memory available, without the margin, on the rank that has least.
        tried: memory of each number of samples tried, in GB; None if it ran out.
    """

    micro_batch_size: int
    longest: int
    max_tokens: int
    needed_gb: float
    limit_gb: float
    tried: dict[int, float | None]

    def as_record(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)

    def describe(self) -> str:
        """One line for people."""
        return (
            f"batch size found: {self.micro_batch_size} samples of {self.longest} tokens, "
            f"{self.max_tokens:,} tokens per micro-batch, take {self.needed_gb:.2f} of "
            f"{self.limit_gb:.2f} GB; tried {', '.join(map(str, self.tried))}"
        )


class Memory:
    """Memory that this process uses on a device, in bytes: allocated on a GPU, resident on a CPU.

    Raises:
        ConfigError: this system cannot reset the peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()
        if device.type != "cuda" and self.peak() > 1.05 * self.in_use():
            raise ConfigError(
                "batch_size=auto: peak memory cannot be measured on this system "
                "(/proc/self/clear_refs); give batch_size as a number"
            )

    def in_use(self) -> float:
        return memory_gb(self._device) * 1e9

    def begin(self) -> None:
        """Reset the peak."""
        reset_peak(self._device)

    def peak(self) -> float:
        return peak_gb(self._device) * 1e9

    def limit(self, processes: int) -> float:
        """Bytes that this process may use, MARGIN kept free; on a CPU, which `processes` share, its
        share."""
        free = free_bytes(self._device)
        if self._device.type == "cuda":
            total = torch.cuda.mem_get_info(self._device)[1]
            return free + torch.cuda.memory_reserved(self._device) - MARGIN * total
        return (1 - MARGIN) * (free / processes + self.in_use())


def find_batch_size(
    engine: Engine,
    model: torch.nn.Module,
    optimizer: Any,
    collate: Callable[[list[Any]], Batch],
    longest: int,
    most: int,
    memory: Memory | None = None,
) -> FoundBatchSize:
    """Find the largest number of samples of `longest` tokens that one forward and backward can
    hold; the same on all ranks. Collective.

    Args:
        engine: of the Accumulator, before its first window.
        model, optimizer: as `Accumulator.prepare` returned them. The optimizer is AdamW; its state
            is counted before it exists.
        collate: samples of `input_ids` and `labels` to a batch.
        longest: tokens of the longest sample.
        most: the largest useful number: the largest share of an effective batch on one rank.
        memory: the memory to measure. Default: of the engine's device.

    Raises:
        ConfigError: not even one sample fits, or peak memory cannot be measured here.
        EngineError: memory ran out on an engine whose processes cannot continue alone.
    """
    memory = memory or Memory(engine.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
    limit = float(engine.all_gather_floats([memory.limit(here)])[:, 0].min())
    trial = _Trial(engine, model, optimizer, collate, longest, memory)
    tried: dict[int, float] = {0: 0.0}
    good, bad, size = 0, most + 1, 1
    with trial.without_trace():
        while good < size < bad:
            held, tried[size] = trial.run(size)
            tried[0] = max(tried[0], held)
            if tried[size] > limit:
                bad = size
            else:
                good = size
            size = min(2 * good, _expected(tried, limit), most)
            if size >= bad:
                size = (good + bad) // 2
    if good == 0:
        raise ConfigError(
            f"batch_size=auto: one sample of {longest} tokens needs {_gb(tried[1])}, and "
            f"{limit / 1e9:.2f} GB are free for training; lower max_seq_len, use "
            "gradient_checkpointing, amp or use_peft, or an engine that shards"
        )
    positions = num_positions(trial.batch(good))
    shown = {n: None if math.isinf(b) else round(b / 1e9, 3) for n, b in sorted(tried.items()) if n}
    return FoundBatchSize(
        good, longest, positions, round(tried[good] / 1e9, 3), round(limit / 1e9, 3), shown
    )


def _expected(tried: dict[int, float], limit: float) -> int:
    """The number of samples that the line through the two largest completed trials predicts."""
    ended = sorted((n, needed) for n, needed in tried.items() if math.isfinite(needed))
    if len(ended) < 2:
        return 0
    (a, low), (b, high) = ended[-2:]
    slope = (high - low) / (b - a)
    # Without a slope (activations smaller than the noise) there is no prediction: double.
    return b + int((limit - high) // slope) if slope > 0 else 2 * b


def _gb(needed: float) -> str:
    return "more memory than there is" if math.isinf(needed) else f"{needed / 1e9:.2f} GB"


class _Trial:
    """Runs windows of one and of n samples that change nothing."""

    def __init__(
        self,
        engine: Engine,
        model: torch.nn.Module,
        optimizer: Any,
        collate: Callable[[list[Any]], Batch],
        longest: int,
        memory: Memory,
    ) -> None:
        self._engine, self._model, self._optimizer = engine, model, optimizer
        self._collate, self._memory = collate, memory
        self._reserve = engine.optimizer_bytes(optimizer.accelerated)
        self._sample = {"input_ids": [0] * longest, "labels": [0] * longest}

    def batch(self, size: int) -> Batch:
        return self._collate([self._sample] * size)

    def run(self, size: int) -> tuple[float, float]:
        """(bytes with a gradient in memory, peak bytes of `size` samples on top); inf if memory ran
        out.

        Counts optimizer state that does not exist yet. The maximum over ranks, so equal on all.
        """
        engine = self._engine
        held, needed = 0.0, math.inf
        engine.free_memory()
        try:
            self._run_one(self.batch(1), is_first=True)
            held = self._memory.in_use()
            self._memory.begin()
            self._run_one(self.batch(size), is_first=False)
            needed = self._memory.peak()
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            if engine.equal_micro_batches:
                raise EngineError(
                    f"batch_size=auto: {size} samples ran out of memory, and {engine.name} cannot "
                    "go on after one process has failed; give batch_size as a number below that"
                ) from error
            engine.abort_micro_batch(error)
        if not engine.equal_micro_batches:
            # Without an exchange: a rank that failed has nothing to exchange.
            engine.discard_local_grads([self._model])
        engine.discard_window_grads(self._optimizer.accelerated)
        most = engine.all_gather_floats([held + self._reserve, needed + self._reserve]).max(axis=0)
        return float(most[0]), float(most[1])

    def _run_one(self, batch: Batch, is_first: bool) -> None:
        engine = self._engine
        is_last = engine.equal_micro_batches and not is_first
        with engine.microbatch((self._model,), is_first, is_last):
            # Times 0: with a loss scale the gradient might overflow.
            engine.backward(causal_lm_loss(self._model, engine.to_device(batch)) * 0.0)

    @contextlib.contextmanager
    def without_trace(self) -> Iterator[None]:
        state = self._engine.rng_state()
        try:
            yield
        finally:
            self._engine.set_rng_state(state)
            self._engine.free_memory()
