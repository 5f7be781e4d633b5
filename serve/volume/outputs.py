"""What is written of a volume: probabilities, masks, labels and overlays."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.errors import ClientError
from serve.volume.cells import cells_mark, components, find_cells, label, pages_above, table_of
from unet.files import fsync, naming
from unet.scores import agglomerate
from unet.volume import StackCanvas, Volume, ZarrCanvas, ZarrStack
from unet.volume.opening import beside
from unet.volume.overlay import exactly, membrane_overlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.segment.bands import Band
    from serve.volume.cells import ShowsProgress
    from unet.intensity import Windows
    from unet.volume.scaled import Planes

KINDS = ("probability", "mask", "labels", "labels3d", "overlay")
LABEL_DTYPES = ("uint16", "uint32")
# Beside these: one slice drawn as a PNG.
PICTURE = "picture"
_FLOAT32_OF_FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


@dataclass(frozen=True)
class OutputSettings:
    """What is written.

    Attributes:
        kinds: of `KINDS`.
        threshold: a pixel is membrane where its probability of not being it is not above this.
        label_dtype: of the labels, "uint16" or "uint32".
        windows: how intensities become 8 bits.
        made_by: how the files were made, for their tags; ASCII.
        link: share of what two segments cover together that both must cover to be one cell of "labels3d".
        min_voxels: of such a cell.
        agglomerate: below which mean probability of membrane pieces of a cell of "labels" are put together; None for
            plain segments.
    """

    kinds: tuple[str, ...]
    threshold: float
    label_dtype: str
    windows: Windows
    made_by: str
    link: float = 0.0
    min_voxels: int = 1
    agglomerate: float | None = None

    def made_by_for(self, kind: str) -> str:
        """How the file of one kind was made."""
        if kind == "labels3d":
            return self.made_by + cells_mark(self.link, self.min_voxels)
        return self.made_by + (labels_mark(self.agglomerate) if kind == "labels" else "")

    def dtype_of(self, kind: str, target: Path) -> np.dtype[Any]:
        """The pixel format of one kind."""
        # OME has no 64-bit integers.
        cells = "uint64" if target.suffix == ".zarr" else "uint32"
        names = {"probability": "float32", "labels": self.label_dtype, "labels3d": cells}
        return np.dtype(names.get(kind, "uint8"))


def target_of(source: Path, kind: str, folder: Path | None) -> Path:
    """The file, or OME-Zarr folder, of one kind that belongs to a source."""
    stem, suffix = stem_of(source)
    # An RGB volume has no agreed place among OME-Zarr's axes.
    extension = ".tif" if kind == "overlay" and suffix == ".zarr" else suffix
    return (folder or beside(source)[0]) / f"{stem}-{kind}{extension}"


def labels_mark(agglomerate: float | None) -> str:
    """What the tag of labels says beside the rest."""
    return "" if agglomerate is None else f"; agglomerated below {exactly(agglomerate)}"


def stem_of(source: Path) -> tuple[str, str]:
    """A source's name without its extension, and the extension of what is written of it."""
    name = beside(source)[1]
    for ending, suffix in (
        (".ome.tif", ".ome.tif"),
        (".ome.tiff", ".ome.tif"),
        (".ome.zarr", ".zarr"),
        (".zarr", ".zarr"),
    ):
        if name.lower().endswith(ending):
            return name[: -len(ending)], suffix
    return Path(name).stem, ".tif"


