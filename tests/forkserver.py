"""A process that has imported torch and what comes with it, and forks the processes that tests
start: real ones, without the seconds of imports.

python -m tests.forkserver ADDRESS

A client connects to the UNIX socket ADDRESS and sends one message for one process: {"module",
"argv", "cwd", "env", "inject"} and maybe {"cpus"}, with the descriptors of its stdin, stdout and
stderr. The process runs `python -m module argv`, or the code in argv if the module is "-c". The
client may send numbers of signals for it; gets its exit status, negative for a signal; and kills it
by closing the connection. tests/stand_ins/command is a client that is a program, and takes the
place of python for all that a forked process starts.

It does not know what a test wants, and imports no module that runs as a program. A process from
here differs from a fresh one: a forgotten import does not show, variables that libraries read when
they are imported have no effect, and libraries' caches are filled (`warm_up`). Tests of these start
fresh processes.

The code in the file ACCUM_TESTS_HOOK runs before the program, in each process from here. `inject`
makes a process send itself SIGKILL: {"micro_step": n} before its n-th micro-batch, {"sync": n}
before the n-th file of a checkpoint is synced to disk. {"nan": n} makes the gradient of one in n
micro-batches NaN: always the same ones, by their content.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import math
import os
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy as np
import peft  # noqa: F401
import rich.console
import rich.progress  # noqa: F401
import torch
import torch.distributed.fsdp

import accum_trainer.cli.train  # noqa: F401
import accum_trainer.train.durable as durable
import accum_trainer.train.loop as train
from accum_trainer import TrainConfig
from accum_trainer.train.loss_picture import draw_loss

# DeepSpeed looks for GPUs when it is imported, and a process forked after that cannot use them.
if not Path("/dev/nvidiactl").exists():
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401

STAND_IN = Path(__file__).parent / "stand_ins" / "python"
MOST_BYTES = 1 << 18  # of a message


def warm_up() -> None:
    """What a process does once, and a forked one then finds done: about a third of a short
    training's CPU time."""
    from accum_trainer.lm.model import load_model, load_tokenizer

    with contextlib.suppress(ImportError):  # no public name of transformers: saving a model asks it
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    load_model(TrainConfig(), load_tokenizer(TrainConfig()))
    with tempfile.TemporaryDirectory() as folder:
        drawn = {"skipped": False, "step": 1, "loss": 1.0, "lr": 1e-3}
        draw_loss({"a run": [drawn, drawn | {"step": 2}]}, Path(folder, "loss.png"), "a title")


def die_with_parent() -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def kill_self_at(
    number: int,
    function: Callable[..., Any],
    is_counted: Callable[..., bool] = lambda *args, **kwargs: True,
) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += is_counted(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def with_nan_gradients(
    one_in: int, function: Callable[[Any, Any], torch.Tensor]
) -> Callable[[Any, Any], torch.Tensor]:
    def spoiled(model: Any, batch: Any) -> torch.Tensor:
        loss = function(model, batch)
        content = batch["input_ids"].numpy().tobytes()
        if loss.requires_grad and zlib.crc32(content) % one_in == 0:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    return spoiled


def run_program(module: str, argv: list[str]) -> None:
    """Run what follows `python`: `-m module argv`, or `-c code` if that is the module."""
    sys.argv = [module, *argv] if module != "-c" else ["-c", *argv[1:]]
    if hook := os.environ.get("ACCUM_TESTS_HOOK"):
        exec(compile(Path(hook).read_text(), hook, "exec"), {})
    if module != "-c":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(argv[0], "<string>", "exec"), main.__dict__)


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Become the process that is asked for; does not return."""
    die_with_parent()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    if "cpus" in request:
        os.sched_setaffinity(0, request["cpus"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.executable = str(STAND_IN)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    # Fresh processes draw these from the system, so that two processes differ.
    random.seed()
    np.random.seed()
    inject = request["inject"] or {}
    if "micro_step" in inject:
        train.causal_lm_loss = kill_self_at(inject["micro_step"], train.causal_lm_loss)
    if "sync" in inject:
        durable.sync = kill_self_at(
            inject["sync"], durable.sync, lambda path: "checkpoints" in path.parts
        )
    if "nan" in inject:
        train.causal_lm_loss = with_nan_gradients(inject["nan"], train.causal_lm_loss)
    status: Any = 0
    try:
        run_program(request["module"], request["argv"])
    except SystemExit as ended:
        status = ended.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # as the interpreter before it ends  # noqa: SLF001 - Python has no public name
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def serve(address: str) -> None:
    running: dict[int, socket.socket] = {}  # pid -> its client
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            wait = 0.01 if running else None
            for one in select.select([listening, *running.values()], [], [], wait)[0]:
                if one is listening:
                    client = listening.accept()[0]
                    data, descriptors, _, _ = socket.recv_fds(client, MOST_BYTES, 3)
                    if not data:  # gone before it asked
                        client.close()
                        continue
                    pid = os.fork()
                    if pid == 0:
                        for other in (listening, client, *running.values()):
                            other.close()
                        become(json.loads(data), descriptors)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    running[pid] = client
                    continue
                pid = next(pid for pid, client in running.items() if client is one)
                try:
                    asked = one.recv(16)
                except ConnectionError:
                    asked = b""
                os.kill(pid, int(asked or signal.SIGKILL))
                if not asked:
                    os.waitpid(pid, 0)
                    running.pop(pid).close()
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with running.pop(pid) as client, contextlib.suppress(ConnectionError):
                        client.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    die_with_parent()
    warm_up()
    gc.freeze()  # pages that the collector does not touch stay shared
    serve(sys.argv[1])
