"""Segment image stacks on a served U-Net: ``python serve/client.py volume.tif``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.segment.address import Tls
from serve.segment.bands import bands_of
from serve.segment.errors import ClientError, ServerError
from serve.segment.segmenter import Segmenter
from serve.segment.slots import SHARED_MEMORY
from serve.volume.outputs import KINDS, LABEL_DTYPES
from serve.volume.run import Request, Summary, segment_volume
from serve.volume.sources import expanded
from serve.volume.work import Filler
from unet.errors import UnetError, command, complain, say
from unet.intensity import parse_window
from unet.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ClientError",
    "Request",
    "Segmenter",
    "ServerError",
    "Tls",
    "segment_volume",
]

_DEFAULT_URL = "localhost:8001"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve/client.py", description=__doc__)
    parser.add_argument(
        "volumes",
        nargs="+",
        help="stacks of grey slices: TIFF, OME-Zarr, HDF5 (FILE:/PLACE), MRC, a folder of slices, or a quoted pattern "
        "like 'day*/*.tif'",
    )
    what = parser.add_argument_group("what is written, beside the input as NAME-probability.tif and so on")
    what.add_argument(
        "--output", action="append", choices=KINDS,
        help="repeat it for several (default: probability, and a picture of one slice)",
    )  # fmt: skip
    what.add_argument("--output_dir", type=Path, help="folder for what is written (default: the input's)")
    what.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="of mask, labels and overlay: membrane is not above it (%(default)g)",
    )
    what.add_argument("--label_dtype", choices=LABEL_DTYPES, default="uint16", help="of labels (default: %(default)s)")
    what.add_argument("--overlay_slice", type=int, default=0, help="slice of the picture (default: %(default)s)")
    what.add_argument("--overwrite", action="store_true", help="replace what a former run wrote")
    what.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    what.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--window", nargs="+", metavar="LOW HIGH",
        help="intensities that become 0 and 255; `stack` or `slice`: the 0.1 and 99.9 percentiles of the stack, each "
        "channel for itself, or of each slice (default: 8-bit as it is, others as `stack`)",
    )  # fmt: skip
    how.add_argument(
        "--resample", action="store_true", help="scale slices to the network's pixel size, and the results back"
    )
    how.add_argument("--tta", action="store_true", help="mean of eight turned and mirrored views; eight times as long")
    how.add_argument("--batch_size", type=int, default=1, help="tiles of a slice in one request (default: %(default)s)")
    how.add_argument("--in_flight", type=int, default=4, help="requests under way at a time (default: %(default)s)")
    how.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that segments an OME-Zarr volume")
    where = parser.add_argument_group("where the model is served")
    where.add_argument(
        "--url", action="append", help=f"HOST:PORT of gRPC; repeat it for servers to fall back on ({_DEFAULT_URL})"
    )
    where.add_argument("--model_name", default="unet", help="the served model (default: %(default)s)")
    where.add_argument("--model_version", default="", help="its version (default: the newest)")
    where.add_argument(
        "--timeout_s", "--timeout", type=float, default=60, help="longest wait for an answer (default: %(default)g)"
    )
    where.add_argument(
        "--patience_s", type=float, default=30, help="how long a server that went away is waited for (%(default)g)"
    )
    where.add_argument("--shared_memory", choices=SHARED_MEMORY, default="auto", help="with a server on this machine")
    where.add_argument("--tls_ca", type=Path, help="PEM of the authority of the server's certificate: encrypts")
    where.add_argument("--tls_cert", type=Path, help="PEM of this client's certificate, where the server wants one")
    where.add_argument("--tls_key", type=Path, help="PEM of its private key")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.add_argument("--json", action="store_true", help="summary as JSON, one line per stack")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Segment the stacks named on the command line."""
    chosen = _parser().parse_args(argv)
    if not 0 <= chosen.threshold <= 1:
        raise ClientError(f"--threshold is {chosen.threshold:g}; it must be from 0 to 1")
    sources = expanded(chosen.volumes)
    request = _request(chosen)
    _refuse_overwriting(sources, request, dry=chosen.dry_run)
    if chosen.resume:
        sources = _left_to_do(sources, request, quiet=chosen.quiet)
    if not sources:
        return 0
    urls, options = tuple(chosen.url or (_DEFAULT_URL,)), _options(chosen)
    filler = _filler(chosen, urls, options)
    with Segmenter(urls, **options) as segmenter:
        _segment_all(segmenter, sources, request, filler, chosen)
    return 0


def _segment_all(
    segmenter: Segmenter, sources: Sequence[Path], request: Request, filler: Filler | None, chosen: Any
) -> None:
    """One volume after the other; one that cannot be read does not stop the others."""
    failed = 0
    for source in sources:
        try:
            if chosen.dry_run:
                _announce(segmenter, source, request, chosen)
            else:
                _report(segment_volume(segmenter, source, request, filler), chosen)
        except UnetError as error:
            # What the server says, it would say of the next one too.
            if isinstance(error, ClientError) or len(sources) == 1:
                raise
            complain(f"error: {error}")
            failed += 1
    if failed:
        raise ClientError(f"{failed} of {len(sources)} volumes failed, for the reasons above; the others are done")


