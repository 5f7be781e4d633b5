"""Turn a training run into proven artefacts: ``python export/main.py --help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export.plan.targets import TARGETS
from unet.errors import UnetError, command, say

if TYPE_CHECKING:
    from collections.abc import Sequence


class TargetError(UnetError):
    """A target whose last step cannot be done here."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="export/main.py",
        description="Export a trained model to ONNX, float16 ONNX and an engine; each step is proven on slices.",
    )
    parser.add_argument("--model_dir", type=Path, required=True, help="folder that train/main.py wrote")
    parser.add_argument("--out", type=Path, default=Path("artefacts"), help="folder to write (default: artefacts)")
    parser.add_argument(
        "--data_dir",
        type=Path,
        help="folder with the *-volume.tif to measure on (default: $DATA_DIR or data where it has one, "
        "else a synthetic stack)",
    )
    parser.add_argument(
        "--target",
        choices=("cpu", *TARGETS),
        default="cpu",
        help="cpu: choose the fastest engine here; a GPU: build its TensorRT plan, on the machine that has it",
    )
    parser.add_argument(
        "--tile_sizes",
        type=int,
        nargs="+",
        default=[572, 700],
        metavar="SIZE",
        help="input sizes to serve, 188 + 16k each (default: 572 700)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="consider an engine in 8-bit integers too; it is taken only if it keeps the scores of held-out slices",
    )
    return parser.parse_args(argv)


def data_folder(named: Path | None) -> Path | None:
    """The folder to measure on; None where none was named and the default has no stack."""
    if named is not None:
        return named
    default = Path(os.environ.get("DATA_DIR", "data"))
    return default if any(default.glob("*-volume.tif")) else None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export from the command line."""
    args = parse_arguments(argv)
    from export.pipeline import ExportConfig, export_model
    from export.plan.build import EngineBuildError, build_into
    from export.plan.trtexec import SCRIPT
    from export.provenance import PAGE
    from unet.engine.device import DeviceError
    from unet.engine.library import LibraryError

    config = ExportConfig(
        model_dir=args.model_dir,
        out=args.out,
        data_dir=data_folder(args.data_dir),
        target=args.target,
        tile_sizes=tuple(args.tile_sizes),
        int8=args.int8,
    )
    card = export_model(config, say)
    for artefact in card.artefacts.values():
        say(f"{artefact.sha256[:12]}  {card.folder / artefact.file}")
    say(f"{'':12}  {card.folder / PAGE}")
    if args.target != "cpu":
        try:
            say(f"{'':12}  {build_into(args.out, args.target)}")
        except (EngineBuildError, DeviceError, LibraryError) as error:
            raise TargetError(
                f"the ONNX files are proven and in {args.out}, but there is no TensorRT plan: {error}; or run "
                f"{args.out / SCRIPT} with trtexec on the machine with the GPU"
            ) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
