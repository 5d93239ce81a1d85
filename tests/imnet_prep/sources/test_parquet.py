"""Parquet files: the same records as the folder, Hugging Face's names and splits, and nothing lost of damaged ones."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imnet_prep import catalog
from imnet_prep.build.convert import convert, dry_run
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.errors import ImnetError, Interrupted, SourceError
from imnet_prep.sources import detect, merge, parquet_rows, read
from imnet_prep.sources.parquet import class_name, is_imagenet
from imnet_prep.sources.staging import Staging
from imnet_prep.types import ImageRef, Progress, RawImage, Reason, Rejected
from tests.imnet_prep.sources.parquets import Row, rows_of, write_parquet
from tests.synthetic import WNIDS, encode, jpeg, make_image_folder, picture

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS: list[Row] = [(wnid, f"{wnid}_{k}.JPEG", jpeg(c, k)) for c, wnid in enumerate(WNIDS[:3]) for k in range(5)]


def quiet(state: Progress) -> None:
    """Say nothing."""


@dataclass
class Read:
    """What a source gave."""

    images: dict[str, bytes]
    rejected: list[Rejected]
    notes: str
    meta: dict[str, str]
    splits: dict[str, str]


def read_all(path: Path, split: str | None = None) -> Read:
    """Read a source to its end."""
    sources = detect([path], split, Staging(path.with_name("staged")))
    found = list(merge(sources))
    refs = [ref for ref in found if isinstance(ref, ImageRef)]
    raws = [read(ref) for ref in refs]
    assert all(isinstance(raw, RawImage) for raw in raws)
    return Read(
        {raw.ref.file_name: raw.data for raw in raws if isinstance(raw, RawImage)},
        [item for item in found if isinstance(item, Rejected)],
        "\n".join(note for source in sources for note in source.notes),
        {ref.file_name: ref.meta for ref in refs if ref.meta},
        {ref.file_name: ref.split for ref in refs},
    )


def run(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Convert in one process, and return the manifest."""
    convert([path], out, None, PlanOptions(**options), ConvertOptions(workers=1), quiet, lambda: False)
    return dict(json.loads((out / "manifest.json").read_bytes()))


def test_it_gives_the_same_shards_as_the_folder(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path / "photos", 3, 6)
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", rows_of(folder / "train")[:10])
    write_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", rows_of(folder / "train")[10:], WNIDS[:3])
    rewritten = write_parquet(
        tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", rows_of(folder / "train")[:10], WNIDS[:3]
    )
    write_parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", rows_of(folder / "val"))
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "hub" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "hub" / ".cache" / "huggingface" / "x.parquet").write_bytes(b"unfinished")
    assert rewritten.exists()
    plain, other = run(folder, tmp_path / "plain"), run(tmp_path / "hub", tmp_path / "other")
    images = sum(path.stat().st_size for path in folder.glob("*/*/*"))
    assert other["sources"] == [
        {"kind": "parquet", "name": "", "size_bytes": images, "md5": "", "sha256": "", "official": False, "images": 36}
    ]
    assert {**plain, "sources": [], "self_sha256": ""} == {**other, "sources": [], "self_sha256": ""}
    assert not (tmp_path / "other.partial").exists()


def test_what_the_datasets_package_writes_is_read(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "fixtures" / "hugging_face", tmp_path / "hub")
    got = read_all(tmp_path / "hub")
    splits = {"train": range(3), "val": range(1)}
    assert sorted(got.images) == sorted(
        f"{wnid}/{wnid}_{split}_{k}.jpg" for wnid in WNIDS[:2] for split, numbers in splits.items() for k in numbers
    )
    assert all(Image.open(io.BytesIO(data)).size == (24, 16) for data in got.images.values())
    assert sorted(got.splits.values()) == ["train"] * 6 + ["val"] * 2


