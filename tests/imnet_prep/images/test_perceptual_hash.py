"""The perceptual hash: what has no content has no hash, and another aspect is another picture."""

from __future__ import annotations

import numpy as np

from imnet_prep.images.perceptual_hash import hash_pixels, same_picture, signature
from tests.imnet_prep.check.test_duplicates import scene


def test_flat_and_nearly_flat_images_are_no_duplicates() -> None:
    rng = np.random.default_rng(0)
    flats = [np.clip(level + rng.normal(0, 0.6, (80, 80)), 0, 255).astype(np.uint8) for level in (0, 128, 250)]
    assert [signature(flat, 80, 80).tolist() for flat in flats] == [[0, 0]] * 3


def test_another_aspect_is_another_picture() -> None:
    image = scene(5, 240, 240)
    squeezed = image.resize((240, 120))
    first, second = (hash_pixels(np.asarray(part.convert("L")), *part.size) for part in (image, squeezed))
    assert not same_picture(first, second, False)
    assert same_picture(first, first, False)
