"""Records: one per update, as JSON lines. Knows no engine and no torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# The keys are described in docs/records.md.
Record = dict[str, Any]


@dataclass
class Tally:
    """What a run's records add up to; part of its checkpoints, so that no line of metrics.jsonl is
    needed to continue.

    Attributes:
        records: how many there are, windows that gave no update included.
        num_micro_batches: the last record's `batch_idx`.
        skipped: windows that gave no update.
        num_samples: samples of all updates, each as often as it was trained on.
        num_targets: targets of all updates.
        loss: of the last update.
        eval_loss: of the last evaluation.
        checksum: CRC-32 of the records' lines.
    """

    records: int = 0
    num_micro_batches: int = 0
    skipped: int = 0
    num_samples: int = 0
    num_targets: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    checksum: int = 0

    def add(self, record: Record) -> None:
        """Count one more record."""
        self.records += 1
        self.num_micro_batches = record["batch_idx"]
        self.checksum = zlib.crc32(_line(record).encode(), self.checksum)
        if record["skipped"]:
            self.skipped += 1
            return
        self.num_samples += record["effective_batch_size"]
        self.num_targets += record["num_targets"]
        self.loss = record["loss"]
        if record.get("eval_loss") is not None:
            self.eval_loss = record["eval_loss"]

    def totals(self) -> dict[str, Any]:
        """The part of it that result.json has."""
        inner = ("records", "num_micro_batches", "checksum")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in inner}


class RecordWriter:
    """Appends one JSON line per update to metrics.jsonl, and to a second file if asked.

    Args:
        path: metrics.jsonl; created, or cut to the records that `kept` counts.
        copy: the second file (`--log-file`), brought to the same content.
        kept: records that a resumed run keeps; later ones than its checkpoint's are made again.
        earlier: another run's metrics.jsonl to take the kept records from.
    """

    def __init__(
        self,
        path: Path,
        copy: Path | None = None,
        kept: Tally | None = None,
        earlier: Path | None = None,
    ) -> None:
        kept, source = kept or Tally(), earlier or path
        # The user's link to the copy stays; metrics.jsonl is inside its folder, link or not.
        targets = [path, *([_followed(copy)] if copy else [])]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        # A pipe or a terminal gets only the records to come.
        files = [target for target in targets if not _is_stream(target)]
        partials = [target.with_name(f"{target.name}.partial") for target in files]
        found, checksum = _copy_records(source, partials, kept)
        if found == kept.records and checksum != kept.checksum:
            logger.warning(
                "the records in %s are not those that were written before the checkpoint: some "
                "line was changed; nothing but the records depends on it",
                source,
            )
        kept.checksum = checksum  # of what is there: said once
        if found < kept.records:
            logger.warning(
                "%s has %d of the %d records that were written before the checkpoint; the others "
                "are lost, and nothing else is",
                *(source, found, kept.records),
            )
        for target, partial in zip(files, partials, strict=True):
            if target.is_file() and not target.is_symlink():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
        self._files = [_LineFile(target) for target in targets]

    def write(self, record: Record) -> None:
        """Append a record and flush it to the operating system. If that fails, a warning says so,
        and it is tried again with the next record."""
        for file in self._files:
            file.append(_line(record))

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


class _LineFile:
    """Appends whole lines; those that could not be written wait for the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        # Where the last whole line ends; None of a pipe.
        self._end = None if _is_stream(path) else path.stat().st_size
        self._waiting: list[str] = []

    def append(self, line: str) -> None:
        was_failing = bool(self._waiting)
        self._waiting.append(line)
        data = "".join(self._waiting).encode()
        try:
            if self._end is not None:
                self._file.truncate(self._end)  # a part of a line that did not fit
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            if not was_failing:
                logger.warning(
                    "a record could not be written to %s (%s); training goes on, and it is tried "
                    "again with the next record",
                    *(self._path, error),
                )
            return
        if self._end is not None:
            self._end += len(data)
        self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            logger.warning(
                "the last %d records could not be written to %s", len(self._waiting), self._path
            )
        self._file.close()


def _copy_records(source: Path, targets: list[Path], kept: Tally) -> tuple[int, int]:
    """Write those records of `source` that `kept` counts to each target; return how many, and
    their checksum."""
    for target in targets:
        target.unlink(missing_ok=True)  # a link would take the content elsewhere
    count, checksum, files = 0, 0, [open(target, "w", encoding="utf-8") for target in targets]  # noqa: SIM115
    try:
        for record in _records_in(source, needed=["batch_idx"]) if kept.records else ():
            if (record["batch_idx"] or 0) > kept.num_micro_batches:
                break
            count += 1
            checksum = zlib.crc32(_line(record).encode(), checksum)
            for file in files:
                file.write(_line(record))
    finally:
        for file in files:
            file.close()
    return count, checksum


def _followed(path: Path) -> Path:
    """The file that a link names, or would name; a device or a pipe keeps its name."""
    return path if _is_stream(path) else Path(os.path.realpath(path))


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_symlink()


def _line(record: Record) -> str:
    # JSON has no nan and inf; readers in other languages refuse Python's spelling of them.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


def read_records(path: Path, keys: Collection[str] | None = None) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that a killed process left unfinished.

    Args:
        keys: numbers to keep of each record, of which `eval_loss` may be missing; None keeps all.
    """
    needed = [key for key in keys or () if key != "eval_loss"]
    return [
        record if keys is None else {key: record[key] for key in keys if key in record}
        for record in _records_in(path, needed)
    ]


def _records_in(path: Path, needed: Collection[str] = ()) -> Iterator[Record]:
    """Record by record; damaged lines, and records without the needed numbers, are left out with a
    warning."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not all(_is_number(record, k) for k in needed):
                    raise ValueError
            except (ValueError, RecursionError):
                logger.warning("line %d of %s is damaged and left out", number, path)
                continue
            yield record


def _is_number(record: Record, key: str) -> bool:
    """Whether a record has a number, or null for one that does not exist, under `key`."""
    return key in record and isinstance(record[key], int | float | None)
