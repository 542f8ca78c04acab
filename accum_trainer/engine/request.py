"""An engine as it is asked for: in arguments and in the launcher's environment.

It knows where people ask; `build` decides which engine that makes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def is_true(value: str | None) -> bool:
    """Whether accelerate takes a variable's text for true."""
    return (value or "").lower() in ("y", "yes", "t", "true", "on", "1")


def _launcher_variables() -> dict[str, str]:
    return {name: v for name, v in os.environ.items() if name.startswith("ACCELERATE_USE_")}


@dataclass(frozen=True)
class Request:
    """The requests of the caller and the launcher.

    Attributes:
        engine: the name of the one that must be in force, of `Engine.asked_for_as`; or None.
        options: of an engine, by the names in `Engine.options`; only those that were given.
        accelerator_kwargs: for `Accelerator(...)`.
        launcher: ACCELERATE_USE_* as the launcher left them; an Accelerator changes them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    accelerator_kwargs: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, str] = field(default_factory=_launcher_variables)
    engine: str | None = None

    def names(self, library: str) -> bool:
        """Whether a plugin among the arguments, or accelerate's launcher, asks for `library`."""
        return bool(self.where(library))

    def where(self, library: str) -> str:
        """The plugin or the launcher's variable that asks for `library`; "" if none does."""
        if self.accelerator_kwargs.get(f"{library}_plugin") is not None:
            return f"{library}_plugin"
        variable = f"ACCELERATE_USE_{library.upper()}"
        if is_true(self.launcher.get(variable)):
            return f"accelerate's launcher ({variable}=true)"
        return ""
