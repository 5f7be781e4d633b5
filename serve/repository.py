"""Publishes exported artefacts as a new version of a Triton model, or goes back to a former one.

``python serve/repository.py --artefacts DIR`` and ``python serve/repository.py --rollback``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.models.config import ModelSettings
from serve.models.publish import KEEP, publish, rollback
from serve.models.signing import Signing
from unet.card.signature import Signer
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.models.publish import Load


def _parser() -> FlagParser:
    parser = FlagParser(prog="serve/repository.py", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    what.add_argument("--rollback", action="store_true", help="go back to a former version instead")
    parser.add_argument("--version", type=int, help="of --rollback; by default the last that differs")
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="where to publish")
    parser.add_argument("--keep", type=int, default=KEEP, help="versions that stay, the new one included")
    parser.add_argument("--load", action="store_true", help="have the running server take it, see serve/triton.py")
    parser.add_argument("--state_dir", type=Path, default=Path(".cache/triton"), help="of that server")
    parser.add_argument("--require_signature", type=Path, metavar="PUBKEY", help="minisign key that must have signed")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="secret minisign key that signs the version")
    add_flags(parser, ModelSettings)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish a new version, or go back to a former one."""
    chosen = _parser().parse_args(argv)
    signing = Signing(chosen.require_signature, Signer(chosen.sign) if chosen.sign else None)
    load: Load | None = None
    if chosen.load:
        from serve.server.control import control_of

        load = control_of(chosen.state_dir, chosen.model_repository).load
    if chosen.rollback:
        published = rollback(
            chosen.model_repository, chosen.model_name, chosen.version, keep=chosen.keep, load=load, signing=signing
        )
    else:
        settings = from_flags(ModelSettings, chosen)
        published = publish(
            chosen.artefacts, chosen.model_repository, settings, keep=chosen.keep, load=load, signing=signing
        )
    served = "the running server serves it" if load else "a running server takes it at its next start"
    say(f"{published.path}: version {published.version} of {chosen.model_name}; {served}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
