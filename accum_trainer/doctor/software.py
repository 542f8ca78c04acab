"""Software: versions against the ranges of the package, compiler, attention, processes, an update.

Imports torch; transformers and deepspeed only by their versions, because importing them takes
longer than the rest.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel

from accum_trainer.doctor.report import FAIL, LIMIT, OK, Finding
from accum_trainer.engine.zero_build import LONGEST_BUILD, process_that_holds
from accum_trainer.errors import first_line

_PACKAGE = "accum-trainer"
# Extras that are features of training; the others serve development.
_EXTRAS = ("deepspeed", "hydra", "panel", "tensorboard", "trackio", "wandb", "mlflow")
_SOURCE = "#include <vector>\nint main() { return (int)std::vector<int>(3).size() - 3; }\n"


def versions() -> Iterator[Finding]:
    """Python and each package against its range; optional ones by the extra that brings them."""
    yield Finding(
        "python", f"{platform.python_version()} ({sys.executable})", data={"path": sys.executable}
    )
    try:
        requirements = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            f"{_PACKAGE} is not installed, so its ranges are not known",
            LIMIT,
            "pip install -e . (in its clone)",
            ("the command accum-trainer",),
        )
        return
    parsed = [Requirement(text) for text in requirements]
    needed = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found: dict[str, str | None] = {r.name: _version(r.name) for r in needed}
    wrong = [r for r in needed if not _fits(r)]
    if wrong:
        said = [f"{r.name} {found[r.name] or 'is not installed'} ({_range(r)})" for r in wrong]
        remedy = "pip install " + " ".join(f"'{r.name}{r.specifier}'" for r in wrong)
        yield Finding("packages", "; ".join(said), FAIL, remedy, data=found)
    else:
        shown = ", ".join(
            f"{n} {found[n]}" for n in ("torch", "accelerate", "transformers", "peft")
        )
        yield Finding("packages", f"{len(needed)} in their ranges: {shown}", data=found)
    for extra in _EXTRAS:
        yield from _extra(extra, parsed)


def _extra(extra: str, parsed: list[Requirement]) -> Iterator[Finding]:
    of_extra = [
        r
        for r in parsed
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]
    for requirement in of_extra:
        version, is_right = _version(requirement.name), _fits(requirement)
        says = version or "not installed; it is optional"
        if version is not None and not is_right:
            says += f", outside {_range(requirement)}"
        yield Finding(
            extra,
            says,
            OK if version is None or is_right else LIMIT,
            "" if is_right else f"pip install '{requirement.name}{requirement.specifier}'",
            () if is_right else (extra,),
            {"package": requirement.name, "version": version},
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _range(requirement: Requirement) -> str:
    return str(requirement.specifier) or "any version"


def compiler() -> Iterator[Finding]:
    """A C++ compiler, tried on a small program; DeepSpeed's extension, built or not."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    remedy = "apt-get install g++ (or module load gcc), or set CXX"
    built, left = _extensions()
    # DeepSpeed compiles once: what is built needs no compiler any more.
    lacks: tuple[str, ...] = ("compile",) if built else ("compile", "deepspeed")
    if name is None or shutil.which(name) is None:
        said = "no C++ compiler is on the PATH" if name is None else f"CXX={name} is not there"
        yield Finding("compiler", said, LIMIT, remedy, lacks)
    elif (error := _compile_error(name)) is not None:
        yield Finding("compiler", f"{name} does not compile: {error}", LIMIT, remedy, lacks)
    elif torch.cuda.is_available() and _version("triton") is None:
        yield Finding(
            "compiler",
            f"{shutil.which(name)}, but Triton is not installed",
            LIMIT,
            "pip install triton",
            ("compile",),
        )
    else:
        yield Finding("compiler", f"{shutil.which(name)} compiles", data={"path": name})
    if _version("deepspeed") is None:
        return
    if left is not None:
        yield Finding(
            "DeepSpeed's extension",
            f"{left} was left by a build that was killed: every start waits for it",
            LIMIT,
            f"rm {left}",
            ("deepspeed",),
        )
        return
    state = (
        f"built: {', '.join(built)}" if built else "not built yet; the first start takes a minute"
    )
    if shutil.which("ninja") is None and not built and _version("ninja") is None:
        yield Finding(
            "DeepSpeed's extension",
            f"{state}, and ninja is missing",
            LIMIT,
            "pip install ninja",
            ("deepspeed",),
        )
        return
    yield Finding("DeepSpeed's extension", state, data={"built": built})


def _compile_error(name: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="accum-trainer-doctor-") as folder:
        source, program = Path(folder, "tried.cpp"), Path(folder, "tried")
        source.write_text(_SOURCE)
        try:
            ended = subprocess.run(
                [name, str(source), "-o", str(program)],
                capture_output=True,
                text=True,
                timeout=60,
            )
            if ended.returncode:
                lines = (ended.stderr or ended.stdout).strip().splitlines()
                return next((line for line in lines if "error" in line), "it failed")
            ran = subprocess.run([str(program)], capture_output=True, timeout=10)
            return None if ran.returncode == 0 else f"its program ended with {ran.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return first_line(error)


