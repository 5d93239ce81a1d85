"""A small ImageNet made in code: folders, Tiny-ImageNet, the official archives and devkit, and the odd files.

Pictures differ by class (hue, and stripes of a direction and width) and vary within it, so that training can learn.
Everything is a function of its arguments: the same call gives the same bytes.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.types import Change, Reason

Picture = NDArray[np.uint8]
_FIRST = (1440764, 1443537, 1484850, 1491361, 1494475, 1496331, 1498041, 1514668, 1514859, 1518878)
WNIDS = tuple(f"n{number:08d}" for number in _FIRST)  # ImageNet's first ten classes, so that its labels apply


def picture(label: int, seed: int, width: int = 48, height: int = 40) -> Picture:
    """Draw a picture of a class: uint8 (height, width, 3), RGB."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:height, :width]
    angle = 0.7 * label + rng.normal(0, 0.08)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (0.3 + 0.12 * (label % 4)) + rng.uniform(0, 6.28))
    hue = (label * 0.618 + rng.normal(0, 0.02)) * 2 * np.pi
    tint = np.array([np.cos(hue), np.cos(hue - 2.1), np.cos(hue + 2.1)])
    shade = rng.uniform(90, 160) + 60 * tint + 45 * wave[..., None] + rng.normal(0, 9, (height, width, 1))
    return np.clip(shade, 0, 255).astype(np.uint8)


