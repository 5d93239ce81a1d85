"""Archives are read where they lie; damage and hostility are accounted for, and nothing is ever written."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from imnet_prep import catalog
from imnet_prep.check.verify import verify
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources import Found, Source, detect, merge, read
from imnet_prep.sources.labels import read_devkit
from imnet_prep.sources.tar import walk
from imnet_prep.types import SPLITS, ImageRef, Progress, RawImage, Reason, Rejected
from tests.records import run
from tests.synthetic import (
    SyntheticImageNet,
    devkit_bytes,
    jpeg,
    make_image_folder,
    make_imagenet,
    make_tiny_imagenet,
    meta_mat,
    tar_bytes,
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> SyntheticImageNet:
    return make_imagenet(tmp_path_factory.mktemp("imagenet"), classes=4, missing_val=[5, 9])


def all_of(*paths: Path, split: str | None = None, salvage: bool = False) -> list[Found]:
    return list(merge(detect(paths, split, salvage=salvage)))


def salvaged(path: Path, words: str = "is damaged|is not a whole tar") -> list[Found]:
    """What is found in a damaged archive, after it is an error without ``salvage``."""
    with pytest.raises(SourceError, match=words) as caught:
        all_of(path)
    assert "\n" not in str(caught.value)
    return all_of(path, salvage=True)


def data_of(ref: Found) -> bytes:
    assert isinstance(ref, ImageRef), ref
    raw = read(ref)
    assert isinstance(raw, RawImage), raw
    return raw.data


def good(found: list[Found]) -> list[str]:
    return [item.file_name for item in found if isinstance(item, ImageRef)]


def bad(found: list[Found]) -> dict[str, Reason]:
    return {item.file_name: item.reason for item in found if isinstance(item, Rejected)}


# --- the official archives -------------------------------------------------------------------------------------------


def test_the_nested_train_tar_gives_every_inner_member(net: SyntheticImageNet) -> None:
    found = all_of(net.train)
    assert good(found) == list(net.train_names)
    for ref in found:
        assert isinstance(ref, ImageRef)
        assert ref.split == "train"
        assert ref.file_name.startswith(ref.class_name + "/")
    by_name = {ref.file_name: data_of(ref) for ref in found}
    assert all(by_name[name] == odd.data for name, odd in net.odd.items())


def test_members_agree_with_pythons_tarfile(net: SyntheticImageNet) -> None:
    wanted = {}
    with tarfile.open(net.train) as outer:
        for tar in outer:
            stream = outer.extractfile(tar)
            assert stream is not None
            with tarfile.open(fileobj=stream) as inner:
                for member in inner:
                    body = inner.extractfile(member)
                    assert body is not None
                    wanted[f"{tar.name.removesuffix('.tar')}/{member.name}"] = body.read()
    assert {item.file_name: data_of(item) for item in all_of(net.train)} == wanted


def test_the_train_archive_unpacked_once_is_the_same(net: SyntheticImageNet, tmp_path: Path) -> None:
    with tarfile.open(net.train) as archive:
        archive.extractall(tmp_path / "train", filter="data")
    found = all_of(tmp_path / "train")
    assert good(found) == list(net.train_names)
    assert [data_of(ref) for ref in found] == [data_of(ref) for ref in all_of(net.train)]


def test_two_inner_tars_of_one_class_are_one_class(tmp_path: Path) -> None:
    inner = [tar_bytes({f"{k}.jpg": jpeg(k) for k in numbers}) for numbers in ((1, 3), (2, 3))]
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a/cat.tar": inner[0], "b/cat.tar": inner[1]}))
    found = all_of(tmp_path / "x.tar")
    assert [item.file_name for item in found] == ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "cat/3.jpg"]
    assert bad(found) == {"cat/3.jpg": Reason.DUPLICATE_NAME}


def test_val_is_labelled_by_number_and_missing_numbers_are_named(net: SyntheticImageNet) -> None:
    sources = detect([net.val, net.devkit])
    found = list(merge(sources))
    assert len(found) == len(net.val_labels) - 2
    for ref in found:
        assert isinstance(ref, ImageRef)
        assert ref.class_name == net.val_labels[int(ref.file_name[-13:-5])]
    (note,) = (note for source in sources for note in source.notes)
    assert "2 of 12" in note
    assert "ILSVRC2012_val_00000005, ILSVRC2012_val_00000009" in note


def test_all_archives_in_any_mix_or_as_their_folder(net: SyntheticImageNet) -> None:
    found = all_of(net.devkit, net.test, net.val, net.train)
    counts = Counter(item.split for item in found)
    assert counts == {"train": len(net.train_names), "val": 10, "test": 4}
    keys = [(SPLITS.index(f.split), f.class_name, f.file_name) for f in found if isinstance(f, ImageRef)]
    assert keys == sorted(keys)
    assert good(all_of(net.folder)) == good(found)
    assert {item.split for item in all_of(net.folder, split="val")} == {"val"}


def test_the_test_split_has_no_classes(net: SyntheticImageNet) -> None:
    found = all_of(net.test)
    assert good(found)[0] == "ILSVRC2012_test_00000001.JPEG"
    assert {item.class_name for item in found if isinstance(item, ImageRef)} == {""}


def test_a_val_number_beyond_the_ground_truth_is_unlabelled(tmp_path: Path) -> None:
    val = tmp_path / "val.tar"
    val.write_bytes(tar_bytes({f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in (1, 7)} | {"cat.jpg": jpeg()}))
    devkit = tmp_path / "devkit.tar.gz"
    devkit.write_bytes(devkit_bytes({"n01440764": 2, "n01443537": 1}, [2, 1]))
    found = all_of(val, devkit)
    assert good(found) == ["n01440764/ILSVRC2012_val_00000001.JPEG"]
    assert bad(found) == {"ILSVRC2012_val_00000007.JPEG": Reason.UNLABELLED, "cat.jpg": Reason.UNLABELLED}


def test_info_digests_in_one_pass_and_reports_progress(net: SyntheticImageNet) -> None:
    seen: list[Progress] = []
    (source,) = detect([net.train])
    info = source.info(seen.append)
    data = net.train.read_bytes()
    assert (info["md5"], info["sha256"]) == (hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
    assert (info["name"], info["size_bytes"], info["images"]) == (net.train.name, len(data), len(net.train_names))
    assert seen[-1].done == seen[-1].total == len(data)
    assert info["official"] is False
    assert catalog.archives()[net.train.name].md5 in source.notes[-1]


def test_the_devkit_is_a_source_without_images(net: SyntheticImageNet) -> None:
    devkit = detect([net.val, net.devkit])[1]
    assert list(devkit.refs()) == []
    assert devkit.info()["images"] is None
    assert devkit.info()["md5"] == hashlib.md5(net.devkit.read_bytes()).hexdigest()


# --- digests against the catalogue -----------------------------------------------------------------------------------


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> dict[str, catalog.Archive]:
    """A catalogue that a test may change; the real one stays as it is."""
    entries = dict(catalog.archives())
    monkeypatch.setattr(catalog, "archives", lambda: entries)
    return entries


def _catalogued(path: Path, name: str) -> catalog.Archive:
    data = path.read_bytes()
    return dataclasses.replace(
        catalog.archives()[name],
        size_bytes=len(data),
        md5=hashlib.md5(data).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def test_an_official_archive_is_known_by_its_digests(
    net: SyntheticImageNet, catalogue: dict[str, catalog.Archive]
) -> None:
    catalogue[net.train.name] = _catalogued(net.train, net.train.name)
    (source,) = detect([net.train])
    assert source.info()["official"]
    assert source.notes == ()


def test_other_bytes_at_the_official_size_name_both_digests(
    net: SyntheticImageNet, catalogue: dict[str, catalog.Archive], tmp_path: Path
) -> None:
    entry = _catalogued(net.train, net.train.name)
    catalogue[net.train.name] = entry
    data = bytearray(net.train.read_bytes())
    data[2000] ^= 1
    flipped = tmp_path / net.train.name
    flipped.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        detect([flipped])[0].info()
    assert entry.md5 in str(caught.value)
    assert hashlib.md5(data).hexdigest() in str(caught.value)


def test_the_dogs_under_the_name_of_the_whole_set_are_told(
    net: SyntheticImageNet, catalogue: dict[str, catalog.Archive]
) -> None:
    name = "ILSVRC2012_img_train_t3.tar"
    catalogue[name] = dataclasses.replace(_catalogued(net.train, name), size_bytes=None, sha256="")
    with pytest.raises(SourceError, match=r"a public README prints the MD5s of .* swapped") as caught:
        detect([net.train])[0].info()
    assert catalog.archives()["ILSVRC2012_img_train.tar"].md5 in str(caught.value)
    assert catalogue[name].md5 in str(caught.value)


# --- plain tars ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "./", "data/", "./a/b/"])
def test_class_folders_below_any_top_folder(tmp_path: Path, top: str) -> None:
    tar = tmp_path / "x.tar"
    members = {f"{top}dog/2.jpg": jpeg(1), f"{top}cat/1.jpg": jpeg(0), f"{top}dog/1.jpg": jpeg(2), f"{top}README": b"x"}
    tar.write_bytes(tar_bytes(members))
    (source,) = detect([tar])
    found = list(source.refs())
    assert good(found) == ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert data_of(found[2]) == members[f"{top}dog/2.jpg"]
    assert source.notes == ("x.tar: 1 other files ignored (no suffix 1)",)


def test_split_folders_in_a_tar(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(
        tar_bytes({f"set/{s}/{c}/{k}.jpg": jpeg(k) for s in ("train", "val") for c in "ab" for k in (1, 2)})
    )
    assert Counter((f.split, f.class_name) for f in all_of(tar) if isinstance(f, ImageRef)) == {
        (split, name): 2 for split in ("train", "val") for name in "ab"
    }
    assert {item.split for item in all_of(tar, split="val")} == {"val"}


def test_a_tar_of_tiny_imagenet_equals_its_folder(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny", test=2)
    with tarfile.open(tmp_path / "tiny.tar", "w") as archive:
        archive.add(root, "tiny")
    from_tar, from_folder = all_of(tmp_path / "tiny.tar"), all_of(root)
    assert [(f.split, f.file_name) for f in from_tar] == [(f.split, f.file_name) for f in from_folder]
    assert [data_of(f) for f in from_tar] == [data_of(f) for f in from_folder]


@pytest.mark.real_data
def test_the_real_photographs(shared_data: Path) -> None:
    found = all_of(shared_data / "imagenet-samples-250.tar")
    assert len(good(found)) == len(found) == 250
    assert all(data_of(ref)[:3] == b"\xff\xd8\xff" for ref in found)


# --- tar formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_format(tmp_path: Path, tar_format: int) -> None:
    names = ["cat/1.jpg", f"{'c' * 90}/{'n' * 60}.jpg"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += [f"{'d' * 200}/{'m' * 200}.jpg", "猫/ün ï.jpg"]
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: jpeg(k) for k, name in enumerate(names)}, tar_format=tar_format))
    found = all_of(tmp_path / "x.tar")
    assert sorted(good(found)) == sorted(names)
    assert {item.file_name: data_of(item) for item in found} == {name: jpeg(k) for k, name in enumerate(names)}


def test_a_base_256_size_is_read(tmp_path: Path) -> None:
    data = bytearray(tar_bytes({"cat/1.jpg": jpeg(), "cat/2.jpg": jpeg(1)}))
    data[124:136] = b"\x80" + len(jpeg()).to_bytes(11, "big")
    _sign(data, 0)
    (tmp_path / "x.tar").write_bytes(data)
    assert [data_of(ref) for ref in all_of(tmp_path / "x.tar")] == [jpeg(), jpeg(1)]


def test_sizes_beyond_8_gib_are_walked_over_without_reading(tmp_path: Path) -> None:
    """A 20 GiB inner tar (sparse on disk) with its last image beyond 2^34: both header kinds, read at its offset."""
    image, far = jpeg(), 20 << 30
    for flavour in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{flavour}.tar"
        info = tarfile.TarInfo("a/filler.bin")
        info.size = far
        header = info.tobuf(flavour)
        with path.open("wb") as file:
            file.write(header)
            file.seek(len(header) + far)
            file.write(tar_bytes({"b/far.jpg": image}).rstrip(b"\x00"))
            file.write(bytes(-file.tell() % 512 + 1024))
        found = all_of(path)
        assert good(found) == ["b/far.jpg"]
        assert data_of(found[0]) == image
        path.unlink()


def _sign(data: bytearray, at: int) -> None:
    """Write a header's checksum anew."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\x00 " % sum(data[at : at + 512])


