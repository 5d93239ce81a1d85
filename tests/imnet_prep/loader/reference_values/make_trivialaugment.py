"""Write ``trivialaugment.png``: what torchvision's TrivialAugmentWide makes of a picture, operation by operation.

Run it with a Python that has torch and torchvision (written by torchvision 0.29.1 with Pillow): ``python
tests/imnet_prep/loader/reference_values/make_trivialaugment.py``. The first row of the picture's cells is the source;
then each operation has a row: magnitude 10 of 30, the same with the other sign, 30, and the other sign.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op
from torchvision.transforms.functional import InterpolationMode

SIDE, FILL = 32, [124, 116, 104]


def source() -> Image.Image:
    """Draw waves of three colours, a disc and a little noise."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    waves = [128 + 90 * np.sin(x / 7 + y / (9 + 4 * channel) + channel) for channel in range(3)]
    pixels = np.stack(waves, axis=-1) + np.random.default_rng(0).normal(0, 4, (SIDE, SIDE, 3))
    pixels[(x - 10) ** 2 + (y - 20) ** 2 < 40] = (230, 60, 30)
    return Image.fromarray(np.clip(pixels, 12, 243).astype(np.uint8))


def main() -> None:
    """Draw the grid."""
    picture, rows = source(), []
    rows.append([picture] * 4)
    for name, (magnitudes, signed) in TrivialAugmentWide()._augmentation_space(31).items():
        cells = []
        for step, sign in ((10, 1), (10, -1), (30, 1), (30, -1)):
            value = float(magnitudes[step]) if magnitudes.ndim else 0.0
            value *= sign if signed else 1
            cells.append(_apply_op(picture, name, value, InterpolationMode.BILINEAR, FILL))
        rows.append(cells)
    grid = np.concatenate([np.concatenate([np.asarray(cell) for cell in row], axis=1) for row in rows])
    Image.fromarray(grid).save(Path(__file__).with_name("trivialaugment.png"), optimize=True)


if __name__ == "__main__":
    main()
