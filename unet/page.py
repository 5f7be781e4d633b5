"""Parts of a page that is one file: pictures and charts as data addresses, and tables. Any browser opens it."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_JPEG_QUALITY = 85


def picture(pixels: npt.NDArray[np.uint8], kind: str) -> str:
    """An image, grey [H, W] or RGB [H, W, 3], as a data address.

    Args:
        pixels: of the image.
        kind: "JPEG", smaller, or "PNG", exact.
    """
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": _JPEG_QUALITY} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg(figure: Figure) -> str:
    """A figure as a data address that an ``img`` element shows, its letters as outlines, so that it needs no font."""
    import matplotlib

    buffer = io.BytesIO()
    # The same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(rows: Mapping[str, Any]) -> str:
    """Names and values as an HTML table."""
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells below their titles as an HTML table."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table class='grid'><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
