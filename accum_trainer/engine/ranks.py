"""Talk between the processes of a job: small exchanges, work that others wait for, shared errors.

It knows no models, gradients or windows. `all_gather_floats` uses the group of the gradients, in
the middle of training. Everything else uses a separate group that waits for hours: it surrounds
work of unknown length (tokenising, loading, saving), and NCCL gives up after ten minutes, gloo
after thirty. Notes (`post`, `posted`) are in the store that the processes met at, and need no other
process to join; a launcher may keep it, and take it along (`StoreLostError`).
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from accum_trainer.errors import AccumTrainerError, EngineError

PATIENCE = timedelta(hours=24)
_LONGEST_SEC = 1e9  # that backends can count in milliseconds
T = TypeVar("T")
# gloo and NCCL say this when another process can no longer be reached.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "remote process exited or there was a network error",
    "NCCL communicator was aborted",
)


def _system() -> str:
    """This running system: hosts and containers may have the same name, so this is a number of the
    kernel's start where there is one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, ValueError):
        return socket.gethostname()


def _place_of(file: Path) -> tuple[str, int, int] | None:
    """The running system, file system and number of a file; None if it cannot be seen."""
    try:
        found = file.stat()
    except OSError:
        return None
    return _system(), found.st_dev, found.st_ino


class StoreLostError(EngineError):
    """The store that the processes met at is gone: who kept it has ended or was killed."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process could not be reached: it has ended, or the network failed."""
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


