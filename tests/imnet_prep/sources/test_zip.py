"""Zip archives are read in place; damaged, joined and hostile ones lose no image in silence."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.errors import SourceError
from imnet_prep.sources import detect, merge, read
from imnet_prep.sources import zip_directory as directory
from imnet_prep.types import ImageRef, Reason, Rejected
from tests.records import prep, run
from tests.synthetic import WNIDS, SyntheticImageNet, jpeg, make_image_folder, make_imagenet

IMAGES = {f"{name}/{k}.jpg": jpeg(label, k, 20, 16) for label, name in enumerate(("cat", "dog")) for k in range(4)}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def zip_bytes(members: Mapping[str, bytes | zipfile.ZipInfo], method: int = DEFLATED, **options: Any) -> bytes:
    """Make a zip of files in the order given."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method, **options) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)  # type: ignore[arg-type]
    return out.getvalue()


def put(tmp_path: Path, data: bytes, name: str = "photos.zip") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def contents(path: Path, *labels: Path, split: str | None = None) -> tuple[dict[str, bytes], dict[str, Rejected]]:
    """What is read, and what is rejected, by ``<split>/<class>/<name>``."""
    stored, rejected = dict[str, bytes](), dict[str, Rejected]()
    for found in merge(detect([path, *labels], split)):
        item = read(found) if isinstance(found, ImageRef) else found
        if isinstance(item, Rejected):
            rejected[f"{item.split}/{item.file_name}"] = item
        else:
            stored[f"{item.ref.split}/{item.ref.file_name}"] = item.data
    return stored, rejected


def train(images: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"train/{name}": data for name, data in images.items()}


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_members_are_read_in_place(tmp_path: Path, method: int) -> None:
    path = put(tmp_path, zip_bytes({"photos/": b"", **{f"photos/{k}": v for k, v in IMAGES.items()}}, method))
    assert contents(path) == (train(IMAGES), {})
    assert detect([path])[0].kind == "class-zip"


def test_splits_and_what_is_ignored(tmp_path: Path) -> None:
    others = {
        "__MACOSX/ds/train/cat/._0.jpg": b"x", "ds/train/cat/.DS_Store": b"x", "ds/note.txt": b"x", "ds/cat.jpg": b"x",
    }  # fmt: skip
    splits = {f"ds/{split}/{name}": data for split in ("train", "val") for name, data in IMAGES.items()}
    path = put(tmp_path, zip_bytes(others | splits))
    stored, rejected = contents(path)
    assert stored == train(IMAGES) | {f"val/{name}": data for name, data in IMAGES.items()}
    assert [item.reason for item in rejected.values()] == [Reason.UNLABELLED]
    source = detect([path])[0]
    list(source.refs())
    assert "3 other files ignored" in source.notes[0]
    assert contents(path, split="val")[0].keys() == {f"val/{name}" for name in IMAGES}


def test_a_zip_and_its_folder_give_the_same_shards(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "photos", 3, 5)
    members = {str(file.relative_to(tmp_path)): file.read_bytes() for file in root.rglob("*.jpg")}
    path = put(tmp_path, zip_bytes(members))
    folder = run(root, tmp_path / "a").manifest
    manifest = run(path, tmp_path / "b").manifest
    assert manifest.splits == folder.splits
    assert manifest.sources[0]["kind"] == "class-zip"
    assert len(manifest.sources[0]["sha256"]) == 64


def kaggle_members(made: SyntheticImageNet) -> dict[str, bytes]:
    """The files of Kaggle's archive, by name."""
    stored, _ = contents(made.folder)
    members = {}
    for name, data in stored.items():
        split, base = name.partition("/")[0], name.rpartition("/")[2]
        members[f"ILSVRC/Data/CLS-LOC/{name if split == 'train' else f'{split}/{base}'}"] = data
    lines = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4" for number, wnid in made.val_labels.items()]
    return {**members, "LOC_val_solution.csv": "\n".join(["ImageId,PredictionString", *lines]).encode()}


def kaggle_zip(made: SyntheticImageNet) -> bytes:
    """Kaggle's archive of a small ImageNet."""
    return zip_bytes(kaggle_members(made))


