"""The number of rows in a data file, without torch or `datasets`; for `accum-trainer plan`."""

from __future__ import annotations

import csv
from pathlib import Path

from accum_trainer.data.checking import check_json, check_text, json_lines
from accum_trainer.data.files import check_file
from accum_trainer.data.literal import check_csv, csv_records
from accum_trainer.errors import DataError


def count_rows(path: str | Path) -> int:
    """The number of rows that `read_file` returns: objects, records, or lines that are not blank.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """
    path = check_file(path)
    try:
        count = _count(path)
    except (ValueError, csv.Error, OSError) as error:
        raise DataError(f"data file {path} cannot be read as {path.suffix[1:]}: {error}") from None
    if count == 0:
        raise DataError(f"data file {path} has no rows")
    return count


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.ParquetFile(path).metadata.num_rows
    check_text(path)
    if path.suffix == ".csv":
        check_csv(path)
        return sum(1 for _ in csv_records(path)) - 1
    if path.suffix == ".json":
        return check_json(path)
    if path.suffix == ".jsonl":
        return sum(1 for _ in json_lines(path))
    with open(path, encoding="utf-8-sig") as file:
        return sum(1 for line in file if line.strip())
