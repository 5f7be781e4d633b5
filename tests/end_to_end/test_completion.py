"""The shell completes the flags of the installed commands, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("line", "flag"), [("unet-segment --overw", "--overwrite"), ("unet-triton start --model_rep", "--model_repository")]
)
def test_a_flag_is_completed(line: str, flag: str) -> None:
    program = Path(sys.executable).parent / line.split()[0]
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "IFS": "\013"}
    done = subprocess.run(
        ["bash", "-c", f"{program} 8>&1 9>/dev/null 1>/dev/null 2>/dev/null"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\013") == [f"{flag} "] or done.stdout.strip() == flag
