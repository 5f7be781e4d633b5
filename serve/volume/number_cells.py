"""Cells in 3-D of a probability that is there: ``python -m serve.volume.number_cells NAME-probability.zarr``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.segment.bands import BAND_PX, Band
from serve.segment.errors import ClientError
from serve.volume.cells import table_of
from serve.volume.outputs import Output, OutputSettings, target_of
from serve.volume.request import Request
from unet.config import FlagParser
from unet.errors import command, say
from unet.files import hidden_folder
from unet.intensity import Windows
from unet.volume import PROBABILITY_LIMITS, open_volume
from unet.volume.overlay import exactly, noted_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from unet.volume import Volume


class _Found:
    """The probabilities of a file as rows of float32."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._scale = 1 if volume.dtype.kind == "f" else np.iinfo(volume.dtype).max

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows of a slice."""
        return np.asarray(self._volume.rows(page, row0, row1) / np.float32(self._scale), np.float32)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Link the segments of every slice, number them, and list them in a table."""
    parser = FlagParser(prog="serve.volume.number_cells", description=__doc__)
    parser.add_argument("proposal", type=Path, help="probability of not being membrane, or a mask, of any format")
    parser.add_argument("--threshold", type=float, help="membrane is not above it; without it the file's own")
    parser.add_argument("--link", type=float, default=0.0, help="as of serve/client.py")
    parser.add_argument("--min_voxels", type=int, default=1, help="as of serve/client.py")
    parser.add_argument("--output_dir", type=Path, help="folder for what is written; without it the proposal's")
    parser.add_argument("--overwrite", action="store_true", help="replace what a former run wrote")
    parser.add_argument("--quiet", action="store_true", help="do not tell how far the work is")
    chosen = parser.parse_args(argv)
    threshold = noted_threshold(chosen.proposal) if chosen.threshold is None else chosen.threshold
    request = Request(
        ("labels3d",), chosen.output_dir, threshold, link=chosen.link, min_voxels=chosen.min_voxels, quiet=chosen.quiet
    )
    with open_volume(chosen.proposal, PROBABILITY_LIMITS) as volume:
        target = target_of(_named_after(chosen.proposal), "labels3d", request.folder)
        for path in (target, table_of(target)):
            if path.exists() and not chosen.overwrite:
                raise ClientError(f"{path} exists already: add --overwrite, or choose another --output_dir")
        count = _write(volume, target, request, threshold)
    say(f"{target}, {table_of(target)}: {count} cells, threshold {threshold:g}")
    return 0


def _named_after(proposal: Path) -> Path:
    """The volume that a proposal was made of, by its name."""
    return proposal.with_name(re.sub(r"-(probability|mask)(?=\.)", "", proposal.name))


def _write(volume: Volume, target: Path, request: Request, threshold: float) -> int:
    """Write the cells and their table, whole or not at all; returns how many there are."""
    rows = max(1, BAND_PX // volume.width)
    starts = range(0, volume.height, rows)
    bands = [Band(row0, end, row0, end, ()) for row0 in starts if (end := min(volume.height, row0 + rows))]
    made = f"cells of {volume.path.name}, threshold {exactly(threshold)}".encode("ascii", "replace").decode()
    windows = Windows((None,) * len(volume))
    settings = OutputSettings(request.kinds, threshold, "uint32", windows, made, request.link, request.min_voxels)

    with hidden_folder(target) as aside:
        output = Output("labels3d", target, aside, volume, bands, settings)
        try:
            count = output.finish(_Found(volume), request.progress)
        finally:
            output.close()
        output.publish()
    return count


if __name__ == "__main__":
    sys.exit(main())
