"""The checks in the order they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from accum_trainer.doctor import machine, places, software
from accum_trainer.doctor.report import FAIL, Finding, Report
from accum_trainer.errors import first_line


def examine(output_dir: Path, port: int | None, needs: Iterable[str]) -> Report:
    """Try everything on this machine.

    Args:
        output_dir: where runs are to live.
        port: where processes are to meet; None for the launchers' default.
        needs: what must work beside plain training.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", software.versions),
        ("device", machine.devices),
        ("processors", machine.processors),
        ("memory", machine.memory),
        ("run directory", partial(places.run_directory, output_dir)),
        ("cache", places.caches),
        ("clock", machine.clock),
        ("compiler", software.compiler),
        ("attention", software.attention),
        ("exchange", software.processes),
        ("port", partial(places.ports, port)),
        ("environment", software.environment),
        ("an update", software.update),
    ]
    findings = [found for name, check in checks for found in _tried(name, check)]
    return Report.of(findings, needs)


def _tried(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that raises must not hide what the others found."""
    try:
        yield from check()
    except Exception as error:  # of any type: of a broken machine
        said = f"could not be checked: {type(error).__name__}: {first_line(error)}"
        yield Finding(name, said, FAIL, "mend what the message names")
