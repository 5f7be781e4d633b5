"""Small valid inputs of every kind that the product reads: what the fuzzer damages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from serve.volume.partial import Partial, RawStore
from unet.card import Card
from unet.card.records import Engine, Proof
from unet.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = (3, 24, 20)
JOURNAL_HEADER = {"model": "unet", "input": {"sha256": "0" * 64}}
JOURNAL_BANDS = ((0, 0), (0, 8), (1, 0))
BAND_ROWS = 8


@dataclass(frozen=True)
class Seed:
    """A valid input: its name, where it is, and which reader takes it."""

    name: str
    path: Path
    reader: str


def pixels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [3, 24, 20]."""
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def band(page: int, row: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """The pixels of a finished band of the journal's seed, float16 [8, 20]."""
    return np.random.default_rng([page, row]).random((BAND_ROWS, SHAPE[2])).astype(np.float16)


def write_seeds(folder: Path) -> list[Seed]:
    """Write one of each kind into an empty folder."""
    made = []
    for name, write in {**_TIFFS, **_OTHERS}.items():
        path = folder / name
        write(path)
        made.append(Seed(name, path, "volume"))
    for name, write, reader in (
        ("card", _card, "card"),
        ("settings.json", _settings, "settings"),
        ("run.partial", _journal, "journal"),
    ):
        path = folder / name
        write(path)
        made.append(Seed(name, path, reader))
    return made


def _tiff(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tifffile.imwrite(path, pixels(), photometric="minisblack", **options)

    return write


_TIFFS: dict[str, Callable[[Path], None]] = {
    "plain.tif": _tiff(),
    "big-endian.tif": _tiff(byteorder=">"),
    "big.tif": _tiff(bigtiff=True),
    "deflate.tif": _tiff(compression="zlib", predictor=True),
    "lzw.tif": _tiff(compression="lzw"),
    "packbits.tif": _tiff(compression="packbits"),
    "zstd.tif": _tiff(compression="zstd"),
    "tiled.tif": _tiff(tile=(16, 16), compression="zlib"),
    "strips.tif": _tiff(rowsperstrip=5),
    "imagej.tif": _tiff(imagej=True, resolution=(0.25, 0.25), metadata={"axes": "ZYX", "spacing": 50.0, "unit": "nm"}),
    "ome.ome.tif": _tiff(ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm"}),
}


def _hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("volumes/raw", data=pixels(), chunks=(1, 8, 20), compression="gzip")
        file["volumes/raw"].attrs["resolution"] = (50.0, 4.0, 4.0)


def _mrc(path: Path) -> None:
    import mrcfile

    with mrcfile.new(path) as file:
        file.set_data(pixels().astype(np.int8))
        file.voxel_size = 4.0


def _zarr(version: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import zarr

        axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
        scale = [{"type": "scale", "scale": [50.0, 4.0, 4.0]}]
        scales = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
        group = zarr.open_group(path, mode="w", zarr_format=version)
        array = group.create_array("0", shape=SHAPE, chunks=(1, 16, 16), dtype="uint8")
        array[:] = pixels()
        if version == 2:
            group.attrs["multiscales"] = [{"version": "0.4", **scales[0]}]
        else:
            group.attrs["ome"] = {"version": "0.5", "multiscales": scales}

    return write


def _n5(path: Path) -> None:
    import tensorstore

    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/"}, "create": True}
    metadata = {
        "dimensions": SHAPE[::-1],
        "blockSize": [16, 16, 1],
        "dataType": "uint8",
        "compression": {"type": "gzip"},
    }
    tensorstore.open({**spec, "metadata": metadata}).result().write(pixels().transpose()).result()


def _pictures(path: Path) -> None:
    from PIL import Image

    path.mkdir()
    for number, page in enumerate(pixels()):
        Image.fromarray(page).save(path / f"slice{number}.png")


_OTHERS: dict[str, Callable[[Path], None]] = {
    "volume.h5": _hdf5,
    "volume.mrc": _mrc,
    "two.zarr": _zarr(2),
    "three.zarr": _zarr(3),
    "volume.n5": _n5,
    "pictures": _pictures,
}


def _card(path: Path) -> None:
    path.mkdir()
    file = path / "model.onnx"
    file.write_bytes(b"a network")
    proof = Proof(sha256_of(file), "cpu", ("avx2",))
    card = Card(path)
    card.tile_sizes = (204, 252)
    card.model["pixel_size_nm"] = {"train-volume.tif": [50, 4, 4]}
    card.record("onnx", file, None, "export/main.py", proof=proof)
    card.engine = card.fallback = Engine("onnxruntime", "f32", file.name, 1.0, proof)
    card.save()


def _settings(path: Path) -> None:
    from dataclasses import asdict

    from train.config import config_of

    path.write_text(json.dumps({"settings": asdict(config_of({}))}, default=str))


def _journal(path: Path) -> None:
    run = Partial(path, JOURNAL_HEADER, resume=False, anew=False)
    store = RawStore(path / "rows", *SHAPE[1:], np.dtype(np.float16))
    for page, row in JOURNAL_BANDS:
        run.keep(store, page, row, band(page, row))
    store.close()
    run.close(finished=False)
