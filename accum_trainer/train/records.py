"""Records: one per update, as JSON lines. Knows no engine and no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accum_trainer.errors import ConfigError

# The keys are described in docs/records.md.
Record = dict[str, Any]


class RecordWriter:
    """Appends one JSON line per update to metrics.jsonl, and to a second file if asked.

    Args:
        path: metrics.jsonl; created, or cut to its first `kept` records.
        copy: the second file (`--log-file`), brought to the same content.
        kept: records that a resumed run keeps; later ones than its checkpoint's are made again.
        earlier: another run's metrics.jsonl to take the kept records from.

    Raises:
        ConfigError: there are fewer than `kept` records.
    """

    def __init__(
        self, path: Path, copy: Path | None = None, kept: int = 0, earlier: Path | None = None
    ) -> None:
        source = earlier or path
        self.records = read_records(source)[:kept] if kept else []
        if len(self.records) < kept:
            raise ConfigError(
                f"{source} has {len(self.records)} records, but the checkpoint was written after "
                f"{kept}"
            )
        self._files = []
        for target in [path, *([copy] if copy else [])]:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            partial.write_text("".join(_line(record) for record in self.records), encoding="utf-8")
            partial.replace(target)
            self._files.append(open(target, "a", encoding="utf-8"))  # noqa: SIM115 - closed by close()

    def write(self, record: Record) -> None:
        """Append a record and flush it to the operating system."""
        self.records.append(record)
        for file in self._files:
            file.write(_line(record))
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _line(record: Record) -> str:
    # JSON has no nan and inf; readers in other languages refuse Python's spelling of them.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that a killed process left unfinished."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
