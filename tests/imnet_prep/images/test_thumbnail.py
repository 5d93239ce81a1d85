"""The thumbnail of a rejected image shows as much as still decodes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from imnet_prep.images.thumbnail import SIDE, thumbnail
from tests.synthetic import encode, jpeg, picture

LIMIT = 1_000_000


def seen(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(thumbnail(data, LIMIT))))


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (200, 100), colour) for colour in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("size", [(640, 400), (97, 300), (2000, 8), (40, 30)])
def test_the_whole_upper_part_of_a_cut_jpeg_is_shown(size: tuple[int, int]) -> None:
    pixels = np.asarray(Image.fromarray(picture(0, 1)).resize(size))
    data = encode(pixels)
    shown = seen(data[: len(data) * 9 // 10])
    assert max(shown.size) == min(SIDE, max(size))
    assert abs(shown.width / size[0] - max(shown.size) / max(size)) < 0.51 / size[0] + 1e-9
    upper = np.asarray(shown, int)[: shown.height // 2]
    whole = np.asarray(Image.fromarray(pixels).resize(shown.size, Image.Resampling.BOX), int)[: shown.height // 2]
    assert upper.size == 0 or np.abs(upper - whole).mean() < 12


def test_the_first_frame_of_an_animation_is_shown() -> None:
    red, green, blue = np.asarray(seen(animated())).reshape(-1, 3).mean(axis=0)
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>no</html>", id="html"),
        pytest.param(jpeg(0, 1)[:40], id="cut in the header"),
        pytest.param(encode(picture(0, 2), "PNG")[:20], id="png cut in the header"),
        pytest.param(encode(np.zeros((1100, 1000, 3), np.uint8), "PNG"), id="bomb"),
        pytest.param(encode(np.zeros((1100, 1000, 3), np.uint8)), id="jpeg bomb"),
    ],
)
def test_nothing_is_shown_of_what_cannot_or_must_not_be_decoded(data: bytes) -> None:
    assert thumbnail(data, LIMIT) == ""
