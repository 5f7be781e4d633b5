"""One page about a training run: ``python -m train.report --model_dir result``.

It shows how the loss fell and the scores rose, what was trained on what, and the score of each slice that the run held
out, the worst first, with a picture of the cells that are merged or split there. The run may still be going on. For a
folder of train/cross_validate.py it shows all folds. The page is one file that any browser opens.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_dir", type=Path, default=Path("result"), help="a run's folder, or that of all folds")
    parser.add_argument("--data_dir", help="folder of the run's stacks, if they were moved")
    parser.add_argument("--out", type=Path, help="the page; without it, report.html in --model_dir")
    chosen = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from train.report.page import write_report

    out = chosen.out or chosen.model_dir / "report.html"
    say(f"{out}: {write_report(chosen.model_dir, chosen.data_dir, out)}; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
