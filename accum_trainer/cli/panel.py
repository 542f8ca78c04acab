"""`accum-trainer panel`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click

from accum_trainer.cli.file_completion import path_argument, path_option
from accum_trainer.errors import ConfigError
from accum_trainer.panel.programs import PASSWORD


@click.command(
    "panel",
    epilog="Example: accum-trainer panel runs --port 8080",
)
@path_argument("runs", metavar="[RUNS]", default="runs")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Listen here. Any address but this machine's own needs a password.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="N",
    help="0 takes a free port.",
)
@path_option(
    "--password-file",
    metavar="FILE",
    help=f"A file with the password on its first line. Or set {PASSWORD}.",
)
def command(runs: str, host: str, port: int, password_file: str | None) -> None:
    """Open a local web page that sets up, starts, stops and watches trainings.

    RUNS is the folder of run directories, `runs` by default. Trainings are processes of their own:
    they go on when the page or the panel is closed, and the panel shows those that were started
    elsewhere, too. It needs no network, and the extra `panel`.
    """
    if find_spec("nicegui") is None:
        raise ConfigError(
            "the panel needs NiceGUI, which is not installed; install it with `pip install "
            "'nicegui>=3.18,<4'`, or accum_trainer with its extra: `pip install -e '.[panel]'`"
        )
    password = os.environ.get(PASSWORD) or None
    if password_file is not None:
        password = _first_line(Path(password_file))
    from accum_trainer.panel.server import serve

    serve(Path(runs), host, port, password)


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"password_file={path} cannot be read: {reason}; name a file with the password on its "
            "first line"
        ) from None
    return lines[0].strip() if lines else ""
