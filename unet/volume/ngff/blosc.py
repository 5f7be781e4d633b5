"""Blosc's decoder trusts the sizes in a chunk's header: where they lie, it reads on behind the chunk, up to a crash.

The header is that of c-blosc 1 (README_CHUNK_FORMAT): four bytes, then the sizes of the pixels, of a block and of the
chunk, as little-endian 32-bit numbers.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

_HEADER = struct.Struct("<4xIII")


@functools.cache
def guard_blosc() -> None:
    """Have every chunk of this process checked before it is decoded; zarr has no place of its own for that."""
    from numcodecs.blosc import Blosc

    decode = Blosc.decode

    def checked(self: Any, buf: Any, out: Any = None) -> Any:
        check_chunk(memoryview(buf).cast("B"))
        return decode(self, buf, out)

    Blosc.decode = checked


def check_chunk(chunk: memoryview) -> None:
    """Refuse a chunk that is not as long as its header says.

    Raises:
        ValueError: saying so.
    """
    if len(chunk) < _HEADER.size:
        raise ValueError(f"a Blosc chunk of {len(chunk)} bytes is shorter than its header")
    pixels, block, stored = _HEADER.unpack_from(chunk)
    if stored != len(chunk):
        raise ValueError(f"a Blosc chunk of {len(chunk)} bytes says that it has {stored}")
    if block > max(pixels, 1) or (pixels and not block):
        raise ValueError(f"a Blosc chunk of {pixels} bytes of pixels says that its blocks have {block}")