class Ranks:
    """This process among the others.

    All methods but those that post and read notes are collective: every rank must make the same
    calls in the same order. The properties are not. Those of notes raise `StoreLostError`.
    """

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def all_gather_floats(self, values: Sequence[float | torch.Tensor]) -> np.ndarray:
        """Every rank's `values`: shape (world_size, len(values)), float64, equal on all ranks.

        One that is a tensor, shape (), on the device is read after the exchange, with the others:
        each read waits for the device.
        """
        tensors = {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
        if self.world_size == 1 and len(tensors) < 2:
            return np.asarray([[float(value) for value in values]], dtype=np.float64)
        # MPS and some accelerators lack float64; whole numbers up to 2**53 need it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        known = [0.0 if i in tensors else value for i, value in enumerate(values)]
        mine = torch.tensor([known], dtype=dtype, device=self.device)
        for index, value in tensors.items():
            mine[0, index] = value.detach()
        return np.asarray(self.accelerator.gather(mine).cpu().double())

    def count_on_machine(self) -> int:
        """How many processes run on this machine, whatever the launcher says of local ranks."""
        return self.gather_objects(_system()).count(_system())

    def share_of_file(self, file: Path) -> tuple[int, int]:
        """(i, n): this is the i-th of the n processes that see the same `file`: on one machine, the
        same one of the same file system."""
        seen = self.gather_objects(_place_of(file))
        mine = seen[self.rank]
        same = [rank for rank, place in enumerate(seen) if mine is not None and place == mine]
        return (same.index(self.rank), len(same)) if same else (0, 1)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in the order of ranks; waits for hours."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=_patient_group(dist.group.WORLD))
        return gathered

    def first_of(self, value: Any) -> Any:
        """The picklable `value` of the first rank whose value is not None, on every rank; None if
        all are None."""
        if self.world_size == 1:
            return value
        has_one = [
            rank for rank, found in enumerate(self.gather_objects(value is not None)) if found
        ]
        if not has_one:
            return None
        shared = [value]
        dist.broadcast_object_list(shared, src=has_one[0], group=_patient_group(dist.group.WORLD))
        return shared[0]

    def barrier(self) -> None:
        """Wait for all ranks, for hours."""
        if self.world_size > 1:
            dist.barrier(group=_patient_group(dist.group.WORLD))

    def wait_in_training(self, seconds: float) -> None:
        """Replace the backend's limit for how long an exchange in training waits for other ranks;
        it stays replaced in this process."""
        if self.world_size > 1:
            _set_pg_timeout(timedelta(seconds=min(seconds, _LONGEST_SEC)), dist.group.WORLD)

    def post(self, key: str, note: str) -> None:
        """Replace this rank's note under `key`. Not collective, and does not wait."""
        if self.world_size > 1:
            with _store() as store:
                store.set(f"{key}/{self.rank}", note)

    def posted(self, key: str) -> list[str]:
        """Every rank's note under `key`, in the order of ranks; empty for a single process. Not
        collective; waits for a rank that has posted none yet."""
        if self.world_size == 1:
            return []
        with _store() as store:
            notes = store.multi_get([f"{key}/{rank}" for rank in range(self.world_size)])
        return [note.decode() for note in notes]

    def post_once(self, key: str, note: str) -> None:
        """Post a note of the whole job under `key`, whichever rank is first. Not collective."""
        if self.world_size > 1:
            with _store() as store:
                store.compare_set(key, "", note)

    def posted_once(self, key: str) -> str | None:
        """The note of `post_once` under `key`, if there is one by now. Not collective."""
        if self.world_size == 1:
            return None
        with _store() as store:
            return store.get(key).decode() if store.check([key]) else None

    def posted_so_far(self, key: str) -> list[str | None]:
        """As `posted`, with None for a rank that has posted none; does not wait."""
        return [self.posted_once(f"{key}/{rank}") for rank in range(self.world_size)]

    # --- work that may fail on one rank ---

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks if any rank has an error.

        A rank raises its own error, or a copy of the first other rank's. The copy names that rank
        and its host; its type is the original's if that is an AccumTrainerError.
        """
        said = None
        if error is not None:
            kind = type(error) if isinstance(error, AccumTrainerError) else AccumTrainerError
            words = (
                str(error)
                if isinstance(error, AccumTrainerError)
                else f"{type(error).__name__}: {error}"
            )
            said = (kind, f"process {self.rank} on {socket.gethostname()}: {words}")
        found = self.gather_objects(said)
        if error is not None:
            raise error
        for other in found:
            if other is not None:
                raise other[0](other[1])

    def together(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function`, which must not be collective, on every rank; if it raises on one, all
        raise (`agree`)."""
        result, error = _outcome(function, arguments)
        self.agree(error)
        return result  # type: ignore[return-value]

    def on_main(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Call `function` on rank 0 while the others wait; they return None, or raise as it
        does."""
        result, error = _outcome(function, arguments) if self.is_main else (None, None)
        self.agree(error)
        return result

    def main_first(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function` on one process of each machine, then on the others, which use what it
        cached."""
        result, error = None, None
        for turn in (True, False):
            if self.world_size == 1 or self.accelerator.is_local_main_process == turn:
                result, error = _outcome(function, arguments)
            self.agree(error)
            if self.world_size == 1:
                break
        return result  # type: ignore[return-value]


class Alone(Ranks):
    """This process as the only one of a job."""

    rank, world_size, is_main = 0, 1, True


def _outcome(
    function: Callable[..., T], arguments: tuple[Any, ...]
) -> tuple[T | None, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # raised again by `agree`
        return None, error


@contextlib.contextmanager
def _store() -> Iterator[dist.Store]:
    try:
        yield _get_default_store()
    except dist.DistNetworkError as error:
        raise StoreLostError(
            f"the store that the processes met at is gone ({error}): the launcher that kept it "
            "has ended or was killed"
        ) from error


@functools.lru_cache(maxsize=1)
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All processes, over gloo, with the timeout `PATIENCE`; made at the first use, on all ranks
    together.

    Raises:
        EngineError: they cannot reach each other over gloo; machines that train over NCCL may not
            be set up for it.
    """
    try:
        group: dist.ProcessGroup = dist.new_group(
            backend="gloo"
        )  # meeting takes seconds, so gloo's timeout holds
    except RuntimeError as error:
        raise EngineError(
            f"the {world.size()} processes cannot reach each other over gloo, which they use "
            f"outside training: {str(error).splitlines()[0]}; name the network device in "
            "GLOO_SOCKET_IFNAME on each machine"
        ) from error
    _set_pg_timeout(PATIENCE, group)
    return group
