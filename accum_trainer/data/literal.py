"""Values exactly as a data file writes them: `007` in CSV and `1.50` in JSON stay so.

Parsers convert numbers, dates and words such as NA. A model must not be trained on text that
nobody wrote.
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
    """A JSON number as the file writes it."""


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
