"""The photographs of the benchmarks: one's own, or made from pictures that anyone can install.

scikit-learn and scikit-image (the extra ``bench``) ship photographs in their wheels. Cuttings of these get the sizes,
the chroma sampling and the bytes of ImageNet's: most are 500 x 375, three of four keep full chroma, and the mean is
110 kB. What a decoder does with them takes as long (docs/bench.md has the comparison), but they are few motives: they
serve to measure speed and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

MADE = 250
CACHE = Path("build/bench")
# Photographs of three colours: pictures of drawings, textures and stars compress unlike photographs.
SHIPPED = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
)
# Of 250 photographs of ImageNet: sizes, and the deciles of JPEG bytes per pixel.
SIZES = ((500, 375),) * 12 + ((375, 500),) * 3 + ((500, 333),) * 6 + ((333, 500),) * 3 + ((800, 600),)
BYTES_A_PIXEL = (0.18, 0.27, 0.38, 0.50, 0.60, 0.67, 0.78, 0.84, 0.95)
FULL_CHROMA_FRAC = 0.75
JPEG_START = b"\xff\xd8"


@dataclass(frozen=True, slots=True)
class Photographs:
    """Photographs, and where they are from.

    Attributes:
        source: What the results say of them.
        files: Name (``<class>/<file>``) and bytes of each.
    """

    source: str
    files: tuple[tuple[str, bytes], ...]

    @property
    def mean_bytes(self) -> float:
        """Mean size of a photograph, in bytes."""
        return sum(len(data) for _, data in self.files) / len(self.files)

    def describe(self) -> dict[str, str | int]:
        """Return what the results say of them."""
        digest = hashlib.sha256(b"".join(data for _, data in self.files)).hexdigest()
        return {"source": self.source, "count": len(self.files), "mean_bytes": round(self.mean_bytes), "sha256": digest}

    def write(self, folder: Path, count: int) -> Path:
        """Write them again and again under other names, ``count`` files in class folders, and return the folder."""
        for number in range(count):
            name, data = self.files[number % len(self.files)]
            path = folder / Path(name).parent / f"{number:06d}_{Path(name).stem}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


def load(source: Path | None, count: int = MADE, seed: int = 0) -> Photographs:
    """Return the JPEGs of a folder or a tar; without one, made photographs, which are kept in ``build/bench``.

    Args:
        source: A folder or a tar, or None.
        count: How many to make.
        seed: Decides the cuttings. The same seed, Pillow and pictures give the same bytes.
    """
    if source is not None:
        files = tuple(read(source))
        if not files:
            sys.exit(f"no JPEG: expected some in a folder or a tar; got {source}; give another one with --images")
        return Photographs(f"{len(files)} photographs of {source.name}", files)
    cache = CACHE / f"photographs-{count}-{seed}.tar"
    if not cache.exists():
        _keep(cache, tuple(make(count, seed)))
    return Photographs(f"{count} cuttings of {len(SHIPPED)} photographs of scikit-learn and scikit-image, "
                       "made to ImageNet's sizes and bytes", tuple(read(cache)))  # fmt: skip


def read(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name (``<class>/<file>``) and bytes of the JPEGs in a folder or a tar, in the order of their names."""
    if source.is_dir():
        found = ((path, path.read_bytes()) for path in sorted(source.rglob("*")) if path.is_file())
        yield from (_named(path.relative_to(source), data) for path, data in found if data.startswith(JPEG_START))
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in sorted((member for member in tar if member.isfile()), key=lambda member: member.name):
                data = tar.extractfile(member).read()  # type: ignore[union-attr]  # a file has one
                if data.startswith(JPEG_START):
                    yield _named(Path(member.name), data)
    else:
        sys.exit(f"no photographs: expected a folder or a tar; got {source}; see --images")


def _named(path: Path, data: bytes) -> tuple[str, bytes]:
    return f"{path.parent.name or 'photographs'}/{path.name}", data


def make(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield made photographs in ten classes."""
    pictures = [shipped(package, name) for package, name in SHIPPED]
    draw = random.Random(seed)
    for number in range(count):
        picture = cut(pictures[number % len(pictures)], draw)
        budget = BYTES_A_PIXEL[number % len(BYTES_A_PIXEL)] * picture.width * picture.height
        subsampling = "4:4:4" if draw.random() < FULL_CHROMA_FRAC else "4:2:0"
        yield f"class{number % 10}/{number:04d}.JPEG", encode(picture, budget, subsampling)


def shipped(package: str, name: str) -> Image.Image:
    """Open a picture that an installed package ships, without importing the package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"no photographs: expected {package}; got none installed; pip install '.[bench]', or --images DIR|TAR")
    return Image.open(Path(spec.origin).parent / name).convert("RGB")


def cut(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Cut a part with the proportions of an ImageNet photograph, about as large, and scale it to that size."""
    width, height = draw.choice(SIZES)
    largest = min(picture.width / width, picture.height / height)
    scale = largest * draw.uniform(0.75, 1.0)
    part = (scale * width, scale * height)
    left, top = (draw.uniform(0, side - size) for side, size in zip(picture.size, part, strict=True))
    box = (left, top, left + part[0], top + part[1])
    cutting = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return cutting.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else cutting


def encode(picture: Image.Image, budget_bytes: float, subsampling: str) -> bytes:
    """Encode at the lowest quality of 40 to 99 whose JPEG is as large as the budget; at 99 if none is."""

    def at(quality: int) -> bytes:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality, subsampling=subsampling)
        return out.getvalue()

    low, high = 40, 99
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(at(middle)) >= budget_bytes else (middle + 1, high)
    return at(low)


def _keep(cache: Path, files: tuple[tuple[str, bytes], ...]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}")
    with tarfile.open(partial, "w") as tar:
        for name, data in files:
            add_to_tar(tar, name, data)
    partial.replace(cache)


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
