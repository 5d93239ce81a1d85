"""What a new user brings: photographs of two kinds in one folder per kind, no split, and one more to recognise."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from imnet_prep.cli.drawings import CLASSES, draw

KINDS = ("bar", "star")
PER_KIND = 80


def draw_photographs(root: Path) -> None:
    """Draw ``root/my-photos/<kind>/<number>.jpg`` and ``root/photo.jpg``, another photograph of the second kind."""
    for kind in KINDS:
        (root / "my-photos" / kind).mkdir(parents=True)
        for number in range(PER_KIND):
            _draw(root / "my-photos" / kind / f"{number}.jpg", kind, number)
    _draw(root / "photo.jpg", KINDS[1], PER_KIND)


def _draw(path: Path, kind: str, number: int) -> None:
    """Draw a shape in any pose, size and colour on any background."""
    pixels = draw(kind, np.random.default_rng([CLASSES.index(kind), number]))
    assert cv2.imwrite(str(path), pixels[..., ::-1])
