"""Every writer of the product: how it is driven, and what it leaves."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import minisign
import numpy as np
import tifffile

from tests.serve.conftest import cropping_model, enter_engine
from tests.serve.volume.shards.harness import make_blocks
from tests.torture.faults.runs import of_runs
from tests.torture.faults.writer import JOBS, Writer
from tests.torture.seeds import write_seeds
from unet.card import Card

SHAPE = (3, 24, 20)
PIXELS = np.random.default_rng(3).integers(0, 256, SHAPE, np.uint8)


def writers(folder: Path, url: str) -> list[Writer]:
    """All of them; what they read is made in ``folder``.

    Args:
        folder: an empty one.
        url: gRPC of a server with the network that gives the middle of its tile back.
    """
    tifffile.imwrite(folder / "v.tif", PIXELS, photometric="minisblack")
    make_blocks(folder / "v.zarr", SHAPE, (1, 24, 20))
    return [
        *_clients(folder, url),
        *_other_inputs(folder, url),
        *_repositories(folder),
        *_reports(folder),
        *of_runs(folder),
        *_data(folder),
    ]


def _clients(folder: Path, url: str) -> list[Writer]:
    def client(source: str, kinds: str, *flags: str) -> Callable[[Path], list[str]]:
        outputs = [word for kind in kinds.split() for word in ("--output", kind)]
        line = [str(folder / source), "--url", url, "--resume", *outputs, *flags]
        return lambda out: [*line, "--output_dir", str(out)]

    def former(out: Path) -> None:
        out.mkdir()
        (out / "v-mask.tif").write_bytes(b"a former result")
        (out / "v-probability.zarr").mkdir()
        (out / "v-probability.zarr" / "zarr.json").write_bytes(b"a former result")

    call, finals = "serve.client:main", ("v-*",)
    tiff, shards = "probability mask labels labels3d overlay", ("--shard", "0/1", "--shard_mpx", "0.0001")
    return [
        Writer("client to TIFF", call, client("v.tif", tiff), kept=_bands, finals=finals),
        Writer("client to OME-Zarr", call, client("v.zarr", "probability labels labels3d"), kept=_bands, finals=finals),
        Writer(
            "client over a TIFF",
            call,
            client("v.tif", "mask", "--overwrite"),
            prepare=former,
            kept=_bands,
            finals=finals,
        ),
        Writer(
            "client over an OME-Zarr",
            call,
            client("v.zarr", "probability", "--overwrite"),
            former,
            kept=_bands,
            finals=finals,
        ),
        Writer("client by shards", call, client("v.zarr", "probability mask", *shards), kept=_shards, finals=finals),
        Writer("client, labels by shards", call, client("v.zarr", "labels", *shards), kept=_shards, finals=finals),
    ]


def _other_inputs(folder: Path, url: str) -> list[Writer]:
    """What is written of volumes of the other formats, and cells of a probability that is there."""
    (seeds := folder / "seeds").mkdir()
    write_seeds(seeds)
    found = {".tif": folder / "p-probability.tif", ".zarr": folder / "p-probability.zarr"}
    tifffile.imwrite(found[".tif"], PIXELS.astype(np.float32) / 255, photometric="minisblack")
    make_blocks(found[".zarr"], SHAPE, (1, 24, 20))

    def client(source: Path) -> Callable[[Path], list[str]]:
        line = [str(source), "--url", url, "--resume", "--output", "mask", "--output", "labels3d"]
        return lambda out: [*line, "--output_dir", str(out)]

    def cells(source: Path) -> Callable[[Path], list[str]]:
        return lambda out: [str(source), "--threshold", "0.5", "--overwrite", "--quiet", "--output_dir", str(out)]

    return [
        *(
            Writer(
                f"client from {name}",
                "serve.client:main",
                client(seeds / source),
                kept=_bands,
                finals=("*-*",),
                timed=True,
            )
            for name, source in (("HDF5", "volume.h5"), ("MRC", "volume.mrc"), ("N5", "volume.n5"), ("PNG", "pictures"))
        ),
        Writer("cells to TIFF", "serve.volume.number_cells:main", cells(found[".tif"])),
        Writer("cells to OME-Zarr", "serve.volume.number_cells:main", cells(found[".zarr"])),
    ]


def _bands(out: Path) -> int:
    """Bands in the journal of an interrupted run."""
    return sum(
        '"crc"' in line for path in out.glob("*.partial/journal.jsonl") for line in path.read_text().split("\n")[:-1]
    )


def _shards(out: Path) -> int:
    """Markers of shards."""
    done = out / "v.shards" / "done"
    return sum(item.name.isdecimal() and item.stat().st_size > 0 for item in done.iterdir()) if done.exists() else 0


def _repositories(folder: Path) -> list[Writer]:
    import onnx

    from serve.models.config import ModelSettings
    from serve.models.publish import publish

    for name, sizes in (("first", (204,)), ("second", (204, 252))):
        (folder / name).mkdir()
        onnx.save(cropping_model(), str(folder / name / "model.fp16.onnx"))
        card = Card(folder / name)
        card.tile_sizes = sizes
        enter_engine(card)
        card.save()
        publish(folder / name, folder / "published", ModelSettings(max_tile_size=1004))

    def published(out: Path) -> None:
        shutil.copytree(folder / "published", out)

    def line(*words: str) -> Callable[[Path], list[str]]:
        return lambda out: [*words, "--model_repository", str(out)]

    key = folder / "ours.key"
    key.write_bytes(bytes(minisign.KeyPair.generate().secret_key))
    call = "serve.repository:main"
    artefacts = ("--artefacts", str(folder / "second"), "--max_tile_size", "1004")
    signed = line(*artefacts, "--sign", str(key))
    finals, commits = ("unet/[0-9]*", "unet/config.pbtxt"), ("unet/config.pbtxt",)
    return [
        Writer("publishing the first version", call, line(*artefacts), finals=finals, commits=commits),
        Writer("publishing another version", call, line(*artefacts, "--keep", "2"), published, finals, commits),
        Writer("going back to a version", call, line("--rollback"), published, finals, commits),
        Writer("publishing a signed version", call, signed, finals=finals, commits=commits, timed=True),
    ]


def _reports(folder: Path) -> list[Writer]:
    row = {"concurrency": 1, "refused": "", "tile_size": 572, "img_per_s": 30.0}
    row |= {"p50_ms": 30.0, "p90_ms": 35.0, "p95_ms": 40.0, "p99_ms": 45.0, "max_ms": 50.0}
    rows = [{"level": "shared memory", "batch_size": size, **row} for size in (1, 8)]
    (folder / "benchmark.json").write_text(json.dumps({"rows": rows}))
    tifffile.imwrite(folder / "found.tif", PIXELS.astype(np.float32) / 255, photometric="minisblack")
    figures = ("--benchmark", str(folder / "benchmark.json"))
    pictures = ("--images", str(folder / "v.tif"), "--probability", str(folder / "found.tif"))

    def report(out: Path) -> list[str]:
        return [*figures, *pictures, "--artefacts", str(folder / "first"), "--out", str(out / "report.html")]

    def scaling(out: Path) -> list[str]:
        return [*figures, "--rates", "10", "--out", str(out / "scaling.json")]

    return [
        Writer("report page", "serve.report:main", report),
        Writer("scaling", "serve.scaling:main", scaling),
        Writer("benchmark", f"{JOBS}:benchmark", lambda out: [str(out)]),
    ]


def _data(folder: Path) -> list[Writer]:
    """Slices that are fetched or made, and what a server keeps."""
    (due := folder / "due").mkdir()
    archive = folder / "slices.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("train-volume.tif", "train-labels.tif", "test-volume.tif"):
            tifffile.imwrite(due / name, PIXELS, photometric="minisblack")
            packed.write(due / name, f"challenge/{name}")
    size = ("--slices", "2", "--size", "64")
    return [
        Writer("synthetic slices", "unet.phantom:main", lambda out: ["--out", str(out), *size], finals=("*.tif",)),
        Writer(
            "fetched slices",
            f"{JOBS}:download",
            lambda out: [str(out), archive.as_uri(), str(due)],
            finals=("*.tif",),
        ),
        Writer(
            "server's state",
            f"{JOBS}:server_state",
            lambda out: [str(out)],
            finals=("backends-*", "admin.key"),
            timed=True,
        ),
    ]
