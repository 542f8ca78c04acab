"""docs/architecture.md is true: its names exist, and the core that it names is short."""

from __future__ import annotations

import ast
import re

from tests.launching import ROOT


def test_architecture_names_files_and_functions_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:accum_trainer|tests)/[\w/]+\.py)(?::([\w.]+))?`", text)
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        for part in name.split(".") if name else []:
            children = [
                node
                for node in tree.body
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part
            ]
            assert children, f"{file} has no {name}"
            tree = children[0]


def test_the_core_files_that_architecture_names_read_in_twenty_minutes():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## Read these") : text.index("Beside them")]
    files = re.findall(r"^\| `([\w/.]+)` \|", table, re.MULTILINE)
    assert 0 < len(files) <= 8
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 1300
