"""Out of memory inside a window: the micro-batch is cut in two and run again.

Remembers the size that did not fit, so that later micro-batches of that size are cut before they
fail. The engine says whether a retry is possible on this rank alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from accum_trainer.batch import Batch, num_positions, num_samples
from accum_trainer.errors import ConfigError, DataError, EngineError

RECOVERIES = ("auto", "always", "never")

logger = logging.getLogger(__name__)


class OomRecovery:
    """Decides whether a window goes on after an error, and knows the size that failed.

    Args:
        engine: says whether an error is about memory, and whether a micro-batch can run again.
        recover: `auto`, `always` or `never`, see `Accumulator(recover_from_oom=)`.

    Raises:
        ConfigError: another word.
    """

    def __init__(self, engine: Any, recover: str) -> None:
        if recover not in RECOVERIES:
            raise ConfigError(
                f"recover_from_oom={recover!r} is not known; give one of {', '.join(RECOVERIES)}"
            )
        self._engine = engine
        self._recover = recover
        self._failed_positions = math.inf
        engine.defer_grad_reduction = recover == "always"

    def fits(self, batch: Batch) -> bool:
        """Whether no micro-batch of this size has run out of memory on this rank."""
        return num_positions(batch) < self._failed_positions

    def remember(self, size: int) -> None:
        """A micro-batch of `size` positions did not fit."""
        self._failed_positions = min(self._failed_positions, size)

    def after(self, num_splits: int) -> None:
        """Take note of the splits of a window, over all ranks, before the next one begins."""
        if num_splits:  # another failure may come in a last micro-batch
            self._engine.defer_grad_reduction = True

    def goes_on(self, window: Any, error: Exception, models: Iterable[torch.nn.Module]) -> bool:
        """Whether `error` says that memory ran out and `window` gives the same samples again.

        A forward adds nothing to the gradient. A backward may have added a part of it, so the
        window starts anew.

        Raises:
            EngineError: memory ran out, and the micro-batch cannot be run again or not be cut.
        """
        if self._recover == "never" or not self._engine.is_out_of_memory(error):
            return False
        micro_batch = window.micro_batch
        batch = micro_batch.planned.batch
        size = f"{num_samples(batch)} sample(s), {num_positions(batch)} positions"
        failed = f"a micro-batch of {size}, ran out of memory"
        obstacle = self._engine.retry_blocker(micro_batch.is_last)
        if obstacle:
            raise EngineError(f"{failed} and cannot be run again in parts: {obstacle}") from error
        from_start = window.has_run_backward
        try:
            window.split(from_start)
        except DataError as reason:
            raise EngineError(
                f"{failed} and cannot be cut in two: {reason}; shorten the samples, or use "
                "gradient checkpointing, a 16-bit precision or an engine that shards"
            ) from error
        self._engine.abort_micro_batch(error)
        if from_start:
            self._engine.discard_local_grads(models)
        redone = "and the window so far is run again" if from_start else "and run again"
        logger.warning("process %d: %s; it is cut in two, %s", self._engine.rank, failed, redone)
        return True


@contextlib.contextmanager
def releasing_graph_on_failure(*terms: torch.Tensor | None) -> Iterator[None]:
    """Detach the losses if a backward inside fails.

    The caller's variable would keep the rest of the graph, and its memory, for the next forward.
    """
    try:
        yield
    except Exception:
        for term in terms:
            if term is not None and term.grad_fn is not None and not term._is_view():  # noqa: SLF001 - torch has no public name
                term.detach_()
        raise
