"""Values exactly as a data file writes them: `007` in CSV and `1.50` in JSON stay so.

Parsers convert numbers, dates and words such as NA. A model must not be trained on text that
nobody wrote.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accum_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets


class _Number(str):
    """A JSON number as the file writes it."""


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each record of a CSV file, the header included; blank lines are none.

    Raises:
        csv.Error, UnicodeDecodeError: the file is not CSV.
    """
    limit = csv.field_size_limit(1 << 30)  # the default refuses long texts
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
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
        DataError: with the line, of two columns of one name, or of a row with more fields than the
            header.
    """
    records = csv_records(path)
    try:
        line, names = next(records, (1, []))
        twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
        if twice:
            raise DataError(
                f"data file {path} line {line}: the header has column {twice[0]} "
                f"{names.count(twice[0])} times; give each column a name of its own"
            )
        for line, fields in records:
            if len(fields) > len(names):
                raise DataError(
                    f"data file {path} line {line} has {len(fields)} fields, and the header has "
                    f"{len(names)} ({', '.join(names)}); put quotes around values that hold a comma"
                    f"{delimiter_remedy(names)}"
                )
    except csv.Error:
        return  # reading it says why


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
    """The rows of a .json or .jsonl file, all in memory; numbers and booleans as text.

    Nested values, such as messages, keep their types.

    Raises:
        DataError: the nested values of a column have several types.
        ValueError: the file is not JSON.
    """
    import datasets
    import pyarrow

    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        rows = [_parsed(line) for line in text.split("\n") if line.strip()]
    else:
        whole = _parsed(text)
        rows = whole if isinstance(whole, list) else [whole]
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
    return datasets.Dataset(pyarrow.table(arrays))


def is_written_otherwise(features: Mapping[str, Any], columns: Collection[str]) -> bool:
    """Whether a parser converted one of `columns` to numbers, booleans or dates."""
    import datasets

    return any(
        isinstance(feature, datasets.Value)
        and feature.dtype not in ("string", "large_string", "null")
        for name, feature in features.items()
        if name in columns
    )


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_Number)


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
