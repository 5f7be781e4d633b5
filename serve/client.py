"""Segment image stacks on a served U-Net: ``python serve/client.py volume.tif``."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.address import Tls
from serve.segment.bands import bands_of
from serve.segment.errors import ClientError
from serve.segment.segmenter import Segmenter
from serve.segment.settings import DEFAULT_URL, Settings, addresses
from serve.volume.jobs import JobList
from serve.volume.outputs import KINDS
from serve.volume.request import Request, Share, Summary
from serve.volume.run import segment_volume
from serve.volume.shards.run import compute_here, goes_on_by_shards, segment_shards
from serve.volume.sources import expanded
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, log_as_json, say, warn
from unet.intensity import parse_window
from unet.tracing import recording, span, traces_url
from unet.volume import open_volume

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from serve.volume.dask_connection import DaskCluster
    from serve.volume.shards.run import Compute
    from serve.volume.work import SegmentBands


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="serve/client.py", description=__doc__)
    parser.add_argument(
        "volumes",
        nargs="+",
        help="stacks of grey slices: TIFF, OME-Zarr, HDF5 (FILE:/PLACE), MRC, a folder of slices, or a quoted pattern "
        "like 'day*/*.tif'",
    )
    what = parser.add_argument_group("what is written, beside the input as NAME-probability.tif and so on")
    what.add_argument(
        "--output", action="append", choices=KINDS,
        help="repeat it for several; without it the probability, and a picture of one slice",
    )  # fmt: skip
    what.add_argument("--output_dir", type=Path, help="folder for what is written; without it the input's")
    what.add_argument("--overlay_slice", type=int, default=0, help="slice of the picture")
    what.add_argument("--view", action="store_true", help="then show it on a page for a browser here, until Ctrl-C")
    what.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")
    add_flags(what, Request)
    how = parser.add_argument_group("how it is computed, and where")
    how.add_argument(
        "--window", nargs="+", metavar="LOW HIGH",
        help="intensities that become 0 and 255; `stack` or `slice`: the 0.1 and 99.9 percentiles of the stack, each "
        "channel for itself, or of each slice; without it 8-bit stays as it is, others are taken as `stack`",
    )  # fmt: skip
    how.add_argument(
        "--url", action="append",
        help=f"HOST:PORT of a server's gRPC; repeat it for several, which share the load; without it {DEFAULT_URL}",
    )  # fmt: skip
    add_flags(how, Settings)
    how.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster whose workers ask the servers")
    for name, what_it_is in (("ca", "authority"), ("cert", "certificate of this side"), ("key", "private key")):
        how.add_argument(f"--dask_tls_{name}", type=Path, help=f"PEM of the {what_it_is}, for --dask tls://HOST:PORT")
    how.add_argument(
        "--shard", type=Share.parse, metavar="K/N",
        help="only part K of N, counted from 0, of an OME-Zarr volume on a shared disk, for tasks that need no "
        "coordinator: $SLURM_ARRAY_TASK_ID/N of --array=0-(N-1), or $JOB_COMPLETION_INDEX/N; the last one to end "
        "publishes the outputs; 0/1 does whatever is missing",
    )  # fmt: skip
    how.add_argument("--tls_ca", type=Path, help="PEM of the authority of the server's certificate: encrypts")
    how.add_argument("--tls_cert", type=Path, help="PEM of this client's certificate, where the server wants one")
    how.add_argument("--tls_key", type=Path, help="PEM of its private key")
    _add_reports(parser)
    return parser


def _add_reports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--otlp", default="", metavar="URL",
        help="http://HOST:4318 of an OpenTelemetry collector, which gets a trace of the run; the spans of servers that "
        "send theirs too belong to it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="summary as JSON, one line per stack")
    parser.add_argument(
        "--log_format", default="text", choices=("text", "json"),
        help="of what is said on standard error; json has a line's time, level, message and run",
    )  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Segment the stacks named on the command line."""
    chosen = _parser().parse_args(argv)
    if chosen.log_format == "json":
        log_as_json()
    request = _request(chosen)
    settings = from_flags(Settings, chosen, urls=addresses(chosen.url or DEFAULT_URL), tls=_tls(chosen))
    if chosen.log_format == "json":
        log_as_json(run=settings.run_id)
    checked = replace(request, overwrite=True) if chosen.dry_run else request
    jobs = JobList(expanded(chosen.volumes), checked, tta=settings.tta)
    output = _Output(as_json=chosen.json, quiet=request.quiet)
    if jobs.planned:
        with _recording(chosen.otlp), Segmenter.with_settings(settings) as segmenter:
            if chosen.dry_run:
                jobs.run(lambda source: output.plan(segmenter, source, request))
            else:
                work = _work(segmenter, request, _cluster(chosen, settings))
                jobs.run(lambda source: output.summary(work(source)))
    jobs.check()
    output.check()
    if len(jobs.jobs) == 1 and not chosen.dry_run:
        output.ways_to_look(jobs.jobs[0].source, request)
    if chosen.view:
        _view(jobs.jobs[0].source, request)
    return 0


def _recording(collector: str) -> AbstractContextManager[None]:
    if collector:
        try:
            traces_url(collector)
        except ValueError as error:
            raise ClientError(str(error)) from error
    return recording(collector, "unet-client", warn)