def _request(chosen: Any) -> Request:
    kinds = tuple(dict.fromkeys(chosen.output or ["probability"]))
    drawn = chosen.output is None or "overlay" in kinds
    return Request(
        kinds=kinds,
        folder=chosen.output_dir,
        threshold=chosen.threshold,
        label_dtype=chosen.label_dtype,
        window=parse_window(chosen.window),
        picture_slice=chosen.overlay_slice if drawn else None,
        resume=chosen.resume,
        overwrite=chosen.overwrite,
        tta=chosen.tta,
        resample=chosen.resample,
        quiet=chosen.quiet,
    )


def _options(chosen: Any) -> dict[str, Any]:
    """Of a segmenter, here or on a cluster's workers."""
    names = (
        "model_name",
        "model_version",
        "timeout_s",
        "patience_s",
        "shared_memory",
        "batch_size",
        "in_flight",
        "tta",
    )
    return {**{name: getattr(chosen, name) for name in names}, "tls": _tls(chosen)}


def _tls(chosen: Any) -> Tls | None:
    if chosen.tls_ca is not None:
        return Tls(chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    if chosen.tls_cert is not None or chosen.tls_key is not None:
        raise ClientError("--tls_cert and --tls_key need --tls_ca, the authority of the server's certificate")
    return None


def _filler(chosen: Any, urls: tuple[str, ...], options: dict[str, Any]) -> Filler | None:
    if chosen.dask is None:
        return None
    from serve.volume.dask_cluster import DaskFiller, Work

    return DaskFiller(chosen.dask, Work(urls, options))


def _refuse_overwriting(sources: Sequence[Path], request: Request, *, dry: bool) -> None:
    """Check before any work that nothing is lost: no input, no former result unasked, no result of this very run."""
    taken = {source.resolve(): source for source in sources}
    for source in sources:
        for path in (*request.targets(source).values(), request.partial_folder(source)):
            other = taken.setdefault(path.resolve(), source)
            if other is not source or path.resolve() == source.resolve():
                raise ClientError(
                    f"what is found in {source} would be written to {path}, over what belongs to {other}: choose "
                    "another --output_dir"
                )
        if request.resume and _is_done(source, request):
            continue
        for path in request.targets(source).values():
            if path.exists() and not (request.overwrite or dry):
                raise ClientError(
                    f"{path} exists already: add --overwrite to replace it, or choose another --output_dir"
                )


def _is_done(source: Path, request: Request) -> bool:
    """Whether a former run has written all that is wanted of a volume and left nothing to resume."""
    if request.partial_folder(source).exists():
        return False
    return all(path.exists() for path in request.targets(source).values())


def _left_to_do(sources: Sequence[Path], request: Request, *, quiet: bool) -> list[Path]:
    """The sources that a former run has not finished; the others are named."""
    left = []
    for source in sources:
        if not _is_done(source, request):
            left.append(source)
        elif not quiet:
            complain(f"{source} is done already: {', '.join(map(str, request.targets(source).values()))}")
    return left


def _announce(segmenter: Segmenter, source: Path, request: Request, chosen: Any) -> None:
    """Say what would be done with one volume."""
    with open_volume(source) as volume:
        plan = segmenter.plan(volume.height, volume.width)
        facts = {
            "input": str(source),
            "slices": len(volume),
            "height": volume.height,
            "width": volume.width,
            "dtype": volume.dtype.name,
            "model_version": segmenter.interface.version,
            "tile_size": plan.tile_size,
            "tiles_per_slice": len(plan),
            "bands_per_slice": len(bands_of(plan)),
            "outputs": {kind: str(path) for kind, path in request.targets(source).items()},
        }
    if chosen.json:
        say(json.dumps(facts))
        return
    say(
        f"{source}: {facts['slices']} slices of {facts['height']} x {facts['width']} {facts['dtype']}, "
        f"{facts['tiles_per_slice']} tiles of {facts['tile_size']} each, by model version {facts['model_version']}, "
        f"would be written to {', '.join(str(path) for path in request.targets(source).values())}"
    )


def _report(summary: Summary, chosen: Any) -> None:
    if chosen.json:
        say(json.dumps({**asdict(summary), "slices_per_s": summary.slices_per_s}))
    elif not chosen.quiet:
        window = "" if summary.window is None else f", intensities {summary.intensities}"
        recalled = f", {summary.recalled} of {summary.bands} parts from before" if summary.recalled else ""
        say(
            f"{', '.join(summary.outputs.values())}: {summary.slices} slices of {summary.height} x {summary.width}"
            f"{window}{recalled}, {summary.seconds:.1f} s, {summary.slices_per_s:.2f} slices/s"
        )


if __name__ == "__main__":
    sys.exit(main())
