"""The shape of the package: what imports what, what is public, what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import accum_trainer

PACKAGE = Path(accum_trainer.__file__).parent
# The core: windows, what a loss sums over, sources, engines. It knows none of the rooms.
CORE = {
    *(
        "errors",
        "seeds",
        "batch_plan",
        "packed_parts",
        "window_plan",
        "batch",
        "sources",
        "losses",
        "engine",
    ),
    *(
        "exchanged",
        "window_reader",
        "noise",
        "oom",
        "window",
        "windows",
        "update",
        "prepared",
        "guards",
        "accumulator",
    ),
}
# Rooms on top of it; each imports from the core and from rooms before it.
ROOMS = [
    "config",
    "data",
    "lm",
    "speed",
    "plan",
    "launch",
    "train",
    "verify",
    "runs",
    "doctor",
    "panel",
    "cli",
]
# What the core may import beside the standard library and itself; deepspeed in its engine only.
CORE_LIBRARIES = {"torch", "numpy", "accelerate", "psutil"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def top_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it but under `if __name__ ==
    "__main__"`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            return  # being the program is not being imported
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("accum_trainer")
        ):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                known = {name_of(p) for p in MODULES}
                found.add(deeper if deeper in known else node.module)
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("accum_trainer"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def libraries_of(path: Path) -> set[str]:
    """Top-level names of the other packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"accum_trainer"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_core_imports_no_room_and_rooms_import_one_way(path):
    mine = top_of(name_of(path))
    if mine == "__init__" or path.name == "__main__.py":
        return
    assert mine in CORE or mine in ROOMS, f"{mine} is neither core nor a room"
    for other in imports_of(path):
        theirs = top_of(other)
        if theirs in ("__init__", mine):
            continue
        below = theirs in CORE or (mine in ROOMS and ROOMS.index(theirs) < ROOMS.index(mine))
        assert below, f"{name_of(path)} imports {other}"


@pytest.mark.parametrize("path", [p for p in MODULES if top_of(name_of(p)) in CORE], ids=name_of)
def test_the_core_needs_torch_numpy_and_accelerate_only(path):
    allowed = CORE_LIBRARIES | ({"deepspeed"} if path.parent.name == "engine" else set())
    assert libraries_of(path) <= allowed


def test_no_circles_inside_a_folder():
    graph = {name_of(path): imports_of(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph.get(module, ()):
                if other not in ("accum_trainer", module):
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        if module != "accum_trainer":
            visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_engines_the_launcher_and_the_plain_accelerator_know_accelerate(path):
    """Beside them, the trackers are Accelerate's."""
    knowing = ("plain_accelerate.py", "trackers.py")
    if top_of(name_of(path)) not in ("engine", "launch") and path.name not in knowing:
        assert not libraries_of(path) & {"accelerate", "deepspeed"}


def test_only_pages_and_their_server_know_the_page_library():
    of_pages = {"nicegui", "fastapi", "starlette", "uvicorn"}
    knowing = {path.stem for path in MODULES if libraries_of(path) & of_pages}
    assert knowing == {
        *("server", "shell", "setup_page", "watch_page", "group_page", "compare_page"),
    }


def test_importing_the_accumulator_brings_nothing_that_accelerate_does_not_bring():
    heavy = (
        "{'transformers', 'datasets', 'peft', 'matplotlib', 'rich', 'yaml', 'click', "
        "'tokenizers', 'safetensors'}"
    )
    found = {}
    for program in ("import accelerate", "from accum_trainer import Accumulator; Accumulator"):
        check = f"{program}\nimport sys\nprint(sorted({heavy} & set(sys.modules)))"
        run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found[program] = set(ast.literal_eval(run.stdout.strip().splitlines()[-1]))
    accelerates, ours = found.values()
    assert ours <= accelerates


def test_public_names():
    assert sorted(accum_trainer.__all__) == [
        "AccumTrainerError",
        "Accumulator",
        "BatchPlan",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "EngineError",
        "TrainConfig",
        "Update",
        "Window",
        "Windows",
        "causal_lm_loss",
    ]
    for name in accum_trainer.__all__:
        assert getattr(accum_trainer, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = accum_trainer.nothing


@pytest.mark.parametrize(
    "program",
    [
        "import accum_trainer",
        "from accum_trainer import BatchPlan, TrainConfig; BatchPlan(4, 8); TrainConfig()",
        "from accum_trainer.cli import main; main(['--help'])",
        "from accum_trainer.cli import main; main(['train', '--help'])",
        "from accum_trainer.cli import main; main(['plan', '--num-samples', '100'])",
        "from accum_trainer.cli import main; main(['panel', '--help'])",
        "from accum_trainer.cli import main; main(['completion', 'bash'])",
        *(
            "import os; os.environ.update(_ACCUM_TRAINER_COMPLETE='bash_complete', "
            f"COMP_WORDS='accum-trainer {words}', COMP_CWORD='{len(words.split())}'); "
            "from accum_trainer.cli import main; main()"
            for words in ("t", "train --eng", "launch a -- --eng", "compare r", "config create m")
        ),
    ],
)
def test_light_programs_do_not_import_torch(program):
    heavy = "{'torch', 'accelerate', 'transformers', 'datasets', 'rich', 'matplotlib'}"
    check = (
        f"import atexit, sys; atexit.register(lambda: print('HEAVY', sorted({heavy} & "
        "set(sys.modules))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{check}\n{program}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "HEAVY []" in run.stdout


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
