"""Draw a small labelled image set: ten patterned shapes in any pose, size and colour on any background.

The demo and the tests use it, so that they download nothing. It is not trivial: place, pose and background tell nothing
about the class, and colour little; shape and pattern do.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SUPERSAMPLE = 2  # drawn at twice the size and shrunk, for smooth edges
_QUALITY = 90
Points = NDArray[np.float64]  # (N, 2) within the unit circle
Rgb = NDArray[np.uint8]  # (H, W, 3)
Coordinate = NDArray[np.float64]
Mask = NDArray[np.bool_]


def _polygon(corners: int, inner: float = 1.0) -> Points:
    """Return a regular polygon, or a star if ``inner`` is the radius of every second point."""
    number = corners if inner == 1.0 else 2 * corners
    angles = 2 * np.pi * np.arange(number) / number
    radii = np.where(np.arange(number) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _crescent() -> Points:
    outer, bite = np.linspace(-2.2, 2.2, 40), np.linspace(1.9, -1.9, 40)
    outside = np.stack([-np.cos(outer), np.sin(outer)], axis=1)
    inside = np.stack([0.45 - 0.85 * np.cos(bite), 0.85 * np.sin(bite)], axis=1)
    return np.concatenate([outside, inside])


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.asarray(np.stack([x, -y], axis=1) / 17)


_PLUS = np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)], float) / 3.2
_SHAPES: dict[str, Points] = {
    "arrow": np.array([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)]),
    "bar": np.array([(1, 0.22), (-1, 0.22), (-1, -0.22), (1, -0.22)]),
    "circle": _polygon(48),
    "crescent": _crescent(),
    "cross": np.concatenate([_PLUS, -_PLUS]),
    "heart": _heart(),
    "hourglass": np.array([(0.8, 0.9), (-0.8, 0.9), (0.8, -0.9), (-0.8, -0.9)]),
    "square": _polygon(4),
    "star": _polygon(5, 0.42),
    "triangle": _polygon(3),
}
# Where a shape, in its own coordinates, has the first of its two colours.
_PATTERNS: dict[str, Callable[[Coordinate, Coordinate], Mask]] = {
    "arrow": lambda x, y: np.ones_like(x, bool),
    "bar": lambda x, y: np.sin(14 * x) > 0,
    "circle": lambda x, y: (np.sin(9 * x) > 0) ^ (np.sin(9 * y) > 0),
    "crescent": lambda x, y: y > 0,
    "cross": lambda x, y: np.hypot(x, y) < 0.35,
    "heart": lambda x, y: np.sin(12 * y) > 0,
    "hourglass": lambda x, y: np.abs(y) > 0.55,
    "square": lambda x, y: np.maximum(np.abs(x - y), np.abs(x + y)) > 0.62,
    "star": lambda x, y: np.sin(12 * np.hypot(x, y)) > 0,
    "triangle": lambda x, y: (np.sin(11 * x) > 0.2) & (np.sin(11 * y) > 0.2),
}
CLASSES = tuple(_SHAPES)


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """One drawn image: its class, a name that is unique in its split, and the bytes of a JPEG."""

    split: str
    class_name: str
    name: str
    jpeg: bytes


def draw_set(seed: int, per_class: dict[str, int]) -> Iterator[DrawnImage]:
    """Draw a set of images; each depends only on the seed and its split, class and number.

    Args:
        seed: Of all draws.
        per_class: Images of each of the ten classes, by split.

    Yields:
        RGB JPEGs of 72 to 128 pixels a side.
    """
    for place, (split, count) in enumerate(per_class.items()):
        for label, class_name in enumerate(CLASSES):
            for number in range(count):
                rng = np.random.default_rng(np.random.SeedSequence([seed, place, label, number]))
                pixels = cv2.cvtColor(draw(class_name, rng), cv2.COLOR_RGB2BGR)
                good, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
                assert good
                yield DrawnImage(split, class_name, f"{class_name}_{split}_{number}.jpg", data.tobytes())


def draw(class_name: str, rng: np.random.Generator) -> Rgb:
    """Draw one image of a class.

    Returns:
        uint8 (H, W, 3) RGB, 72 to 128 pixels a side.
    """
    width, height = (int(side) for side in rng.integers(72, 129, 2))
    canvas = _background(width * SUPERSAMPLE, height * SUPERSAMPLE, rng)
    ground = canvas.reshape(-1, 3).mean(axis=0)
    ink, paper = _colours(CLASSES.index(class_name), ground, rng)
    radius = rng.uniform(0.3, 0.45) * min(canvas.shape[:2])
    centre = radius + rng.uniform(0, 1, 2) * (np.array(canvas.shape[1::-1]) - 2 * radius)
    pose = _pose(rng)
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(_SHAPES[class_name] @ pose.T * radius + centre).astype(np.int32)], 255)
    rows, columns = np.nonzero(mask)
    places = (np.stack([columns, rows], axis=1) - centre) / radius @ np.linalg.inv(pose).T
    canvas[rows, columns] = np.where(_PATTERNS[class_name](places[:, 0], places[:, 1])[:, None], ink, paper)
    canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    noisy = canvas + rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return np.asarray(np.clip(noisy, 0, 255), dtype=np.uint8)


def _background(width: int, height: int, rng: np.random.Generator) -> Rgb:
    """Draw a blurred patchwork of dull colours with thin lines across it."""
    shape = (int(rng.integers(2, 5)), int(rng.integers(2, 5)))
    grey = rng.integers(0, 256) + rng.integers(-60, 61, (*shape, 1))
    patches = np.clip(grey + rng.integers(-25, 26, (*shape, 3)), 0, 255).astype(np.uint8)
    canvas: Rgb = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(1, 5))):
        ends = [(int(x * width), int(y * height)) for x, y in rng.uniform(0, 1, (2, 2))]
        cv2.line(canvas, ends[0], ends[1], tuple(int(v) for v in rng.integers(0, 256, 3)), int(rng.integers(1, 4)))
    return canvas


def _colours(
    label: int, ground: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return two colours that differ from each other; the first also differs from the background.

    The first has the hue of its class, give or take the distance to the next class: a hint, not an answer.
    """
    while True:
        hue = (label / len(CLASSES) + rng.normal(0, 0.5 / len(CLASSES))) % 1.0
        ink = np.array([int(255 * part) for part in colorsys.hsv_to_rgb(hue, *rng.uniform([0.6, 0.5], 1.0))])
        paper = np.full(3, rng.integers(0, 256)) + rng.integers(-20, 21, 3)
        if min(np.abs(ink - ground).sum(), np.abs(ink - paper).sum()) > 180:  # of 765
            return ink, np.clip(paper, 0, 255)


def _pose(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a (2, 2) matrix that turns by any angle, squeezes one axis a little, and may mirror."""
    angle, squeeze, mirror = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0), rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.asarray(turn @ np.diag([1.0, squeeze * mirror]))
