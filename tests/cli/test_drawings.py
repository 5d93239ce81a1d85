"""The drawn image set."""

from __future__ import annotations

import cv2
import numpy as np

from imnet_prep.cli.drawings import CLASSES, draw_set


def test_a_set_has_the_images_asked_for_and_depends_on_the_seed_alone() -> None:
    drawn = list(draw_set(3, {"train": 2, "val": 1}))
    assert [(image.split, image.class_name) for image in drawn] == [
        (split, name) for split, count in (("train", 2), ("val", 1)) for name in CLASSES for _ in range(count)
    ]
    assert len({image.jpeg for image in drawn}) == len({(image.split, image.name) for image in drawn}) == 30
    assert [image.jpeg for image in draw_set(3, {"train": 2, "val": 1})] == [image.jpeg for image in drawn]
    assert [image.jpeg for image in draw_set(4, {"train": 2, "val": 1})] != [image.jpeg for image in drawn]


def test_images_are_colour_photographs_of_varied_size() -> None:
    shapes = set()
    for image in draw_set(0, {"train": 3}):
        pixels = cv2.imdecode(np.frombuffer(image.jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
        shapes.add(pixels.shape)
        assert min(pixels.shape[:2]) >= 72
        assert max(pixels.shape[:2]) <= 128
        assert pixels.shape[2] == 3
    assert len(shapes) > 20
