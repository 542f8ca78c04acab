"""Another source's shares, made in a thread. Knows no data, only the contract of `shares`."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator

from accum_trainer.sources.shares import Source, WindowShare, WindowShares


class Prefetched:
    """Another source's shares, each made in a thread while the previous one is trained on.

    Reading, splitting, collating and pinning leave the critical path. One share queued, one in
    production; more would only hold memory. `__getitem__` must not use the global random
    generators, whose draws would interleave with the training's.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.unit = source.unit
        self.knows_counts, self.reads_ahead, self.alike = source.knows_counts, True, source.alike
        self.is_read_once = source.is_read_once

    def num_windows(self) -> int | None:
        return self._source.num_windows()

    def order(self) -> None:
        """None, as for the source."""

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
                for share in self._source.shares(epoch, consumed):
                    put(share)
                    if given_up.is_set():
                        return
                put(None)
            except BaseException as error:  # raised again in the consumer
                put(error)

        def stop() -> None:
            given_up.set()
            maker.join()

        maker = threading.Thread(target=make, name="windows", daemon=True)
        maker.start()
        # A thread inside a library at interpreter shutdown can crash the process.
        atexit.register(stop)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop()
            atexit.unregister(stop)
