"""Whose batches a DataLoader of accelerate gives, and who must read them. Knows their classes."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard


def gives_this_ranks_batches(loader: Any) -> bool:
    """Whether accelerate has sharded this loader already."""
    return isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))


def reads_with_the_others(loader: Any) -> bool:
    """Whether reading a batch of this loader is collective."""
    return isinstance(loader, DataLoaderDispatcher)