def test_a_single_file_has_its_name_and_digests(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "photos.parquet", ROWS)
    (entry,) = run(path, tmp_path / "out")["sources"]
    data = path.read_bytes()
    assert (entry["name"], entry["size_bytes"], entry["images"]) == ("photos.parquet", len(data), 15)
    assert entry["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_encoding_gives_the_bytes(tmp_path: Path, codec: str, version: str) -> None:
    options: dict[str, Any] = {
        "compression": codec,
        "data_page_version": version,
        "row_group_size": 4,
        "use_dictionary": codec != "none",
    }
    got = read_all(write_parquet(tmp_path / "x.parquet", ROWS, **options))
    assert got.images == {f"{wnid}/{name}": data for wnid, name, data in ROWS}


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=["binary", "large_binary", "binary_view"]
)
def test_a_column_of_bytes_and_one_of_texts(tmp_path: Path, kind: Any) -> None:
    table = pa.table({"jpg": pa.array([row[2] for row in ROWS], kind), "cls": [row[0] for row in ROWS]})
    pq.write_table(table, tmp_path / "x.parquet")
    got = read_all(tmp_path / "x.parquet")
    assert got.images == {f"{wnid}/{k:08d}.jpg": data for k, (wnid, _, data) in enumerate(ROWS)}
    assert "images from the column 'jpg', classes from 'cls'" in got.notes


def test_names_without_a_path_are_numbered_by_split_and_told_apart_by_content(tmp_path: Path) -> None:
    png = encode(picture(1, 1), "PNG")
    for number in range(2):
        rows: list[Row] = [("a", None, jpeg(1, number)), ("a", "", png), ("b", "deep/er\\x.jpg", b"no image")]
        write_parquet(tmp_path / "hub" / f"train-0000{number}-of-00002.parquet", rows)
    got = read_all(tmp_path / "hub")
    names = ["a/00000000.jpg", "a/00000001.png", "a/00000003.jpg", "a/00000004.png", "b/x-row5.jpg", "b/x.jpg"]
    assert list(got.images) == names
    assert "1 images have the name of another one" in got.notes


def test_null_images_and_labels_are_rejected_by_name(tmp_path: Path) -> None:
    rows = [*ROWS, ("n01440764", "null.jpg", None), ("n01440764", None, None)]
    labels = [*([0] * 13), None, -1, 0, 0]
    got = read_all(write_parquet(tmp_path / "x.parquet", rows, labels=labels))
    assert len(got.images) == 13
    assert {(item.file_name, item.reason) for item in got.rejected} == {
        (ROWS[13][1], Reason.UNLABELLED),
        (ROWS[14][1], Reason.UNLABELLED),
        ("null.jpg", Reason.UNREADABLE),
        ("00000016.img", Reason.UNREADABLE),
    }


def test_the_test_split_needs_no_labels(tmp_path: Path) -> None:
    names = [f"ILSVRC2012_test_{k:08d}.JPEG" for k in range(3)]
    rows: list[Row] = [("", name, jpeg(1, k)) for k, name in enumerate(names)]
    for labels in ([-1] * 3, [None, None, -1]):
        path = write_parquet(tmp_path / "test-00000-of-00001.parquet", rows, WNIDS, labels=labels)
        got = read_all(path)
        assert sorted(got.images) == names
        assert set(got.splits.values()) == {"test"}


def test_numbers_without_names_are_names_in_their_order(tmp_path: Path) -> None:
    labels = [k for k in range(11) for _ in range(2)]
    rows: list[Row] = [("", f"{k}.jpg", jpeg(k, k)) for k in range(22)]
    got = read_all(write_parquet(tmp_path / "x.parquet", rows, [], labels=labels))
    assert {name.split("/")[0] for name in got.images} == {f"{k:02d}" for k in range(11)}
    assert "the numbers are used as names" in got.notes


