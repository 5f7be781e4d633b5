"""Zarr volumes on web servers and in object stores: what is needed to reach them, what goes wrong, what has changed."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.volume.limits import StackError

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKS = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
# pathlib makes one slash of two.
_REMOTE = re.compile(r"(s3|gs|gcs|https?):/+(.+)")
# The package that speaks with a store, and the extra that installs it.
_CLIENTS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
_S3_ADVICE = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket FSSPEC_S3_ANON=true"
)
_GS_ADVICE = "set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket FSSPEC_GS_TOKEN=anon"
_ADVICE = {"s3": _S3_ADVICE, "gs": _GS_ADVICE, "gcs": _GS_ADVICE.replace("_GS_", "_GCS_")}
# The libraries' own errors, by name: none of them has to be installed.
_NO_RIGHTS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError",
    "PermissionError", "InvalidAccessKeyId",
}  # fmt: skip
_NO_WAY = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ClientConnectorError",
    "ServerDisconnectedError", "ConnectionRefusedError", "ConnectionError", "TimeoutError", "gaierror",
}  # fmt: skip
_SERVER_FAULT = 500
# What tells two states of an object apart, in the words of the stores.
_STATE = ("size", "ETag", "etag", "generation", "LastModified", "Last-Modified", "updated")
# Of a store that cannot list its objects each one is asked for; of more than this, so many of them.
_ASKED, _AT_ONCE = 10_000, 16


def remote_address(path: Path) -> str | None:
    """The address in an object store or on a web server that a path was made of; None of a path on this machine."""
    found = _REMOTE.match(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def check_reachable(address: str) -> None:
    """Make sure that a Zarr group or array lies at an address.

    One small object after the other is asked for: the parallel requests of zarr complain at exit after a failure.

    Raises:
        StackError: if there is none, or the store cannot be reached or needs credentials or a package.
    """
    scheme = address.partition(":")[0]
    package, extra = _CLIENTS[scheme]
    if any(importlib.util.find_spec(name) is None for name in ("fsspec", package)):
        raise StackError(f"{package} is not installed: pip install 'unet-medical-triton[{extra}]'")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what is said here in a sentence
    try:
        files, root = _open(address)
        for mark in MARKS:
            try:
                files.cat_file(f"{root.rstrip('/')}/{mark}")
            except FileNotFoundError as error:
                missing = error
            else:
                return
    except Exception as error:  # each store fails in its own way
        raise StackError(remote_fault(address, error)) from error
    raise StackError(remote_fault(address, missing)) from missing


def remote_fault(address: str, error: BaseException) -> str:
    """One sentence about an address that cannot be read."""
    return store_fault(address, error) or (
        f"{address} is not a Zarr image that can be read ({_said(error)}): check the address"
    )


def store_fault(address: str, error: BaseException) -> str | None:
    """One sentence about a store that gives nothing; None where the fault lies in what it gave."""
    names = {type(one).__name__ for one in _chain(error)}
    status = _statuses(error)
    if names & _NO_RIGHTS or status & {401, 403}:
        advice = _ADVICE.get(address.partition(":")[0], "ask its owner for a public address")
        return f"{address} may not be read ({_said(error)}): {advice}"
    if names & _NO_WAY or any(isinstance(code, int) and code >= _SERVER_FAULT for code in status):
        return f"{address} cannot be reached ({_said(error)}): check the address and the network"
    return None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _statuses(error: BaseException) -> set[Any]:
    """What the server answered, as HTTP's numbers."""
    return {getattr(one, "status", None) for one in _chain(error)}


def _open(address: str) -> tuple[Any, str]:
    import fsspec.core

    files, root = fsspec.core.url_to_fs(address)
    return files, str(root)


class RemoteIdentity:
    """Whether the objects of an array are still the ones that they were, by their ETags, sizes and times."""

    def __init__(self, address: str, array: Any) -> None:
        self._address, self._array = address, array
        self._first: str | None = None

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over names, sizes, times and ETags of the array's objects.

        Raises:
            StackError: if the store does not answer.
        """
        self._first = self._first or self._look()
        return {"sha256": self._first}

    def changed(self) -> bool:
        """Whether an object was written, added or removed since ``fingerprint`` was first asked for.

        Raises:
            StackError: if the store does not answer.
        """
        return self._first is not None and self._look() != self._first

    def _look(self) -> str:
        digest = hashlib.sha256(str(self._array.metadata).encode())
        try:
            files, root = _open(self._address)
            files.invalidate_cache()
            states = self._ask(files, root) if self._address.startswith("http") else self._list(files, root)
        except Exception as error:  # each store fails in its own way
            raise StackError(remote_fault(self._address, error)) from error
        for name, state in sorted(states.items()):
            digest.update(f"{name}\0{[str(state.get(key)) for key in _STATE]}\n".encode())
        return digest.hexdigest()

    def _list(self, files: Any, root: str) -> dict[str, dict[str, Any]]:
        try:
            return dict(files.find(root, detail=True))
        except PermissionError:  # objects may be read and not listed
            return self._ask(files, root)

    def _ask(self, files: Any, root: str) -> dict[str, dict[str, Any]]:
        steps = self._array.shards or self._array.chunks
        counts = [-(-length // step) for length, step in zip(self._array.shape, steps)]
        stride = max(1, -(-math.prod(counts) // _ASKED))
        places = itertools.islice(itertools.product(*map(range, counts)), 0, None, stride)
        names = [*MARKS, *(self._array.metadata.encode_chunk_key(place) for place in places)]

        def ask(name: str) -> dict[str, Any]:
            try:
                return dict(files.info(f"{root.rstrip('/')}/{name}"))
            except FileNotFoundError as error:
                # fsspec calls every failure on a web server so.
                if {type(one).__name__ for one in _chain(error)} & _NO_WAY or _statuses(error) - {None, 404}:
                    raise
                return {}  # a chunk that holds the fill value alone need not be there

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(names, pool.map(ask, names)))
