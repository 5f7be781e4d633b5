from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage

from train.input.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    change_intensities,
    elastic_field,
    linear_part,
    resample,
    sampling_map,
)

SIZE = 64


def only(**changes: object) -> Augmentation:
    return dataclasses.replace(NO_AUGMENTATION, **changes)  # type: ignore[arg-type]


@pytest.fixture
def plane() -> np.ndarray:  # type: ignore[type-arg]
    noise = np.random.default_rng(0).normal(size=(120, 140))
    return np.asarray(scipy.ndimage.gaussian_filter(noise, 2), np.float32)


def test_no_augmentation_is_a_plain_crop(plane: np.ndarray) -> None:  # type: ignore[type-arg]
    mapped = sampling_map(SIZE, (60.5, 70.5), NO_AUGMENTATION, np.random.default_rng(0))
    np.testing.assert_array_equal(resample(plane, mapped), plane[29:93, 39:103])


@pytest.mark.parametrize("seed", range(3))
def test_one_resampling_equals_scipy(plane: np.ndarray, seed: int) -> None:  # type: ignore[type-arg]
    mapped = sampling_map(SIZE, (30.0, 100.0), Augmentation(), np.random.default_rng(seed))
    expected = scipy.ndimage.map_coordinates(plane, mapped, order=1, mode="mirror")
    # OpenCV reads at 1/32 of a pixel.
    np.testing.assert_allclose(resample(plane, mapped), expected, atol=np.abs(np.diff(plane)).max() / 16)


def test_flips_only_give_the_four_mirrorings(plane: np.ndarray) -> None:  # type: ignore[type-arg]
    crop = plane[29:93, 39:103]
    wanted = {array.tobytes() for array in (crop, crop[::-1], crop[:, ::-1], crop[::-1, ::-1])}
    seen = {
        resample(plane, sampling_map(SIZE, (60.5, 70.5), only(flip=True), np.random.default_rng(seed))).tobytes()
        for seed in range(40)
    }
    assert seen == wanted


def test_rotation_keeps_lengths_and_covers_the_circle() -> None:
    matrices = [linear_part(only(rotation=True), np.random.default_rng(seed)) for seed in range(200)]
    for matrix in matrices:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), atol=1e-6)
    angles = [np.arctan2(matrix[1, 0], matrix[0, 0]) for matrix in matrices]
    assert set(np.digitize(angles, np.linspace(-np.pi, np.pi, 9))) == set(range(1, 9))


def test_scale_stays_between_its_bounds() -> None:
    scales = [linear_part(only(min_scale=0.8), np.random.default_rng(seed))[0, 0] for seed in range(200)]
    assert 0.8 <= min(scales) < 0.85
    assert 1.2 < max(scales) <= 1.2501


def test_elastic_field_is_smooth_and_of_its_deviation() -> None:
    fields = np.stack([elastic_field(256, 6.0, np.random.default_rng(seed)) for seed in range(20)])
    assert fields.dtype == np.float32
    assert 3.0 < fields.std() < 6.5
    assert np.abs(np.diff(fields, axis=-1)).max() < 1.0


def test_labels_get_no_new_value_and_follow_the_image() -> None:
    label = (scipy.ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(120, 140)), 6) > 0).astype(np.uint8)
    mapped = sampling_map(SIZE, (60.0, 70.0), Augmentation(), np.random.default_rng(1))
    nearest = resample(label, mapped, nearest=True)
    smooth = resample(label.astype(np.float32), mapped)
    assert set(np.unique(nearest)) == {0, 1}
    # The nearest of the four pixels that bilinear reading mixes has a quarter of the weight at least.
    assert (np.abs(smooth - nearest) <= 0.77).all()


def test_an_exact_map_gives_mirrored_and_turned_pixels(plane: np.ndarray) -> None:  # type: ignore[type-arg]
    """All eight symmetries of a square, each pixel one of the slice's own."""
    crop = plane[29:93, 39:103]
    turned = [np.rot90(crop, turns) for turns in range(4)]
    wanted = {array.tobytes() for array in (*turned, *(array[::-1] for array in turned))}
    seen = {
        resample(
            plane, sampling_map(SIZE, (60.5, 70.5), Augmentation(), np.random.default_rng(seed), exact=True)
        ).tobytes()
        for seed in range(80)
    }
    assert seen == wanted


