"""What the measuring commands share: their error, and which percentiles count."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unet.errors import UnetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

# With fewer requests than this, a few of them decide the percentile, so it is not given.
LEAST_REQUESTS = {50: 1, 90: 50, 95: 100, 99: 1000}


class MeasureError(UnetError):
    """Something that cannot be measured, simulated or shown."""


def percentiles(latencies_s: Sequence[float] | npt.NDArray[np.float64]) -> dict[int, float | None]:
    """The 50th, 90th, 95th and 99th percentile in milliseconds; None where there are too few requests for one."""
    return {
        share: float(np.percentile(latencies_s, share)) * 1e3 if len(latencies_s) >= least else None
        for share, least in LEAST_REQUESTS.items()
    }


def plain(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as JSON can hold them: paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