def test_kaggles_zip_finds_its_labels_inside_beside_or_among_the_sources(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "official", 3, 2, odd=False)
    stored, _ = contents(made.folder)
    members = kaggle_members(made)
    inside = put(tmp_path, zip_bytes(members, STORED), "k1.zip")
    solution = members.pop("LOC_val_solution.csv")
    without = put(tmp_path, zip_bytes(members), "k2.zip")
    assert contents(inside) == (stored, {})
    assert detect([inside])[0].kind == "kaggle-zip"
    with pytest.raises(SourceError, match="need their labels"):
        detect([without])
    assert contents(without, split="train")[0].keys() == {name for name in stored if name.startswith("train")}
    assert contents(without, made.devkit) == (stored, {})
    (tmp_path / "LOC_val_solution.csv").write_bytes(solution)
    assert contents(without) == (stored, {})
    one_less = {name: data for name, data in members.items() if not name.endswith("val_00000002.JPEG")}
    source = detect([put(tmp_path, zip_bytes(one_less))])[0]
    list(source.refs())
    assert any("1 of 9 images in LOC_val_solution.csv are missing" in note for note in source.notes)


def test_tiny_imagenets_zip(tmp_path: Path) -> None:
    files = {f"tiny/train/{wnid}/images/{wnid}_0.JPEG": jpeg(k, 0) for k, wnid in enumerate(WNIDS[:2])}
    files |= {f"tiny/val/images/val_{k}.JPEG": jpeg(k, 9) for k in range(2)}
    notes = "".join(f"val_{k}.JPEG\t{WNIDS[k]}\t0\t0\t62\t62\n" for k in range(2)).encode()
    stored, rejected = contents(put(tmp_path, zip_bytes({**files, "tiny/val/val_annotations.txt": notes})))
    assert not rejected
    assert set(stored) == {f"train/{w}/{w}_0.JPEG" for w in WNIDS[:2]} | {
        f"val/{WNIDS[k]}/val_{k}.JPEG" for k in range(2)
    }


# --- odd members -----------------------------------------------------------------------------------------------------


def _link(data: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        info = zipfile.ZipInfo("cat/link.jpg")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "0.jpg")
    return out.getvalue()


def _flagged(data: bytes) -> bytes:
    """Set the flag of encryption of the first member, in both headers."""
    at = data.index(b"PK\1\2")
    return data[:6] + b"\1" + data[7 : at + 8] + b"\1" + data[at + 9 :]


def test_what_cannot_be_read_is_rejected_by_name(tmp_path: Path) -> None:
    out = io.BytesIO(_link(_flagged(zip_bytes(IMAGES))))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("cat/bz.jpg", IMAGES["cat/1.jpg"], zipfile.ZIP_BZIP2)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("cat/1.jpg", b"another of the name")
        archive.writestr("/abs/1.jpg", b"x")
        archive.writestr("../up/1.jpg", b"x")
    stored, rejected = contents(put(tmp_path, out.getvalue()))
    assert stored.keys() == train(IMAGES).keys() - {"train/cat/0.jpg"}
    assert {name: (item.reason, item.detail) for name, item in rejected.items()} == {
        "train/cat/0.jpg": (Reason.UNREADABLE, "it is encrypted"),
        "train/cat/bz.jpg": (
            Reason.UNREADABLE, "it is compressed with bzip2; only stored and deflated are read"
        ),
        "train/cat/1.jpg": (Reason.DUPLICATE_NAME, "another image of this name is in the train split"),
        "train/cat/link.jpg": (Reason.UNREADABLE, "a link in the archive, not a file"),
        "train//abs/1.jpg": (Reason.UNREADABLE, "its name is an absolute path"),
        "train/../up/1.jpg": (Reason.UNREADABLE, "its name leads out of the archive (..)"),
    }  # fmt: skip


def _renamed(name: bytes, flags: int = 0, system: int = 3) -> bytes:
    """A zip of one member whose name is raw bytes."""
    data = zip_bytes({"cat/" + "x" * (len(name) - 8) + ".jpg": IMAGES["cat/0.jpg"]})
    was = b"cat/" + b"x" * (len(name) - 8) + b".jpg"
    at = data.index(b"PK\1\2")
    data = data[:6] + struct.pack("<H", flags) + data[8 : at + 8] + struct.pack("<H", flags) + data[at + 10 :]
    data = data[: at + 5] + bytes([system]) + data[at + 6 :]
    return data.replace(was, name)


@pytest.mark.parametrize(
    ("name", "flags", "system", "expected"),
    [
        ("cat/é.jpg".encode(), 1 << 11, 3, "train/cat/é.jpg"),
        ("cat/é.jpg".encode(), 0, 3, "train/cat/é.jpg"),
        ("cat/é.jpg".encode("cp437"), 0, 3, "train/cat/é.jpg"),
        (b"cat\\dog.jpg", 0, 0, "train/cat/dog.jpg"),
        (b"cat/\\oo.jpg", 0, 3, "train/cat/\\oo.jpg"),
    ],
)
def test_names_in_every_code(tmp_path: Path, name: bytes, flags: int, system: int, expected: str) -> None:
    assert contents(put(tmp_path, _renamed(name, flags, system))) == ({expected: IMAGES["cat/0.jpg"]}, {})