def test_intensities_are_changed_and_clipped() -> None:
    window = np.linspace(-1, 1, 2500, dtype=np.float32).reshape(50, 50)
    changed = [change_intensities(window, Augmentation(), np.random.default_rng(seed)) for seed in range(20)]
    assert all(array.dtype == np.float32 and array.min() >= -1 and array.max() <= 1 for array in changed)
    assert max(np.abs(array - window).max() for array in changed) > 0.1
    np.testing.assert_array_equal(change_intensities(window, NO_AUGMENTATION, np.random.default_rng(0)), window)


def test_gamma_keeps_the_ends_and_moves_the_middle() -> None:
    window = np.array([[-1, 0, 1]], np.float32)
    middles = []
    for seed in range(50):
        low, middle, high = change_intensities(window, only(gamma=0.3), np.random.default_rng(seed))[0]
        assert (low, high) == (-1, 1)
        middles.append(middle)
    # 2 * 0.5 ** exp(0.3) - 1 and 2 * 0.5 ** exp(-0.3) - 1
    assert -0.216 <= min(middles) < -0.15
    assert 0.15 < max(middles) <= 0.197


def test_half_of_the_windows_are_blurred_or_noisy() -> None:
    rng = np.random.default_rng(7)
    window = rng.uniform(-0.5, 0.5, (80, 80)).astype(np.float32)
    rough = [np.std(change_intensities(window, only(blur_px=1.0), np.random.default_rng(n))) for n in range(60)]
    still = sum(deviation == np.std(window) for deviation in rough)
    assert 20 <= still <= 40
    assert min(rough) < 0.5 * np.std(window)  # a blur of one pixel leaves 0.28 of white noise
    noisy = [change_intensities(window, only(noise=0.1), np.random.default_rng(n)) - window for n in range(60)]
    assert 20 <= sum(not added.any() for added in noisy) <= 40
    assert 0.08 < max(np.std(added) for added in noisy) <= 0.105


def test_what_nobody_annotated_gets_no_value_between() -> None:
    rng = np.random.default_rng(3)
    label = np.asarray([0, 1, 255], np.uint8)[rng.integers(0, 3, (120, 140))]
    mapped = sampling_map(SIZE, (60.0, 70.0), Augmentation(), rng)
    assert set(np.unique(resample(label, mapped, nearest=True))) == {0, 1, 255}


@pytest.mark.parametrize("elastic_px", [0.0, 0.5])
def test_a_map_is_its_matrix_its_centre_and_its_field(elastic_px: float) -> None:
    settings, rng = only(flip=True, rotation=True, min_scale=0.8, elastic_px=elastic_px), np.random.default_rng(4)
    mapped = sampling_map(SIZE, (60.0, 70.0), settings, np.random.default_rng(4))
    offsets = np.asarray(np.mgrid[:SIZE, :SIZE]) - (SIZE - 1) / 2
    due = np.einsum("ij,jrc->irc", linear_part(settings, rng), offsets) + np.array([60.0, 70.0])[:, None, None]
    if elastic_px:
        due += elastic_field(SIZE, elastic_px, rng)
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped, due, atol=1e-4)


def test_every_angle_is_as_likely_and_nothing_is_drawn_for_nothing() -> None:
    matrices = [linear_part(only(rotation=True), np.random.default_rng(seed)) for seed in range(400)]
    assert matrices[0].dtype == np.float32
    quarters = np.histogram([np.arctan2(one[1, 0], one[0, 0]) for one in matrices], 4, (-np.pi, np.pi))[0]
    assert 75 < quarters.min() <= quarters.max() < 125
    rng, untouched = np.random.default_rng(5), np.random.default_rng(5)
    sampling_map(SIZE, (60.0, 70.0), NO_AUGMENTATION, rng)
    assert rng.random() == untouched.random()


def test_an_elastic_field_bends_without_a_kink_and_favours_no_side() -> None:
    fields = np.stack([elastic_field(256, 6.0, np.random.default_rng(seed)) for seed in range(60)])
    assert abs(fields.mean()) < 0.3
    # Linear interpolation turns by about sigma / spacing at each control point, cubic by a tenth of that a pixel.
    assert np.abs(np.diff(fields, 2, axis=-1)).max() < 0.05


def test_gain_and_shift_fill_their_ranges() -> None:
    window, settings = np.array([[0.0, 0.1]], np.float32), only(contrast=0.2, brightness=0.2)
    changed = [change_intensities(window, settings, np.random.default_rng(seed))[0] for seed in range(300)]
    for found, middle, reach in ((np.diff(changed)[:, 0] / 0.1, 1, 0.2), (np.array(changed)[:, 0], 0, 0.2)):
        assert middle - reach - 1e-5 <= found.min() < middle - 0.9 * reach
        assert middle + 0.9 * reach < found.max() <= middle + reach + 1e-5