def _extensions() -> tuple[list[str], Path | None]:
    """(names of extensions that are built, a lock that nobody holds and that is old, or None)."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    built = sorted({path.stem for path in root.glob("**/deepspeed*.so")})
    for lock in root.glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > LONGEST_BUILD and not process_that_holds(lock):
                return built, lock
    return built, None


def attention() -> Iterator[Finding]:
    """torch's attention kernels on this device, each tried forward and backward, and 16 bits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield _sixteen_bits(device)
    works = []
    for backend in (
        *(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    ):
        if device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            continue
        if _attends(device, backend):
            works.append(backend.name.removesuffix("_ATTENTION").lower())
    flash = _version("flash-attn")
    says = f"sdpa with {', '.join(works) or 'no kernel'} on {device.type}"
    says += f"; flash-attn {flash}" if flash else "; flash-attn is not installed"
    if not works:
        yield Finding("attention", says, FAIL, "reinstall torch for this device")
        return
    remedy = "pip install flash-attn --no-build-isolation"
    if device.type == "cpu":
        remedy = "flash attention needs a GPU; leave --attention at sdpa"
    lacks = ("flash_attention_2",) if flash is None or device.type == "cpu" else ()
    yield Finding("attention", says, OK, remedy if lacks else "", lacks, {"kernels": works})


def _attends(device: torch.device, backend: SDPBackend) -> bool:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")  # why a kernel does not run
        q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            out.sum().backward()
        return bool(torch.isfinite(q.grad).all()) if q.grad is not None else False
    return False


def _sixteen_bits(device: torch.device) -> Finding:
    is_native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        works = float((ones @ ones)[0, 0]) == 16
    except RuntimeError:
        works = False
    if works and is_native:
        return Finding("bf16", f"works on {device.type}")
    return Finding(
        "bf16",
        f"is not native on this {device.type}",
        LIMIT,
        "use --mixed-precision fp16, or --amp, which chooses it",
        ("bf16",),
    )


def processes() -> Iterator[Finding]:
    """The exchange between processes: this host's name, gloo in a group of one, NCCL."""
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        yield Finding(
            "host name",
            f"{host} has no address ({error.strerror}): gloo cannot find its own network device",
            LIMIT,
            f"echo '127.0.0.1 {host}' >> /etc/hosts, or export GLOO_SOCKET_IFNAME=lo",
            ("several processes",),
        )
    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1":
        yield Finding("exchange", "not tried: this is one process of a job")
        return
    import torch.distributed as dist

    try:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            number = torch.ones(1)
            dist.all_reduce(number)
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        yield Finding(
            "exchange",
            f"gloo does not work here: {first_line(error)}",
            LIMIT,
            "export GLOO_SOCKET_IFNAME=lo (or the device that reaches the other nodes)",
            ("several processes",),
        )
        return
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    yield Finding("exchange", f"gloo works{f'; NCCL {version}' if nccl else ''}")


def update() -> Iterator[Finding]:
    """One update of a small model through the Accumulator, on this device, against its result by
    hand."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield Finding("an update", "not tried: this is one process of a job")
        return
    from accum_trainer import Accumulator

    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(weight.weight)
    rows = [{"x": torch.tensor([float(n)])} for n in (1, 2, 3, 6)]
    try:
        acc = Accumulator(micro_batch_size=1, gradient_accumulation_steps=4)
        model, optimizer = acc.prepare(weight, torch.optim.SGD(weight.parameters(), lr=0.1))
        for window in acc.windows(rows, shuffle=False, count_targets=_count):
            for batch in window:
                with acc.accumulate(model):
                    acc.backward(model(batch["x"]).sum(), reduction="sum")
            acc.step(optimizer)
        found = float(model.weight.detach().cpu())
    except Exception as error:  # of any type: this is what the check is for
        yield Finding(
            "an update",
            f"fails: {type(error).__name__}: {first_line(error)}",
            FAIL,
            "see the message; accum-trainer verify says more",
        )
        return
    expected = 1 - 0.1 * (1 + 2 + 3 + 6) / 4
    if abs(found - expected) > 1e-6:
        yield Finding(
            "an update",
            f"gave {found}, by hand {expected}",
            FAIL,
            "run accum-trainer verify",
            data={"found": found},
        )
        return
    yield Finding("an update", f"of 4 micro-batches on {acc.device.type} is right")


def _count(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["x"])


def environment() -> Iterator[Finding]:
    """Variables that override the options of training."""
    prefix = ("ACCELERATE_", "ACCUM_TRAINER_")
    ours = sorted(name for name in os.environ if name.startswith(prefix))
    if ours:
        shown = ", ".join(name for name in ours if not re.search("TOKEN|KEY", name))
        yield Finding("environment", f"set, and options of training: {shown}")
