from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet.engine import EngineError, memory
from unet.engine.cpu import EngineChoice
from unet.engine.memory import TileLimit, bytes_per_pixel, free_memory, largest_tile, total_memory
from unet.geometry import MIN_SIZE, is_valid_size

GIB = 1 << 30


@given(gib=st.integers(1, 1024), filters=st.sampled_from([8, 16, 64]))
def test_the_largest_tile_fits_half_of_the_memory_and_the_next_does_not(gib: int, filters: int) -> None:
    needed = bytes_per_pixel(EngineChoice("openvino", "f32"), filters)
    side = largest_tile(gib * GIB, needed)
    assert is_valid_size(side)
    assert side == MIN_SIZE or side**2 * needed <= gib * GIB / 2
    assert (side + 16) ** 2 * needed > gib * GIB / 2


def test_the_estimate_is_above_what_was_measured() -> None:
    """Growth of the resident memory in a pass of one tile of 2508 x 2508, in MiB."""
    for kind, precision, filters, measured in (
        ("openvino", "bf16", 16, 865),
        ("openvino", "f32", 16, 1701),
        ("onnxruntime", "f32", 16, 2789),
        ("onnxruntime", "f32", 8, 1094),
    ):
        estimate = 2508**2 * bytes_per_pixel(EngineChoice(kind, precision), filters) / 2**20
        assert measured <= estimate < 2.5 * measured


def test_a_container_grants_less_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = total_memory()
    assert 0 < free_memory() <= whole
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/a/b\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert total_memory() >= whole
    for folder, limit, used in ((group, 300 << 20, 100 << 20), (group.parent, 200 << 20, 150 << 20)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    (group.parent / "memory.stat").write_text(f"anon 1\ninactive_file {20 << 20}\n")
    assert total_memory() == 200 << 20
    assert free_memory() == 70 << 20


def test_a_tile_beyond_the_limit_or_the_memory_is_refused() -> None:
    limit = TileLimit(side=1004, usual_side=572, pixel_bytes=100)
    assert limit.images_at_once(1004, 1004) == 1
    assert limit.images_at_once(572, 572) == 3
    with pytest.raises(EngineError, match="at most 1004 x 1004"):
        limit.images_at_once(1020, 1004)
    hungry = TileLimit(side=100_000, usual_side=572, pixel_bytes=1 << 30)
    assert hungry.images_at_once(572, 572) > 1
    with pytest.raises(EngineError, match=r"takes \d+ MiB, and this server has \d+ MiB left"):
        hungry.images_at_once(588, 588)