def test_a_name_that_is_not_utf8_as_it_says_is_rejected(tmp_path: Path) -> None:
    _, rejected = contents(put(tmp_path, _renamed(b"cat/\xff\xfe.jpg", 1 << 11)))
    assert [item.detail for item in rejected.values()] == ["its name is not UTF-8"]


def test_members_written_to_a_pipe_have_their_sizes_after_them(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, part: Any) -> int:
            self.data += bytes(part)
            return len(part)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", DEFLATED) as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
    assert b"PK\7\x08" in pipe.data
    assert contents(put(tmp_path, pipe.data)) == (train(IMAGES), {})


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    data = zip_bytes(IMAGES, STORED)
    assert b"PK\6\6" in data
    assert contents(put(tmp_path, data)) == (train(IMAGES), {})
    assert contents(put(tmp_path, b"#!/bin/sh\n" + data)) == (train(IMAGES), {})
    with pytest.raises(SourceError, match="Zip64"):
        detect([put(tmp_path, data.replace(b"PK\6\6", b"PK\6\5"))])


def test_a_bomb_is_rejected_by_its_size_and_read_no_further(tmp_path: Path) -> None:
    data = zip_bytes({**IMAGES, "cat/bomb.jpg": bytes(10_000_000)})
    small = data.replace(struct.pack("<L", 10_000_000), struct.pack("<L", 100_000))
    huge = data.replace(struct.pack("<L", 10_000_000), struct.pack("<L", 1 << 30))
    for lying, detail in ((small, "100001 bytes read"), (huge, "1073741824 bytes, at most")):
        stored, rejected = contents(put(tmp_path, lying))
        assert stored == train(IMAGES)
        assert detail in rejected["train/cat/bomb.jpg"].detail


# --- other archives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_bytes({}), "holds no images"),
        (zip_bytes({"n01440764.tar": b"x", "n01443537.tar": b"x"}), "got n01440764.tar"),
        (zip_bytes({"ILSVRC.tar.gz": b"x"}), "unpack it"),
        (zip_bytes({"1.jpg": b"x", "1.cls": b"0"}), "zip of WebDataset samples"),
        (zip_bytes(IMAGES)[:-30], "no end record"),
        (zip_bytes(IMAGES) + bytes(70_000), "no end record"),
        (zip_bytes(IMAGES) + b"x", "other bytes follow"),
        (b"PK\3\4" + bytes(500), "no end record"),
        (zip_bytes(IMAGES)[:-18] + b"\1\0\1\0" + zip_bytes(IMAGES)[-14:], "split"),
    ],
)
def test_what_is_no_whole_zip_of_images_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        detect([put(tmp_path, data)])


def test_an_archive_among_images_is_noted(tmp_path: Path) -> None:
    source = detect([put(tmp_path, zip_bytes({**IMAGES, "more/birds.tar": b"x"}))])[0]
    list(source.refs())
    assert "photos.zip: archives in it are not read (more/birds.tar)" in source.notes


def test_a_zip_before_another_is_not_lost(tmp_path: Path) -> None:
    other = zip_bytes({"bird/0.jpg": jpeg(3, 3)})
    with pytest.raises(SourceError, match="a member at byte 0 is not in its directory"):
        contents(put(tmp_path, other + zip_bytes(IMAGES)))
    script = b"#!/bin/sh\n" + b"PK\3\4" * 9 + bytes(3000)
    assert contents(put(tmp_path, script + zip_bytes(IMAGES))) == (train(IMAGES), {})


def test_a_member_that_the_directory_lacks_is_not_lost(tmp_path: Path) -> None:
    data = zip_bytes(IMAGES)
    start = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", start + 1)
    head, end = data[:start] + data[second:-22], data[-22:]
    length = len(head) - start
    counts = struct.pack("<HHL", len(IMAGES) - 1, len(IMAGES) - 1, length)
    with pytest.raises(SourceError, match="a member at byte 0 is not in its directory"):
        contents(put(tmp_path, head + end[:8] + counts + end[16:]))
    with pytest.raises(SourceError, match="by its end record"):
        contents(put(tmp_path, head + end[:12] + struct.pack("<L", length) + end[16:]))


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    data = zip_bytes({"cat/0.jpg": IMAGES["cat/0.jpg"], "cat/1.jpg": IMAGES["cat/0.jpg"]})
    second = data.index(b"PK\3\4", 4)
    inner = data[second:].index(b"PK\1\2") + second
    grown = bytearray(data)
    size = inner - 39  # of the first, until the directory
    for at in (18, 22, inner + 20, inner + 24):
        grown[at : at + 4] = struct.pack("<L", size)
    grown[8:10] = grown[inner + 10 : inner + 12] = b"\0\0"
    with pytest.raises(SourceError, match="two members overlap"):
        contents(put(tmp_path, bytes(grown)))


