"""What a process of a training says when it can no longer reach another: one sentence, because the
other's own words say why, not torch's traceback here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from accum_trainer.engine.ranks import Ranks, is_lost_connection
from accum_trainer.errors import AccumTrainerError


@contextlib.contextmanager
def naming_lost_processes(
    ranks: Ranks, updates: Callable[[], int], folder: Callable[[], Path | None]
) -> Iterator[None]:
    """Raise an AccumTrainerError in place of what a library says of a lost connection.

    Args:
        updates: the updates of the run so far.
        folder: the run directory; None before it is known.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.world_size == 1 or not is_lost_connection(error):
            raise
        said = str(error).splitlines()[0].partition(". ")[0]  # gloo goes on with advice
        done, run = updates(), folder()
        when = f"after update {done}" if done else "before the first update"
        named = f" with --output-dir {run}" if run is not None else ""
        raise AccumTrainerError(
            f"process {ranks.rank} lost another process {when} ({said}): it ended, and its log "
            "says why, or the network failed. The last checkpoint stays; the same command"
            f"{named} continues from it"
        ) from error
