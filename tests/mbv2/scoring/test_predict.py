"""Single images as evaluation sees them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from imnet_prep import open_batches
from imnet_prep.errors import SourceError, TrainError
from imnet_prep.types import record_id
from mbv2.data import eval_options
from mbv2.outputs import check_outputs
from mbv2.scoring.predict import _predict_batch, contact_sheet, find_images, load_image, refuse_unread
from mbv2.weights.checkpoint import Meta
from tests.records import run
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


def test_an_image_is_cropped_before_it_is_resized(tmp_path: Path) -> None:
    thin = save(tmp_path / "thin.png", Image.new("L", (1, 30_000), 200))
    tracemalloc.start()
    got = load_image(thin, META)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.shape == (32, 32, 3)
    assert (got == 200).all()
    assert peak_bytes < 1 << 22  # resized as a whole it would be 37 x 1,110,000 pixels


def test_the_loader_and_conversion_see_a_turned_photograph_as_predict_does(tmp_path: Path) -> None:
    """Conversion turns it upright and encodes it again; the loader then shows what predict shows."""
    folder = tmp_path / "images" / "val" / "a"
    folder.mkdir(parents=True)
    image = Image.fromarray(cv2.GaussianBlur(picture(1, 2, 96, 64), (0, 0), 2))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(folder / f"{orientation}.jpg", image, exif=exif, quality=97)
    run(tmp_path / "images", tmp_path / "records")
    with open_batches(tmp_path / "records", "val", eval_options(8, META.image_size, META.eval_crop), 0) as batches:
        (batch,) = list(batches)
    listed = {record_id("val", f"a/{number}.jpg"): number for number in range(1, 9)}
    for pixels, record in zip(batch.image, batch.record_id.tolist(), strict=True):
        seen = load_image(folder / f"{listed[record]}.jpg", META)
        assert np.abs(pixels.astype(int) - seen).mean() < 2, listed[record]


def test_one_unreadable_image_does_not_cost_the_others(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", Image.fromarray(picture(0, 0)))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    found = list(
        _predict_batch(lambda pixels: np.eye(3, 2, dtype=np.float32), META, [tmp_path / "bad.jpg", good], 3, 1)
    )
    assert "bad.jpg" in found[0].to_json()["error"]
    assert found[1].to_json()["guesses"][0]["class"] == "b"
    contact_sheet(tmp_path / "sheet.png", found)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 200  # one picture
    with pytest.raises(SourceError, match=r"1 of 2 images could not be read"):
        refuse_unread(found)
    refuse_unread(found[1:])


@pytest.mark.parametrize("name", ["absent/file.csv", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrainError, match="cannot write"):
        check_outputs(None, tmp_path / name)
    check_outputs(None, tmp_path / "folder" / "new.csv")


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
