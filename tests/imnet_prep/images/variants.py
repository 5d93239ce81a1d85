"""One picture in every form that a JPEG takes, and damaged ones.

``python -m tests.imnet_prep.images.variants ARCHIVE.tar`` writes all of them for ``make cross``.
"""

from __future__ import annotations

import io
import random
import sys
import tarfile

import cv2
import numpy as np
from PIL import Image

from tests.synthetic import encode, picture


def _variants() -> dict[str, bytes]:
    """One picture in every form that a JPEG takes."""
    pixels = picture(5, 0, 157, 121)
    found = {f"subsampling_{name}": encode(pixels, subsampling=code) for code, name in enumerate(("444", "422", "420"))}
    for name in ("411", "440"):
        code = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
        found[f"subsampling_{name}"] = cv2.imencode(
            ".jpg", pixels, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, code, cv2.IMWRITE_JPEG_QUALITY, 95]
        )[1].tobytes()
    found["progressive"] = encode(pixels, progressive=True)
    found["optimised"] = encode(pixels, optimize=True)
    found["quality_100"] = encode(pixels, quality=100)
    found["quality_5"] = encode(pixels, quality=5)
    found["grey"] = encode(pixels[..., 0])
    found["restart_every_block"] = encode(pixels, restart_marker_blocks=1)
    found["restart_every_7_blocks"] = encode(pixels, restart_marker_blocks=7)
    found["restart_rows"] = encode(pixels, restart_marker_rows=1)
    found["noise"] = encode(np.random.default_rng(0).integers(0, 256, (121, 157, 3), dtype=np.uint8), quality=100)
    found["orientation_tag"] = encode(pixels, exif=_rotated_exif())
    found["extra_bytes_at_the_end"] = encode(pixels) + b"\0" * 500
    for wide, tall in ((1, 1), (1, 9), (9, 1), (8, 8), (17, 16), (15, 33), (1000, 3)):
        found[f"size_{wide}x{tall}"] = encode(picture(1, 0, wide, tall))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    found["png"] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    found["cmyk"] = buffer.getvalue()
    return found


def _rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


VARIANTS = _variants()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change, lose or add a few bytes, or end the image early."""
    changed, kind = bytearray(data), rng.randrange(6)
    at = rng.randrange(2, len(data))
    if kind < 2:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[at : at + rng.choice((1, 2, 9))]
    elif kind == 3:
        changed[at:at] = rng.randbytes(rng.choice((1, 2, 5)))
    elif kind == 4:
        changed = changed[:at] + b"\xff\xd9"
    else:
        changed[-2:-2] = rng.choice((b"\0", b"\xff", b"\xff\xd0", rng.randbytes(2)))
    return bytes(changed)


def main() -> None:
    """Write the variants, and 20 damaged ones of each, to the tar that the command line names."""
    rng = random.Random(0)
    with tarfile.open(sys.argv[1], "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in VARIANTS.items():
            for number in range(21):
                member = tarfile.TarInfo(f"damaged_{name}_{number}" if number else name)
                changed = mutated(data, rng) if number else data
                member.size = len(changed)
                archive.addfile(member, io.BytesIO(changed))


if __name__ == "__main__":
    main()
