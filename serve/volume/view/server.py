"""The page's server: this machine alone, reading only, and of the path nothing but numbers."""

from __future__ import annotations

import errno
import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from serve.segment.errors import ClientError
from unet.errors import UnetError, complain, say

if TYPE_CHECKING:
    from serve.volume.view.layers import Layers

HOST = "127.0.0.1"
_ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
}
_LAST_PORT = 65535
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Another run may have the same port.
    "Cache-Control": "no-store",
}
_PLANE = re.compile(r"/plane/([0-9]{1,3})/([0-9]{1,9})", re.ASCII)


class ViewServer(ThreadingHTTPServer):
    """Serves what some layers hold, on the loopback interface.

    Args:
        layers: open for as long as it serves.
        port: 0 takes a free one.

    Raises:
        ClientError: the port is taken, or not for this user.
    """

    daemon_threads = True
    # Two servers on one port would each get some of the requests.
    allow_reuse_port = False

    def __init__(self, layers: Layers, port: int = 0) -> None:
        if not 0 <= port <= _LAST_PORT:
            raise ClientError(f"--port is {port}; it must be from 0 to {_LAST_PORT}")
        self.layers = layers
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ClientError(f"port {port} {reason}: choose another one, or leave --port out") from error

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Under which names a browser on this machine asks. Others come from pages elsewhere, by DNS rebinding."""
        return tuple(f"{name}:{self.server_port}" for name in (HOST, "localhost"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no fault."""


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        origin = self.headers.get("Origin")
        ours = [f"http://{host}" for host in self.server.hosts]
        if self.headers.get("Host") not in self.server.hosts or (origin is not None and origin not in ours):
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for browsers on this machine only")
        elif asset := _ASSETS.get(self.path):
            name, kind = asset
            self._answer(files("serve.volume.view").joinpath(name).read_bytes(), kind)
        elif self.path == "/about.json":
            self._answer(json.dumps(self.server.layers.about()).encode(), "application/json")
        elif found := _PLANE.fullmatch(self.path):
            self._plane(int(found[1]), int(found[2]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def _plane(self, layer: int, page: int) -> None:
        try:
            plane = self.server.layers.plane(layer, page)
        except IndexError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except UnetError as error:
            complain(f"error: {error}")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._answer(plane.tobytes(), "application/octet-stream")

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        # The rest of such a request is not read.
        self.close_connection = True
        self._answer(why.encode("utf-8", "replace"), "text/plain; charset=utf-8", status)

    def version_string(self) -> str:
        return "unet-view"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's own name
        """Nothing: a line for each slice helps nobody."""


def show(layers: Layers, port: int = 0) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        ClientError: see `ViewServer`.
    """
    with ViewServer(layers, port) as server:
        say(f"{server.url} shows it in a browser; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
