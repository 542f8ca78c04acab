"""Real text from every CPython, and a tokenizer for it, so that a first run needs no network.

The rows are the standard library's documentation: each documented function or class as `signature
-> docstring`, and the topics of the language reference (`pydoc_data`). The source is parsed with
`ast`; nothing is imported or run. The docstrings' lengths are strongly skewed, like instruction
data. The tokenizer is a byte-level BPE, trained on the same text in seconds. Both are cached as
files per Python version.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accum_trainer.data.files import private_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
# Every 50th row is for evaluation.
HOLD_BACK = 50
# Increment when the rows change, so that an old cache is not reused.
_VERSION = 1
# Folders of the standard library that hold tests, vendored or generated code.
_SKIP = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}


def corpus_files() -> tuple[Path, Path]:
    """Paths of the training and evaluation rows (JSON lines of prompt + completion).

    The files are written if they are missing.
    """
    folder = _folder()
    train, evaluation = folder / "train.jsonl", folder / "eval.jsonl"
    if not (train.exists() and evaluation.exists()):
        rows = list(_rows())
        held_back = rows[HOLD_BACK - 1 :: HOLD_BACK]
        del rows[HOLD_BACK - 1 :: HOLD_BACK]
        _write_rows(evaluation, held_back)
        _write_rows(train, rows)
    return train, evaluation


def corpus_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer: byte-level BPE, 4,096 tokens, trained once on the rows."""
    from transformers import PreTrainedTokenizerFast

    path = _folder() / f"tokenizer-{VOCABULARY}.json"
    if not path.exists():
        _train_tokenizer(path)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _folder() -> Path:
    version = ".".join(map(str, sys.version_info[:3]))
    return private_cache("embedded") / f"v{_VERSION}-{sys.implementation.name}-{version}"


def _rows() -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIP & set(path.relative_to(root).parts):
            continue
        for row in _documented(path):
            if row["completion"] not in seen:
                seen.add(row["completion"])
                yield row
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield {"prompt": f"{name}\n", "completion": text.strip()}


def _documented(path: Path) -> Iterator[dict[str, str]]:
    """Each documented definition of a source file, in order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template or a deliberately broken file, which the corpus can do without
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            signature = f"def {node.name}({ast.unparse(node.args)}):\n"
        elif isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            signature = f"class {node.name}({bases}):\n"
        else:
            continue
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if docstring.strip():
            yield {"prompt": signature, "completion": docstring}


def _partial(path: Path) -> Path:
    """A unique name to write under: containers that share the cache may share process ids too."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _train_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    train, _ = corpus_files()
    rows = (json.loads(line) for line in train.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    partial = _partial(path)
    tokenizer.save(str(partial))
    partial.replace(path)
