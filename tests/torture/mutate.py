"""Damage that finds its way past the first check: bytes, TIFF's directory entries, values of JSON."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from pathlib import Path

_NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES: tuple[Any, ...] = (
    None, True, "", "x", "../../../../etc/passwd", "/etc/passwd", "\x00", 0, -1, 1, 2**31, 2**63, 2**64, -(2**63),
    1e308, -0.0, float("inf"), float("nan"), [], [[]], {}, [0] * 1000, [-1, -1, -1], "NaN", "|O", ">u1", "<f2",
    "object",
)  # fmt: skip
# TIFF: width, height, bits, compression, offsets, samples, rows in a strip, counts, predictor, tiles, formats, SubIFDs.
_TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 330, 339, 270, 282, 305)


def mutated(content: bytes, rng: random.Random, *, name: str = "") -> bytes:
    """The bytes with one to four damages; the same for the same state of ``rng``."""
    if name.endswith("json") or content[:1] in (b"{", b"["):
        damage = rng.choice((_json, _json, _json, _bytes))
    elif content[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
        damage = rng.choice((_tag, _tag, _bytes, _next_directory))
    else:
        damage = _bytes
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = damage(content, rng)
    return content


def files_of(path: Path) -> list[Path]:
    """What can be damaged of an input: itself, or the files below a folder."""
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data, at = bytearray(content), rng.randrange(len(content) + 1)
    kind = rng.randrange(6)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        size = rng.choice((1, 2, 4, 8))
        data[at : at + size] = (rng.choice(_NUMBERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + rng.randrange(1, 40)]
    elif kind == 4:
        data[at:at] = data[(start := rng.randrange(len(content) + 1)) : start + rng.randrange(1, 200)]
    else:
        data[at : at + 8] = rng.randbytes(rng.randrange(1, 16))
    return bytes(data)


def _directory(content: bytes) -> tuple[str, int, int, str] | None:
    """Byte order, offset of the first entry, their number, and an entry's layout."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        if content[2:3] == b"+" or content[3:4] == b"+":
            (offset,) = struct.unpack_from(order + "Q", content, 8)
            (count,) = struct.unpack_from(order + "Q", content, offset)
            return order, offset + 8, count, "HHQQ"
        (offset,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, offset)
        return order, offset + 2, count, "HHII"
    except struct.error:
        return None


def _tag(content: bytes, rng: random.Random) -> bytes:
    found = _directory(content)
    if found is None or not 0 < found[2] < 1000:
        return _bytes(content, rng)
    order, first, count, layout = found
    data, size = bytearray(content), struct.calcsize("=" + layout)
    at = first + rng.randrange(count) * size
    try:
        entry = list(struct.unpack_from(order + layout, data, at))
        field = rng.randrange(4)
        wide = {"H": 0xFFFF, "I": 0xFFFFFFFF, "Q": 0xFFFFFFFFFFFFFFFF}[layout[field]]
        entry[field] = rng.choice(_TAGS) if field == 0 else rng.choice((*_NUMBERS, len(content), first)) & wide
        struct.pack_into(order + layout, data, at, *entry)
    except struct.error:
        return _bytes(content, rng)
    return bytes(data)


def _next_directory(content: bytes, rng: random.Random) -> bytes:
    """The chain of directories goes on where it must not: in a circle, outside the file, into pixels."""
    found = _directory(content)
    if found is None:
        return _bytes(content, rng)
    order, first, count, layout = found
    data, at = bytearray(content), first + count * struct.calcsize("=" + layout)
    try:
        struct.pack_into(order + layout[3], data, at, rng.choice((first - 2, first, 8, 16, len(content), 2**31, 1)))
    except struct.error:
        return _bytes(content, rng)
    return bytes(data)


def _json(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    number = rng.randrange(len(lines)) if lines else 0
    whole = len(lines) > 1 and not _is_json(lines[0])
    try:
        value = json.loads(content if whole else lines[number])
    except (ValueError, IndexError, RecursionError):
        return _bytes(content, rng)
    changed = "[" * 100_000 if rng.random() < 0.02 else json.dumps(_changed(value, rng))
    if whole:
        return changed.encode()
    lines[number] = changed.encode()
    return b"\n".join(lines) + b"\n"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its nodes replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.15:
            return {other: item for other, item in value.items() if other != key}
        if kind < 0.2:
            return {**value, key + "x": value[key]}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.25:
            return [*value, value[at]]
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(_VALUES)
