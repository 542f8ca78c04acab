"""`command(...)`: run `accum-trainer` in a process of its own and see its status, output and
files."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.launching import forked


@dataclass
class Finished:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of error; fails where there is not exactly one, or a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.lower().startswith("error")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def command():
    def run(*argv, cwd, inject=None, **env) -> Finished:
        finished = forked(1, "accum_trainer", *argv, cwd=cwd, inject=inject, **env)
        return Finished(finished.returncode, finished.stdout, finished.stderr)

    return run


@pytest.fixture
def train(command, tmp_path):
    """Run `accum-trainer train` on the embedded default on the CPU, in an empty folder."""

    def run(*argv, **options) -> Finished:
        return command("train", "--cpu", *argv, cwd=options.pop("cwd", tmp_path), **options)

    return run


@pytest.fixture
def rows_file(tmp_path_factory):
    """Write a data file and return its path: `rows_file("name.jsonl", lines or text)`."""

    def write(name, content):
        path = tmp_path_factory.mktemp("data") / name
        text = (
            content
            if isinstance(content, str)
            else "".join(json.dumps(row) + "\n" for row in content)
        )
        path.write_text(text)
        return path

    return write
