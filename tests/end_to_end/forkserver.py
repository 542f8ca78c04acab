"""A process that has imported everything and forks one child per command: real processes without
the wait for imports.

Reads one JSON request per line: {"argv", "cwd", "env", "out", "err", "kill"}; answers one line:
{"status"}. A child runs the command line exactly as `accum-trainer` does. `kill` makes it send
itself SIGKILL: {"micro_step": n} before its n-th micro-batch, or {"sync": n} before the n-th file
of a checkpoint is synced to disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import datasets  # noqa: F401
import peft  # noqa: F401
import torch

import accum_trainer.train.checkpoint as checkpoint
import accum_trainer.train.loop as train
from accum_trainer.cli import main


def kill_self_at(number: int, function):
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def child(request: dict) -> None:
    for descriptor, key in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    torch.set_num_threads(1)
    kill = request.get("kill") or {}
    if "micro_step" in kill:
        train.causal_lm_loss = kill_self_at(kill["micro_step"], train.causal_lm_loss)
    if "sync" in kill:
        checkpoint._sync = kill_self_at(kill["sync"], checkpoint._sync)
    try:
        main(request["argv"])
        status = 0
    except SystemExit as done:
        status = done.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(request)
    _, status = os.waitpid(pid, 0)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
