"""Start real processes as a user does: fresh ones, or forked from one that has imported torch
(tests/forkserver.py), which saves 3 to 6 seconds of CPU each. Forking needs Linux."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Completed = subprocess.CompletedProcess[str]


def environment(**more: object) -> dict[str, str]:
    """This process's environment without what a launcher or a user's shell may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "ACCUM_TRAINER_")) or name == "ACCUM_TRAINER_CACHE"
    }
    # pytest's workers set the last two, which are taken for a terminal's size.
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES")
    for name in left:
        kept.pop(name, None)
    return kept | {name: str(value) for name, value in more.items()}


def run(command: list[object], timeout: float = 600, cwd: Path = ROOT, **more: object) -> Completed:
    """Run a command in fresh processes."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*arguments: object, fresh: bool = False, **more: Any) -> Completed:
    """`python arguments`; `-m module` is forked unless it must be `fresh`."""
    if fresh or arguments[0] != "-m" or "PYTHONPATH" in more:
        return run([sys.executable, *arguments], **more)
    return forked(1, *arguments[1:], **more)


def script(code: str, cwd: Path, **more: Any) -> Completed:
    """`python -c code`, forked."""
    return forked(1, "-c", code, cwd=cwd, **more)


def cli(*arguments: object, **more: Any) -> Completed:
    """The command `accum-trainer`."""
    return python("-m", "accum_trainer", *arguments, **more)


def torchrun(
    processes: int, module: str, *arguments: object, fresh: bool = False, **more: Any
) -> Completed:
    """`torchrun -m module` on one machine, on its own port; the processes are forked unless they
    must be `fresh`."""
    if not fresh:
        return forked(processes, module, *arguments, launcher=True, **more)
    launcher = (
        *("-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={processes}", "-m", module),
    )
    return run([sys.executable, *launcher, *arguments], **more)


@functools.cache
def _server() -> str:
    """Start the fork server of this test process, which ends with it; its address."""
    folder = tempfile.TemporaryDirectory(prefix="forkserver-")
    atexit.register(folder.cleanup)
    address = str(Path(folder.name, "socket"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forkserver", address],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS=1),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return address


STAND_INS = Path(__file__).parent / "stand_ins"


def _with_server(env: dict[str, str]) -> dict[str, str]:
    """`env` in which the stand-ins find the fork server."""
    known = [sys.executable, _server(), os.environ.get("PYTHONPATH")]
    return env | {"ACCUM_TESTS_FORKSERVER": json.dumps(known)}


def with_stand_ins(env: dict[str, str]) -> dict[str, str]:
    """`env` in which accum-trainer, accelerate, torchrun and python are forked."""
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), env["PATH"]])
    return _with_server(env | {"PATH": path})


def forked(
    processes: int,
    module: object,
    *arguments: object,
    launcher: bool = False,
    timeout: float = 600,
    cwd: Path = ROOT,
    inject: dict[str, int] | None = None,
    **more: object,
) -> Completed:
    """`python -m module arguments` in processes forked from one server; as torchrun's if there is a
    `launcher`, whose exit status is 1 for any failure."""
    base = _with_server(environment(**more))
    asked = {"module": str(module), "argv": [str(a) for a in arguments]}
    asked |= {"cwd": str(cwd), "inject": inject}
    with tempfile.TemporaryFile("a+") as out, tempfile.TemporaryFile("a+") as err:
        with contextlib.ExitStack() as stack:
            clients = []
            for env in _ranks(processes, base) if launcher else [base]:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(client).connect(_server())
                message = json.dumps(asked | {"env": env}).encode()
                with open(os.devnull) as nothing:
                    files = [nothing.fileno(), out.fileno(), err.fileno()]
                    socket.send_fds(client, [message], files)
                clients.append(client)
            statuses = _wait(clients, timeout)
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    command = [str(module), *asked["argv"]]
    if statuses is None:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    status = int(any(statuses)) if launcher else statuses[0]
    return subprocess.CompletedProcess(command, status, *said)


TERM_TO_KILL = 30.0  # seconds that torchrun gives the others after one process failed


def _wait(clients: list[socket.socket], timeout: float) -> list[int] | None:
    """The exit statuses; None if the time ran out. One that fails ends the others, as under
    torchrun. Processes whose client is closed are killed."""
    statuses: dict[socket.socket, int] = {}
    late = ends = time.monotonic() + timeout
    while left := [client for client in clients if client not in statuses]:
        ready = select.select(left, [], [], max(0.0, ends - time.monotonic()))[0]
        if not ready and time.monotonic() >= late:
            return None
        if not ready:
            _signal(left, signal.SIGKILL)
            ends = late
        for client in ready:
            statuses[client] = int(client.recv(16))
            if statuses[client] != 0 and not any([*statuses.values()][:-1]):
                _signal([other for other in left if other not in statuses], signal.SIGTERM)
                ends = min(late, time.monotonic() + TERM_TO_KILL)
    return [statuses[client] for client in clients]


def _signal(clients: list[socket.socket], number: signal.Signals) -> None:
    for client in clients:
        with contextlib.suppress(ConnectionError):  # it ended meanwhile
            client.send(str(int(number)).encode())


def _ranks(processes: int, base: dict[str, str]) -> list[dict[str, str]]:
    """Each process's environment, as torchrun sets it on one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        **{f"{of}WORLD_SIZE": processes for of in ("", "LOCAL_", "ROLE_")},
    }
    return [
        {"OMP_NUM_THREADS": "1"}
        | base
        | {name: str(value) for name, value in shared.items()}
        | {f"{of}RANK": str(rank) for of in ("", "LOCAL_", "ROLE_")}
        for rank in range(processes)
    ]


def stand_in(name: str, **more: object) -> tuple[str, dict[str, str]]:
    """The program that takes the place of the command `name`, which is forked, and its
    environment."""
    return str(STAND_INS / name), _with_server(environment(OMP_NUM_THREADS=1, **more))


def shell(code: str, cwd: Path, timeout: float = 300) -> Completed:
    """`bash -euo pipefail -c code`, in which accum-trainer, accelerate, torchrun and python are
    forked."""
    return run(
        ["bash", "-euo", "pipefail", "-c", code], timeout, cwd, **with_stand_ins(environment())
    )