def test_a_list_names_the_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS, [], labels=[k // 5 for k in range(15)])
    (tmp_path / "names.txt").write_text("\n".join(WNIDS[:3]) + "\n", encoding="utf-8")
    listed = run(path, tmp_path / "out", classes=str(tmp_path / "names.txt"))
    named = run(write_parquet(tmp_path / "y.parquet", ROWS), tmp_path / "other")
    assert listed["splits"] == named["splits"]
    (tmp_path / "names.txt").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(SourceError, match="class 2 has no name"):
        run(path, tmp_path / "third", classes=str(tmp_path / "names.txt"))


def test_class_names_that_no_folder_can_have_are_changed(tmp_path: Path) -> None:
    assert class_name(" cat/dog\n") == "cat_dog"
    assert [class_name(name) for name in ("..", ".", "", ".a")] == ["__", "_", "_", ".a"]
    got = read_all(write_parquet(tmp_path / "x.parquet", ROWS, ["a/b", "c", *WNIDS[:3]], labels=[0] * 15))
    assert {name.split("/")[0] for name in got.images} == {"a_b"}
    with pytest.raises(SourceError, match="two classes have the same name"):
        read_all(write_parquet(tmp_path / "y.parquet", ROWS, ["a/b", "a_b", *WNIDS[:3]]))


def imagenet_rows() -> tuple[list[Row], list[int]]:
    """Rows as those of ILSVRC/imagenet-1k: words as names, the WordNet id at the end of each path."""
    rows: list[Row] = []
    for label, wnid in enumerate(WNIDS[:4]):
        rows += [("", f"{wnid}_{k}_{wnid}.JPEG", jpeg(label, k)) for k in range(3)]
    return rows, [label for label in range(4) for _ in range(3)]


def hub_words() -> list[str]:
    """The class names of ILSVRC/imagenet-1k, whose second crane has another name, as a ClassLabel must have."""
    words = [synset.words for synset in catalog.synsets()]
    words[words.index("crane", words.index("crane") + 1)] = "crane2"
    return words


def test_imagenet_gets_its_wordnet_ids_and_official_names(tmp_path: Path) -> None:
    rows, labels = imagenet_rows()
    data = tmp_path / "imagenet-1k" / "data"
    write_parquet(data / "train-00000-of-00001.parquet", rows, hub_words(), labels=labels)
    val: list[Row] = [("", f"ILSVRC2012_val_0000000{k}_{WNIDS[k]}.JPEG", jpeg(k, 70 + k)) for k in range(4)]
    write_parquet(data / "validation-00000-of-00001.parquet", val, hub_words(), labels=range(4))
    got = read_all(tmp_path / "imagenet-1k")
    assert sorted(name for name, split in got.splits.items() if split == "train") == sorted(
        f"{wnid}/{wnid}_{k}.JPEG" for wnid in WNIDS[:4] for k in range(3)
    )
    assert sorted(name for name, split in got.splits.items() if split == "val") == [
        f"{WNIDS[k]}/ILSVRC2012_val_0000000{k}.JPEG" for k in range(4)
    ]
    assert "under their WordNet ids" in got.notes
    manifest = run(tmp_path / "imagenet-1k", tmp_path / "out", label_space="imagenet1k")
    assert len(manifest["classes"]) == 1000


def test_names_and_labels_of_imagenet_must_agree(tmp_path: Path) -> None:
    rows, labels = imagenet_rows()
    labels[5] = 0
    path = write_parquet(tmp_path / "train.parquet", rows, hub_words(), labels=labels)
    with pytest.raises(SourceError, match=f"row 5 of train: the label is {WNIDS[0]}, the name is {WNIDS[1]}_2"):
        read_all(path)


def test_other_lists_of_1000_names_are_not_imagenet() -> None:
    words = [synset.words for synset in catalog.synsets()]
    assert is_imagenet(words)
    assert is_imagenet([word.split(",")[0].replace(" ", "_") for word in words])
    assert not is_imagenet(words[:999])
    assert not is_imagenet(sorted(words))
    assert not is_imagenet([str(k) for k in range(1000)])


def test_other_small_columns_are_kept(tmp_path: Path) -> None:
    others: dict[str, list[Any]] = {
        "source": [f"s{k}" for k in range(15)], "score": [k / 4 for k in range(15)], "good": [True, None, False] * 5,
        "embedding": [[0.5, 0.5]] * 15, "mask": [b"xyz"] * 15,
    }  # fmt: skip
    got = read_all(write_parquet(tmp_path / "x.parquet", ROWS, others=others))
    assert json.loads(got.meta[f"{WNIDS[0]}/{ROWS[1][1]}"]) == {"source": "s1", "score": 0.25}
    assert json.loads(got.meta[f"{WNIDS[0]}/{ROWS[2][1]}"]) == {"source": "s2", "score": 0.5, "good": False}


# --- columns ---------------------------------------------------------------------------------------------------------


def test_the_columns_are_chosen_by_feature_then_name(tmp_path: Path) -> None:
    others: dict[str, list[Any]] = {"coarse_label": [0] * 15, "mask": [b"x"] * 15}
    path = write_parquet(tmp_path / "x.parquet", ROWS, image="img", label="fine_label", others=others)
    assert "images from the column 'img', classes from 'fine_label'" in read_all(path).notes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [b"x"], "b": [b"y"], "label": [1]}, "no column of images that can be told"),
        ({"text": ["x"], "label": [1]}, "no column of images that can be told"),
        ({"image": [b"x"]}, "no column of classes that can be told"),
        ({"image": [b"x"], "p": [1], "q": [2]}, "no column of classes that can be told"),
        ({"image": [b"x"], "label": [[1, 2]]}, "no column of classes that can be told"),
        ({"image": [b"x"], "label": [0.5]}, "no column of classes that can be told"),
    ],
)
def test_columns_that_cannot_be_told_are_an_error(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        read_all(tmp_path / "x.parquet")


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"]), pa.array([1])], names=["image", "image", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="two columns of one name"):
        read_all(tmp_path / "x.parquet")


def test_images_that_are_only_named_are_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [(wnid, name, None) for wnid, name, _ in ROWS])
    with pytest.raises(SourceError, match="holds no images"):
        read_all(path)


