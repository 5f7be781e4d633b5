"""The shared memory of clients: which segments and regions are whose, and how a server gives back those of the dead.

Only the standard library, for the server's guard, which starts without any package.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# What a client's segments and regions are called: this, its process number, a dash and a random word.
CLIENT_PREFIX = "unet-client-"
ADMIN_KEY_HEADER = "admin-key"
_REGION_KINDS = ("systemsharedmemory", "cudasharedmemory")
_ANSWER_TIMEOUT_S = 2.0


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its number this identifies it. None when it has ended.

    Field 22 of ``/proc/PID/stat``; the name in field 2 may itself hold spaces and parentheses. A zombie has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def remove_segments(prefix: str) -> list[str]:
    """Remove the shared-memory segments whose name begins with ``prefix``; returns their names."""
    removed = []
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path.name)
    return removed


def is_of_dead_client(name: str) -> bool:
    """Whether a segment or region belongs to a client of this machine whose process has ended."""
    owner = name[len(CLIENT_PREFIX) :].partition("-")[0]
    if not name.startswith(CLIENT_PREFIX) or not owner.isdecimal():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's, alive; or no process number
        return False
    return start_ticks(int(owner)) is None


class Regions:
    """The shared memory that clients have registered with a running server.

    Args:
        address: IP address of the server's HTTP.
        port: its port.
        key: the admin key.
    """

    def __init__(self, address: str, port: int, key: str) -> None:
        self._address, self._port, self._key = address, port, key

    def of_dead_clients(self) -> dict[str, int]:
        """The bytes of each region whose client has ended, by the region's name.

        Raises:
            OSError: the server does not answer.
        """
        return {name: size for kind in _REGION_KINDS for name, size in self._dead(kind).items()}

    def release(self) -> dict[str, int]:
        """Have the server give those regions back; returns what `of_dead_clients` found.

        Raises:
            OSError: the server does not answer.
        """
        released = {}
        for kind in _REGION_KINDS:
            for name, size in self._dead(kind).items():
                self._ask("POST", f"/v2/{kind}/region/{name}/unregister")
                released[name] = size
        return released

    def _dead(self, kind: str) -> dict[str, int]:
        regions = json.loads(self._ask("GET", f"/v2/{kind}/status") or b"[]")
        return {one["name"]: int(one["byte_size"]) for one in regions if is_of_dead_client(one["name"])}

    def _ask(self, method: str, path: str) -> bytes:
        import http.client  # takes as long to load as all the rest of the guard

        connection = http.client.HTTPConnection(self._address, self._port, timeout=_ANSWER_TIMEOUT_S)
        try:
            connection.request(method, path, headers={ADMIN_KEY_HEADER: self._key})
            response = connection.getresponse()
            body = response.read()
        except http.client.HTTPException as error:
            raise OSError(f"HTTP port {self._port} does not answer in HTTP: {error}") from error
        finally:
            connection.close()
        return body if response.status == http.HTTPStatus.OK else b""