def test_a_damaged_member_is_rejected_with_its_reason(tmp_path: Path) -> None:
    data = bytearray(zip_bytes(IMAGES, STORED))
    data[200] ^= 1
    stored, rejected = contents(put(tmp_path, bytes(data)))
    assert stored == train(dict(list(IMAGES.items())[1:]))
    assert [item.detail for item in rejected.values()] == ["its CRC-32 is not the one in the archive"]
    done = prep("to-mindrecord", tmp_path / "photos.zip", "--out", tmp_path / "out")
    assert done.returncode == 3
    assert "unreadable 1" in done.stderr


# --- damage ----------------------------------------------------------------------------------------------------------


def _damages() -> list[Callable[[random.Random, bytearray], bytearray]]:
    def stretch(rng: random.Random, data: bytearray) -> bytearray:
        at, size = rng.randrange(len(data)), rng.choice((1, 4, 40, 700))
        data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        return data

    def zeros(rng: random.Random, data: bytearray) -> bytearray:
        at = data.find(rng.choice((b"PK\3\4", b"PK\1\2")), rng.randrange(len(data)))
        data[at : at + 46] = bytes(len(data[at : at + 46]))
        return data

    def cut(rng: random.Random, data: bytearray) -> bytearray:
        return data[: rng.randrange(len(data))]

    def missing(rng: random.Random, data: bytearray) -> bytearray:
        at = rng.randrange(len(data))
        return data[:at] + data[at + rng.choice((1, 100, 600)) :]

    def joined(rng: random.Random, data: bytearray) -> bytearray:
        other = zip_bytes({"owl/9.jpg": jpeg(4, 9, 20, 16)})
        return bytearray(rng.choice((data + other, other + data, data[: len(data) // 2] + other)))

    def bit(rng: random.Random, data: bytearray) -> bytearray:
        start = data.find(b"PK\1\2")  # the directory is what all depends on
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
        return data

    return [stretch, zeros, cut, missing, joined, bit, bit, stretch]


def check_damaged(tmp_path: Path, seed: int) -> None:
    """Damage a zip, and check that each of its images is stored, rejected by name, or the source refused."""
    rng = random.Random(seed)
    whole = zip_bytes({**IMAGES, "notes.txt": b"x" * 50}, rng.choice((STORED, DEFLATED)))
    damage = rng.choice(_damages())
    path = put(tmp_path, bytes(damage(rng, bytearray(whole))))
    try:
        stored, rejected = contents(path)
    except SourceError:
        return
    named = [item.file_name + item.detail for item in rejected.values()]
    for name, data in IMAGES.items():
        assert data in stored.values() or any(name in text for text in named), f"seed {seed}: {name} is lost"


@pytest.mark.parametrize("block", range(4))
def test_no_damage_loses_an_image_in_silence(tmp_path: Path, block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        check_damaged(tmp_path, seed)


@pytest.mark.long
def test_no_damage_loses_an_image_in_silence_in_many_archives(tmp_path: Path) -> None:
    for seed in range(1000, 6000):
        check_damaged(tmp_path, seed)


@pytest.mark.slow
def test_many_members_take_little_memory(tmp_path: Path) -> None:
    """Sixteen bytes for each, and a part of the directory."""
    import tracemalloc

    count, name = 20_000, b"ILSVRC/train/n01440764/n01440764_%08d.JPEG"
    crc = zlib.crc32(b"x")
    fixed = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, crc, 1, 1, len(name % 0), 0)
    local = b"".join(b"PK\3\4" + fixed + name % k + b"x" for k in range(count))
    size = len(local) // count
    entries = b"".join(
        b"PK\1\2\x14\x03" + fixed + struct.pack("<3H2L", 0, 0, 0, 0, k * size) + name % k for k in range(count)
    )
    extra = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), len(local))
    extra += struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(entries), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(entries), len(local), 0)
    path = put(tmp_path, local + entries + extra + end)
    del local, entries
    tracemalloc.start()
    archive = directory.Zip(path)
    found = sum(not archive.place(entry)[1] for entry in archive.entries())
    archive.check_whole()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == count
    assert peak < 4 << 20