# --- folders ---------------------------------------------------------------------------------------------------------


def shards(tmp_path: Path, *names: str) -> Path:
    for name in names:
        write_parquet(tmp_path / "hub" / name, ROWS)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"], "without number 00001"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "not one whole series"),
        (["small/train-00000-of-00001.parquet", "large/train-00000-of-00001.parquet"], "give one of these folders"),
    ],
)
def test_an_incomplete_or_double_series_is_an_error(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_all(shards(tmp_path, *names))


def test_splits_are_named_by_files_or_their_folders(tmp_path: Path) -> None:
    folder = shards(tmp_path, "default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0.parquet")
    (source,) = detect([folder], None, Staging(tmp_path / "staged"))
    assert {ref.split for ref in source.refs() if isinstance(ref, ImageRef)} == {"train", "val", "test"}
    assert set(read_all(folder, "val").splits.values()) == {"val"}
    with pytest.raises(SourceError, match=r"has no val split; .* got train"):
        read_all(shards(tmp_path / "other", "train.parquet"), "val")
    assert set(read_all(shards(tmp_path / "third", "photos.parquet"), "val").splits.values()) == {"val"}


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path, "photos.parquet/part-00000-c000.snappy.parquet", "photos.parquet/_metadata.parquet")
    assert len(read_all(folder).images) == len(read_all(folder / "photos.parquet").images) == 15


def test_a_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    folder = shards(tmp_path, "train.parquet")
    (folder / "validation.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"validation\.parquet cannot be read"):
        read_all(folder)


def test_one_file_of_a_series_may_be_given(tmp_path: Path) -> None:
    folder = shards(tmp_path, "train-00001-of-00003.parquet")
    assert len(read_all(folder / "train-00001-of-00003.parquet").images) == 15


def test_parquet_beside_images_is_not_guessed(tmp_path: Path) -> None:
    folder = shards(tmp_path, "train.parquet")
    (folder / "logo.png").write_bytes(encode(picture(1, 1), "PNG"))
    with pytest.raises(SourceError, match="holds Parquet files and images"):
        read_all(folder)
    photos = make_image_folder(tmp_path / "photos", 2, 2, ())
    pq.write_table(pa.table({"file": ["a.jpg"], "text": ["a"]}), photos / "metadata.parquet")
    assert len(read_all(photos).images) == 4


def test_what_else_is_in_the_folder_is_not_passed_over(tmp_path: Path) -> None:
    folder = shards(tmp_path, "a/train-1.parquet", "a/train-2.PARQUET")
    assert len(read_all(folder).images) == 30
    (folder / "more.tar.gz").write_bytes(b"x")
    for given in (folder, f"file://{folder}"):
        (source,) = detect([given], None, Staging(tmp_path / "staged"))
        assert len(list(source.refs())) == 30
        assert any("more.tar.gz" in note for note in source.notes)
    shutil.copytree(folder / "a", folder / "b" / "c" / "d")
    with pytest.raises(SourceError, match=r"others further down; .* got b/c/d/train-[12]"):
        read_all(folder)


def test_files_with_other_class_names_are_not_mixed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub" / "train-00000-of-00002.parquet", ROWS)
    write_parquet(tmp_path / "hub" / "train-00001-of-00002.parquet", ROWS, [*reversed(WNIDS[:3])])
    with pytest.raises(SourceError, match="different columns or class names"):
        read_all(tmp_path / "hub")


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(data: bytes, draw: random.Random) -> bytes:
    """Return a file with one random fault."""
    at, size = draw.randrange(4, len(data)), draw.randrange(1, 400)
    faults: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[:at] + bytes(size) + data[at + size :],
        lambda: data[:at] + draw.randbytes(size) + data[at + size :],
        lambda: data[:at] + data[at + size :],
        lambda: data + data[:at],
    ]
    return draw.choice(faults)()


