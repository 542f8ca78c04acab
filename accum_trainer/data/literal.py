"""Values exactly as a data file writes them: `007` in CSV and `1.50` in JSON stay so.

Parsers convert numbers, dates and words such as NA. A model must not be trained on text that
nobody wrote.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accum_trainer.data.checking import json_rows
from accum_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

# Rows that are objects of Python at a time.
_PART = 10_000
_AFTER = "after"


class _Number(str):
    """A JSON number as the file writes it."""


_AS_WRITTEN = {"parse_int": _Number, "parse_float": _Number, "parse_constant": _Number}


def csv_records(path: Path, then: Iterable[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each record of a CSV file, the header included; blank lines are none.

    Args:
        then: lines after the file's own.

    Raises:
        csv.Error, UnicodeDecodeError: the file is not CSV.
    """
    limit = csv.field_size_limit(1 << 30)  # the default refuses long texts
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(itertools.chain(file, then))
            begin = 1
            for fields in reader:
                if fields:
                    yield begin, fields
                begin = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def check_csv(path: Path) -> None:
    """Refuse a CSV file whose values would come under another column's name.

    Raises:
        DataError: with the line, of two columns of one name, of a row with more fields than the
            header, or of a quote that is never closed; or there are no rows.
    """
    # If the file ends inside quotes, so does the line after it.
    records = csv_records(path, ["\n", f"{_AFTER}\n"])
    try:
        line, names = next(records, (1, []))
        twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
        if twice:
            raise DataError(
                f"data file {path} line {line}: the header has column {twice[0]} "
                f"{names.count(twice[0])} times; give each column a name of its own"
            )
        count, fields = 0, names
        for line, fields in records:
            count += 1
            if len(fields) > len(names):
                raise DataError(
                    f"data file {path} line {line} has {len(fields)} fields, and the header has "
                    f"{len(names)} ({', '.join(names)}); put quotes around values that hold a comma"
                    f"{delimiter_remedy(names)}"
                )
    except csv.Error as error:
        raise DataError(f"data file {path} cannot be read as csv: {error}") from None
    if fields != [_AFTER]:
        raise DataError(
            f"data file {path} line {line} opens a quote that is never closed; close it, or double "
            "the quotes that are text"
        )
    if count == 1:
        raise DataError(f"data file {path} has no rows")


def delimiter_remedy(columns: Collection[str]) -> str:
    """The remedy for columns that another delimiter than a comma separates; "" if none does."""
    for sign, name in ((";", "';'"), ("\t", "a tab"), ("|", "'|'")):
        if len(columns) == 1 and sign in next(iter(columns)):
            return f"; its columns seem to be separated by {name}: separate them by commas"
    return ""


def csv_options(path: Path) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset("csv", ...)`: all columns text, empty cells absent."""
    import datasets
    import pandas

    names = pandas.read_csv(path, nrows=0).columns
    text = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"features": text, "keep_default_na": False, "na_values": [""]}


def read_json(path: Path) -> datasets.Dataset:
    """The rows of a .json or .jsonl file, in memory as columns; numbers and booleans as text.

    Nested values, such as messages, keep their types.

    Raises:
        DataError: the file is not JSON, or the nested values of a column have several types.
    """
    import datasets
    import pyarrow

    rows = (row for _, row in json_rows(path, **_AS_WRITTEN))
    try:  # as columns a row takes what the file has of it, as objects a multiple
        takes = iter(lambda: list(itertools.islice(rows, _PART)), [])
        parts = [_columns_of(part, path) for part in takes]
        return datasets.Dataset(pyarrow.concat_tables(parts, promote_options="permissive"))
    except (DataError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        # Kinds that differ between parts, or in one: all together may have a common one.
        everything = [row for _, row in json_rows(path, **_AS_WRITTEN)]
        return datasets.Dataset(_columns_of(everything, path))


def _columns_of(rows: list[dict[str, Any]], path: Path) -> pyarrow.Table:
    """Rows as a table. DataError if the values of a column have several kinds."""
    import pyarrow

    columns: dict[str, list[Any]] = {name: [] for row in rows for name in row}
    for row in rows:
        for name, values in columns.items():
            values.append(_literal(row.get(name)))
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(
                f"data file {path}: the values of {name} are of several kinds "
                f"({str(error).splitlines()[0]}); use one kind in all rows"
            ) from None
    return pyarrow.table(arrays)


def is_written_otherwise(features: Mapping[str, Any], columns: Collection[str]) -> bool:
    """Whether a parser converted one of `columns` to numbers, booleans or dates."""
    import datasets

    return any(
        isinstance(feature, datasets.Value)
        and feature.dtype not in ("string", "large_string", "null")
        for name, feature in features.items()
        if name in columns
    )


def _literal(value: Any) -> Any:
    """A number or boolean of a row as text; nested values with their JSON types."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return _nested(value)
    return str(value) if isinstance(value, _Number) else value


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nested(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_nested(entry) for entry in value]
    return json.loads(value) if isinstance(value, _Number) else value
