"""nginx with the gateway's own configuration; as a command, what it costs: ``python -m tests.serve.server.gateway``."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import string
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.address import Tls
from serve.segment.segmenter import Segmenter
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.authority import Authority
from unet.errors import UnetError, command, say
from unet.measure import interleave, ratios, timed
from unet.processes import free_ports

TEMPLATE = Path("docker/gateway/unet.conf.template")
_MAIN = """
worker_processes 1;
pid $folder/pid;
error_log $folder/error.log;
events {}
http {
    access_log off;
    client_body_temp_path $folder/body;
    proxy_temp_path $folder/proxy;
    fastcgi_temp_path $folder/fastcgi;
    uwsgi_temp_path $folder/uwsgi;
    scgi_temp_path $folder/scgi;
    include $folder/unet.conf;
}
"""


@dataclass(frozen=True)
class Gateway:
    """nginx in front of a server.

    Attributes:
        url: where clients connect.
        tls: what a client of the right authority has.
        authority: of clients and of the gateway.
    """

    url: str
    tls: Tls
    authority: Authority


@contextlib.contextmanager
def gateway(folder: Path, triton: str, max_request: str = "64m") -> Iterator[Gateway]:
    """Run nginx in a folder.

    Raises:
        UnetError: there is none.
    """
    program = shutil.which("nginx")
    if program is None:
        raise UnetError("no nginx was found: install it (Debian: apt-get install nginx-light)")
    folder.chmod(0o755)
    authority = Authority(folder / "authority")
    own, client = authority.issue("gateway"), authority.issue("client")
    (port,) = free_ports(1)
    values = {
        "TRITON_GRPC": triton,
        "LISTEN": f"127.0.0.1:{port}",
        "TLS_CERT": own.cert,
        "TLS_KEY": own.key,
        "TLS_CLIENT_CA": authority.cert,
        "MAX_REQUEST": max_request,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    # As the image does it: names that are known, and nginx's own variables stay.
    for name, value in values.items():
        assert f"${{{name}}}" in text
        text = text.replace(f"${{{name}}}", str(value))
    (folder / "unet.conf").write_text(text)
    (folder / "nginx.conf").write_text(string.Template(_MAIN).substitute(folder=folder))
    line = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*line, "-t", "-q"], check=True)
    # It returns once it listens, and goes on in the background.
    subprocess.run(line, check=True)
    try:
        yield Gateway(f"127.0.0.1:{port}", Tls(authority.cert, client.cert, client.key), authority)
    finally:
        subprocess.run([*line, "-s", "stop"], check=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure batches through the gateway against the same batches sent to Triton, over gRPC both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--slices", type=int, default=48, help="of 512 x 512, in each turn")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args(argv)
    images = np.random.default_rng(0).integers(0, 256, (chosen.slices, 512, 512), np.uint8)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        publish(chosen.artefacts, folder / "models", ModelSettings(max_batch_size=16))
        http, grpc, metrics = free_ports(3)
        settings = ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics)
        stack.enter_context(TritonServer(settings))
        (folder / "nginx").mkdir()
        front = stack.enter_context(gateway(folder / "nginx", settings.grpc_url))
        how = {"shared_memory": "off", "batch_size": chosen.batch_size}
        direct = stack.enter_context(Segmenter(settings.grpc_url, **how))
        through = stack.enter_context(Segmenter(front.url, tls=front.tls, **how))
        ways = {name: timed(partial(_segment, one, images)) for name, one in (("Triton", direct), ("gateway", through))}
        interleave(ways, 1)
        taken = interleave(ways, chosen.rounds)
    for way, seconds in taken.items():
        say(f"{way}: {chosen.slices / statistics.median(seconds):.2f} slices/s")
    each = ratios(taken["Triton"], taken["gateway"])
    say(f"gateway / Triton, batch {chosen.batch_size}: {statistics.median(each):.3f} ({each[0]:.3f}-{each[-1]:.3f})")
    return 0


def _segment(segmenter: Segmenter, images: npt.NDArray[np.uint8]) -> None:
    for _ in segmenter.segment(images):
        pass


if __name__ == "__main__":
    main()
