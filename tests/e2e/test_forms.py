"""The same images in every form that people have them give the same shards, and so does the way back."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.build.export import export
from imnet_prep.build.reshard import ReshardOptions, reshard
from imnet_prep.records.manifest import MANIFEST
from imnet_prep.sources import detect, read
from imnet_prep.types import ImageRef, RawImage
from tests.imnet_prep.sources.parquets import write_parquet
from tests.records import quiet, run
from tests.synthetic import jpeg, tar_bytes

Images = Mapping[str, bytes]  # by <split>/<class>/<name>
NOT_COMPARED = {"sources", "self_sha256"}


def parts(images: Images) -> Iterator[tuple[str, str, str, bytes]]:
    for path, data in images.items():
        split, class_name, name = path.split("/")
        yield split, class_name, name, data


def as_folder(images: Images, root: Path) -> Path:
    for path, data in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def as_tar(images: Images, root: Path) -> Path:
    (root / "images.tar").write_bytes(tar_bytes({f"ds/{path}": data for path, data in reversed(list(images.items()))}))
    return root / "images.tar"


def as_compressed_tar(images: Images, root: Path) -> Path:
    (root / "images.tar.gz").write_bytes(gzip.compress(as_tar(images, root).read_bytes(), 1))
    return root / "images.tar.gz"


def as_nested_tar(images: Images, root: Path) -> Path:
    classes: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for _, class_name, name, data in parts(images):
        classes[class_name][name] = data
    inner = {f"{class_name}.tar": tar_bytes(files) for class_name, files in classes.items()}
    (root / "classes.tar").write_bytes(tar_bytes(inner))
    return root / "classes.tar"


def as_zip(images: Images, root: Path) -> Path:
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for number, (path, data) in enumerate(images.items()):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
            archive.writestr(path, data, method, 1)
    return root / "images.zip"


def as_webdataset(images: Images, root: Path) -> Path:
    webdataset = pytest.importorskip("webdataset")
    classes = sorted({class_name for _, class_name, _, _ in parts(images)})
    for split in sorted({path.partition("/")[0] for path in images}):
        with webdataset.ShardWriter(str(root / f"ds-{split}-%06d.tar"), maxcount=100, verbose=0) as sink:
            for its, class_name, name, data in parts(images):
                if its == split:
                    key, _, suffix = name.partition(".")
                    sink.write({"__key__": key, suffix: data, "cls": classes.index(class_name)})
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def as_parquet(images: Images, root: Path) -> Path:
    pytest.importorskip("pyarrow")
    names = sorted({class_name for _, class_name, _, _ in parts(images)})
    for split in sorted({path.partition("/")[0] for path in images}):
        rows = [(class_name, name, data) for its, class_name, name, data in parts(images) if its == split]
        middle = len(rows) // 2
        for number, part in enumerate((rows[:middle], rows[middle:])):
            write_parquet(root / "data" / f"{split}-{number:05d}-of-00002.parquet", part, names, row_group_size=40)
    return root


FORMS: Mapping[str, Callable[[Images, Path], Path]] = {
    "tar": as_tar, "tar.gz": as_compressed_tar, "nested tar": as_nested_tar, "zip": as_zip,
    "webdataset": as_webdataset, "parquet": as_parquet,
}  # fmt: skip


def compared(records: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((records / MANIFEST).read_bytes())
    assert values.keys() >= NOT_COMPARED
    return {key: value for key, value in values.items() if key not in NOT_COMPARED}


def check_forms(images: Images, tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    for form, make in {"folder": as_folder, **FORMS}.items():
        if form == "nested tar" and any(not path.startswith("train/") for path in images):
            continue  # it holds one split
        root = tmp_path / form
        root.mkdir()
        run(make(images, root), tmp_path / f"{form} records", shards=2, max_rejected="0")
        expected = expected or compared(tmp_path / f"{form} records")
        assert compared(tmp_path / f"{form} records") == expected, form


def check_way_back(records: Path, images: int, tmp_path: Path) -> None:
    proofs = {reshard([records], tmp_path / "resharded", ReshardOptions(workers=1), quiet).to_json()["proof"]}
    for to in ("imagefolder", "webdataset"):
        result = export(records, tmp_path / f"{to} exported", to, None, quiet)
        assert sum(result.images.values()) == images
        run(tmp_path / f"{to} exported", tmp_path / f"{to} again", shards=2, max_rejected="0")
        assert compared(tmp_path / f"{to} again") == compared(records), to
        again = reshard([tmp_path / f"{to} again"], tmp_path / f"{to} resharded", ReshardOptions(workers=1), quiet)
        proofs |= {result.proof, again.to_json()["proof"]}
    assert len(proofs) == 1


def read_all(archive: Path) -> dict[str, bytes]:
    found = {}
    for ref in detect([archive])[0].refs():
        assert isinstance(ref, ImageRef)
        raw = read(ref)
        assert isinstance(raw, RawImage)
        found[f"{ref.split}/{ref.file_name}"] = raw.data
    return found


@pytest.fixture(scope="module")
def drawn() -> Images:
    """Images of three classes in two splits."""
    return {
        f"{split}/{name}/{name}_{split}_{number}.JPEG": jpeg(
            label, 100 * label + number + 50 * (split == "val"), 32, 24
        )
        for split, count in (("train", 9), ("val", 3))
        for label, name in enumerate(("cat", "dog", "owl"))
        for number in range(count)
    }


def test_drawn_images_give_the_same_shards_in_every_form(drawn: Images, tmp_path: Path) -> None:
    check_forms(drawn, tmp_path)
    check_way_back(tmp_path / "webdataset records", len(drawn), tmp_path)


@pytest.mark.slow
@pytest.mark.real_data
def test_photographs_give_the_same_shards_in_every_form(shared_data: Path, tmp_path: Path) -> None:
    images = read_all(shared_data / "imagenet-samples-250.tar")
    assert len(images) == 250
    check_forms(images, tmp_path)
    check_way_back(tmp_path / "parquet records", 250, tmp_path)


@pytest.mark.long
@pytest.mark.real_data
def test_tiny_imagenet_gives_the_same_shards_in_every_form(shared_data: Path, tmp_path: Path) -> None:
    images = read_all(shared_data / "tiny-imagenet-10.tar")
    assert len(images) > 5000
    check_forms(images, tmp_path)
    check_way_back(tmp_path / "zip records", len(images), tmp_path)
