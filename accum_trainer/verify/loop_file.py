"""Load the user's loop from `FILE.py:function`, or say what is wrong with the file or function.

Knows the five parameters of a loop; nothing of what it does.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from accum_trainer.errors import ConfigError

PARAMETERS = ("accelerator", "model", "optimizer", "scheduler", "batches")
# Called with PARAMETERS, in this order; makes one update.
Loop = Callable[[Any, Any, Any, Any, list[Any]], Any]


def load_loop(spec: str) -> Loop:
    """The function that `FILE.py:function` names.

    Raises:
        ConfigError: no such file or function, a file that fails to import, or other parameters.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path or not name:
        raise ConfigError(f"loop={spec} does not name a function; give FILE.py:function")
    module = _import(spec, path)
    loop = getattr(module, name, None)
    if not callable(loop):
        defined = sorted(
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        )
        raise ConfigError(
            f"loop={spec}: {path} has no function {name}; it has {', '.join(defined) or 'none'}"
        )
    _check_parameters(spec, name, loop)
    return loop


def _import(spec: str, path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ConfigError(f"loop={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("loop_to_verify", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"loop={spec}: {path} is not a Python file; give FILE.py:function")
    module = importlib.util.module_from_spec(module_spec)
    # As for `python FILE.py`: the file may import its neighbours.
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise ConfigError(
            f"loop={spec}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    return module


def _check_parameters(spec: str, name: str, loop: Loop) -> None:
    """Refuse a function that does not accept the five objects, or names them in another order."""
    try:
        signature = inspect.signature(loop)
    except ValueError:  # a callable written in C has no signature
        return
    call = f"({', '.join(PARAMETERS)})"
    try:
        signature.bind(*PARAMETERS)
    except TypeError as wrong:
        raise ConfigError(
            f"loop={spec}: {name}{signature} cannot be called with {call}: {wrong}; give it "
            "these five parameters"
        ) from None
    pairs = zip(signature.parameters, PARAMETERS, strict=False)
    for position, (parameter, given) in enumerate(pairs, start=1):
        if parameter != given and parameter in PARAMETERS:
            raise ConfigError(
                f"loop={spec}: {name}{signature} is called with {call}, but its parameter "
                f"{position} is {parameter}, not {given}; put them in this order"
            )
