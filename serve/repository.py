"""Publishes exported artefacts as a new version of a Triton model, or goes back to a former one.

``python serve/repository.py --artefacts DIR`` and ``python serve/repository.py --rollback``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.models.config import PROFILES, ModelSettings
from serve.models.publish import KEEP, publish, rollback
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.models.publish import Load


def _parser() -> argparse.ArgumentParser:
    default = ModelSettings()
    parser = argparse.ArgumentParser(
        prog="serve/repository.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    what.add_argument("--rollback", action="store_true", help="go back to a former version instead")
    parser.add_argument("--version", type=int, help="of --rollback; by default the last that differs")
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="where to publish")
    parser.add_argument("--model_name", default=default.name, help="the model's name")
    parser.add_argument("--keep", type=int, default=KEEP, help="versions that stay, the new one included")
    parser.add_argument("--load", action="store_true", help="have the running server take it, see serve/triton.py")
    parser.add_argument("--state_dir", type=Path, default=Path(".cache/triton"), help="of that server")
    parser.add_argument("--profile", choices=tuple(PROFILES), default=default.profile, help="machine that serves")
    parser.add_argument("--max_batch_size", type=int, default=default.max_batch_size, help="most tiles in one pass")
    parser.add_argument(
        "--max_queue_delay_us", type=int, help="wait for others to share a pass (default: the profile's)"
    )
    parser.add_argument(
        "--preferred_batch_sizes", type=int, nargs="+", default=[], help="of a pass that are worth the wait"
    )
    parser.add_argument(
        "--max_queue_size", type=int, default=default.max_queue_size, help="requests that may wait; 0: any"
    )
    parser.add_argument(
        "--default_timeout_us", type=int, default=default.default_timeout_us, help="longest wait in the queue; 0: any"
    )
    parser.add_argument(
        "--priority_levels", type=int, default=default.priority_levels, help="1 goes first; 0: none does"
    )
    parser.add_argument(
        "--instances", type=int, default=default.instances, help="copies of the network; 0: by the machine"
    )
    parser.add_argument(
        "--threads", type=int, default=default.threads, help="threads of each copy; 0 shares out the cores"
    )
    parser.add_argument("--response_cache", action="store_true", help="keep answers; see --response_cache_mib there")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish a new version, or go back to a former one."""
    chosen = _parser().parse_args(argv)
    load: Load | None = None
    if chosen.load:
        from serve.server.control import control_of

        load = control_of(chosen.state_dir, chosen.model_repository).load
    if chosen.rollback:
        published = rollback(chosen.model_repository, chosen.model_name, chosen.version, keep=chosen.keep, load=load)
    else:
        settings = ModelSettings(
            name=chosen.model_name,
            profile=chosen.profile,
            max_batch_size=chosen.max_batch_size,
            max_queue_delay_us=chosen.max_queue_delay_us,
            preferred_batch_sizes=tuple(chosen.preferred_batch_sizes),
            max_queue_size=chosen.max_queue_size,
            default_timeout_us=chosen.default_timeout_us,
            priority_levels=chosen.priority_levels,
            instances=chosen.instances,
            threads=chosen.threads,
            response_cache=chosen.response_cache,
        )
        published = publish(chosen.artefacts, chosen.model_repository, settings, keep=chosen.keep, load=load)
    served = "the running server serves it" if load else "a running server takes it at its next start"
    say(f"{published.path}: version {published.version} of {chosen.model_name}; {served}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
