"""Archives of small images in every tar-like form, and ways to damage them."""

from __future__ import annotations

import functools
import io
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imnet_prep.sources.base import is_image_name
from tests.imnet_prep.sources.accounting import Name
from tests.synthetic import WNIDS, devkit_bytes, jpeg

BLOCK = 512
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
IMAGES = 40  # of an archive


@functools.cache
def image(number: int) -> bytes:
    """A JPEG of a few hundred bytes to 3 kB, another one for each number."""
    side = 8 + number * 7 % 70
    return jpeg(number % 10, number, side, side, quality=40 + number % 50, optimize=True)


@dataclass
class Archive:
    """An archive, or a folder of them.

    Attributes:
        files: The bytes of each tar.
        others: What lies beside them, by name.
        images: The bytes of each image by split and name.
        spans: What an image is read from: the first byte and the end of each stretch, and the tar that it is in.
    """

    files: dict[str, bytes]
    images: dict[Name, bytes]
    spans: dict[Name, list[tuple[str, int, int]]]
    others: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, files: Mapping[str, bytes] | None = None) -> list[Path]:
        """Write it, or damaged files of it, and return the sources to give."""
        folder.mkdir(parents=True)
        for name, data in {**(files or self.files), **self.others}.items():
            (folder / name).write_bytes(data)
        return [folder] if len(self.files) > 1 else [folder / name for name in (*self.files, *self.others)]


def pack(members: Mapping[str, bytes], kind: int, folders: Sequence[str] = ()) -> bytes:
    """Make a tar in one of :data:`FORMATS`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_600_000_000, "somebody"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def places(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, first byte of the headers, first byte of the body, and end of the body of each file."""
    with tarfile.open(fileobj=io.BytesIO(data[start:end])) as archive:
        for member in archive:
            if member.isreg():
                body = start + member.offset_data
                yield member.name, start + member.offset, body, body + member.size


def _class_name(rng: random.Random, number: int, kind: int) -> str:
    long = "c" * 90 if rng.random() < 0.2 else ""
    odd = "ü" if rng.random() < 0.2 and kind != tarfile.USTAR_FORMAT else ""
    return f"class{odd}{number}{long}"


