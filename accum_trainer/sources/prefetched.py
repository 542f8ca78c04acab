"""WindowShares of another source, made in a thread."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator

from accum_trainer.sources.shares import Source, WindowShare, WindowShares


class Prefetched:
    """Another source's parts, each made in a thread while the one before it is trained on.

    Reading, cutting, collating and pinning happen off the critical path. One part is ready and one
    is being made, beside one that may have been asked for ahead; more would only hold memory.
    Draws from the global random generators in a data set's `__getitem__` would interleave with the
    training's own: such data is read without this.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.unit = source.unit
        self.knows_counts, self.reads_ahead, self.alike = source.knows_counts, True, source.alike
        self.is_read_once = source.is_read_once

    def num_windows(self) -> int | None:
        return self._source.num_windows()

    def order(self) -> None:
        """As of the source: none."""

    def micro_batches(self, epoch: int) -> tuple[int, list[int], list[int]] | None:
        return self._source.micro_batches(epoch)

    def shares(self, epoch: int, consumed: int) -> WindowShares:
        return WindowShares(self._made(epoch, consumed))

    def _made(self, epoch: int, consumed: int) -> Generator[WindowShare, None, None]:
        ready: queue.Queue[WindowShare | BaseException | None] = queue.Queue(maxsize=1)
        given_up = threading.Event()

        def put(item: WindowShare | BaseException | None) -> None:
            while not given_up.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def make() -> None:
            try:
                for part in self._source.shares(epoch, consumed):
                    put(part)
                    if given_up.is_set():
                        return
                put(None)
            except BaseException as error:  # raised again where the part is asked for
                put(error)

        def stop() -> None:
            given_up.set()
            maker.join()

        maker = threading.Thread(target=make, name="windows", daemon=True)
        maker.start()
        # A thread that is inside a library while the interpreter goes down takes the process with
        # it.
        atexit.register(stop)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop()
            atexit.unregister(stop)