class Output:
    """One file on its way."""

    def __init__(
        self,
        kind: str,
        target: Path,
        aside: Path,
        volume: Volume,
        bands: Sequence[Band],
        settings: OutputSettings,
        *,
        keep: bool = False,
    ) -> None:
        """Lay the file out.

        Args:
            kind: one of `KINDS`.
            target: its final name.
            aside: folder on the same disk, where it grows.
            volume: what it is made of.
            bands: of each slice.
            settings: what is written.
            keep: go on with an OME-Zarr output that another process has laid out.
        """
        self.kind, self.target, self._volume, self._bands, self._settings = kind, target, volume, bands, settings
        self._aside = aside / f"{kind}{''.join(target.suffixes[-1:])}"
        dtype = settings.dtype_of(kind, target)
        self._canvas: StackCanvas | ZarrCanvas
        if target.suffix == ".zarr":
            assert isinstance(volume, ZarrStack)
            notes = {"kind": kind, "made_by": settings.made_by_for(kind)}
            rows = bands[0].row1 - bands[0].row0
            # As seen from the final place, if they lie side by side.
            image = f"../{volume.path.name}" if kind.startswith("labels") else None
            self._canvas = ZarrCanvas(
                self._aside, volume, dtype, chunk_rows=rows, notes=notes, labels_of=image, keep=keep
            )
        else:
            shape = (len(volume), volume.height, volume.width)
            samples = 3 if kind == "overlay" else 1
            self._canvas = StackCanvas(
                self._aside, volume.metadata, shape, dtype, samples=samples, software=settings.made_by_for(kind)
            )

    def write(self, page: int, row0: int, probability: npt.NDArray[Any]) -> None:
        """Write one band of probabilities, float16 or float32 [R, W]."""
        rows = to_float32(probability)
        if self.kind == "probability":
            self._canvas.write(page, row0, rows)
        elif self.kind == "mask":
            self._canvas.write(page, row0, np.where(rows > self._settings.threshold, np.uint8(255), np.uint8(0)))
        elif self.kind == "overlay":
            image = self._settings.windows.apply(page, self._volume.rows(page, row0, row0 + len(rows)))
            self._canvas.write(page, row0, membrane_overlay(image, rows, self._settings.threshold))

    def finish_page(self, page: int, store: Planes) -> None:
        """Write what needs a whole slice, whose bands are all in the store: labels, and a pyramid's smaller levels.

        Raises:
            ClientError: if the slice has more segments than the labels' pixels can number.
        """
        if self.kind == "labels":
            if self._settings.agglomerate is not None:
                rows = [to_float32(store.read(page, band.row0, band.row1)) for band in self._bands]
                cells = agglomerate(np.concatenate(rows), self._settings.threshold, self._settings.agglomerate)
                self._canvas.write(page, 0, self._numbered(page, *cells))
            elif len(self._bands) == 1:
                mask = self._mask(store, page, self._bands[0])
                self._canvas.write(page, 0, self._numbered(page, *label(mask)))
            else:
                self._label_by_bands(page, store)
        if isinstance(self._canvas, ZarrCanvas) and self.kind != "labels3d":
            self._canvas.finish_page(page)

    def finish(self, store: Planes, progress: ShowsProgress) -> int:
        """Write what needs the whole volume, whose bands are all in the store: cells in 3-D, and the table of them.

        Returns:
            How many cells there are; 0 for another kind.

        Raises:
            ClientError: its axes have no depth, or it has more cells than the pixels can number.
        """
        if self.kind != "labels3d":
            return 0

        def mask(page: int) -> npt.NDArray[np.bool_]:
            return np.concatenate([self._mask(store, page, band) for band in self._bands])

        pages, settings = len(self._volume), self._settings
        above = pages_above(self._volume.metadata, pages)
        cells = find_cells(mask, above, settings.link, settings.min_voxels, progress)
        if len(cells.voxels) > np.iinfo(self._canvas.dtype).max:
            raise ClientError(f"{self._volume.path} has more cells than {self._canvas.dtype} can number: use OME-Zarr")
        for page in progress(pages, "slices whose cells were numbered", name="numbers").over(range(pages)):
            self._canvas.write(page, 0, cells.ids(page, mask(page)))
            if isinstance(self._canvas, ZarrCanvas):
                self._canvas.finish_page(page)
        cells.write_table(table_of(self._aside), self._volume.metadata.pixel_size_nm)
        return len(cells.voxels)

    def _mask(self, store: Planes, page: int, band: Band) -> npt.NDArray[np.bool_]:
        return np.asarray(store.read(page, band.row0, band.row1).astype(np.float32) > self._settings.threshold)

    def _numbered(self, page: int, labels: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        most = np.iinfo(self._settings.label_dtype).max
        if count > most:
            raise ClientError(
                f"slice {page} of {self._volume.path} has {count} segments, more than {self._settings.label_dtype} can "
                "number: add --label_dtype uint32 --resume"
            )
        return labels

    def _label_by_bands(self, page: int, store: Planes) -> None:
        """Label band by band, then give the pieces of a segment that spans several bands one number.

        The numbers are those of labelling the slice in one piece: segments in the order of their first pixels.
        """
        counts, pairs = [0], []
        above: npt.NDArray[Any] | None = None
        for band in self._bands:
            labels, count = label(self._mask(store, page, band))
            labels = np.where(labels > 0, labels.astype(np.int64) + counts[-1], 0)
            if above is not None:
                touching = (above > 0) & (labels[0] > 0)
                pairs.append(np.unique(np.stack([above[touching], labels[0][touching]]), axis=1))
            above = labels[-1]
            counts.append(counts[-1] + count)
        # Provisional numbers rise in the order of first pixels. Background is 0 and alone.
        number = components(np.concatenate(pairs, axis=1), counts[-1] + 1)
        self._numbered(page, number, int(number.max()))
        for band, offset in zip(self._bands, counts):
            labels, _ = label(self._mask(store, page, band))
            self._canvas.write(
                page, band.row0, np.where(labels > 0, number[labels + np.where(labels > 0, offset, 0)], 0)
            )

    def settle(self, page: int, bands: Sequence[Band], *, levels: bool) -> None:
        """Have some bands of a slice of an OME-Zarr output on the disk, and with ``levels`` the smaller ones too."""
        assert isinstance(self._canvas, ZarrCanvas)
        self._canvas.settle(page, bands[0].row0, bands[-1].row1, levels=levels)

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows of a slice of an OME-Zarr output as they were written."""
        assert isinstance(self._canvas, ZarrCanvas)
        return self._canvas.read(page, row0, row1)

    def close(self) -> None:
        """Close it unfinished; it stays aside."""
        self._canvas.close()

    def publish(self) -> None:
        """Give the closed file its final name, once all of it is on the disk: a power cut leaves no half output there.

        Raises:
            OSError: the disk is full or broken.
        """
        table = [table_of(self._aside)] if self.kind == "labels3d" else []
        # A closed TIFF is on the disk already; the chunks of a Zarr are files of their own.
        with naming(self.target):
            for item in (*self._aside.rglob("*"), self._aside, *table):
                fsync(item)
        if self.target.is_dir():
            former = self._aside.with_name(f"{self.kind}.former")
            shutil.rmtree(former, ignore_errors=True)  # of a run that was killed here
            os.replace(self.target, former)
        elif self._aside.is_dir() and self.target.exists():
            self.target.unlink()
        for one in table:
            os.replace(one, table_of(self.target))
        os.replace(self._aside, self.target)
        fsync(self.target.parent)


def to_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Float16 or float32 values as float32; by a table, three times as fast as NumPy's conversion."""
    if values.dtype == np.float32:
        return values
    # No index is beyond the table: wrapping only spares the check.
    return _FLOAT32_OF_FLOAT16.take(values.view(np.uint16), mode="wrap")
