"""Faults in the content of data files, found before a parser reads them; each names the line.

The parsers of `datasets` name none, drop half characters, keep the last of two equal keys, and end
in their own errors on deep nesting. Knows no columns that can be trained on.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accum_trainer.data.skipped import Skipped
from accum_trainer.errors import DataError

# Arrow reads at most 64 levels of types.
MAX_DEPTH = 60
_TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep; leave the inner levels out"
# A \uXXXX that is half of a character beyond the first 65,536, if its other half is missing.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class _KeyTwice(ValueError):
    """An object of JSON with two values of one name."""


def check_text(path: Path) -> None:
    """Refuse a text file that is not UTF-8, is not text, or has blank lines only.

    Raises:
        DataError: with the line.
    """
    has_text = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                has_text = bool(_text_of(line).strip()) or has_text
            except ValueError as bad:
                raise DataError(f"data file {path} line {number} {bad}") from None
    if not has_text:
        raise DataError(f"data file {path} has no rows")


def check_json(path: Path) -> int:
    """Refuse a .json or .jsonl file that a parser would misread; return the number of its rows.

    Raises:
        DataError: with the line or row: it is no object, has two values of one name, half a
            character, or more than MAX_DEPTH levels.
    """
    count = 0
    for where, row in json_rows(path, object_pairs_hook=_object):
        count += 1
        try:
            _check_object(row)
        except ValueError as bad:
            raise DataError(f"data file {path} {where} {bad}") from None
    return count


def good_lines(path: Path, skipped: Skipped) -> Iterator[bytes]:
    """The lines of a .jsonl or .txt file that `check_text` and `check_json` would take, without
    their ends; the others are counted in `skipped`."""
    parse = {"parse_int": _integer, "object_pairs_hook": _object}
    for number, line in json_lines(path):
        try:
            _text_of(line)
            if path.suffix == ".jsonl":
                _check_object(_parsed(line, parse))
        except json.JSONDecodeError as bad:
            skipped.add(f"line {number} is not JSON: {_said(bad)}")
        except ValueError as bad:
            skipped.add(f"line {number} {bad}")
        else:
            yield line


def _text_of(line: bytes) -> str:
    """A line as text. ValueError that says what it has instead."""
    if line.count(0) * 3 > len(line):
        raise ValueError(
            "is mostly NUL bytes; save it as UTF-8 if it is UTF-16, or write it again if it was "
            "not written to its end"
        )
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise ValueError(f"is not UTF-8 text: {bad.reason}") from None


def _check_object(row: Any) -> None:
    """ValueError that says why this value of JSON is no row."""
    if not isinstance(row, dict):
        raise ValueError(f"is not a JSON object: {json.dumps(row)[:60]}")
    if _is_deep(row):
        raise ValueError(_TOO_DEEP)


def json_rows(path: Path, **parse: Any) -> Iterator[tuple[str, Any]]:
    """(place in the file, value) of each row of a .json or .jsonl file.

    Args:
        parse: arguments of `json.loads`. Integers stay text by default: Python reads 4,300 digits.

    Raises:
        DataError: with the line of what is not JSON.
    """
    parse = {"parse_int": _integer} | parse
    if path.suffix == ".json":
        content = _without_mark(path.read_bytes())
        try:
            whole = _parsed(content, parse)
        except json.JSONDecodeError as bad:
            if bad.msg != "Extra data":  # else lines, as in .jsonl
                raise DataError(
                    f"data file {path} line {bad.lineno} is not JSON: {_said(bad)}"
                ) from None
        except ValueError as bad:
            raise DataError(f"data file {path} {_place(content, parse)} {bad}") from None
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
            return
    for number, line in json_lines(path):
        try:
            yield f"line {number}", _parsed(line, parse)
        except json.JSONDecodeError as bad:
            raise DataError(f"data file {path} line {number} is not JSON: {_said(bad)}") from None
        except ValueError as bad:
            raise DataError(f"data file {path} line {number} {bad}") from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, content) of each line that is not blank; a carriage return ends one too, as parsers
    have it, and cannot stand inside JSON's strings."""
    number = 0
    with open(path, "rb") as file:
        for line in file:
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            for part in text.split(b"\r"):
                number += 1
                if number == 1:
                    part = _without_mark(part)
                if part.strip():
                    yield number, part


def _without_mark(content: bytes) -> bytes:
    """Without byte order marks before the text."""
    while content.startswith(codecs.BOM_UTF8):
        content = content[len(codecs.BOM_UTF8) :]
    return content


def _parsed(content: bytes, parse: dict[str, Any]) -> Any:
    """The value. JSONDecodeError, or a ValueError that says what the place has."""
    try:
        value = json.loads(content.decode("utf-8"), **parse)
    except _KeyTwice as twice:
        raise ValueError(f"has two values of {twice}; name each once") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _HALF.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as bad:
            half = bad.object[bad.start]
            raise ValueError(
                f"has \\u{ord(half):04x}, which is half of a character; write the character, or "
                "both halves"
            ) from None
        except RecursionError:
            pass  # refused as too deep
    return value


def _place(content: bytes, parse: dict[str, Any]) -> str:
    """The row of a JSON list that cannot be taken, and its line."""
    text = content.decode("utf-8")
    row, at, space = 0, text.find("[") + 1, re.compile(r"[\s,]*")
    with contextlib.suppress(ValueError, RecursionError):
        while True:
            row += 1
            begin = space.match(text, at).end()  # type: ignore[union-attr]
            _, at = json.JSONDecoder().raw_decode(text, begin)
            _parsed(text[begin:at].encode("utf-8"), parse)
    return f"line {text.count(chr(10), 0, begin) + 1} (row {row})"


def _integer(text: str) -> int | str:
    return int(text) if len(text) < 20 else text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return found


def _is_deep(row: dict[str, Any]) -> bool:
    level = list(row.values())
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, (dict, list)) for value in level)


def _said(bad: json.JSONDecodeError) -> str:
    return f"{bad.msg.removesuffix(' at')} at column {bad.colno}"
