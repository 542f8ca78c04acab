"""The place of a launcher among the nodes: its number, and where all processes meet.

Knows sockets and accelerate's options; starts nothing.
"""

from __future__ import annotations

import math
import socket
import zlib
from dataclasses import dataclass, replace

from accum_trainer.errors import AccumTrainerError, ConfigError


@dataclass(frozen=True)
class NodePlacement:
    """This node among all nodes, and the address where the processes meet."""

    machine_rank: int = 0
    num_machines: int = 1
    main_process_ip: str | None = None
    main_process_port: int | None = None
    meeting_sec: float | None = None  # how long to wait for other nodes; torchrun's 600 if None
    meeting_name: str | None = None  # tells it from meetings of other jobs

    def check(self, may_restart: bool = False) -> None:
        """Raise a ConfigError unless the processes can meet at this address, and again at the next
        port if they `may_restart`."""
        if not 0 <= self.machine_rank < self.num_machines:
            raise ConfigError(
                f"machine_rank={self.machine_rank} is no node of num_machines={self.num_machines}; "
                f"give 0 to {self.num_machines - 1}"
            )
        port = self.main_process_port
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"main_process_port={port} is not a port; give 1024 to 65535")
        if self.num_machines > 1 and (self.main_process_ip is None or port is None):
            raise ConfigError(
                f"{self.num_machines} nodes must know where to meet; give --main-process-ip (the "
                "first node) and --main-process-port, the same on each, and --machine-rank"
            )
        ports = [] if port is None else [port]
        if port is not None and self.num_machines > 1 and may_restart:
            if port == 65535:
                raise ConfigError(
                    f"main_process_port={port} has no port after it, where the nodes meet at every "
                    "other restart; give at most 65534"
                )
            ports.append(port + 1)
        if self.machine_rank == 0:
            for number in ports:
                _check_free(number)

    def of_restart(self, number: int, meeting_sec: float, run: str) -> NodePlacement:
        """This node's place in the restart `number`, from 1, of what trains in the folder `run`.

        Several nodes meet at the port and at the one after it by turns: a node that is quicker than
        node 0 waits there, and cannot reach what is left of the start before.

        Raises:
            AccumTrainerError: the port has been taken.
        """
        if self.num_machines == 1 or self.main_process_port is None:
            return self
        port = self.main_process_port + (1 if number % 2 else -1)
        name = f"{zlib.crc32(run.encode()):08x}-{number}"
        place = replace(self, main_process_port=port, meeting_sec=meeting_sec, meeting_name=name)
        try:
            place.check()
        except ConfigError as error:
            raise AccumTrainerError(f"not started again: {error}") from None
        return place

    def arguments(self) -> list[str]:
        """Options for accelerate's launcher; without a port, a free one of this machine."""
        port = self.main_process_port or free_port()
        given = ["--num_machines", str(self.num_machines), "--machine_rank", str(self.machine_rank)]
        if self.main_process_ip is not None:
            given += ["--main_process_ip", self.main_process_ip]
        if self.meeting_sec is not None:
            given += ["--rdzv_conf", f"timeout={math.ceil(self.meeting_sec)}"]
        return [*given, "--main_process_port", str(port)]

    def environment(self) -> dict[str, str]:
        """Variables for accelerate's launcher. torchrun takes its `--rdzv-id` from one: nodes of
        another job that come to the same port are not met."""
        return {} if self.meeting_name is None else {"PET_RDZV_ID": self.meeting_name}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"main_process_port={port} cannot be used here: {error.strerror}; give another, or "
                "none on one machine"
            ) from None
