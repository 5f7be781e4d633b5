"""Train the U-Net, predict and evaluate with it: ``python train/main.py --help``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from train.config import config_of, parse_flags
from train.input.fitting import settings_of
from unet.errors import command

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the trainer's modes.

    Returns:
        0 on success, also after a SIGTERM that was followed by a checkpoint; 130 after Ctrl-C, which saves as well.
    """
    given = settings_of(parse_flags(argv, minutes=True))
    config_of(given)  # so that a wrong value is named before TensorFlow is loaded
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow 2.15 greets with lines that look like errors
    from train.modes import run

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
