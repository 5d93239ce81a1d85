"""Rendering is a function of its arguments: each image for itself, in any company."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.images.batch_decoder import PortableDecoder
from imnet_prep.images.formats import MAX_PIXELS
from imnet_prep.loader.options import EvalOptions, Options, TrainOptions
from imnet_prep.loader.render import choose_decoder, render
from tests.synthetic import encode, picture

SIDES = [(90, 60), (64, 64), (50, 120), (33, 77), (200, 41)]
IMAGES = [encode(picture(seed, 0, *size)) for seed, size in enumerate(SIDES)]
SIZES = np.array(SIDES, dtype=np.int32)
IDS = np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
TRAIN = TrainOptions(5, image_size=32, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment_ops=2, erasing_prob=0.5)
EVAL = EvalOptions(5, image_size=32)


def _render(
    images: list[bytes],
    sizes: NDArray[np.int32],
    ids: NDArray[np.uint64],
    options: Options = TRAIN,
    seed: int = 1,
    epoch: int = 2,
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    out = np.zeros((len(images), options.image_size, options.image_size, 3), dtype=np.uint8)
    faults = render(images, sizes, ids, options, seed, epoch, out, choose_decoder("auto"))
    return out, faults


@pytest.mark.parametrize("options", [TRAIN, EVAL], ids=["train", "eval"])
def test_an_image_is_rendered_the_same_alone_and_in_company(options: Options) -> None:
    together, faults = _render(IMAGES, SIZES, IDS, options)
    assert faults == {}
    for row in (3, 0, 4):
        alone, _ = _render([IMAGES[row]], SIZES[row : row + 1], IDS[row : row + 1], options)
        assert np.array_equal(alone[0], together[row])


def test_seed_epoch_and_id_choose_the_training_view_and_evaluation_ignores_them() -> None:
    changes = ((2, 2, IDS), (1, 3, IDS), (1, 2, IDS + np.uint64(1)))
    train, evaluation = (_render(IMAGES, SIZES, IDS, options)[0] for options in (TRAIN, EVAL))
    for seed, epoch, ids in changes:
        assert not np.array_equal(_render(IMAGES, SIZES, ids, TRAIN, seed, epoch)[0], train)
        assert np.array_equal(_render(IMAGES, SIZES, ids, EVAL, seed, epoch)[0], evaluation)


def test_the_arguments_are_left_as_they_are() -> None:
    sizes, ids = SIZES * (np.arange(5) % 2)[:, None].astype(np.int32), IDS.copy()
    listed = sizes.copy()
    _render(IMAGES, sizes, ids)
    assert np.array_equal(sizes, listed)
    assert np.array_equal(ids, IDS)


@pytest.mark.parametrize("options", [TRAIN, EVAL], ids=["train", "eval"])
def test_sizes_that_are_not_listed_are_read_from_the_headers(options: Options) -> None:
    expected, _ = _render(IMAGES, SIZES, IDS, options)
    for unlisted in ([0], [1, 4], [0, 1, 2, 3, 4]):
        sizes = SIZES.copy()
        sizes[unlisted] = 0
        found, faults = _render(IMAGES, sizes, IDS, options)
        assert faults == {}
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("options", [TRAIN, EVAL], ids=["train", "eval"])
def test_bad_rows_are_named_and_the_others_rendered(options: Options) -> None:
    expected, _ = _render(IMAGES, SIZES, IDS, options)
    images, sizes = list(IMAGES), SIZES.copy()
    images[1] = b""
    images[2] = b"no image"
    sizes[3] = (91, 60)
    sizes[4] = (40_000, MAX_PIXELS)
    found, faults = _render(images, sizes, IDS, options)
    assert sorted(faults) == [1, 2, 3, 4]
    assert "by the record list" in faults[3]
    assert "pixels by the record list" in faults[4]
    assert np.array_equal(found[0], expected[0])


def test_the_decoded_pixels_are_not_augmented_yet_when_the_caller_is_told() -> None:
    out = np.zeros((5, 32, 32, 3), dtype=np.uint8)
    seen: list[NDArray[np.uint8]] = []
    render(IMAGES, SIZES, IDS, TRAIN, 1, 2, out, PortableDecoder(), lambda: seen.append(out.copy()))
    plain = np.zeros_like(out)
    render(IMAGES, SIZES, IDS, TrainOptions(5, image_size=32), 1, 2, plain, PortableDecoder())
    assert np.array_equal(seen[0], plain)
    assert not np.array_equal(out, plain)