def class_tar(rng: random.Random) -> Archive:
    """A tar of class folders, with split folders or without."""
    kind, splits = rng.choice(FORMATS), rng.choice([("train", "val"), ("",)])
    classes = [_class_name(rng, number, kind) for number in range(4)]
    names = {
        f"{split}/{rng.choice(classes)}/{'n' * rng.choice((1, 60))}{k}.jpg".lstrip("/"): image(rng.randrange(500))
        for split in splits
        for k in range(IMAGES // len(splits))
    }
    folders = sorted({name.rpartition("/")[0] for name in names}) if rng.random() < 0.5 else []
    members = names | {"README": b"Images.\n"}
    order = rng.sample(sorted(members), len(members)) if rng.random() < 0.5 else sorted(members)
    data = pack({name: members[name] for name in order}, kind, folders)
    keys: dict[str, Name] = {}
    for name in names:
        top, _, rest = name.partition("/")
        keys[name] = (top, rest) if len(splits) > 1 else ("train", name)
    spans = {keys[name]: [("x.tar", first, end)] for name, first, _, end in places(data) if name in keys}
    return Archive({"x.tar": data}, {keys[name]: names[name] for name in names}, spans)


def nested_tar(rng: random.Random) -> Archive:
    """A tar of class tars, whose images are named as the official ones or not."""
    kind, official = rng.choice(FORMATS[:2]), rng.random() < 0.5
    inner, images, spans = dict[str, bytes](), dict[Name, bytes](), dict[Name, list[tuple[str, int, int]]]()
    for wnid in WNIDS[:4]:
        names = {f"{wnid}_{k}.JPEG" if official else f"{k}.jpg": image(rng.randrange(500)) for k in range(IMAGES // 4)}
        inner[f"{wnid}.tar"] = pack(names, kind)
        images |= {("train", f"{wnid}/{name}"): data for name, data in names.items()}
    data = pack(inner, kind)
    for name, first, body, end in places(data):
        for base, start, _, stop in places(data, body, end):
            # Without its class tar's header, only an official name tells the class.
            spans["train", f"{name[:-4]}/{base}"] = [("x.tar", start, stop)] + [("x.tar", first, body)] * (not official)
    return Archive({"x.tar": data}, images, spans)


def tar_folder(rng: random.Random) -> Archive:
    """A folder of class tars."""
    kind = rng.choice(FORMATS)
    archive = Archive({}, {}, {})
    for wnid in WNIDS[:4]:
        names = {f"{wnid}_{k}.JPEG": image(rng.randrange(500)) for k in range(IMAGES // 4)}
        archive.files[f"{wnid}.tar"] = pack(names, kind)
        for name, first, _, end in places(archive.files[f"{wnid}.tar"]):
            archive.images["train", f"{wnid}/{name}"] = names[name]
            archive.spans["train", f"{wnid}/{name}"] = [(f"{wnid}.tar", first, end)]
    return archive


def val_tar(rng: random.Random) -> Archive:
    """The flat tar of validation images, and the devkit with their labels."""
    kind = rng.choice(FORMATS)
    ids = {wnid: number for number, wnid in enumerate(WNIDS, start=1)}
    truth = [rng.choice(list(ids.values())) for _ in range(IMAGES)]
    names = {f"ILSVRC2012_val_{k:08d}.JPEG": image(rng.randrange(500)) for k in range(1, IMAGES + 1)}
    data = pack({name: names[name] for name in rng.sample(sorted(names), len(names))}, kind)
    keys = {name: ("val", f"{WNIDS[truth[int(name[15:23]) - 1] - 1]}/{name}") for name in names}
    spans = {keys[name]: [("x.tar", first, end)] for name, first, _, end in places(data)}
    devkit = {"ILSVRC2012_devkit_t12.tar.gz": _devkit(tuple(truth))}
    return Archive({"x.tar": data}, {keys[name]: names[name] for name in names}, spans, devkit)


@functools.cache
def _devkit(truth: tuple[int, ...]) -> bytes:
    return devkit_bytes({wnid: number for number, wnid in enumerate(WNIDS, start=1)}, truth)


def webdataset(rng: random.Random) -> Archive:
    """A tar of samples: an image and its class."""
    kind, archive = rng.choice(FORMATS), Archive({}, {}, {})
    members, keys = dict[str, bytes](), dict[str, Name]()
    for k in range(IMAGES):
        key, label = f"{k:06d}", rng.choice(WNIDS)
        members |= {f"{key}.jpg": image(rng.randrange(500)), f"{key}.cls": label.encode()}
        keys[key] = ("train", f"{label}/{key}.jpg")
    data = pack(members, kind)
    archive.files["x.tar"] = data
    for name, first, _, end in places(data):
        sample = keys[name[:-4]]
        archive.spans.setdefault(sample, []).append(("x.tar", first, end))
        if is_image_name(name):
            archive.images[sample] = members[name]
    return archive


MAKERS: dict[str, Callable[[random.Random], Archive]] = {
    "class": class_tar, "nested": nested_tar, "folder": tar_folder, "val": val_tar, "webdataset": webdataset,
}  # fmt: skip


# --- damage ----------------------------------------------------------------------------------------------------------

Stretch = tuple[int, int]
"""The first byte that is damaged, and the end."""


def _stretch(rng: random.Random, data: bytearray) -> Stretch:
    length = min(len(data), round(4 ** rng.uniform(0, 8)))  # 1 to 65,536 bytes
    start = rng.randrange(len(data) - length + 1)
    if rng.random() < 0.5:  # disks lose whole sectors
        start, length = start // BLOCK * BLOCK, max(BLOCK, length // BLOCK * BLOCK)
    return start, min(len(data), start + length)


def noise(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite a stretch with random bytes."""
    start, end = _stretch(rng, data)
    data[start:end] = rng.randbytes(end - start)
    return [(start, end)]


def zeros(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite a stretch with zeros."""
    start, end = _stretch(rng, data)
    data[start:end] = bytes(end - start)
    return [(start, end)]


def zero_header(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite a header with zeros."""
    at = rng.choice(headers)
    data[at : at + BLOCK] = bytes(BLOCK)
    return [(at, at + BLOCK)]


def noisy_header(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite some bytes of a header."""
    at = rng.choice(headers) + rng.randrange(BLOCK - 8)
    data[at : at + 8] = rng.randbytes(8)
    return [(at, at + 8)]


def zero_members(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite whole members with zeros."""
    first = rng.randrange(len(headers) - 1)
    start, end = headers[first], headers[min(len(headers) - 1, first + rng.randrange(1, 6))]
    data[start:end] = bytes(end - start)
    return [(start, end)]


def zero_rest(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Overwrite everything from a member on with zeros."""
    start, end = rng.choice(headers), len(data)
    data[start:] = bytes(end - start)
    return [(start, end)]


def cut(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Leave out the end."""
    start, end = rng.choice((rng.randrange(len(data)), rng.choice(headers))), len(data)
    del data[start:]
    return [(start, end)]


def garbage(rng: random.Random, data: bytearray, headers: Sequence[int]) -> list[Stretch]:
    """Append random bytes."""
    start = len(data)
    data += rng.randbytes(round(4 ** rng.uniform(0, 7)))
    return [(start, len(data))]


KINDS = (noise, noise, zeros, zeros, zero_header, noisy_header, zero_members, zero_rest, cut, garbage)


def damage(rng: random.Random, archive: Archive) -> tuple[dict[str, bytes], str, set[Name]]:
    """Damage one tar of an archive in one to three places.

    Returns:
        The tars, what was done, and the images that it touched.
    """
    name = rng.choice(sorted(archive.files))
    data, done, stretches = bytearray(archive.files[name]), list[str](), list[Stretch]()
    headers = [first for _, first, _, _ in places(bytes(data))]
    if not archive.others and len(archive.files) == 1 and archive.images:  # also the headers of inner tars
        headers += [
            start for base, _, body, end in places(bytes(data)) if base.endswith(".tar")
            for _, start, _, _ in places(bytes(data), body, end)
        ]  # fmt: skip
    headers.sort()
    for kind in rng.sample(KINDS, rng.choice((1, 1, 1, 2, 3))):
        if len(data) > headers[-1] + BLOCK:  # not cut before
            stretches += kind(rng, data, headers)
            done.append(f"{kind.__name__} {stretches[-1]}")
    touched = {
        key
        for key, spans in archive.spans.items()
        if any(file == name and first < end and start < last for file, first, last in spans for start, end in stretches)
    }
    return archive.files | {name: bytes(data)}, f"{name}: {', '.join(done)}", touched
