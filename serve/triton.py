"""Run the model repository on a real Triton: ``python serve/triton.py run|start|stop|status|watch``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.server.process import TritonServer
from serve.server.settings import MODEL_CONTROL, ServerSettings
from serve.server.state import load_state, stop_kept
from serve.server.watch import WatchSettings, watch
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ServerSettings", "TritonServer", "WatchSettings", "main", "run", "start", "status", "stop", "watch"]


def run(settings: ServerSettings, watching: WatchSettings | None = None) -> int:
    """Serve in the foreground until Ctrl-C, SIGTERM or ``stop``; 0 then, also if it came while starting.

    Args:
        settings: how the server runs.
        watching: how it is watched meanwhile; None leaves it alone.
    """
    try:
        with TritonServer(settings) as server:
            say(f"ready: {_where(settings)}; Ctrl-C stops it")
            if watching is not None:
                watch(settings.state_dir, watching)
            server.wait()
    except (KeyboardInterrupt, SystemExit):
        pass
    say("stopped")
    return 0


def start(settings: ServerSettings) -> int:
    """Serve in the background; returns once the server is ready."""
    server = TritonServer(settings)
    server.start()
    server.detach()
    say(f"ready: {_where(settings)}; `make stop` stops it")
    return 0


def stop(state_dir: Path) -> int:
    """Stop what ``run`` or ``start`` started; 0 also if nothing runs."""
    say("stopped" if stop_kept(state_dir) else "no server is running")
    return 0


def status(state_dir: Path) -> int:
    """Say whether a server runs; 0 if it is ready, 1 if not."""
    state = load_state(state_dir)
    if state is None or not state.is_kept:
        say("no server is running")
        return 1
    ready = state.is_ready
    say(
        f"{'ready' if ready else 'not ready'}: process {state.server_pid} serves {', '.join(state.models)}, "
        f"gRPC {state.address}:{state.grpc_port}, HTTP {state.http_address}:{state.http_port}, log {state.log}"
    )
    return 0 if ready else 1


def _where(settings: ServerSettings) -> str:
    where = f"gRPC {settings.grpc_url}, HTTP {settings.http_url}, log {settings.log}"
    if settings.is_local or settings.tls_client_ca is not None:
        return where
    return f"{where}; anyone who reaches {settings.address} may use it, --tls_client_ca admits known clients only"


def _parser() -> argparse.ArgumentParser:
    watching = WatchSettings()
    parser = argparse.ArgumentParser(
        prog="serve/triton.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "action",
        choices=("run", "start", "stop", "status", "watch"),
        help="run: in the foreground; start: in the background; status: exit code 0 if ready, 1 if not; "
        "watch: load models anew that no longer answer",
    )
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="what is served")
    parser.add_argument("--http_port", type=int, default=8000, help="port of HTTP and health")
    parser.add_argument("--grpc_port", type=int, default=8001, help="port of gRPC")
    parser.add_argument("--metrics_port", type=int, default=8002, help="port of the metrics")
    parser.add_argument("--address", default="127.0.0.1", help="of gRPC and metrics; the default is this machine only")
    parser.add_argument("--http_address", default="127.0.0.1", help="of HTTP, which only health needs")
    parser.add_argument("--start_timeout_s", type=float, default=120.0, help="longest wait for readiness")
    parser.add_argument("--stop_timeout_s", type=float, default=30.0, help="longest wait for an orderly end")
    parser.add_argument("--log", type=Path, help="file for what the server says; by default in --state_dir")
    parser.add_argument("--state_dir", type=Path, default=Path(".cache/triton"), help="where stop and status look")
    parser.add_argument(
        "--model_control", choices=MODEL_CONTROL, default="none", help="explicit: the admin key loads and unloads"
    )
    parser.add_argument("--admin_key_file", type=Path, help="file with that key; by default one in --state_dir")
    parser.add_argument("--tls_cert", type=Path, help="PEM certificate for gRPC; HTTP then tells health only")
    parser.add_argument("--tls_key", type=Path, help="PEM file with its private key")
    parser.add_argument("--tls_client_ca", type=Path, help="PEM authority whose certificates clients must show")
    parser.add_argument("--response_cache_mib", type=int, default=0, help="for answers that come again; 0: none")
    parser.add_argument("--watch", action="store_true", help="of run: watch as well; needs --model_control explicit")
    parser.add_argument("--watch_interval_s", type=float, default=watching.interval_s, help="between canaries")
    parser.add_argument("--watch_timeout_s", type=float, default=watching.timeout_s, help="for a canary's answer")
    parser.add_argument("--watch_failures", type=int, default=watching.failures, help="before a model is loaded anew")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Start, stop, watch or ask after the server."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.watch and (chosen.action != "run" or chosen.model_control != "explicit"):
        parser.error("--watch is of run, and needs --model_control explicit")
    watching = WatchSettings(chosen.watch_interval_s, chosen.watch_timeout_s, chosen.watch_failures)
    if chosen.action == "status":
        return status(chosen.state_dir)
    if chosen.action == "stop":
        return stop(chosen.state_dir)
    if chosen.action == "watch":
        watch(chosen.state_dir, watching)
        return 0
    settings = ServerSettings(
        repository=chosen.model_repository,
        log=chosen.log or chosen.state_dir / "triton.log",
        state_dir=chosen.state_dir,
        http_port=chosen.http_port,
        grpc_port=chosen.grpc_port,
        metrics_port=chosen.metrics_port,
        address=chosen.address,
        http_address=chosen.http_address,
        start_timeout_s=chosen.start_timeout_s,
        stop_timeout_s=chosen.stop_timeout_s,
        model_control=chosen.model_control,
        admin_key_file=chosen.admin_key_file,
        tls_cert=chosen.tls_cert,
        tls_key=chosen.tls_key,
        tls_client_ca=chosen.tls_client_ca,
        response_cache_mib=chosen.response_cache_mib,
    )
    if chosen.action == "start":
        return start(settings)
    return run(settings, watching if chosen.watch else None)


if __name__ == "__main__":
    sys.exit(main())
