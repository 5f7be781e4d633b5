"""Look at a volume and what was found in it: ``python -m serve.volume.view volume.tif``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.volume.view.layers import Layers
from serve.volume.view.server import show
from unet.config import FlagParser
from unet.errors import command

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    parser = FlagParser(prog="serve.volume.view", description=__doc__)
    parser.add_argument("volume", type=Path, help="a volume of any format that the client reads")
    parser.add_argument(
        "results", nargs="*", type=Path,
        help="what was found in it, NAME-probability.tif and so on; without them all that lie beside it",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, help="folder of the results, as of serve/client.py")
    parser.add_argument("--port", type=int, default=0, help="of the page; without it a free one")
    chosen = parser.parse_args(argv)
    with Layers(chosen.volume, chosen.results or None, chosen.output_dir) as layers:
        show(layers, chosen.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
