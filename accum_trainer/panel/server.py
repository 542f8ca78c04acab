"""Serve the panel: one process, one address, until Ctrl-C. Runs go on after it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query
from nicegui import app as pages
from nicegui import ui

from accum_trainer.errors import ConfigError
from accum_trainer.launch.folders import make_folder
from accum_trainer.panel.compare_page import ComparePage
from accum_trainer.panel.form import Form
from accum_trainer.panel.group_page import GroupPage
from accum_trainer.panel.guard import Guard, check_address, is_loopback
from accum_trainer.panel.row_counts import RowCounts
from accum_trainer.panel.run_view import find_groups
from accum_trainer.panel.setup_page import SetupPage
from accum_trainer.panel.shell import FAVICON, Panel
from accum_trainer.panel.watch_page import WatchPage

# Beside the runs: what was typed.
STATE = ".panel.json"


def serve(runs: Path, host: str, port: int, password: str | None) -> None:
    """Serve until a signal; prints the address.

    Args:
        runs: the folder of run directories; made if missing.
        port: 0 takes a free one.

    Raises:
        ConfigError: the address cannot be used, or would be open to others without a password.
    """
    check_address(host, password)
    make_folder(runs, "folder of runs")
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(build(runs), host, password),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )

    def end(*_: object) -> None:
        server.should_exit = True

    # Before the address is known: a KeyboardInterrupt while the server starts can be lost.
    signal.signal(signal.SIGINT, end)
    name = f"[{host}]" if ":" in host else host
    print(f"panel: http://{name}:{port}/ (runs in {runs}; Ctrl-C ends the panel, not the runs)")
    if not is_loopback(host):
        print("note: passwords and pages travel unencrypted; use it in a network that you trust")
    sys.stdout.flush()
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # now: who reads the address may use it at once
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host={host} port={port} cannot be used: {reason}; give another --port, or 0 for a "
            "free one"
        ) from None
    return listener


def build(runs: Path) -> FastAPI:
    """The application: its pages, on what is kept in `runs`."""
    form = Form(runs / STATE)
    panel = Panel(runs, form, RowCounts(_from_thread(form.changed)))

    @ui.page("/", title="Set up · accum-trainer")
    def setup() -> None:
        SetupPage(panel)

    @ui.page("/watch", title="Watch · accum-trainer")
    def watch(run: str = "") -> None:
        if run in find_groups(runs):
            GroupPage(panel, run)
        else:
            WatchPage(panel, run)

    @ui.page("/compare", title="Compare · accum-trainer")
    def compare(run: Annotated[list[str], Query(default_factory=list)]) -> None:
        ComparePage(panel, run)

    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        application,
        title="accum-trainer",
        favicon=FAVICON,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
    )
    return application


def _from_thread(function: Callable[[], None]) -> Callable[[], None]:
    """`function`, to be called in the server's loop from any thread."""
    loop: list[asyncio.AbstractEventLoop] = []
    pages.on_startup(lambda: loop.append(asyncio.get_running_loop()))

    def call() -> None:
        if loop and not loop[0].is_closed():
            loop[0].call_soon_threadsafe(function)

    return call
