"""Words for bash and YAML that hold any text: blanks, quotes, `#`, line breaks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

_PLAIN_YAML = re.compile(r"[A-Za-z0-9_./][\w./-]*")


def word(text: object) -> str:
    """`text` as one word of bash, on one line, so that it can also stand in a comment."""
    given = str(text)
    if given.isprintable():
        return shlex.quote(given)
    escaped = "".join(
        {"\n": "\\n", "\t": "\\t", "'": "\\'", "\\": "\\\\"}.get(
            char, char if char.isprintable() else _as_bytes(char)
        )
        for char in given
    )
    return f"$'{escaped}'"


def _as_bytes(char: str) -> str:
    """`\\xHH` of each byte: in a locale that is not UTF-8, bash leaves `\\u` as it is."""
    try:
        encoded = char.encode(errors="surrogateescape")  # a path may hold bytes of no character
    except UnicodeEncodeError:
        encoded = b"?"
    return "".join(f"\\x{byte:02x}" for byte in encoded)


def words(texts: Iterable[object]) -> str:
    return " ".join(word(text) for text in texts)


def yaml_scalar(text: object) -> str:
    """`text` as a YAML string on one line; not for a bare number or a word such as `true`."""
    given = str(text)
    return (
        given
        if _PLAIN_YAML.fullmatch(given)
        else json.dumps(given, ensure_ascii=not given.isprintable())
    )
