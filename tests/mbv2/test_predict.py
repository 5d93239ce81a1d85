"""Single images as evaluation sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imnet_prep.errors import SourceError
from mbv2.checkpoint import Meta
from mbv2.predict import find_images, load_image
from tests.synthetic import picture

META = Meta({"classes": 2}, ("a", "b"), image_size=32, eval_crop=0.875)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_the_centre_of_the_resized_image_is_taken(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255  # after the resize to 37 x 74, columns 18 to 55; the crop takes 21 to 53
    got = load_image(save(tmp_path / "x.png", Image.fromarray(pixels)), META)
    assert got.shape == (32, 32, 3)
    assert got.min() == 255


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(picture(1, 2, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    turned = load_image(save(tmp_path / "turned.png", image, exif=exif), META)
    plain = load_image(save(tmp_path / "plain.png", image.transpose(Image.Transpose.ROTATE_270)), META)
    assert np.array_equal(turned, plain)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0)).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    got = load_image(save(tmp_path / f"x.{suffix}", image), META)
    assert got.shape == (32, 32, 3)
    if mode in ("RGBA", "LA"):
        assert got.min() == 255  # fully transparent: white


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(SourceError, match=r"bad\.jpg"):
        load_image(bad, META)
    cut = save(tmp_path / "cut.png", Image.fromarray(picture(0, 0)))
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(SourceError, match=r"cut\.png"):
        load_image(cut, META)


def test_folders_are_searched_and_empty_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    one = save(tmp_path / "a" / "b" / "one.JPG", Image.new("RGB", (8, 8)), format="JPEG")
    two = save(tmp_path / "two.webp", Image.new("RGB", (8, 8)))
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert find_images([two, tmp_path / "a"]) == [two, one]
    with pytest.raises(SourceError, match="empty"):
        find_images([tmp_path / "empty"])
    with pytest.raises(SourceError, match="absent"):
        find_images([tmp_path / "absent"])
