"""Which processes share the work of checking a checkpoint: those that see the same files."""

from __future__ import annotations

from accum_trainer.engine import ranks
from accum_trainer.engine.ranks import Ranks


class Of(Ranks):
    """Rank `rank` of processes that see these files."""

    def __init__(self, rank, files):
        self._rank, self._files = rank, files

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: len(self._files))

    def gather_objects(self, value):
        assert value == ranks._place_of(self._files[self.rank])  # noqa: SLF001
        return [ranks._place_of(file) for file in self._files]  # noqa: SLF001


def shares(*files):
    return [Of(rank, files).share_of_file(file) for rank, file in enumerate(files)]


def test_processes_share_files_that_are_the_same_and_no_others(tmp_path, monkeypatch):
    """LOCAL_RANK may be that of a container, or of a script that starts each process as the first:
    then no process would have read every second file."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    one, other, gone = tmp_path / "one", tmp_path / "other", tmp_path / "gone"
    one.touch(), other.touch()
    (tmp_path / "linked").hardlink_to(one)
    assert shares(one, one) == [(0, 2), (1, 2)]
    assert shares(one, other, tmp_path / "linked", other) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(gone, one, gone) == [(0, 1)] * 3