def encode(pixels: Picture | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Encode with Pillow; JPEG at quality 85 unless told."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 85} | options if kind == "JPEG" else options))
    return out.getvalue()


def jpeg(label: int = 0, seed: int = 0, width: int = 48, height: int = 40, **options: Any) -> bytes:
    """A clean baseline JPEG of a class."""
    return encode(picture(label, seed, width, height), **options)


# --- folders ---------------------------------------------------------------------------------------------------------


def make_image_folder(
    root: Path,
    classes: int | Sequence[str] = 3,
    per_class: int | Mapping[str, int] = 8,
    splits: Sequence[str] = ("train", "val"),
    *,
    width: int = 48,
    height: int = 40,
    seed: int = 0,
) -> Path:
    """Make ``root/<split>/<class>/<image>.jpg``, or ``root/<class>/<image>.jpg`` where ``splits`` is empty.

    Args:
        root: Made where missing.
        classes: Names, or how many of :data:`WNIDS` (numbered names beyond its ten).
        per_class: Images a class, for each split or by split.
        splits: Folders between root and class.
        width: Of the pictures, in pixels. height: Likewise.
        seed: Another seed, other pictures.

    Returns:
        ``root``.
    """
    if isinstance(classes, int):
        names: Sequence[str] = WNIDS[:classes] if classes <= len(WNIDS) else [f"class{k:04d}" for k in range(classes)]
    else:
        names = classes
    for place, split in enumerate(splits or [""]):
        count = per_class if isinstance(per_class, int) else per_class[split]
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                data = jpeg(label, seed * 1_000_003 + place * 10_007 + k, width, height)
                (folder / f"{name}_{split or 'all'}_{k}.jpg").write_bytes(data)
    return root


def make_tiny_imagenet(root: Path, classes: int = 3, per_class: int = 6, val_per_class: int = 2, test: int = 0) -> Path:
    """Make Tiny-ImageNet's layout with 64 x 64 pictures; test images are unlabelled."""
    wnids = WNIDS[:classes]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\tthing {k}\n" for k, wnid in enumerate(wnids)))
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for k in range(per_class):
            (folder / f"{wnid}_{k}.JPEG").write_bytes(jpeg(label, k, 64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    rows = []
    for k in range(classes * val_per_class):
        label = (k * 7 + 1) % classes
        (root / "val" / "images" / f"val_{k}.JPEG").write_bytes(jpeg(label, 5000 + k, 64, 64))
        rows.append(f"val_{k}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    if test:
        (root / "test" / "images").mkdir(parents=True)
        for k in range(test):
            (root / "test" / "images" / f"test_{k}.JPEG").write_bytes(jpeg(k % classes, 9000 + k, 64, 64))
    return root


# --- the official archives -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SyntheticImageNet:
    """The official files, small.

    Attributes:
        folder: Holds the archives under their official names.
        train: Nested tar. val: Flat tar. test: Flat tar under ``test/``. devkit: tar.gz.
        wnids: The classes, sorted.
        ids: ILSVRC2012_ID by wnid; its order is not the sorted one.
        val_labels: wnid by val number, for every number in the ground truth.
        train_names: ``<wnid>/<file>`` of every member of the train archive, sorted.
        odd: What was mixed in, by ``<wnid>/<file>``.
    """

    folder: Path
    train: Path
    val: Path
    test: Path
    devkit: Path
    wnids: tuple[str, ...]
    ids: Mapping[str, int]
    val_labels: Mapping[int, str]
    train_names: tuple[str, ...]
    odd: Mapping[str, OddImage]


def make_imagenet(
    folder: Path,
    classes: int = 5,
    per_class: int = 6,
    val_per_class: int = 3,
    test: int = 4,
    *,
    odd: bool = True,
    missing_val: Iterable[int] = (),
    seed: int = 0,
) -> SyntheticImageNet:
    """Write the train, val and test tars and the devkit, in seconds.

    Args:
        folder: Where; made where missing.
        classes: At most ten, of :data:`WNIDS`.
        per_class: Train images a class, odd ones aside. val_per_class: Val images a class. test: Test images.
        odd: Mix :func:`odd_images` into the train archive, class by class in turn.
        missing_val: Val numbers left out of the val archive (their lines stay in the ground truth).
        seed: Another seed, other pictures and another order of ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    wnids = WNIDS[:classes]
    order = [*wnids[1:], wnids[0]] if classes > 1 else list(wnids)  # a rotation: no class keeps its sorted place
    ids = {wnid: number for number, wnid in enumerate(order, start=1)}
    members: dict[str, dict[str, bytes]] = {}
    for label, wnid in enumerate(wnids):
        members[wnid] = {f"{wnid}_{seed * 100 + 10 * k + 3}.JPEG": jpeg(label, seed + k) for k in range(per_class)}
    mixed = {}
    if odd:
        for k, (_, image) in enumerate(sorted(odd_images().items())):
            wnid = wnids[k % classes]
            members[wnid][f"{wnid}_{90000 + k}.JPEG"] = image.data
            mixed[f"{wnid}/{wnid}_{90000 + k}.JPEG"] = image
    val_labels = {}
    val: dict[str, bytes] = {}
    gone = set(missing_val)
    for number, label in enumerate(rng.permutation(np.repeat(np.arange(classes), val_per_class)).tolist(), start=1):
        val_labels[number] = wnids[label]
        if number not in gone:
            val[f"ILSVRC2012_val_{number:08d}.JPEG"] = jpeg(label, 70_000 + seed + number)
    shuffled = [list(val)[k] for k in rng.permutation(len(val))]
    truth = [ids[wnid] for wnid in val_labels.values()]
    paths = SyntheticImageNet(
        folder=folder,
        train=folder / "ILSVRC2012_img_train.tar",
        val=folder / "ILSVRC2012_img_val.tar",
        test=folder / "ILSVRC2012_img_test_v10102019.tar",
        devkit=folder / "ILSVRC2012_devkit_t12.tar.gz",
        wnids=wnids,
        ids=ids,
        val_labels=val_labels,
        train_names=tuple(sorted(f"{wnid}/{name}" for wnid, files in members.items() for name in files)),
        odd=mixed,
    )
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in reversed(members.items())}
    paths.train.write_bytes(tar_bytes(inner))
    paths.val.write_bytes(tar_bytes({name: val[name] for name in shuffled}))
    pictures = {f"test/ILSVRC2012_test_{k:08d}.JPEG": jpeg(k % classes, 80_000 + k) for k in range(1, test + 1)}
    paths.test.write_bytes(tar_bytes(pictures))
    paths.devkit.write_bytes(devkit_bytes(ids, truth))
    return paths


def tar_bytes(members: Mapping[str, bytes], mode: str = "w", tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """Make a tar of regular files, in the order given, with time stamp 0."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tar_format) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def devkit_bytes(ids: Mapping[str, int], truth: Sequence[int]) -> bytes:
    """Make the devkit's tar.gz: ``meta.mat`` (MATLAB v5, compressed) and the ground truth, a line a val image."""
    top = "ILSVRC2012_devkit_t12"
    files = {
        f"{top}/readme.txt": b"Synthetic development kit.\n",
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
        f"{top}/data/meta.mat": meta_mat(ids),
    }
    return tar_bytes(files, mode="w:gz")


def meta_mat(ids: Mapping[str, int]) -> bytes:
    """Make ``meta.mat``: struct array ``synsets``, the classes in id order, then two synsets above them."""
    from scipy.io import savemat

    texts, numbers = ("WNID", "words", "gloss"), ("num_children", "children", "wordnet_height", "num_train_images")
    fields = ("ILSVRC2012_ID", *texts, *numbers)
    table = np.zeros((len(ids) + 2, 1), dtype=[(name, object) for name in fields])
    leaves = sorted(ids.items(), key=lambda pair: pair[1])
    half = len(leaves) // 2
    for row, (wnid, number) in enumerate(leaves):
        table[row, 0] = (float(number), wnid, f"thing {wnid}", "a thing", 0.0, np.zeros((1, 0)), 0.0, 1300.0)
    for k, below in enumerate((leaves[:half], leaves[half:])):
        children = np.array([[number for _, number in below]], dtype=np.float64)
        row = len(leaves) + k
        table[row, 0] = (float(row + 1), f"n0000000{k}", "entity", "all", float(len(below)), children, 1.0, 0.0)
    out = io.BytesIO()
    savemat(out, {"synsets": table}, do_compression=True)
    return out.getvalue()


# --- the odd files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OddImage:
    """Bytes that are not a plain JPEG, and what must become of them.

    Attributes:
        data: The file.
        reason: Why it must be rejected, or None.
        changes: What must stand in its record, where it is kept.
    """

    data: bytes
    reason: Reason | None = None
    changes: tuple[Change, ...] = ()


def odd_images() -> dict[str, OddImage]:
    """Every kind of odd file by name, small."""
    return _kept() | _rejected()


def _kept() -> dict[str, OddImage]:
    base = picture(1, 42)
    alpha = np.dstack([base, np.full(base.shape[:2], 128, np.uint8)])
    grey = Image.fromarray(base).convert("L")
    deep = np.asarray(grey).astype(np.uint16) * np.uint16(256) + np.uint16(77)
    plain = encode(base)
    made = Change.FORMAT
    return {
        "grey": OddImage(encode(grey), None, (Change.GREYSCALE,)),
        "progressive": OddImage(encode(base, progressive=True), None, (Change.PROGRESSIVE,)),
        "cmyk": OddImage(encode(Image.fromarray(base).convert("CMYK")), None, (Change.CMYK,)),
        "ycck": OddImage(ycck(base), None, (Change.CMYK,)),
        "exif_turned": OddImage(with_exif(plain, exif(6)), None, (Change.ORIENTED,)),
        "exif_damaged": OddImage(with_exif(plain, exif(1)[:14]), None, (Change.EXIF_DAMAGED,)),
        "trailing": OddImage(plain + b"camera maker's notes" * 9, None, (Change.TRAILING_BYTES,)),
        "two_in_one": OddImage(plain + encode(picture(2, 2)), None, (Change.TRAILING_BYTES,)),
        "restarts": OddImage(encode(base, restart_marker_blocks=2)),
        "png": OddImage(encode(base, "PNG"), None, (made,)),
        "png_16": OddImage(png16(deep), None, (made, Change.SIXTEEN_BIT)),
        "png_alpha": OddImage(encode(alpha, "PNG"), None, (made, Change.ALPHA)),
        "png_palette": OddImage(encode(Image.fromarray(base).quantize(16), "PNG"), None, (made,)),
        "gif": OddImage(encode(Image.fromarray(base).quantize(16), "GIF"), None, (made,)),
        "webp": OddImage(encode(base, "WEBP"), None, (made,)),
        "bmp": OddImage(encode(base, "BMP"), None, (made,)),
        "tiff": OddImage(encode(base, "TIFF", compression="tiff_lzw"), None, (made,)),
    }


def _rejected() -> dict[str, OddImage]:
    base = picture(1, 42)
    plain = encode(base)
    frames = [Image.fromarray(picture(k, 0)) for k in range(3)]
    sos = plain.index(b"\xff\xda")
    return {
        "empty": OddImage(b"", Reason.EMPTY),
        "html": OddImage(b"<!DOCTYPE html><title>404</title>", Reason.NOT_AN_IMAGE),
        "truncated": OddImage(plain[: sos + (len(plain) - sos) // 2], Reason.TRUNCATED),
        "truncated_header": OddImage(plain[:40], Reason.TRUNCATED),
        "no_end_marker": OddImage(plain[:-2], Reason.TRUNCATED),
        "garbled": OddImage(plain[: sos + 200] + bytes(150) + plain[sos + 350 :], Reason.CORRUPT),
        "spliced": OddImage(plain[: sos + 300] + jpeg(2, 7), Reason.CORRUPT),
        "bomb": OddImage(with_size(plain, 60_000, 60_000), Reason.TOO_MANY_PIXELS),
        "png_bomb": OddImage(png_header_bomb(), Reason.TOO_MANY_PIXELS),
        "png_cut": OddImage(encode(base, "PNG")[:-20], Reason.TRUNCATED),
        "gif_animated": OddImage(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), Reason.ANIMATED),
        "webp_animated": OddImage(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]), Reason.ANIMATED),
        "png_animated": OddImage(encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), Reason.ANIMATED),
        "tiff_pages": OddImage(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]), Reason.ANIMATED),
    }