def account(folder: Path, data: bytes, rows: list[Row]) -> bool:
    """Convert a damaged file; check that it ends in an error, or that every row is stored or rejected."""
    path = folder / "x.parquet"
    path.write_bytes(data)
    try:
        convert(
            [path],
            folder / "out",
            None,
            PlanOptions(),
            ConvertOptions(workers=1, max_rejected="100%"),
            quiet,
            lambda: False,
        )
    except ImnetError:
        return False
    manifest = json.loads((folder / "out" / "manifest.json").read_bytes())
    stored = sum(split["images"] for split in manifest["splits"].values())
    rejected = (folder / "out" / "rejected.jsonl").read_text(encoding="utf-8").count("\n")
    assert stored + rejected == len(rows)
    return True


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_a_damaged_file_is_an_error_or_accounted_for(tmp_path: Path, count: int) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", ROWS, row_group_size=4).read_bytes()
    draw = random.Random(15)
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        account(folder, damage(whole, draw), ROWS)


def test_a_file_that_is_cut_or_none_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"x\.parquet is not a whole Parquet file"):
            read_all(path)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_brings_no_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path, *(f"train-0000{k}-of-00003.parquet" for k in range(3)))
    calls: list[str] = []
    extract = parquet_rows.extract

    def counted(path: Path, given: str, *rest: Any) -> dict[str, Any]:
        calls.append(path.name)
        return extract(path, given, *rest)

    monkeypatch.setattr("imnet_prep.sources.parquet.extract", counted)
    staging = Staging(tmp_path / "staged")
    first = list(detect([folder], None, staging)[0].refs())
    assert list(detect([folder], None, Staging(tmp_path / "staged"))[0].refs()) == first
    assert len(calls) == 3


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    shown = dry_run([path], tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=1), quiet, lambda: False)
    assert (shown["images"], shown["classes"]) == (15, 3)
    assert [item.name for item in tmp_path.iterdir()] == ["x.parquet"]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'imnet-prep\[parquet\]'"):
        read_all(path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_stopped_after_some_shards_it_goes_on_to_the_same_bytes(tmp_path: Path, what: str) -> None:
    folder = shards(tmp_path, "train-00000-of-00001.parquet")
    path = folder / "train-00000-of-00001.parquet" if what == "file" else folder
    done = tmp_path / "out.partial" / ".work" / "done"

    def convert_to(out: Path, stop: Callable[[], bool]) -> bytes:
        convert([path], out, None, PlanOptions(shards=5), ConvertOptions(workers=1), quiet, stop)
        return (out / "manifest.json").read_bytes()

    with pytest.raises(Interrupted):
        convert_to(tmp_path / "out", lambda: len(list(done.glob("*.json"))) > 0)
    shutil.rmtree(tmp_path / "out.partial" / ".work" / "staged")  # even then
    whole = convert_to(tmp_path / "whole", lambda: False)
    assert convert_to(tmp_path / "out", lambda: False) == whole
