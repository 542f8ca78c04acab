"""`Windows`, which a loop iterates, and `Batches`, for a loop that has no windows.

Here training's position in a source is kept: the epoch, and what finished windows consumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from accum_trainer.batch import Batch
from accum_trainer.errors import DataError
from accum_trainer.losses.counter import Counter
from accum_trainer.losses.objective import Objective
from accum_trainer.noise import GradientNoise
from accum_trainer.sources.progress import Passed, Progress
from accum_trainer.sources.shares import Source
from accum_trainer.window import Window
from accum_trainer.window_reader import CountedWindow, WindowReader


class Windows:
    """The windows of a source. Each `for` loop over them is one epoch, after the last begun.

    An epoch that was left early is resumed only by `load_state_dict(state_dict())`. A source that
    can be read only once, such as a generator, is read on. All windows of one source share its
    position, which counts what finished windows consumed: save it after any update and load it into
    a run with another number of processes.

    Args:
        begin: makes a window the one in hand.
        engine: of the accumulator.
        source: gives this rank's shares.
        counter: counts targets.
        progress: the position in the source.
    """

    def __init__(
        self,
        begin: Callable[[CountedWindow, WindowReader, Progress], Window],
        engine: Any,
        source: Source,
        counter: Counter,
        progress: Progress,
    ) -> None:
        self._begin = begin
        self._engine = engine
        self._source = source
        self._counter = counter
        self._progress = progress

    @property
    def counts_given(self) -> bool:
        """Whether the user said how targets are counted."""
        return self._counter.given is not None

    @property
    def objective(self) -> Objective | None:
        """The terms that the model's own loss sums over; None before the first window was read."""
        return self._counter.objective

    @property
    def epoch(self) -> int:
        """The epoch of the position: epochs that are finished, or were left for a later one."""
        return self._progress.epoch

    @property
    def noise(self) -> GradientNoise:
        """The noise of the gradient, from the windows that `noise_every` has measured."""
        return self._progress.noise

    def __len__(self) -> int:
        """Windows in one epoch; TypeError if the source has no length."""
        length = self._source.num_windows()
        if length is None:
            raise TypeError("this source of windows has no length")
        return length

    def num_micro_batches(self) -> int | None:
        """Micro-batches that this process runs in this epoch if none is split; None if unknown."""
        found = self._source.micro_batches(self.epoch)
        if found is None:
            return None
        windows, of_one, of_tail = found
        return windows * self._mine(of_one) + self._mine(of_tail)

    def _mine(self, counts: list[int]) -> int:
        """Micro-batches that this process runs of a window whose ranks have `counts`."""
        engine = self._engine
        if not counts or engine.equal_micro_batches:
            return max(counts, default=0)
        return max(1, counts[int(engine.rank)])

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, and the samples (batches of a loader or stream) that its updates
        consumed; also of a loader `order`, the states of its own generators when its epoch began,
        and `consumed_crc`, a checksum of what was consumed; `noise`, if a window was measured."""
        progress = self._progress
        order = self._source.order() if progress.order is None else progress.order
        position: dict[str, Any] = {
            "epoch": self.epoch,
            f"{self._source.unit}_consumed": progress.consumed,
        }
        if order is not None:
            position["order"] = order
        if progress.passed is not None:
            position["consumed_crc"] = tuple(progress.passed)
        if self.noise.num_windows:
            position["noise"] = self.noise.state_dict()
        return position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; the next loop over this source starts there."""
        key = f"{self._source.unit}_consumed"
        if key not in state:
            raise DataError(
                f"the saved position {state} does not count {self._source.unit}, as this source "
                "does; resume with the kind of source that was saved"
            )
        crc = state.get("consumed_crc")
        passed = None if crc is None else Passed(*map(int, crc))
        self._progress.load(int(state["epoch"]), int(state[key]), state.get("order"), passed)
        if "noise" in state:
            self.noise.load_state_dict(state["noise"])

    def __iter__(self) -> Iterator[Window]:
        epoch, consumed = self._progress.begin(self._source.is_read_once)
        found_any = consumed > 0
        reader = WindowReader(self._engine, self._source, self._counter, epoch, consumed)
        with contextlib.closing(reader):
            while (counted := reader.next()) is not None:
                found_any = True
                window = self._begin(counted, reader, self._progress)
                try:
                    yield window
                except GeneratorExit:
                    window.leave()
                    raise
                window.check_finished()
        if not found_any:
            raise DataError(
                "the source gave no batch in this epoch; is it a generator that is already used up?"
            )
        self._progress.reach(epoch + 1, 0)


class Batches:
    """This process's micro-batches, one after another; each `for` loop is one epoch.

    Attributes:
        windows: the windows that they belong to.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __iter__(self) -> Iterator[Batch]:
        for window in self.windows:
            yield from window

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch, if none is split; TypeError if unknown."""
        length = self.windows.num_micro_batches()
        if length is None:
            raise TypeError("how many micro-batches this source gives is not known beforehand")
        return length

    @property
    def epoch(self) -> int:
        """As of `Windows`."""
        return self.windows.epoch

    def state_dict(self) -> dict[str, Any]:
        """As of `Windows`."""
        return self.windows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `Windows`."""
        self.windows.load_state_dict(state)
