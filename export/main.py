"""Turn a training run into proven artefacts: ``python export/main.py --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unet.card.signature import SIGNATURE_FILE, Signer
from unet.engine.targets import TARGETS
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    int8 = parser.add_mutually_exclusive_group()
    int8.add_argument(
        "--int8",
        action="store_true",
        default=None,
        help="fail where an engine in 8-bit integers cannot be considered, and accept 0.995 of the scores of slices "
        "that training did not see; by default it is considered where NNCF is installed and such slices have labels, "
        "and taken only if it is the fastest and keeps 0.999",
    )
    int8.add_argument("--no_int8", "--no-int8", dest="int8", action="store_false", help="do not consider it")
    parser.add_argument(
        "--bioimageio",
        action="store_true",
        help="write bioimageio.zip too, a BioImage.IO package for ilastik, deepImageJ and others",
    )
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="secret key as `minisign -G` writes it: sign the folder, by a list of every file's SHA-256",
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export from the command line."""
    args = parse_arguments(argv)
    # A key that cannot be used is said before the work.
    signer = Signer(args.sign) if args.sign else None
    from export.pipeline import ExportConfig, run

    run(
        ExportConfig(
            model_dir=args.model_dir,
            out=args.out,
            data_dir=args.data_dir,
            target=args.target,
            tile_sizes=tuple(args.tile_sizes),
            int8=args.int8,
            bioimageio=args.bioimageio,
        ),
        say,
    )
    if signer is not None:
        signer.sign(args.out)
        say(f"signed: {args.out / SIGNATURE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
