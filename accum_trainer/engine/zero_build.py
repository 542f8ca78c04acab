"""DeepSpeed's start: a launcher's variables if there is none, its extension, what it refuses.

Without a GPU, DeepSpeed compiles an extension at its first start on a machine, in silence; here it
is announced. torch marks the build by a file `lock`, which names no owner: a build that is killed
leaves it behind, and every later start waits for it for ever. Such a lock is refused. torch builds
with the first ninja on PATH; the one of this Python is put there. Knows no configuration and no
process group.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sysconfig
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.cpp_extension import _get_build_directory

from accum_trainer.errors import EngineError, first_line

logger = logging.getLogger(__name__)

# Seconds; the build takes about one minute, on a busy machine three.
LONGEST_BUILD = 600.0


def stand_in_for_launcher() -> None:
    """Set a launcher's variables for one process, if no launcher did: DeepSpeed needs them."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def await_extension() -> None:
    """Return when DeepSpeed may load its extension, or compile it; say either wait.

    Raises:
        EngineError: a build that did not end left its lock.
    """
    name = _extension_to_compile()
    if name is None:
        return
    prefer_own_ninja(sysconfig.get_path("scripts"))
    folder = Path(_get_build_directory(name, verbose=False))
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    await_lock(folder / "lock", speaks)
    if speaks and not (folder / f"{name}.so").exists():
        logger.warning(
            "DeepSpeed compiles its extension in %s, once on a machine; it takes a minute or more, "
            "and must not be interrupted",
            folder,
        )


def prefer_own_ninja(scripts: str) -> None:
    """Put the programs of this Python first on PATH if there is a ninja among them.

    A ninja takes for outdated whatever another version of it has built. So starts from an activated
    environment and starts without would in turn compile the extension anew, a minute and more each.

    Args:
        scripts: the folder of these programs.
    """
    if shutil.which("ninja", path=scripts) is None:
        return
    others = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place != scripts]
    os.environ["PATH"] = os.pathsep.join([scripts, *others])


def await_lock(lock: Path, speaks: bool = True) -> None:
    """Wait while a process builds under `lock`.

    A process that builds holds the file open, which shows on its own machine only. Elsewhere, in
    another container or on a machine that shares the folder, the lock's age decides.

    Raises:
        EngineError: nothing here holds it, and it is older than `LONGEST_BUILD`.
    """
    said = False
    while (age := _age(lock)) is not None:
        owner = process_that_holds(lock)
        is_left = owner is None and age > LONGEST_BUILD
        # Without a lock by now, the build ended while its owner was looked for.
        if is_left and _age(lock) is not None:
            raise EngineError(
                f"{lock} is {age / 60:.0f} minutes old and no process here holds it: a compilation "
                "of DeepSpeed's extension was killed and left it, and every start would wait for "
                f"it; remove it (rm {lock}) and start again"
            )
        if speaks and not said:
            said = True
            if owner is not None:
                logger.warning("process %d compiles DeepSpeed's extension; waiting for it", owner)
            else:
                logger.warning(
                    "waiting for %s, which no process here holds: if no other machine or container "
                    "compiles DeepSpeed's extension now, a killed start left it; remove it",
                    lock,
                )
        time.sleep(0.1)


def prepared_by_deepspeed(accelerator: Accelerator, model: Any, optimizer: Any) -> Any:
    """`accelerator.prepare(model, optimizer)`; an EngineError for what DeepSpeed refuses, which it
    says by errors of many types."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        return accelerator.prepare(model, optimizer)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        said = first_line(error)
        if hasattr(error, "errors"):  # pydantic's, which tell the fields apart
            fields = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            said = "; ".join(fields)
        raise EngineError(f"DeepSpeed refuses its configuration: {said}") from error
    except (AttributeError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise EngineError(f"DeepSpeed stopped during set-up: {said}") from error


def _extension_to_compile() -> str | None:
    """The name of the extension that DeepSpeed will load and may have to compile; None if none."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    name = getattr(builder, "NAME", None)
    if name is None or not deepspeed.ops.__compatible_ops__.get(name, False):
        return None
    return None if installed_ops.get(name, False) else str(name)


def _age(lock: Path) -> float | None:
    """Seconds since `lock` was made; None if there is none."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def process_that_holds(file: Path) -> int | None:
    """The pid of a process that has `file` open, as far as Linux shows this user."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(entry.samefile(file) for entry in descriptors.iterdir() if entry.exists()):
                return int(descriptors.parent.name)
        except OSError:  # another user's, or gone by now
            continue
    return None
