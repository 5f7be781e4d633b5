"""Addresses that a server listens on. Triton takes no names, and writes IPv6 in two ways."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from serve.server.install import TritonError


def listen_address(name: str) -> str:
    """The IP address that a name stands for, IPv4 first; an IP address stays, without brackets.

    Raises:
        TritonError: the name stands for none.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name.strip("[]")))
    if not name:
        raise TritonError("the address to listen on is empty: give an address of this machine")
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TritonError(
            f"{name!r} is no address and no known name ({reason}): give an address of this machine"
        ) from error
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    return address == "localhost"


def in_url(address: str) -> str:
    """An address as it stands before ``:PORT``, also on Triton's command line for gRPC."""
    return f"[{address}]" if ":" in address else address


def for_http(address: str) -> str:
    """An address as Triton's HTTP and metrics take it on the command line."""
    return f"ipv6:{address}" if ":" in address else address


def require_free_port(address: str, name: str, port: int) -> None:
    """Check that a server could listen.

    Args:
        address: an IP address.
        name: of the setting, for the message.
        port: to listen on.

    Raises:
        TritonError: it could not, with the reason.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError as error:
            raise TritonError(f"port {port} needs more rights than you have: choose another with --{name}") from error
        except OSError as error:
            raise TritonError(
                f"port {port} of {address} cannot be listened on ({error.strerror}): stop what uses it, or choose "
                f"another with --{name}"
            ) from error
