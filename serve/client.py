"""Segment image stacks on a served U-Net: ``python serve/client.py volume.tif``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from serve.connection import ClientError
from serve.segmenter import SHARED_MEMORY, Segmenter
from unet.errors import command, say
from unet.intensity import Window, to_uint8, window_of
from unet.overlay import overlay_png
from unet.stack import StackReader, StackWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ClientError", "Segmenter", "segment_file"]


@dataclass(frozen=True)
class Summary:
    """What segmenting one file came to."""

    input: str
    probability: str
    overlay: str
    slices: int
    height: int
    width: int
    window: Window | None
    seconds: float

    @property
    def slices_per_s(self) -> float:
        """Slices per second, reading and writing included."""
        return self.slices / self.seconds


def segment_file(
    segmenter: Segmenter,
    source: Path,
    target: Path,
    overlay: Path,
    *,
    window: Window | None = None,
    overlay_slice: int = 0,
    threshold: float = 0.5,
    quiet: bool = False,
) -> Summary:
    """Segment one stack into a 32-bit float stack of non-membrane probability, and draw one slice.

    Args:
        segmenter: the connection.
        source: a stack of uint8 or uint16 slices.
        target: the probabilities, with the source's pages, size and tags.
        overlay: a PNG of one slice with its membrane.
        window: the intensities that become 0 and 255; for uint16 the stack's own percentiles by default.
        overlay_slice: which slice to draw.
        threshold: of the drawing.
        quiet: show no progress bar.

    Raises:
        StackError: if the source cannot be read.
        ClientError: if the server does not answer or refuses, or there is no such slice to draw.
    """
    started = time.perf_counter()
    with StackReader(source) as reader:
        if not 0 <= overlay_slice < len(reader):
            raise ClientError(f"{source} has slices 0 to {len(reader) - 1}; there is no slice {overlay_slice} to draw")
        if window is None and reader.dtype != np.uint8:
            window = window_of(reader)
        slices = (to_uint8(page, window) for page in reader)
        with (
            StackWriter(target, reader, np.float32) as writer,
            tqdm(total=len(reader), unit="slice", desc=source.name, disable=True if quiet else None) as bar,
        ):
            for index, probability in enumerate(segmenter.segment(slices)):
                writer.append(probability)
                if index == overlay_slice:
                    drawn = probability
                bar.update()
        overlay_png(overlay, to_uint8(reader[overlay_slice], window), drawn, threshold)
        size = len(reader), reader.height, reader.width
    return Summary(str(source), str(target), str(overlay), *size, window, time.perf_counter() - started)


def _targets(source: Path, chosen: Any) -> tuple[Path, Path]:
    """The probability stack and the picture that are written for a stack."""
    stem, _, suffix = source.name.partition(".ome.")
    # An OME-TIFF is known by its name too.
    stem, extension = (stem, ".ome.tif") if suffix.lower() in ("tif", "tiff") else (source.stem, ".tif")
    folder = chosen.output_dir or source.parent
    target = chosen.output or folder / f"{stem}-probability{extension}"
    return target, target.with_name(f"{stem}-overlay.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve/client.py", description=__doc__)
    parser.add_argument("volumes", type=Path, nargs="+", help="TIFF stacks of 8- or 16-bit grey slices")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="the probability stack (default: NAME-probability.tif)")
    where.add_argument("--output_dir", type=Path, help="folder for what is written (default: the input's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what a former run wrote")
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC (default: %(default)s)")
    parser.add_argument("--model_name", default="unet", help="the served model (default: %(default)s)")
    parser.add_argument("--model_version", default="", help="its version (default: the newest)")
    parser.add_argument("--timeout_s", type=float, default=60, help="longest wait for an answer (default: %(default)g)")
    parser.add_argument("--shared_memory", choices=SHARED_MEMORY, default="auto", help="with a server on this machine")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="tiles of a slice in one request (default: %(default)s)"
    )
    parser.add_argument("--in_flight", type=int, default=2, help="requests under way at a time (default: %(default)s)")
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities that become 0 and 255"
    )
    parser.add_argument("--overlay_slice", type=int, default=0, help="slice that is drawn (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the drawing (default: %(default)g)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.add_argument("--json", action="store_true", help="summary as JSON, one line per stack")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Segment the stacks named on the command line."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.output is not None and len(chosen.volumes) > 1:
        parser.error("--output names one file: use --output_dir with several stacks")
    _refuse_overwriting(chosen)
    with Segmenter(
        chosen.url,
        chosen.model_name,
        chosen.model_version,
        timeout_s=chosen.timeout_s,
        shared_memory=chosen.shared_memory,
        batch_size=chosen.batch_size,
        in_flight=chosen.in_flight,
    ) as segmenter:
        for source in chosen.volumes:
            target, overlay = _targets(source, chosen)
            summary = segment_file(
                segmenter,
                source,
                target,
                overlay,
                window=tuple(chosen.window) if chosen.window else None,
                overlay_slice=chosen.overlay_slice,
                threshold=chosen.threshold,
                quiet=chosen.quiet,
            )
            _report(summary, chosen)
    return 0


def _refuse_overwriting(chosen: Any) -> None:
    """Check before any work that nothing is lost: no input, no former result unasked, no result of this very run."""
    taken = {source.resolve(): source for source in chosen.volumes}
    for source in chosen.volumes:
        for path in _targets(source, chosen):
            other = taken.setdefault(path.resolve(), source)
            if other is not source or path.resolve() == source.resolve():
                raise ClientError(
                    f"what is found in {source} would be written to {path}, over what belongs to {other}: choose "
                    "another --output or --output_dir"
                )
            if path.exists() and not chosen.overwrite:
                raise ClientError(
                    f"{path} exists already: add --overwrite to replace it, or choose another --output_dir"
                )


def _report(summary: Summary, chosen: Any) -> None:
    if chosen.json:
        say(json.dumps({**asdict(summary), "slices_per_s": summary.slices_per_s}))
    elif not chosen.quiet:
        window = "" if summary.window is None else f", intensities {summary.window[0]:g} to {summary.window[1]:g}"
        say(
            f"{summary.probability}: {summary.slices} slices of {summary.height} x {summary.width}{window}, "
            f"{summary.seconds:.1f} s, {summary.slices_per_s:.2f} slices/s; picture: {summary.overlay}"
        )


if __name__ == "__main__":
    sys.exit(main())
