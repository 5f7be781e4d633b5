"""What one server holds for itself from before its start until its end: its state folder and its ports.

The kernel releases both when the last process that holds them ends. That is first the command that starts the server,
and then the server's guard, so that nothing stale is ever left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING

from serve.server.install import TritonError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LOCK_FILE = "server.lock"


def lock_state(state_dir: Path) -> int | None:
    """The open descriptor of a state folder's lock, which holds it; None while somebody else does.

    Raises:
        TritonError: the folder's file system has no locks.
    """
    descriptor = os.open(state_dir / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise TritonError(
            f"{state_dir} cannot be locked ({error.strerror}): name a folder on a local disk with --state_dir"
        ) from error
    return descriptor


class Claims:
    """The state folder's lock and the ports of one server, to be handed to its guard."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.descriptors: list[int] = []

    def take_state(self, state_dir: Path) -> bool:
        """Lock a state folder; False if another server, or the start of one, holds it."""
        descriptor = lock_state(state_dir)
        if descriptor is None:
            return False
        self.descriptors.append(descriptor)
        self._held.callback(os.close, descriptor)
        return True

    def take_ports(self, ports: Mapping[str, int]) -> None:
        """Claim ports, so that no two of this project's servers start on one, even if neither listens yet.

        A claim is a name in the kernel's list of abstract sockets, which every network namespace has its own of, as it
        has its own ports.

        Args:
            ports: by the name of the setting.

        Raises:
            TritonError: another server has claimed one.
        """
        for name, port in ports.items():
            claim = self._held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                claim.bind(f"\0unet-triton-port-{port}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise TritonError(
                    f"port {port} belongs to another server of this project, which runs or is being started: stop "
                    f"that one, or choose another port with --{name}"
                ) from error
            self.descriptors.append(claim.fileno())

    def release(self) -> None:
        """Let this process's hold go; the guard's, if there is one, stays."""
        self._held.close()
        self.descriptors = []