def ycck(rgb: Picture) -> bytes:
    """Make a YCCK JPEG as Adobe's programs do: inks in YCbCr, black inverted, Adobe transform 2."""
    inks = np.asarray(Image.fromarray(rgb).convert("CMYK"))
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(inks[..., :3])).convert("YCbCr"))
    planes = np.dstack([255 - ycc, inks[..., 3]])  # Pillow inverts what it writes as CMYK
    data = bytearray(encode(Image.fromarray(planes, mode="CMYK")))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def exif(orientation: int) -> bytes:
    """Make an EXIF block that holds an orientation."""
    return b"Exif\x00\x00" + struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0)


def with_exif(data: bytes, block: bytes) -> bytes:
    """Put an EXIF segment right after SOI."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Rewrite the frame header of a baseline JPEG: the pixels stay, the size lies."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def many_scans(width: int, height: int, scans: int) -> bytes:
    """Make a progressive grey JPEG of so many scans after the first, each a few bytes that touch every block."""

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    blocks = -(-width // 8) * -(-height // 8)
    full, rest = divmod(blocks, 1 << 14)  # the only code of the scans: 2**14 and more blocks without a coefficient
    bits = ("0" + "0" * 14) * full + ("0" + f"{0:014b}") * bool(rest)
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return b"".join(
        (
            b"\xff\xd8" + segment(0xDB, bytes([0]) + bytes([16] * 64)),
            segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])),
            segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])) + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0])),
            segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8)),
            *(segment(0xDA, bytes([1, 1, 0, 1 + scan % 63, 1 + scan % 63, 0])) + runs for scan in range(scans)),
            b"\xff\xd9",
        )
    )


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Make a PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """Make a 16-bit PNG: (H, W) grey or (H, W, 3) colour."""
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in pixels)
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_header_bomb() -> bytes:
    """Make a PNG of a few hundred bytes whose header says 50,000 x 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
