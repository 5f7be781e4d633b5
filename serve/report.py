"""One page that shows what a model finds and how well and fast: ``python serve/report.py``, ``make report``.

The page is one file that any browser opens. Where no stack is named it shows what ``make demo`` made.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from serve.measure.page.report import ReportSettings, make_report
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say
from unet.volume import add_label_flags, label_options

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report."""
    parser = FlagParser(prog="serve/report.py", description=__doc__)
    add_flags(parser, ReportSettings)
    add_label_flags(parser)
    chosen = parser.parse_args(argv)
    settings = from_flags(ReportSettings, chosen).or_demo()
    count = make_report(settings, label_options(chosen))
    say(f"{settings.out}: {count} slices, {settings.out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
