"""Values of data files as the file writes them: `007` in a CSV stays `007`, `1.50` in JSON stays
`1.50`.

Parsers turn numbers, dates and words such as NA into values of their own, and text cannot be
trained on that nobody wrote.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accum_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets


class _Number(str):
    """A JSON number as it is written."""


def csv_options(path: Path) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset("csv", ...)`: every column is text, and only an empty
    cell is absent."""
    import datasets
    import pandas

    names = pandas.read_csv(path, nrows=0).columns
    text = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"features": text, "keep_default_na": False, "na_values": [""]}


def read_json(path: Path) -> datasets.Dataset:
    """The rows of a .json or .jsonl file, all in memory: numbers and booleans of a row as they are
    written.

    What is nested, such as messages, keeps its own types.

    Raises:
        DataError: a column whose nested values are of several kinds.
        ValueError: the file is not JSON.
    """
    import datasets
    import pyarrow

    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        rows = [_parsed(line) for line in text.splitlines() if line.strip()]
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
                f"({str(error).splitlines()[0]}); "
                "give all rows the same"
            ) from None
    return datasets.Dataset(pyarrow.table(arrays))


def is_written_otherwise(features: Mapping[str, Any], columns: Collection[str]) -> bool:
    """Whether one of `columns` holds numbers, booleans or dates, which a parser made."""
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
    """A value of a row as text, if it is a number or boolean; nested ones as JSON has them."""
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
