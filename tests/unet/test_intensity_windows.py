"""Which intensities become 0 and 255, of stacks whose right window is known."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train.input.store import load_stack
from unet.errors import UnetError
from unet.intensity import WindowChoice, Windows, find_windows, parse_window, to_uint8
from unet.intensity.percentiles import measure
from unet.volume import MASKS, open_volume

Array = npt.NDArray[Any]

# Tissue of 26,000 to 31,099 counts, each as often.
TISSUE = np.random.default_rng(0).permutation(np.arange(4 * 51 * 500) % 5100 + 26000).reshape(4, 51, 500)
TISSUE_WINDOW = (26005, 31094)


def stack(folder: Path, pixels: Array, **options: Any) -> Path:
    path = folder / "a-volume.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", **options)
    return path


def windows(path: Path, choice: WindowChoice = None) -> Windows:
    with open_volume(path) as volume:
        return find_windows(volume, choice)


def zero_slice(pixels: Array) -> Array:
    return np.concatenate([pixels, np.zeros_like(pixels[:1])])


def zero_border(pixels: Array) -> Array:
    return np.pad(pixels[:, 4:-4, 4:-4], ((0, 0), (4, 4), (4, 4)))


def burnt_in(pixels: Array) -> Array:
    marked = pixels.copy()
    marked[:, :5, :60] = 65535
    return marked


def flat_fill(pixels: Array) -> Array:
    """Of a value that is no type's limit, below the tissue, as after a conversion of 0."""
    return np.concatenate([pixels, np.full_like(pixels[:1], 128)])


FILLS = {"slice": zero_slice, "border": zero_border, "saturation": burnt_in, "plateau": flat_fill}


@pytest.mark.parametrize("fill", sorted(FILLS))
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float32", "float64"])
def test_fill_and_saturation_do_not_rule_the_window(tmp_path: Path, fill: str, dtype: str) -> None:
    found = windows(stack(tmp_path, FILLS[fill](TISSUE).astype(dtype)))
    assert found.each[0] == pytest.approx(TISSUE_WINDOW, abs=5)
    assert "leaves out pixels of exactly" in found.notes[0]
    assert (len(set(found.each)), found.shared_by) == (1, "stack")


def test_signed_intensities_have_a_window_too(tmp_path: Path) -> None:
    signed = (zero_slice(TISSUE) - 32768).astype(np.int16)
    found = windows(stack(tmp_path, signed))
    assert found.each[0] == pytest.approx((TISSUE_WINDOW[0] - 32768, TISSUE_WINDOW[1] - 32768), abs=5)
    bits = found.apply(0, signed[0])
    assert np.array_equal(bits, to_uint8(zero_slice(TISSUE)[0].astype(np.uint16), (26005, 31094)))


def test_without_fill_the_window_is_as_it_was(tmp_path: Path) -> None:
    found = windows(stack(tmp_path, TISSUE.astype(np.uint16)))
    below = np.sort(TISSUE.ravel())
    assert found.each[0] == (below[102], below[-103])
    assert found.notes == ()


def test_each_slice_by_its_own_percentiles(tmp_path: Path) -> None:
    drifting = (TISSUE + np.array([0, 5000, 10000, 15000])[:, None, None]).astype(np.uint16)
    path = stack(tmp_path, zero_slice(drifting))
    found = windows(path, "slice")
    for page, step in enumerate((0, 5000, 10000, 15000)):
        assert found.each[page] == pytest.approx((26005 + step, 31094 + step), abs=8)
    assert "each slice" in str(found)
    whole = windows(path)
    assert whole.each[0] == pytest.approx((26000, 46100), abs=50)
    eight = (np.arange(200 * 200).reshape(1, 200, 200) % 100 + 50).astype(np.uint8)
    path = stack(tmp_path, eight)
    assert windows(path).value is None
    assert windows(path, "slice").value == (50, 149)
    assert windows(path, "stack").value == (50, 149)