def _view(source: Path, request: Request) -> None:
    from serve.volume.view.layers import Layers
    from serve.volume.view.server import show

    with Layers(source, folder=request.folder) as layers:
        show(layers)


def _request(chosen: argparse.Namespace) -> Request:
    kinds = tuple(dict.fromkeys(chosen.output or ["probability"]))
    drawn = chosen.output is None or "overlay" in kinds
    if chosen.view and (chosen.dry_run or len(chosen.volumes) > 1):
        raise ClientError("--view shows what was found in one volume: name one, and leave --dry_run out")
    if chosen.shard is not None and chosen.dask is not None:
        raise ClientError("--shard is for tasks without a coordinator, and --dask names one: leave one of them out")
    request = from_flags(
        Request,
        chosen,
        kinds=kinds,
        folder=chosen.output_dir,
        window=parse_window(chosen.window),
        picture_slice=chosen.overlay_slice if drawn else None,
        by_shards=chosen.shard is not None or chosen.dask is not None,
        share=chosen.shard,
    )
    # A second pass, or a task that was started again, does what is missing.
    return replace(request, resume=True) if chosen.shard else request


def _tls(chosen: argparse.Namespace) -> Tls | None:
    if chosen.tls_ca is not None:
        return Tls(chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    if chosen.tls_cert is not None or chosen.tls_key is not None:
        raise ClientError("--tls_cert and --tls_key need --tls_ca, the authority of the server's certificate")
    return None


def _cluster(chosen: argparse.Namespace, settings: Settings) -> DaskCluster | None:
    if chosen.dask is None:
        return None
    from serve.volume.dask_connection import DaskCluster

    tls = Tls(chosen.dask_tls_ca, chosen.dask_tls_cert, chosen.dask_tls_key) if chosen.dask_tls_ca else None
    return DaskCluster(chosen.dask, settings.patience_s, tls)


def _work(segmenter: Segmenter, request: Request, cluster: DaskCluster | None) -> Callable[[Path], Summary]:
    """How one volume is segmented: by shards, or by bands that one process writes."""
    segment_bands: SegmentBands = segmenter.segment_bands
    compute: Compute = compute_here
    if cluster is not None:
        from serve.volume.dask_cluster import DaskDispatcher
        from serve.volume.shards.cluster import DaskShards

        segment_bands, compute = DaskDispatcher(cluster, segmenter).segment_bands, DaskShards(cluster).compute

    def work(source: Path) -> Summary:
        with span("segment", volume=source.name, run=segmenter.settings.run_id):
            if goes_on_by_shards(request, source):
                return segment_shards(segmenter, source, request, compute)
            return segment_volume(segmenter, source, request, segment_bands)

    return work


class _Output:
    """Standard output; what cannot be written there does not stop the work."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet
        self._fault: OSError | None = None

    def _say(self, text: str) -> None:
        try:
            say(text)
        except OSError as error:
            self._fault = error

    def check(self) -> None:
        """Say that something could not be written.

        Raises:
            ClientError: naming the reason.
        """
        if self._fault is not None:
            raise ClientError(f"the work is done, but standard output cannot be written to: {self._fault.strerror}")

    def plan(self, segmenter: Segmenter, source: Path, request: Request) -> None:
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
        if self._as_json:
            self._say(json.dumps(facts))
            return
        self._say(
            f"{source}: {facts['slices']} slices of {facts['height']} x {facts['width']} {facts['dtype']}, "
            f"{facts['tiles_per_slice']} tiles of {facts['tile_size']} each, by model version "
            f"{facts['model_version']}, would be written to {', '.join(map(str, request.targets(source).values()))}"
        )

    def summary(self, summary: Summary) -> None:
        """Say what became of one volume."""
        if self._as_json:
            self._say(json.dumps({**asdict(summary), "slices_per_s": summary.slices_per_s}))
        elif not self._quiet:
            window = "" if summary.window is None else f", intensities {summary.intensities}"
            recalled = f", {summary.recalled} of {summary.bands} parts from before" if summary.recalled else ""
            if summary.missing:
                self._say(
                    f"{summary.input}: {summary.bands} shards of this share done, {summary.recalled} of them before; "
                    f"{summary.missing} of other shares are missing, {summary.seconds:.1f} s"
                )
                return
            resent = f", {summary.resent} requests sent again" if summary.resent else ""
            cut = {"mask", "labels", "labels3d", "overlay"} & set(summary.outputs) and summary.threshold is not None
            threshold = f", threshold {summary.threshold:g}" if cut else ""
            self._say(
                f"{', '.join(summary.outputs.values())}: {summary.slices} slices of {summary.height} x {summary.width}"
                f"{window}{threshold}{recalled}{resent}, {summary.seconds:.1f} s, {summary.slices_per_s:.2f} slices/s"
            )

    def ways_to_look(self, source: Path, request: Request) -> None:
        """Say by which commands a person sees what was found; nothing where a program reads the output."""
        made = [path for path in request.targets(source).values() if path.exists() and path.suffix != ".png"]
        if made and not (self._as_json or self._quiet):
            folder = [] if request.folder is None else ["--output_dir", str(request.folder)]
            ours = shlex.join(["python", "-m", "serve.volume.view", str(source), *folder])
            self._say(f"to look at it: {ours}, or {shlex.join(['napari', str(source), *map(str, made)])}")


if __name__ == "__main__":
    sys.exit(main())
