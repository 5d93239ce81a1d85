"""Resharding: the same records in other files, by the same rule as a conversion, and proof of it."""

from __future__ import annotations

import gzip
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.build.reshard import MultisetHash, ReshardOptions, ReshardResult, reshard
from imnet_prep.check.verify import verify
from imnet_prep.errors import IntegrityError, PlanError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.records.shards import ShardWriter
from tests.imnet_prep.obstacles import make_fifo
from tests.records import command, copy, flip, make_records, names, quiet, read_records, reseal
from tests.synthetic import WNIDS, encode, picture


def spoil(source: Path) -> None:
    """A broken image and a PNG: one is rejected, the other converted."""
    folder = min((source / "train").iterdir())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "drawn.png").write_bytes(encode(picture(0, 77), "PNG"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("clean"), per_class=9, shards=8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("mixed"), per_class=9, shards=8, add=spoil)


def run(folders: list[Path], out: Path, **options: Any) -> ReshardResult:
    return reshard(folders, out, ReshardOptions(workers=1, **options), quiet)


def rows(records: Path) -> Counter[tuple[str, int, str, bytes]]:
    """Every record as it lies in the data files, whatever its place."""
    found: Counter[tuple[str, int, str, bytes]] = Counter()
    for path in sorted(records.glob("*/*.mindrecord")):
        with Shard(path) as shard:
            for row in range(len(shard)):
                fields = shard.fields(row)
                found[path.parent.name, fields["label"], fields["file_name"], shard.image(row)] += 1
    return found


def tree(records: Path) -> dict[str, str]:
    return {str(path.relative_to(records)): file_digest(path) for path in records.rglob("*") if path.is_file()}


def test_8_to_3_to_8_gives_the_same_files_again(clean: Path, tmp_path: Path) -> None:
    three = run([clean], tmp_path / "three", shards=3)
    eight = run([tmp_path / "three"], tmp_path / "eight", shards=8)
    assert three.written == eight.written
    assert three.labels_unchanged
    assert len(list((tmp_path / "three" / "train").glob("*.mindrecord"))) == 3
    assert tree(tmp_path / "eight") == tree(clean)
    for folder in (tmp_path / "three", tmp_path / "eight"):
        assert verify(folder, "decode", 1, quiet).ok


def test_it_is_the_conversion_with_as_many_shards(clean: Path, tmp_path: Path) -> None:
    direct = make_records(tmp_path, per_class=9, shards=3)
    run([clean], tmp_path / "three", shards=3)
    assert tree(tmp_path / "three") == tree(direct)


def test_rejections_and_conversions_come_along_and_nothing_changes(mixed: Path, tmp_path: Path) -> None:
    result = run([mixed], tmp_path / "three", shards=3)
    assert rows(tmp_path / "three") == rows(mixed)
    before, after = load_manifest(mixed).splits["train"], result.built.manifest.splits["train"]
    assert before.rejected == after.rejected == {"not_an_image": 1}
    assert before.changes["format"] == 1
    assert (before.changes, before.found, before.duplicates) == (after.changes, after.found, after.duplicates)
    assert (tmp_path / "three" / "rejected.jsonl").read_bytes() == (mixed / "rejected.jsonl").read_bytes()
    lines = {line.file_name: (line.sha256, line.source_sha256, line.changes) for line in read_records(mixed, before)}
    again = read_records(tmp_path / "three", after)
    assert {line.file_name: (line.sha256, line.source_sha256, line.changes) for line in again} == lines
    assert verify(tmp_path / "three", "decode", 1, quiet).ok


@pytest.mark.slow
def test_worker_count_changes_no_byte(mixed: Path, tmp_path: Path) -> None:
    run([mixed], tmp_path / "one", shards=3)
    reshard([mixed], tmp_path / "two", ReshardOptions(shards=3, workers=2), quiet)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_filtered_classes_are_numbered_again_and_the_rest_stays(mixed: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text(f"{WNIDS[2]}\n{WNIDS[1]}\n")
    result = run([mixed], tmp_path / "kept", shards=2, keep_classes=keep)
    assert result.built.manifest.classes == (WNIDS[1], WNIDS[2])
    assert not result.labels_unchanged
    assert result.written.records == 36
    assert verify(tmp_path / "kept", "decode", 1, quiet).ok
    expected = Counter({(s, label - 1, n, i): c for (s, label, n, i), c in rows(mixed).items() if label})
    assert rows(tmp_path / "kept") == expected


def test_renamed_class_keeps_its_images(clean: Path, tmp_path: Path) -> None:
    renames = tmp_path / "renames.tsv"
    renames.write_text(f"{WNIDS[0]}\ttench\n")
    result = run([clean], tmp_path / "renamed", shards=2, rename_classes=renames)
    assert result.built.manifest.classes == (WNIDS[1], WNIDS[2], "tench")
    images = Counter(
        image for (_, _, name, image), _ in rows(tmp_path / "renamed").items() if name.startswith("tench/")
    )
    assert images == Counter(image for (_, label, _, image), _ in rows(clean).items() if label == 0)
    assert verify(tmp_path / "renamed", "decode", 1, quiet).ok


def test_folders_are_merged_in_any_order(clean: Path, tmp_path: Path) -> None:
    other = make_records(tmp_path, classes=5, per_class=4, splits=("train",), seed=3)
    first = renamed_copies(other, tmp_path / "names", tmp_path / "other")
    run([clean, first], tmp_path / "ab", shards=2)
    run([first, clean], tmp_path / "ba", shards=2)
    assert tree(tmp_path / "ab") == tree(tmp_path / "ba")
    merged = load_manifest(tmp_path / "ab")
    assert merged.splits["train"].images == 27 + 20
    assert merged.classes == tuple(sorted({*WNIDS[:3], *(f"x{name}" for name in WNIDS[:5])}))


def renamed_copies(records: Path, names: Path, out: Path) -> Path:
    names.write_text("".join(f"{name}\tx{name}\n" for name in load_manifest(records).classes), encoding="utf-8")
    run([records], out, shards=1, rename_classes=names)
    return out


def test_the_same_name_twice_is_refused(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="same record id"):
        run([clean, copy(clean, tmp_path / "copy")], tmp_path / "out", shards=2)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_image_stops_it_and_is_named(clean: Path, tmp_path: Path) -> None:
    records = copy(clean, tmp_path / "records")
    path = sorted(records.glob("train/*.mindrecord"))[3]
    with Shard(path) as shard:
        place, name = int(shard.index.blob_start[1]) + 300, shard.fields(1)["file_name"]
    flip(path, 8 * place)
    with pytest.raises(IntegrityError, match=f"row 1 .{name}"):
        run([records], tmp_path / "out", shards=3)
    assert not (tmp_path / "out").exists()


def test_asked_for_again_it_is_already_done(clean: Path, tmp_path: Path) -> None:
    first = run([clean], tmp_path / "out", shards=3)
    again = run([clean], tmp_path / "out", shards=3)
    assert (first.built.already_done, again.built.already_done) == (False, True)
    assert first.written == again.written
    with pytest.raises(PlanError, match="another plan: --shards was 3, now 4; choose"):
        run([clean], tmp_path / "out", shards=4)


def test_the_hash_depends_on_every_record_and_on_no_order() -> None:
    a, b, c = (
        MultisetHash.of("train", *record) for record in (("x", "x/1", "00"), ("x", "x/2", "11"), ("y", "x/1", "00"))
    )
    assert a + b == b + a
    assert (a + b).records == 2
    assert a + a != b + b
    assert a != c
    assert (a + b).digest == f"{(a.total + b.total) % (1 << 256):064x}"
    assert len({MultisetHash().digest, a.digest, b.digest, (a + b).digest}) == 4


# --- what is accepted once is accepted everywhere --------------------------------------------------------------------


def odd_names(source: Path) -> None:
    """Images in folders below a class, and names with blanks and joiners that Python calls unprintable."""
    folder = min((source / "train").iterdir())
    (folder / "sub" / "deeper").mkdir(parents=True)
    for number, name in enumerate(ODD_NAMES):
        (folder / name).write_bytes(encode(picture(0, 200 + number), "JPEG"))


ODD_NAMES = (
    "sub/a.jpg",
    "sub/deeper/a.jpg",
    "Screenshot 2024-01-01 at 9.41.00\u202fAM.jpg",
    "全角\u3000空白.jpg",
    "no\u00a0break.jpg",
    "family\U0001f468\u200d\U0001f469\u200d\U0001f467.jpg",
)


def test_folders_below_a_class_and_odd_blanks_come_along(tmp_path: Path) -> None:
    records = make_records(tmp_path, add=odd_names)
    assert verify(records, "decode", 1, quiet).ok
    result = run([records], tmp_path / "three", shards=3)
    assert rows(tmp_path / "three") == rows(records)
    assert {name.partition("/")[2] for _, _, name, _ in rows(tmp_path / "three")} >= set(ODD_NAMES)
    assert verify(tmp_path / "three", "decode", 1, quiet).ok
    assert result.labels_unchanged


# --- what is damaged is refused, and nothing is left -----------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut", "garbled", "a FIFO"])
def test_a_list_of_rejections_that_is_not_the_manifests_is_refused(mixed: Path, tmp_path: Path, damage: str) -> None:
    records = copy(mixed, tmp_path / "records")
    listed = records / "rejected.jsonl"
    data = listed.read_bytes()
    listed.unlink()
    if damage == "a FIFO":
        make_fifo(listed)
    elif damage != "missing":
        listed.write_bytes(data[:-9] if damage == "cut" else bytes([data[0], data[1] ^ 1]) + data[2:])
    fault = "cannot be read" if damage in ("missing", "a FIFO") else "is not the manifest's"
    with pytest.raises(IntegrityError, match=rf"rejected\.jsonl: the list of rejected images {fault}"):
        run([records], tmp_path / "out", shards=3)
    assert names(tmp_path) == {"records"}


def test_a_manifest_is_written_once_and_after_the_proof(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it proves, the next run proves again before anything has its name."""
    from imnet_prep.build import reshard as module

    class Killed(BaseException):
        pass

    def dying(*_: object) -> MultisetHash:
        raise Killed

    whole = run([mixed], tmp_path / "whole", shards=3)
    with monkeypatch.context() as patch:
        patch.setattr(module, "record_hash", dying)
        with pytest.raises(Killed):
            run([mixed], tmp_path / "out", shards=3)
        assert not (tmp_path / "out.partial" / MANIFEST).exists()
        with pytest.raises(Killed):
            run([mixed], tmp_path / "out", shards=3)
        assert not (tmp_path / "out").exists()
    assert run([mixed], tmp_path / "out", shards=3).written == whole.written
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert names(tmp_path) == {"whole", "out"}


def test_what_a_shard_lost_while_it_was_written_is_noticed(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is of the written files: a memory that flips a name between the list and the shard shows."""
    writer = ShardWriter.add

    def other_name(self: Any, image: bytes, label: int, file_name: str) -> None:
        writer(self, image, label, file_name if label else file_name + "x")

    monkeypatch.setattr(ShardWriter, "add", other_name)
    with pytest.raises(IntegrityError, match="what was written is not what was read"):
        run([clean], tmp_path / "out", shards=3)
    assert not (tmp_path / "out").exists()


def test_no_folder_is_made_inside_records(clean: Path, tmp_path: Path) -> None:
    records = copy(clean, tmp_path / "records")
    before = tree(records)
    for out in (records / "re", records / "train" / "re", records / "deep" / "er"):
        with pytest.raises(RecordsError, match="lies in the records folder"):
            run([clean], out, shards=2)
    (tmp_path / "link").symlink_to(records)
    with pytest.raises(RecordsError, match="lies in the records folder"):
        run([clean], tmp_path / "link" / "re", shards=2)
    assert tree(records) == before
    assert verify(records, "quick", 1, quiet).ok


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    records = make_records(tmp_path, classes=5, per_class=30, shards=128, splits=("train",))
    call = command("reshard", records, "--shards", 3, "--out", tmp_path / "three", "--workers", 1)
    limited = ["bash", "-c", 'ulimit -n 80; exec "$@"', "-", *call]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "three") == rows(records)


@pytest.mark.parametrize("forgery", ["many rows", "no classes", "short counts", "a shard twice"])
def test_forged_manifests_are_one_error(clean: Path, tmp_path: Path, forgery: str) -> None:
    def forge(document: dict[str, Any]) -> None:
        split = document["splits"]["train"]
        if forgery == "many rows":
            split["shards"][0]["rows"] = split["images"] = split["found"] = 10**18
        elif forgery == "no classes":
            document["classes"] = []
        elif forgery == "short counts":
            split["class_counts"] = split["class_counts"][:1]
        else:
            split["shards"] = [split["shards"][0]] * len(split["shards"])

    records = copy(clean, tmp_path / "records")
    reseal(records, forge)
    with pytest.raises(IntegrityError, match="contradicts itself"):
        run([records], tmp_path / "out", shards=3)
    assert names(tmp_path) == {"records"}


def test_a_record_list_that_is_not_the_manifests_is_refused(clean: Path, tmp_path: Path) -> None:
    records = copy(clean, tmp_path / "records")
    path = records / "train" / "records.jsonl.gz"
    text = gzip.decompress(path.read_bytes()).replace(b"n01440764_", b"n01440764-", 1)
    path.write_bytes(gzip.compress(text))
    with pytest.raises(IntegrityError, match=r"records\.jsonl\.gz: the record list is not the manifest's"):
        run([records], tmp_path / "out", shards=3)


def test_class_names_keep_their_odd_blanks(tmp_path: Path) -> None:
    """Also of a class without an image, which only a list of names knows."""

    def odd(source: Path) -> None:
        for split in ("train", "val"):
            (source / split / WNIDS[0]).rename(source / split / "big\u2028dog")
            for path in (source / split / WNIDS[1]).iterdir():
                path.write_bytes(b"no image")
            (source / split / WNIDS[1]).rename(source / split / "cat ")

    records = make_records(tmp_path, add=odd)
    before = load_manifest(records)
    assert set(before.classes) == {"big\u2028dog", "cat ", WNIDS[2]}
    result = run([records], tmp_path / "out", shards=2)
    assert result.built.manifest.classes == before.classes
    assert result.labels_unchanged


def test_names_that_no_record_can_have_are_refused(clean: Path, tmp_path: Path) -> None:
    renames = tmp_path / "renames.tsv"
    renames.write_text(f"{WNIDS[0]}\ta\x01b\n")
    with pytest.raises(PlanError, match="not a list of renamed classes"):
        run([clean], tmp_path / "out", shards=2, rename_classes=renames)