# --- hostile ones ----------------------------------------------------------------------------------------------------


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _hostile(members: Mapping[str, bytes], specials: list[tarfile.TarInfo]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for special in specials:
            archive.addfile(special)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


HOSTILE_NAMES = ["/etc/passwd.jpg", "../../outside.jpg", "cat/../../x.jpg", "cat/caf\udce9.jpg", "cat/two\nlines.jpg"]
SPECIALS = [
    _special("cat/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    _special("cat/hard.jpg", tarfile.LNKTYPE, "../../etc/passwd"),
    _special("cat/tty.jpg", tarfile.CHRTYPE),
    _special("cat/pipe.jpg", tarfile.FIFOTYPE),
    _special("cat/folder", tarfile.DIRTYPE),
]


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    """A folder whose listing, and that of its parent, must be the same afterwards but for ``x.tar`` itself."""
    inside = tmp_path / "in" / "deep"
    inside.mkdir(parents=True)
    yield inside
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/deep", "in/deep/x.tar"]


@pytest.mark.parametrize("nested", [False, True])
def test_hostile_members_are_rejected_one_by_one(nothing_written: Path, nested: bool) -> None:
    members = {name: jpeg() for name in ["cat/1.jpg", *HOSTILE_NAMES, "cat/2.jpg"]}
    data = _hostile(members, SPECIALS)
    tar = nothing_written / "x.tar"
    tar.write_bytes(tar_bytes({"cat.tar": data}) if nested else data)
    found = all_of(tar)
    assert good(found) == ["cat/1.jpg", "cat/2.jpg"]
    rejected = bad(found)
    assert set(rejected.values()) == {Reason.UNREADABLE}
    assert len(found) == len(members) + 4  # the folder is no image
    assert all(name.isprintable() for name in rejected)
    assert any("caf\\xe9" in name for name in rejected)


def _pax(*members: tuple[str, dict[str, str]]) -> bytes:
    """A tar of images with extended headers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(jpeg()), headers
            archive.addfile(info, io.BytesIO(jpeg()))
    return out.getvalue()


def test_a_null_byte_in_the_name_of_an_extended_header_is_damage(tmp_path: Path) -> None:
    long = f"cat/{'n' * 120}.jpg"
    (tmp_path / "x.tar").write_bytes(_pax((f"{long}\x00.jpg", {}), ("cat/2.jpg", {})))
    found = salvaged(tmp_path / "x.tar", "a null byte in the name")
    assert good(found) == ["cat/2.jpg"]
    assert list(bad(found).values()) == [Reason.UNREADABLE]


def test_a_size_of_thousands_of_digits_is_damage(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_pax(("cat/1.jpg", {}), ("cat/2.jpg", {"size": "9" * 5000}), ("cat/3.jpg", {})))
    found = salvaged(tmp_path / "x.tar", "a size of 5000 characters")
    assert good(found) == ["cat/1.jpg", "cat/3.jpg"]
    assert bad(found) == {"cat/2.jpg": Reason.UNREADABLE}


@pytest.mark.parametrize("nested", [False, True])
def test_a_second_member_of_the_same_name_is_rejected(tmp_path: Path, nested: bool) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for k in range(3):
            info = tarfile.TarInfo("cat/1.jpg")
            info.size = len(jpeg(k))
            archive.addfile(info, io.BytesIO(jpeg(k)))
    (tmp_path / "x.tar").write_bytes(tar_bytes({"cat.tar": out.getvalue()}) if nested else out.getvalue())
    found = all_of(tmp_path / "x.tar")
    assert [type(item).__name__ for item in found] == ["ImageRef", "Rejected", "Rejected"]
    assert data_of(found[0]) == jpeg(0)
    assert bad(found) == {"cat/1.jpg": Reason.DUPLICATE_NAME}


def _with_size(tar: bytes, index: int, text: bytes) -> bytes:
    """Rewrite the size field of the member ``index``, checksum made right."""
    data, at = bytearray(tar), 0
    for _ in range(index):
        at += 512 + (int(data[at + 124 : at + 135], 8) + 511) // 512 * 512
    data[at + 124 : at + 136] = text
    _sign(data, at)
    return bytes(data)


@pytest.mark.parametrize("size", [b"00000000001\x00", b"77777777777\x00", b"not a number", b"\xff" * 12])
@pytest.mark.parametrize("nested", [False, True])
def test_a_lying_size_costs_its_own_member_alone(tmp_path: Path, size: bytes, nested: bool) -> None:
    honest = tar_bytes(
        {f"cat/{k}.jpg": jpeg(k, width=64, height=64) for k in range(5)}, tar_format=tarfile.USTAR_FORMAT
    )
    data = _with_size(honest, 2, size)
    (tmp_path / "x.tar").write_bytes(tar_bytes({"cat.tar": data, "dog.tar": honest}) if nested else data)
    found = salvaged(tmp_path / "x.tar")
    assert {f"cat/{k}.jpg" for k in (0, 1, 3, 4)} <= set(good(found))
    assert bad(found) or "cat/2.jpg" in good(found)  # with the size that its header says
    assert len([name for name in good(found) if name.startswith("dog/")]) == (5 if nested else 0)


def test_a_lying_size_of_the_last_member_is_no_cut(tmp_path: Path) -> None:
    data = _with_size(tar_bytes({f"cat/{k}.jpg": jpeg(k) for k in range(3)}), 2, b"00077777777\x00")
    (tmp_path / "x.tar").write_bytes(data)
    found = salvaged(tmp_path / "x.tar")
    assert (good(found), bad(found)) == (["cat/0.jpg", "cat/1.jpg"], {"cat/2.jpg": Reason.UNREADABLE})


def test_a_lying_inner_tar_costs_no_image(tmp_path: Path) -> None:
    inner = {f"{name}.tar": tar_bytes({f"{k}.jpg": jpeg(k) for k in range(3)}) for name in ("ant", "bee", "cat")}
    (tmp_path / "x.tar").write_bytes(_with_size(tar_bytes(inner), 1, b"00777777777\x00"))
    found = salvaged(tmp_path / "x.tar")
    assert good(found) == [f"{name}/{k}.jpg" for name in ("ant", "bee", "cat") for k in range(3)]
    assert bad(found) == {"bee/bee.tar": Reason.UNREADABLE}


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    sparse = bytearray(tar_bytes({"cat/1.jpg": jpeg(), "cat/2.jpg": jpeg(1)}))
    sparse[156:157] = b"S"
    _sign(sparse, 0)
    (tmp_path / "x.tar").write_bytes(sparse)
    found = all_of(tmp_path / "x.tar")
    assert (good(found), bad(found)) == (["cat/2.jpg"], {"cat/1.jpg": Reason.UNREADABLE})


def test_damaged_archives_never_crash_the_walk(tmp_path: Path) -> None:
    """500 damaged copies: every walk ends, offsets stay within the file, errors are ours."""
    rng = random.Random(5)
    plain = _hostile({f"cat/{k}.jpg": jpeg(k) for k in range(4)} | {"c" * 150 + "/1.jpg": jpeg()}, SPECIALS)
    pax = tar_bytes({f"猫/{k}.jpg": jpeg(k) for k in range(4)}, tar_format=tarfile.PAX_FORMAT)
    seeds = [plain, pax, tar_bytes({"cat.tar": plain, "dog.tar": pax})]
    path = tmp_path / "x.tar"
    for _ in range(500):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 3, 10))):
            at = rng.randrange(len(data) // 512) * 512 + rng.choice((rng.randrange(512), rng.randrange(100, 160)))
            data[at : at + 1] = rng.choice((bytes([rng.randrange(256)]), b"", b"\x80", rng.randbytes(3)))
            if rng.random() < 0.7 and at // 512 * 512 + 512 <= len(data):
                _sign(data, at // 512 * 512)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            found = all_of(path)
        except SourceError:
            continue
        for item in found:
            if isinstance(item, ImageRef):
                assert item.offset + item.size_bytes <= len(data)


def test_a_walk_reads_headers_only(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({f"cat/{k}.bin": bytes(100_000) for k in range(20)}))
    asked: list[int] = []

    class Counted(PlainFile):
        def read(self, size_bytes: int, offset: int) -> bytes:
            asked.append(size_bytes)
            return super().read(size_bytes, offset)

    file = Counted(tmp_path / "x.tar")
    members = list(walk(file))
    assert len(members) == 20
    assert asked[:21] == [512] * 21
    assert len(asked) == 22  # the zeros at the end


def test_descriptors_stay_few(tmp_path: Path) -> None:
    for k in range(50):
        (tmp_path / f"{k}.tar").write_bytes(tar_bytes({f"cat/{k}.jpg": jpeg(k)}))
    found = all_of(*(tmp_path / f"{k}.tar" for k in range(50)))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [data_of(ref) for ref in found] == [jpeg(int(ref.file_name[4:-4])) for ref in found]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 32


# --- errors ----------------------------------------------------------------------------------------------------------


def _cut(path: Path, folder: Path, share: float = 0.5) -> Path:
    data = path.read_bytes().rstrip(b"\x00")  # a tar ends in zeros, which may go unmissed
    cut = folder / path.name
    cut.write_bytes(data[: int(len(data) * share)])
    return cut


def _refs(sources: list[Source]) -> None:
    for source in sources:
        list(source.refs())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77, 0.95])
def test_a_tar_cut_short_is_an_error(net: SyntheticImageNet, tmp_path: Path, share: float) -> None:
    plain = tmp_path / "plain.tar"
    plain.write_bytes(tar_bytes({f"cat/{k}.jpg": jpeg(k, width=99, height=99) for k in range(30)}))
    (tmp_path / "cut").mkdir()
    for path in (net.train, net.val, plain):
        cut = _cut(path, tmp_path / "cut", share)
        with pytest.raises(SourceError, match=r"not (a )?whole|cannot|holds no images") as caught:
            _refs(detect([cut, net.devkit]))
        assert "\n" not in str(caught.value)


def test_a_cut_at_a_member_boundary_is_an_error_too(tmp_path: Path) -> None:
    one = tar_bytes({"cat/1.jpg": jpeg()})
    body = 512 + (len(jpeg()) + 511) // 512 * 512
    (tmp_path / "x.tar").write_bytes(one[:body])
    with pytest.raises(SourceError, match="no end-of-archive block"):
        _refs(detect([tmp_path / "x.tar"]))


def test_val_without_labels_asks_for_the_devkit(net: SyntheticImageNet) -> None:
    for paths in ([net.val], [net.train, net.val]):
        with pytest.raises(SourceError, match="need their labels"):
            detect(paths)
    with pytest.raises(SourceError, match="labels and no images"):
        detect([net.devkit])


def test_what_is_no_archive_is_an_error(tmp_path: Path) -> None:
    gz = tar_bytes({"cat/1.jpg": jpeg()}, mode="w:gz")
    for name, data, words in [
        ("empty.tar", b"", "is empty"),
        ("noise.tar", random.Random(1).randbytes(4000), "not a tar archive"),
        ("x.tar.gz", gz, "cannot be read in place"),
        ("x.zip", b"PK\x03\x04" + bytes(600), "not a whole zip"),
        ("words.tar", tar_bytes({"a/b.txt": b"x"}), "holds no images"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError, match=words) as caught:
            _refs(detect([tmp_path / name]))
        assert "\n" not in str(caught.value)


def test_a_devkit_that_is_not_one_is_an_error(tmp_path: Path) -> None:
    ids = {"n01440764": 2, "n01443537": 1}
    truth = "data/ILSVRC2012_validation_ground_truth.txt"
    whole = devkit_bytes(ids, [1, 2])
    for data, words in [
        (b"hello", "not the ILSVRC2012 devkit"),
        (whole[: len(whole) // 2], "not the ILSVRC2012 devkit"),
        (tar_bytes({"a/b.txt": b"x"}, "w:gz"), "data/meta.mat"),
        (tar_bytes({"data/meta.mat": meta_mat(ids)}, "w:gz"), "ground_truth"),
        (tar_bytes({"data/meta.mat": b"MATLAB 5.0 no" * 50, truth: b"1\n"}, "w:gz"), "meta.mat"),
        (tar_bytes({"data/meta.mat": meta_mat(ids)[:300], truth: b"1\n"}, "w:gz"), "meta.mat"),
        (devkit_bytes(ids, [1, 3]), "line 2 .* is not the ILSVRC2012_ID of a class"),
        (tar_bytes({"data/meta.mat": meta_mat(ids), truth: b"1\nx\n"}, "w:gz"), "line 2"),
        (tar_bytes({"data/meta.mat": meta_mat(ids), truth: b""}, "w:gz"), "is empty"),
    ]:
        path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=words) as caught:
            read_devkit(path)
        assert "\n" not in str(caught.value)


def test_synsets_above_the_classes_are_no_labels(net: SyntheticImageNet) -> None:
    labels = read_devkit(net.devkit)
    assert set(labels.by_key.values()) == set(net.wnids)
    assert {int(number): wnid for number, wnid in labels.by_key.items()} == dict(net.val_labels)


def test_damage_says_whether_anything_follows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes({"cat/1.jpg": jpeg()})[:700])
    (damage,) = walk(PlainFile(path))
    assert damage.last
    assert damage.name == "cat/1.jpg"


def test_an_archive_whose_name_is_not_utf8_is_named_with_escapes(tmp_path: Path) -> None:
    archive, out = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/photos\xff.tar", b"/records\xff"))
    with tarfile.open(archive, "w") as tar:
        tar.add(make_image_folder(tmp_path / "photos", 2, 3), arcname="photos")
    manifest = run(archive, out).manifest
    assert [source["name"] for source in manifest.sources] == [r"photos\xff.tar"]
    assert verify(out, "decode", 1, lambda _: None).ok
