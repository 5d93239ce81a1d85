"""Crops, flips, boxes and mixes follow their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.errors import PipelineError
from imnet_prep.images.batch_decoder import resize
from imnet_prep.loader.augment import CROP_ATTEMPTS, erase_boxes, eval_geometry, mix, train_geometry
from imnet_prep.loader.colour import (
    RANDAUGMENT,
    TRIVIALAUGMENT,
    Operation,
    augment_colours,
    brightness,
    contrast,
    hue,
    posterize,
    saturation,
    solarize,
    trivialaugment_choice,
)
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.loader.random_numbers import Stream, uniforms
from tests.imnet_prep.loader.distributions import p_value, p_value_even
from tests.synthetic import picture

DRAWS = 100_000
P_VALUE = 1e-3  # a smaller p-value means a wrong distribution; the seed is fixed, so the result is always the same


def _ids(count: int) -> NDArray[np.uint64]:
    return np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def test_crop_area_is_uniform_and_ratio_log_uniform_and_place_uniform() -> None:
    side = 1_000_000  # so large that rounding to whole pixels does not show; every crop of this range fits
    options = TrainOptions(1, scale=(0.08, 0.5), ratio=(3 / 4, 4 / 3))
    found = train_geometry(options, np.full((DRAWS, 2), side, dtype=np.int32), 0, 0, _ids(DRAWS))
    left, top, right, bottom = found.box.T
    wide, tall = right - left, bottom - top
    area = wide * tall / side**2
    assert p_value(area, "uniform", (0.08, 0.42)) > P_VALUE
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert p_value(np.log(wide / tall), "uniform", (low, high - low)) > P_VALUE
    assert p_value(left / (side - wide), "uniform") > P_VALUE
    assert p_value(top / (side - tall), "uniform") > P_VALUE
    assert abs(np.corrcoef(area, np.log(wide / tall))[0, 1]) < 0.02
    assert abs(found.flip.mean() - 0.5) < 0.01
    # A range that is off by a hundredth is noticed.
    assert p_value(area, "uniform", (0.09, 0.41)) < 1e-9


def _crop_by_the_book(options: TrainOptions, width: int, height: int, drawn: NDArray[np.float64]) -> list[int]:
    """RandomResizedCrop as in torchvision, one image, in plain Python."""
    for attempt in range(CROP_ATTEMPTS):
        area = width * height * (options.scale[0] + (options.scale[1] - options.scale[0]) * drawn[attempt, 0])
        low, high = math.log(options.ratio[0]), math.log(options.ratio[1])
        ratio = math.exp(low + (high - low) * drawn[attempt, 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(drawn[attempt, 2] * (width - w + 1)), int(drawn[attempt, 3] * (height - h + 1))
            return [left, top, left + w, top + h]
    w, h = width, height
    if width / height < options.ratio[0]:
        h = round(width / options.ratio[0])
    elif width / height > options.ratio[1]:
        w = round(height * options.ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return [left, top, left + w, top + h]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (40, 400), (1000, 30), (1, 1), (3, 2)])
def test_crops_equal_the_obvious_implementation(size: tuple[int, int]) -> None:
    options = TrainOptions(1)
    ids = _ids(300)
    found = train_geometry(options, np.tile(np.array(size, dtype=np.int32), (300, 1)), 4, 2, ids)
    drawn = uniforms(4, 2, ids, np.arange(Stream.CROP, Stream.CROP + CROP_ATTEMPTS))
    assert found.limits.tolist() == [_crop_by_the_book(options, *size, one) for one in drawn]
    assert (found.limits[:, :2] >= 0).all()
    assert (found.limits[:, 2:] <= size).all()


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (100, 80), (1200, 257), (64, 64)])
@pytest.mark.parametrize("options", [EvalOptions(1), EvalOptions(1, image_size=64), EvalOptions(1, 96, 96)])
def test_evaluation_is_a_resize_of_the_whole_image_then_a_centre_crop(
    size: tuple[int, int], options: EvalOptions
) -> None:
    pixels = cv2.blur(picture(1, 0, *size), (3, 3))  # without noise, in which a rounded half counts more
    short, side = options.short_side, options.image_size
    wide, tall = (short * edge // min(size) for edge in size)
    left, top = round((wide - side) / 2.0), round((tall - side) / 2.0)
    whole = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)))
    found = eval_geometry(options, np.array([size], dtype=np.int32))
    square = resize(pixels, tuple(found.box[0].tolist()), "bilinear", side)
    assert np.abs(square.astype(int) - expected).max() <= 1


def test_the_default_short_side_is_256_for_224() -> None:
    assert EvalOptions(1).short_side == 256
    assert EvalOptions(1, image_size=64).short_side == 73


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (TrainOptions, {"batch_size": 0}),
        (TrainOptions, {"image_size": 0}),
        (TrainOptions, {"image_size": 1 << 20}),
        (TrainOptions, {"scale": (0.0, 1.0)}),
        (TrainOptions, {"scale": (0.5, 0.4)}),
        (TrainOptions, {"ratio": (-1.0, 1.0)}),
        (TrainOptions, {"interpolation": "nearest"}),
        (TrainOptions, {"flip_prob": 1.5}),
        (TrainOptions, {"mixup_alpha": float("nan")}),
        (TrainOptions, {"mixup_prob": 1.5}),
        (TrainOptions, {"mixup_last_epoch": -1}),
        (TrainOptions, {"color_jitter": (0.4, 0.4, 0.4, 0.6)}),
        (TrainOptions, {"randaugment_ops": 17}),
        (TrainOptions, {"randaugment_magnitude": 31}),
        (TrainOptions, {"randaugment_ops": 2, "trivialaugment": True}),
        (EvalOptions, {"resize": 100}),
    ],
)
def test_an_option_out_of_range_is_named(kind: type[Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=next(iter(wrong))):
        kind(**{"batch_size": 4, **wrong})


def test_erased_boxes_lie_inside_and_come_as_often_as_asked() -> None:
    options = TrainOptions(1, image_size=64, erasing_prob=0.25)
    boxes = erase_boxes(options, 0, 0, _ids(20_000))
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / 64**2
    assert abs((area > 0).mean() - 0.25) < 0.01
    assert boxes.min() >= 0
    assert boxes.max() <= 64
    some = area[area > 0]
    assert some.min() > 0.01
    assert some.max() < 0.36


def test_mixup_blends_row_i_with_row_n_minus_1_minus_i() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    mixed, share = mix(TrainOptions(6, mixup_alpha=0.4), image, 0, 0, _ids(6))
    assert share.dtype == np.float32
    expected = image * share[:, None, None, None] + image[::-1] * (1 - share[:, None, None, None])
    assert np.abs(mixed - expected).max() <= 0.51


def test_mixup_shares_follow_beta() -> None:
    _, share = mix(TrainOptions(1, mixup_alpha=0.4), np.zeros((20_000, 1, 1, 3), dtype=np.uint8), 0, 0, _ids(20_000))
    assert p_value(share, "beta", (0.4, 0.4)) > P_VALUE


def test_batches_are_mixed_as_often_as_asked_and_up_to_the_last_epoch() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    options = TrainOptions(2, mixup_alpha=1.0, mixup_prob=0.25, mixup_last_epoch=1001)
    mixed = []
    for epoch in range(1000):
        pixels, share = mix(options, image, 7, epoch, _ids(2))
        mixed.append(bool((share < 1).all()))
        assert mixed[-1] == bool((pixels != image).any())
        if mixed[-1]:  # the share is what it would be if all were mixed
            assert np.array_equal(share, mix(TrainOptions(2, mixup_alpha=1.0), image, 7, epoch, _ids(2))[1])
    assert abs(np.mean(mixed) - 0.25) < 0.05
    two = TrainOptions(2, mixup_alpha=1.0, cutmix_alpha=1.0, mixup_last_epoch=2)
    assert [bool((mix(two, image, 7, epoch, _ids(2))[1] < 1).any()) for epoch in range(4)] == [True, True, False, False]
    never = TrainOptions(2, mixup_alpha=1.0, mixup_prob=0.0)
    assert all((mix(never, image, 7, epoch, _ids(2))[1] == 1).all() for epoch in range(20))


def test_cutmix_share_is_that_of_the_pixels_kept() -> None:
    image = np.zeros((40, 32, 32, 3), dtype=np.uint8)
    image[20:] = 255
    mixed, share = mix(TrainOptions(40, cutmix_alpha=1.0), image, 0, 0, _ids(40))
    kept = (mixed == image).all(axis=-1).mean(axis=(1, 2))
    assert np.allclose(kept, share, atol=1e-6)
    assert len(np.unique(share)) > 20


def test_with_both_on_each_is_used_for_some_batches() -> None:
    image = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    image[0] = 200
    options = TrainOptions(2, mixup_alpha=1.0, cutmix_alpha=1.0)
    blended = [
        bool(np.isin(mix(options, image, 0, epoch, _ids(2))[0], (0, 200)).all()) for epoch in range(40)
    ]  # CutMix makes no new values
    assert 8 < sum(blended) < 32


def test_colour_operations_have_their_fixed_points() -> None:
    pixels = picture(3, 0, 40, 30)
    for same in (brightness(pixels, 1.0), contrast(pixels, 1.0), saturation(pixels, 1.0), posterize(pixels, 8)):
        assert np.array_equal(same, pixels)
    assert np.abs(hue(pixels, 0.0).astype(int) - pixels).max() <= 6  # 8-bit HSV and back
    assert brightness(pixels, 0.0).max() == 0
    assert np.ptp(contrast(pixels, 0.0)) == 0
    assert np.ptp(saturation(pixels, 0.0), axis=-1).max() == 0
    assert np.array_equal(solarize(pixels, 0.0), 255 - pixels)


@pytest.mark.parametrize("operations", [RANDAUGMENT, TRIVIALAUGMENT], ids=["randaugment", "trivialaugment"])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_every_operation_keeps_shape_and_type(name: str, operations: dict[str, Operation]) -> None:
    pixels = picture(3, 0, 40, 30)
    before = pixels.copy()
    for magnitude in (-1.0, 0.0, 1.0):
        result = operations[name](pixels, magnitude)
        assert result.shape == pixels.shape
        assert result.dtype == np.uint8
    assert np.array_equal(pixels, before)
    if name not in ("identity", "autocontrast"):
        assert any(not np.array_equal(operations[name](pixels, m), pixels) for m in (-0.9, 0.9))


REFERENCE = Path(__file__).with_name("reference_values") / "trivialaugment.png"
SAME_PIXELS = ("identity", "translate_x", "translate_y", "posterize", "solarize", "equalize")  # others round otherwise


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("name", TRIVIALAUGMENT)
def test_trivialaugment_agrees_with_torchvision(name: str, column: int) -> None:
    grid = cv2.imread(str(REFERENCE), cv2.IMREAD_COLOR_RGB)
    side = grid.shape[0] // (len(TRIVIALAUGMENT) + 1)
    cells = grid.reshape(len(TRIVIALAUGMENT) + 1, side, 4, side, 3).swapaxes(1, 2)
    source, expected = cells[0, 0], cells[1 + list(TRIVIALAUGMENT).index(name), column]
    magnitude = (10 / 30, -10 / 30, 1.0, -1.0)[column]
    turned = name in ("translate_x", "translate_y", "rotate")  # the same with the other sign, which is drawn
    found = TRIVIALAUGMENT[name](np.ascontiguousarray(source), -magnitude if turned else magnitude)
    difference = np.abs(found.astype(int) - expected).max(axis=-1)
    if name.startswith(("shear", "rotate")):  # bilinear to 1/32 of a pixel here, and blended with the fill at the edge
        assert np.median(difference) <= 1
        assert (difference > 8).mean() < 0.06
    else:
        assert difference.max() <= (name not in SAME_PIXELS)


def test_trivialaugment_draws_operations_and_magnitudes_evenly() -> None:
    drawn = [trivialaugment_choice(one) for one in uniforms(0, 0, _ids(62_000), Stream.TRIVIALAUGMENT)]
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert sorted(TRIVIALAUGMENT) == names.tolist()
    assert p_value_even(counts) > P_VALUE
    magnitudes, counts = np.unique(np.rint([abs(m) * 30 for _, m in drawn]), return_counts=True)
    assert magnitudes.tolist() == list(range(31))
    assert p_value_even(counts) > P_VALUE
    assert abs(np.mean([m > 0 for _, m in drawn if m]) - 0.5) < 0.01


def test_trivialaugment_takes_one_operation_an_image() -> None:
    ids, options = _ids(8), TrainOptions(8, trivialaugment=True)
    batch = np.stack([picture(seed, 0, 24, 24) for seed in range(8)])
    changed = batch.copy()
    augment_colours(options, changed, 5, 1, ids)
    for row, draw in enumerate(uniforms(5, 1, ids, Stream.TRIVIALAUGMENT)):
        name, magnitude = trivialaugment_choice(draw)
        assert np.array_equal(changed[row], TRIVIALAUGMENT[name](batch[row], magnitude))


def test_translation_moves_by_the_stated_share() -> None:
    pixels = np.zeros((100, 100, 3), dtype=np.uint8)
    pixels[50, 50] = 255
    moved = RANDAUGMENT["translate_x"](pixels, 0.5)[..., 0]
    moved[:, 70:] = 0  # filled from outside
    assert np.average(np.arange(100), weights=moved[50]) == pytest.approx(50 - 100 * 150 / 331 * 0.5, abs=0.1)


def test_colours_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    options = TrainOptions(4, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment_ops=2)
    batch = np.stack([picture(seed, 0, 24, 24) for seed in range(4)])
    together, alone = batch.copy(), batch.copy()
    ids = _ids(4)
    augment_colours(options, together, 0, 0, ids)
    for row in range(4):
        augment_colours(options, alone[row : row + 1], 0, 0, ids[row : row + 1])
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, batch)
