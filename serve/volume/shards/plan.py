"""How a volume is split into shards, and which volumes can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from serve.volume.outputs import PICTURE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from serve.segment.bands import Band
    from serve.volume.request import Request


@dataclass(frozen=True)
class Shard:
    """Whole slices, or some bands of one slice; either way whole chunks of every output.

    Attributes:
        number: its place in the plan.
        page0: first slice.
        page1: one past the last.
        bands: of each of these slices.
        whole: whether these are all bands of a slice.
    """

    number: int
    page0: int
    page1: int
    bands: tuple[Band, ...]
    whole: bool

    def units(self) -> Iterator[tuple[int, Band]]:
        """Each slice and band, in order."""
        return ((page, band) for page in range(self.page0, self.page1) for band in self.bands)


def shards_of(pages: int, width: int, bands: Sequence[Band], pixels: float, *, divisible: bool) -> tuple[Shard, ...]:
    """The plan: every band of every slice is in exactly one shard.

    Args:
        pages: slices.
        width: columns of each.
        bands: of each slice; all but the last have as many rows as a chunk of the outputs.
        pixels: of a shard, about.
        divisible: whether one slice may be several shards. Labels and scaling need it whole.
    """
    height = bands[-1].row1
    whole = tuple(bands)
    each = int(pixels // (height * width))
    if each or not divisible or len(whole) == 1:
        each = max(1, each)
        starts = range(0, pages, each)
        return tuple(Shard(n, p, min(pages, p + each), whole, whole=True) for n, p in enumerate(starts))
    count = max(1, int(pixels // (width * (whole[0].row1 - whole[0].row0))))
    parts = [whole[first : first + count] for first in range(0, len(whole), count)]
    places = ((page, part) for page in range(pages) for part in parts)
    return tuple(Shard(n, page, page + 1, part, whole=len(parts) == 1) for n, (page, part) in enumerate(places))


def can_be_sharded(request: Request, source: Path) -> bool:
    """Whether all that is wanted of a source can be written by several processes."""
    targets = request.targets(source)
    drawn = targets.pop(PICTURE, None)
    if "labels3d" in targets:
        return False
    return all(path.suffix == ".zarr" for path in targets.values()) and (not drawn or "probability" in targets)


def require_shards(request: Request, source: Path) -> None:
    """Refuse what one process must write.

    Raises:
        ClientError: naming what to do.
    """
    if can_be_sharded(request, source):
        return
    if "labels3d" in request.kinds:
        raise ClientError(
            "--shard writes no labels3d, which needs the whole volume: take the probability, and make them of it with "
            "`python -m serve.volume.number_cells NAME-probability.zarr` when all shards are done"
        )
    if "overlay" in request.kinds:
        raise ClientError("--shard writes no overlay, which is one TIFF file: leave --output overlay out")
    raise ClientError(
        f"--shard needs an OME-Zarr volume, whose outputs are chunks that several processes write; those of {source} "
        "are single TIFF files: convert it to NAME.zarr (docs/formats.md says how), or leave --shard out"
    )