@pytest.mark.parametrize("flavour", ["imagej", "ome"])
def test_each_channel_has_its_window(tmp_path: Path, flavour: str) -> None:
    bright = np.stack([TISSUE, TISSUE // 100], axis=1).astype(np.uint16)  # [Z, C, Y, X]
    found = windows(stack(tmp_path, bright, metadata={"axes": "ZCYX"}, **{flavour: True}))
    assert found.shared_by == "channel"
    for page in range(8):
        expected = (26005, 31094) if page % 2 == 0 else (260, 310)
        assert found.each[page] == pytest.approx(expected, abs=6)
    assert str(found).endswith("by channel")


def test_a_window_that_is_too_wide_is_said(tmp_path: Path) -> None:
    rare = TISSUE.copy()
    rare[:, 0, :100] = np.arange(100) * 250 + 500  # 0.4 % far below
    path = stack(tmp_path, rare.astype(np.uint16))
    (note,) = windows(path).notes
    assert note.startswith(f"nearly all pixels of {path} lie between ")
    assert "in a quarter of the intensity window" in note
    assert any("nearly all pixels of" in note for note in windows(path, (0, 65535)).notes)
    assert windows(path, (26000, 31100)).notes == ()


def test_what_a_window_leaves_out_is_said_with_its_share(tmp_path: Path) -> None:
    filled = TISSUE.reshape(1, 204, 500).repeat(2, 0)
    filled[0, :51], filled[:, -51:] = 0, 65535
    path = stack(tmp_path, filled.astype(np.uint16))
    said = f"the intensity window of {path} leaves out pixels of exactly 0 (12.5%) and 65535 (25.0%)"
    assert said in windows(path).notes
    # By slices, each of which leaves out its own, the shares are those of the whole stack.
    assert said in windows(path, "slice").notes


def test_how_many_slices_have_too_wide_a_window_is_said(tmp_path: Path) -> None:
    wide = TISSUE.copy()
    wide[2, 0, :100] = np.arange(100) * 250 + 500  # 0.4 % far below
    path = stack(tmp_path, wide.astype(np.uint16))
    (note,) = windows(path, "slice").notes
    low, bulk_low, bulk_high, high = np.sort(wide[2].ravel())[[25, 255, -256, -26]]
    assert note.startswith(
        f"nearly all pixels of 1 of 4 slices of {path} lie between {bulk_low} and {bulk_high}, in a quarter of the "
        f"intensity window {low} to {high}: "
    )
    (given,) = windows(path, (0, 65535)).notes
    assert given.startswith(f"nearly all pixels of {path} lie between 26")


@pytest.mark.parametrize(
    "window", [(-np.inf, 5.0), (5.0, np.inf), (np.nan, 5.0), (5.0, np.nan), (5.0, 5.0), (6.0, 5.0)]
)
def test_a_window_has_two_finite_ends_that_rise(tmp_path: Path, window: tuple[float, float]) -> None:
    with pytest.raises(UnetError, match="window"):
        windows(stack(tmp_path, TISSUE.astype(np.uint16)), window)


def test_every_floating_point_slice_is_looked_at_for_what_is_no_number(tmp_path: Path) -> None:
    pixels = np.tile(TISSUE, (5, 1, 1)).astype(np.float32)
    pixels[1, 0, 0] = np.nan
    path = stack(tmp_path, pixels)
    (note,) = windows(path, (26000.0, 31100.0)).notes
    assert note.startswith(f"1 pixels of {path} are not finite numbers")


def test_what_is_no_number_becomes_an_end_and_is_counted(tmp_path: Path) -> None:
    broken = TISSUE.astype(np.float32)
    broken[0, 0, :3] = np.nan, np.inf, -np.inf
    path = stack(tmp_path, broken)
    for choice in (None, (26000.0, 31100.0)):
        found = windows(path, choice)
        assert found.each[0] == pytest.approx(TISSUE_WINDOW, abs=10)
        assert found.notes[0].startswith(f"3 pixels of {path} are not finite numbers")
        assert found.apply(0, broken[0])[0, :3].tolist() == [0, 255, 0]
    assert windows(stack(tmp_path, np.full((1, 4, 4), np.nan, np.float32))).value == (0, 1)


def test_trainer_and_client_agree(tmp_path: Path) -> None:
    pixels = zero_slice(TISSUE).astype(np.uint16)
    path = stack(tmp_path, pixels)
    labels = np.ones(pixels.shape, np.uint8)
    labels[:, :, ::5] = 0
    tifffile.imwrite(tmp_path / "a-labels.tif", labels, photometric="minisblack")
    for choice in (None, "slice", (27000.0, 30000.0)):
        found = windows(path, choice)
        slices = load_stack((path, tmp_path / "a-labels.tif"), MASKS, 0.0, choice)
        for page, item in enumerate(slices):
            assert np.array_equal(item.image, found.apply(page, pixels[page]))


def test_the_words_of_the_flag() -> None:
    assert parse_window(None) is None
    assert parse_window([]) is None
    assert parse_window(["slice"]) == "slice"
    assert parse_window(["-5", "1e3"]) == (-5, 1000)


@given(arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))))
def test_percentiles_of_few_values_leave_nothing_out(pixels: Array) -> None:
    low, high = measure(pixels[:, :1, :5]).window
    assert low == pixels[:, :1, :5].min()
    assert high == max(pixels[:, :1, :5].max(), low + 1)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["uint32", "int32", "float32"]), st.integers(1, 2**30))
def test_more_than_16_bits_are_as_exact_as_16(seed: int, dtype: str, span: int) -> None:
    values = np.random.default_rng(seed).integers(1, span + 1, (3, 30, 70)).astype(dtype)
    if dtype != "uint32":
        values = values - np.asarray(span // 2, dtype)
    ordered = np.sort(values.ravel())
    counts = [int(np.count_nonzero(values == end)) for end in (ordered[0], ordered[-1])]
    if max(counts) > 6 or len(np.unique(values)) < 40:
        return  # with a plateau something is left out
    assert measure(values).window == (float(ordered[6]), float(ordered[-7]))


def test_a_flat_stack_keeps_its_intensity() -> None:
    assert measure(np.full((2, 3, 3), 7, np.uint8)).window == (7, 8)


def test_a_large_slice_takes_little_memory() -> None:
    page = np.zeros((4096, 8192), np.uint8)
    tracemalloc.start()
    measure([page])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * page.size


def test_windows_in_words() -> None:
    assert str(Windows((None, None))) == "as they are"
    assert str(Windows(((1, 2.5), (1, 2.5)))) == "1 to 2.5"
    assert str(Windows(((1, 2.5), (3, 65535)), "channel")) == "1 to 2.5; 3 to 65535 by channel"
    assert str(Windows(((1, 2.5), (0, 2)), "slice")) == "0 to 2.5, each slice by its own percentiles"


@pytest.mark.parametrize(
    ("dtype", "choice", "times"),
    [
        ("uint8", None, 0),
        ("uint8", "stack", 1),
        ("uint16", "slice", 1),
        ("uint32", None, 2),
        ("float32", (0.0, 1.0), 2),
    ],
)
def test_whoever_waits_is_told_of_each_slice_that_was_read(
    tmp_path: Path, dtype: str, choice: WindowChoice, times: int
) -> None:
    told: list[int] = []
    with open_volume(stack(tmp_path, (TISSUE % 250).astype(dtype))) as volume:
        find_windows(volume, choice, lambda: told.append(1))
    assert len(told) == times * len(TISSUE)
