"""Run the model repository on a real Triton: ``python serve/triton.py run|start|stop|status|watch|check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# So that it runs as a file, and `stop` does without an installation: what else needs packages is imported below.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve.server.install import TritonError
from serve.server.settings import ServerSettings, WatchSettings
from serve.server.state import load_state, stop_kept
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence

STATUS_TIMEOUT_S = 10.0


def run(settings: ServerSettings, watching: WatchSettings | None = None) -> int:
    """Serve in the foreground until Ctrl-C, SIGTERM or ``stop``; 0 then, also if it came while starting.

    Args:
        settings: how the server runs.
        watching: how it is watched meanwhile; None leaves it alone.
    """
    from serve.server.process import TritonServer

    try:
        with TritonServer(settings) as server:
            say(f"ready: {_where(server.settings)}; Ctrl-C stops it")
            if watching is not None:
                from serve.server.watch import watch

                watch(settings.state_dir, watching)
            server.wait()
    except (KeyboardInterrupt, SystemExit):
        pass
    say("stopped")
    return 0


def start(settings: ServerSettings) -> int:
    """Serve in the background; returns once the server is ready."""
    from serve.server.process import TritonServer

    server = TritonServer(settings)
    server.start()
    server.detach()
    say(f"ready: {_where(server.settings)}; `make stop` stops it")
    return 0


def check(settings: ServerSettings) -> int:
    """Look at what would be served, as each start does; 0 if it can be."""
    from serve.server.check import check_repository

    models = check_repository(settings.repository, settings.require_signature)
    say(f"{settings.repository} can be served: {', '.join(models)}")
    return 0


def stop(state_dir: Path) -> int:
    """Stop what ``run`` or ``start`` started; 0 also if nothing runs."""
    say("stopped" if stop_kept(state_dir) else "no server is running")
    return 0


def status(state_dir: Path, timeout_s: float = STATUS_TIMEOUT_S) -> int:
    """Say whether a server runs and answers; 0 if each of its models segments a tile, 1 if not.

    Args:
        state_dir: that it was started with.
        timeout_s: longest wait for each answer.
    """
    state = load_state(state_dir)
    if state is None or not state.is_kept:
        say("no server is running")
        return 1
    about = (
        f"process {state.server_pid} serves {', '.join(state.models)}, gRPC {state.grpc_url}, HTTP {state.http_url}, "
        f"log {state.log}"
    )
    if state.restarted:
        about += f"; it crashed, and was started again, {state.restarted} times"
    if not state.is_ready:
        say(f"not ready: {about}")
        return 1
    from serve.server.control import ModelControl

    control = ModelControl(state, state.admin_key)
    try:
        for model in state.models:
            control.canary(model, timeout_s)
    except TritonError as error:
        say(f"not answering: {about}; {error}")
        return 1
    say(f"ready: {about}")
    return 0


def _where(settings: ServerSettings) -> str:
    where = f"gRPC {settings.grpc_url}, HTTP {settings.http_url}, log {settings.log}"
    if settings.is_local or settings.tls_client_ca is not None:
        return where
    return f"{where}; anyone who reaches {settings.address} may use it, --tls_client_ca admits known clients only"


def _parser() -> FlagParser:
    parser = FlagParser(prog="serve/triton.py", description=__doc__)
    parser.add_argument(
        "action",
        choices=("run", "start", "stop", "status", "watch", "check"),
        help="run: in the foreground; start: in the background; status: exit code 0 if every model segments a tile, "
        "else 1; watch: load models again that no longer answer; check: exit code 0 if the repository can be served",
    )
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="what is served")
    parser.add_argument("--log", type=Path, help="file for what the server says; by default in --state_dir")
    parser.add_argument("--state_dir", type=Path, default=Path(".cache/triton"), help="where stop and status look")
    add_flags(parser, ServerSettings)
    parser.add_argument("--watch", action="store_true", help="of run: watch as well; needs --model_control explicit")
    add_flags(parser, WatchSettings, "watch_")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Start, stop, watch or ask after the server."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.watch and (chosen.action != "run" or chosen.model_control != "explicit"):
        parser.error("--watch is of run, and needs --model_control explicit")
    if chosen.action == "status":
        return status(chosen.state_dir)
    if chosen.action == "stop":
        return stop(chosen.state_dir)
    watching = from_flags(WatchSettings, chosen, "watch_")
    if chosen.action == "watch":
        from serve.server.watch import watch

        watch(chosen.state_dir, watching)
        return 0
    log = chosen.log or chosen.state_dir / "triton.log"
    settings = from_flags(
        ServerSettings, chosen, repository=chosen.model_repository, log=log, state_dir=chosen.state_dir
    )
    if chosen.action == "check":
        return check(settings)
    if chosen.action == "start":
        return start(settings)
    return run(settings, watching if chosen.watch else None)


if __name__ == "__main__":
    sys.exit(main())
