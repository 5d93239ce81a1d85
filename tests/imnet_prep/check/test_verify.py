"""Verification: what each level finds, that it names it, and that no damage makes it fall over."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageOps

from imnet_prep.check.adopt import AdoptOptions, adopt
from imnet_prep.check.verify import VerifyResult, verify
from imnet_prep.errors import RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.mindrecord import Shard, read_header
from imnet_prep.types import Progress
from tests.imnet_prep.check.test_duplicates import scene
from tests.imnet_prep.obstacles import make_fifo, shared_folder, unprivileged
from tests.records import copy, flip, make_records, quiet, read_records, reseal, shard_files
from tests.synthetic import encode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def records(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path / "records")


def look(records: Path, level: str = "decode", **options: Any) -> VerifyResult:
    return verify(records, level, 1, quiet, **options)


def kinds(result: VerifyResult) -> set[str]:
    return {problem.kind for problem in result.problems}


def place_of_image(records: Path, number: int) -> tuple[Path, int, int]:
    """A train shard, and where the bytes of its row ``number`` begin and end."""
    path = sorted(records.glob("train/*.mindrecord"))[0]
    with Shard(path) as shard:
        return path, int(shard.index.blob_start[number]) + 8, int(shard.index.blob_end[number])


@pytest.mark.parametrize("level", ["quick", "hash", "decode"])
def test_whole_folder_is_ok_at_every_level(whole: Path, level: str) -> None:
    result = look(whole, level)
    assert result.ok
    assert (result.shards, result.records) == (4, 36)
    assert result.to_json()["problems"] == []


@pytest.mark.slow
def test_worker_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    records = make_records(tmp_path, classes=4, per_class=150, splits=("train",), shards=3)
    path, start, _ = place_of_image(records, 5)
    flip(path, 8 * (start + 200))
    alone, together = look(records), verify(records, "decode", 2, quiet)
    assert not alone.ok
    assert alone == together


@pytest.mark.slow
@pytest.mark.parametrize("flips", [60, pytest.param(200, marks=pytest.mark.long)])
def test_hash_finds_every_bit_that_is_flipped(records: Path, flips: int) -> None:
    draw = random.Random(8)
    files = shard_files(records)
    missed = []
    for _ in range(flips):
        path = draw.choice(files)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        if look(records, "hash").ok:
            missed.append((path.name, bit))
        flip(path, bit)
    assert missed == []
    assert look(records, "hash").ok


@pytest.mark.slow
@pytest.mark.parametrize("withheld", [("shards",), ("shards", "records")])
@pytest.mark.parametrize("flips", [3, pytest.param(7, marks=pytest.mark.long)])
def test_decode_never_falls_over_whatever_bit_is_flipped(records: Path, withheld: tuple[str, ...], flips: int) -> None:
    draw = random.Random(len(withheld))
    files = [*shard_files(records), *records.glob("*/records.jsonl.gz"), records / "manifest.json"]
    for path in files:
        ends = [*range(64), *(draw.randrange(8 * path.stat().st_size) for _ in range(12))]
        for bit in draw.sample(ends, flips):
            flip(path, bit)
            for problem in look(records, withhold=withheld).problems:
                assert problem.to_line()
            flip(path, bit)
    assert look(records).ok


def changed_rows(records: Path, before: dict[tuple[str, int], tuple[Any, ...]]) -> bool:
    """Whether a reader now gets another image, label or name, or none, for some row."""
    for (file, row), content in before.items():
        try:
            with Shard(records / file) as shard:
                fields = shard.fields(row)
                if (shard.image(row), fields.get("label"), fields.get("file_name")) != content:
                    return True
        except (RecordsError, IndexError, KeyError):
            return True
    return False


def contents(records: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for path in sorted(records.glob("*/*.mindrecord")):
        with Shard(path) as shard:
            for row in range(len(shard)):
                fields = shard.fields(row)
                key = path.relative_to(records).as_posix(), row
                found[key] = shard.image(row), fields["label"], fields["file_name"]
    return found


@pytest.mark.slow
def test_decode_finds_by_record_digests_every_flip_that_changes_a_record(records: Path) -> None:
    before = contents(records)
    draw = random.Random(3)
    changed = 0
    for number in range(80):
        path = draw.choice(shard_files(records))
        if number % 2 and path.suffix == ".mindrecord":
            header = read_header(path)  # into the used part of a page, where most flips matter
            page = draw.choice(header.pages)
            bit = 8 * header.offset(page.page_id) + draw.randrange(8 * page.used_bytes)
        else:
            bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        if changed_rows(records, before):
            changed += 1
            assert not look(records, withhold=("shards",)).ok, (path.name, bit)
        flip(path, bit)
    assert changed > 20


def test_without_any_digest_undecodable_images_and_bad_labels_and_names_are_found(records: Path) -> None:
    path, start, end = place_of_image(records, 1)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\x00" * (end - start))
        data = (path.read_bytes(), file.seek(0))[0]
        raw = data.index(b"\xa5label")
        file.seek(raw + 6)
        file.write(bytes([(data[raw + 6] + 1) % 3]))
        name = data.rindex(b"file_name") + len(b"file_name") + 2
        file.seek(name)
        file.write(b"x")
    result = look(records, withhold=("shards", "records"))
    assert {"image", "label", "name"} <= kinds(result)
    bad = next(problem for problem in result.problems if problem.kind == "image")
    assert (bad.file, bad.row) == ("train/" + path.name, 1)
    assert bad.name is not None
    assert bad.name.startswith("n0")


def test_a_flip_that_decodes_is_named_with_file_row_and_name(records: Path) -> None:
    path, _, end = place_of_image(records, 2)
    for back in range(40, 400):  # a bit of the entropy-coded data that changes pixels and draws no complaint
        flip(path, 8 * (end - back))
        found = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind == "digest"]
        if found:
            break
        flip(path, 8 * (end - back))
    line = list(read_records(records, load_manifest(records).splits["train"]))[2]
    assert [(problem.file, problem.row, problem.name) for problem in found] == [
        ("train/" + path.name, 2, line.file_name)
    ]
    assert look(records, withhold=("shards", "records")).ok  # nothing else can see it


@pytest.mark.parametrize("level", ["quick", "decode"])
def test_truncated_and_missing_files_are_named(records: Path, level: str) -> None:
    first, second = sorted(records.glob("train/*.mindrecord"))
    with first.open("r+b") as file:
        file.truncate(first.stat().st_size * 2 // 3)
    second.unlink()
    (records / "val" / "records.jsonl.gz").unlink()
    found = {(problem.kind, problem.file) for problem in look(records, level).problems}
    assert {("size", "train/" + first.name), ("missing", "train/" + second.name)} <= found
    assert ("missing", "val/records.jsonl.gz") in found


def test_rows_are_read_by_their_pages_where_the_index_is_gone(records: Path) -> None:
    for index in records.glob("*/*.db"):
        index.unlink()
    assert kinds(look(records)) == {"missing"}


def test_an_index_that_points_elsewhere_is_named_with_its_row(records: Path) -> None:
    path = sorted(records.glob("train/*.db"))[0]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE INDEXES SET label_0 = (label_0 + 1) % 3 WHERE ROW_ID IN (4, 6)")
    found = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind == "index"]
    assert [(problem.file, problem.row) for problem in found] == [("train/" + path.name, 4)]
    assert found[0].detail.endswith("and 1 more such rows")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = PAGE_OFFSET_BLOB_END - 1 WHERE ROW_ID = 2")
    found = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind == "index"]
    assert {(problem.row, problem.detail) for problem in found} >= {(2, "does not agree with the data file")}


def cut(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join(lines))[:-20]


def garbled(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join([*lines[:3], b'{"shard": []}\n', *lines[4:]]))


def without_a_line(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join([*lines[:3], *lines[4:]]))


def too_short(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join(lines[:-2]))


def too_long(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join([*lines, lines[0]]))


@pytest.mark.parametrize("damage", [cut, garbled, without_a_line, too_short, too_long])
def test_a_damaged_record_list_is_one_problem_and_the_rows_are_still_looked_at(
    records: Path, damage: Callable[[list[bytes]], bytes]
) -> None:
    path = records / "train" / "records.jsonl.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes()).splitlines(keepends=True)))
    shard, start, end = place_of_image(records, 3)
    with shard.open("r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))
    found = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind != "size"]
    assert sorted((problem.kind, problem.file, problem.row) for problem in found) == [
        ("image", "train/" + shard.name, 3),
        ("records", "train/records.jsonl.gz", None),
    ]


def test_an_edited_manifest_shows(records: Path) -> None:
    path = records / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"images": 18', b'"images": 17', 1))
    assert kinds(look(records, "quick")) == {"manifest"}


def test_class_counts_are_compared_with_the_records(records: Path) -> None:
    def move(document: dict[str, Any]) -> None:
        counts = document["splits"]["train"]["class_counts"]
        counts[0], counts[1] = counts[0] - 1, counts[1] + 1

    reseal(records, move)
    assert look(records, "hash").ok
    assert kinds(look(records)) == {"counts"}


def test_the_list_of_rejected_images_is_covered(tmp_path: Path) -> None:
    def spoil(source: Path) -> None:
        (min((source / "train").iterdir()) / "broken.jpg").write_bytes(b"\xff\xd8 no image")

    records = make_records(tmp_path, add=spoil)
    assert look(records).ok
    path = records / "rejected.jsonl"
    text = path.read_text()
    path.write_text(text.replace("broken", "brokem"))
    assert [(problem.kind, problem.file) for problem in look(records).problems] == [("rejected", "rejected.jsonl")]
    path.write_text(text + text)
    assert [(problem.kind, problem.file) for problem in look(records).problems] == [("size", "rejected.jsonl")]

    def relist(document: dict[str, Any]) -> None:
        data = path.read_bytes()
        document["rejected"].update(size_bytes=len(data), sha256=file_digest(path))

    reseal(records, relist)  # whoever forges the digest, too
    (problem,) = look(records, "quick").problems
    assert problem.kind == "rejected"
    assert "expected not_an_image 1, got not_an_image 2" in problem.detail


def test_a_file_that_the_manifest_does_not_list_is_named(records: Path) -> None:
    extra = records / "train" / "train-00002-of-00002.mindrecord"
    shutil.copy(sorted(records.glob("train/*.mindrecord"))[0], extra)
    assert [(problem.kind, problem.file) for problem in look(records, "quick").problems] == [
        ("unexpected", "train/" + extra.name)
    ]
    os.rename(extra, os.fsencode(records) + b"/train/\xff.mindrecord")
    call = [sys.executable, "-m", "imnet_prep", "verify", str(records)]
    done = subprocess.run(call, capture_output=True, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith(b"train/\\udcff.mindrecord: unexpected: ")


def test_duplicates_inside_and_across_splits_are_warnings(tmp_path: Path) -> None:
    def repeat(source: Path) -> None:
        images = sorted((source / "train").rglob("*.jpg"))
        shutil.copy(images[0], images[0].with_name("again.jpg"))
        shutil.copy(images[1], source / "val" / images[-1].parent.name / "elsewhere.jpg")
        big = scene(9, 320, 240)
        images[2].write_bytes(encode(big))
        images[2].with_name("mirrored.jpg").write_bytes(encode(ImageOps.mirror(big), quality=60))

    result = look(make_records(tmp_path, add=repeat))
    assert result.ok
    exact = {str(warning.name).rpartition("/")[2] for warning in result.warnings if warning.kind == "duplicate"}
    assert len(exact) == 2
    assert any("another label" in warning.detail for warning in result.warnings if warning.kind == "duplicate")
    near = [warning for warning in result.warnings if warning.kind == "near_duplicate"]
    assert any("mirrored" in warning.detail for warning in near)


def test_expectation_compares_with_the_published_counts(records: Path) -> None:
    result = look(records, "quick", expect="ilsvrc2012")
    assert kinds(result) == {"counts"}
    assert any("1,281,167" in problem.detail for problem in result.problems)
    with pytest.raises(RecordsError, match="ilsvrc2012"):
        look(records, "quick", expect="cifar")


def test_official_archives_converted_whole_must_have_the_published_counts(records: Path) -> None:
    def pretend(document: dict[str, Any]) -> None:
        source = {"kind": "ilsvrc2012-val-tar", "name": "ILSVRC2012_img_val.tar", "size_bytes": 6744924160}
        digests = {"md5": "29b22e2961454d5413ddabcf34fc5622", "sha256": "", "official": True, "images": 50000}
        document["sources"] = [{**source, **digests}]

    reseal(records, pretend)
    found = look(records, "quick").problems
    assert all("split val" in problem.detail for problem in found)
    assert any("50,000" in problem.detail for problem in found)
    reseal(records, lambda document: document["options"].update(max_per_class=6))  # type: ignore[attr-defined]
    assert look(records, "quick").ok


def test_unknown_level_lists_the_choices(records: Path) -> None:
    with pytest.raises(RecordsError, match="quick, hash, decode"):
        look(records, "deep")


def test_digest_of_a_file_is_its_sha256(whole: Path) -> None:
    import hashlib

    assert file_digest(whole / MANIFEST) == hashlib.sha256((whole / MANIFEST).read_bytes()).hexdigest()
    assert json.loads((whole / MANIFEST).read_bytes())["rejected"]["file"] == "rejected.jsonl"


# --- what is accepted once is accepted everywhere --------------------------------------------------------------------

ODD_NAMES = (
    "sub/a.jpg",
    "sub/deeper/a.jpg",
    "Screenshot 2024-01-01 at 9.41.00\u202fAM.jpg",
    "wide\u3000blank.jpg",
    "no\u00a0break.jpg",
    "\U0001f469\u200d\U0001f4bb.jpg",
)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Records of which some lie in folders below their class, or have names that Python calls unprintable."""

    def add(source: Path) -> None:
        folder = sorted((source / "train").iterdir())[0]
        (folder / "sub" / "deeper").mkdir(parents=True)
        for number, name in enumerate(ODD_NAMES):
            (folder / name).write_bytes(encode(scene(number, 64, 48)))

    return make_records(tmp_path, add=add)


@pytest.mark.parametrize("withheld", [(), ("shards", "records")])
def test_folders_below_a_class_and_names_called_unprintable_are_no_damage(odd: Path, withheld: tuple[str, ...]) -> None:
    manifest = load_manifest(odd)
    names = {line.file_name for line in read_records(odd, manifest.splits["train"])}
    assert {f"{manifest.classes[0]}/{name}" for name in ODD_NAMES} <= names
    assert look(odd, withhold=withheld).to_json()["problems"] == []


def test_a_wrong_label_below_a_class_is_found_by_its_name_alone(odd: Path) -> None:
    line = next(
        line
        for line in read_records(odd, load_manifest(odd).splits["train"])
        if line.file_name.endswith("sub/deeper/a.jpg")
    )
    path = sorted(odd.glob("train/*.mindrecord"))[line.shard]
    with Shard(path) as shard:
        start, end = int(shard.index.raw_start[line.row]), int(shard.index.raw_end[line.row])
    data = path.read_bytes()
    place = data.index(b"\xa5label", start, end) + 6
    assert data[place] == 0
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    found = [(problem.kind, problem.row) for problem in look(odd, withhold=("shards", "records")).problems]
    assert ("label", line.row) in found


def test_a_class_name_may_hold_slashes(records: Path) -> None:
    for path in [records / MANIFEST, records / "rejected.jsonl", *records.glob("*/records.jsonl.gz")]:
        path.unlink()
    names = records.parent / "classes.txt"
    names.write_text("pets/cat\npets/dog/large\nbird\n")
    adopt(records, AdoptOptions(label_space=str(names)), quiet)
    assert load_manifest(records).classes == ("pets/cat", "pets/dog/large", "bird")
    assert look(records).to_json()["problems"] == []
    path = records / "train" / "records.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"pets/dog/large/", b"pets/dog/small/")))
    wrong = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind == "name"]
    assert len(wrong) == 6  # every image of that class


# --- nothing makes it fall over --------------------------------------------------------------------------------------

PLACES = ("manifest.json", "rejected.jsonl", "train/records.jsonl.gz", "train/{}", "train/{}.db")


def place(records: Path, name: str) -> Path:
    return records / name.format(sorted(records.glob("train/*.mindrecord"))[0].name)


def fifo(path: Path) -> None:
    path.unlink()
    make_fifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def brackets(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def a_length_and_brackets(path: Path) -> None:
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


def packed_brackets(path: Path) -> None:
    path.write_bytes(gzip.compress(b"[" * 100_000 + b"\n"))


def a_newline(path: Path) -> None:
    path.write_bytes(b"\n")


DAMAGES = (fifo, a_folder, a_link_to_itself, brackets, a_length_and_brackets, packed_brackets, a_newline)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("level", ["quick", "decode"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", PLACES)
def test_whatever_stands_in_place_of_a_file_is_a_problem_with_it(
    records: Path, name: str, damage: Callable[[Path], None], level: str
) -> None:
    path = place(records, name)
    damage(path)
    found = {problem.file for problem in look(records, level).problems}
    data_file = path.suffix == ".mindrecord"  # of which the rows are gone as well
    assert found == {path.relative_to(records).as_posix()} | ({MANIFEST} if data_file and level == "decode" else set())


@pytest.fixture
def public(whole: Path) -> Iterator[Path]:
    """Records that an unprivileged user may read; what a verification imports is imported."""
    look(whole)
    with shared_folder() as folder:
        yield copy(whole, folder / "records")


@pytest.mark.parametrize("name", ["manifest.json", "rejected.jsonl", "train", "train/records.jsonl.gz", "train/{}"])
def test_what_may_not_be_read_is_a_problem(public: Path, name: str) -> None:
    path = place(public, name)
    path.chmod(0)
    try:
        with unprivileged():
            found = look(public).problems
    finally:
        path.chmod(0o755)
    assert any(problem.file.startswith(path.relative_to(public).as_posix()) for problem in found)
    assert any("Permission denied" in problem.detail for problem in found)
    assert look(public).ok


def test_a_folder_that_may_not_be_read_is_a_named_error(public: Path) -> None:
    public.chmod(0)
    try:
        with unprivileged(), pytest.raises(RecordsError, match="Permission denied"):
            look(public)
    finally:
        public.chmod(0o755)


def test_the_command_ends_with_a_line_and_an_exit_code(records: Path) -> None:
    def command(*arguments: str) -> tuple[int, list[str]]:
        call = [sys.executable, "-m", "imnet_prep", "verify", str(records), *arguments]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.splitlines() or done.stderr.splitlines()

    brackets(records / MANIFEST)
    code, lines = command("--level", "decode")
    assert (code, len(lines)) == (3, 2)
    assert lines[0].startswith("manifest.json: manifest: ")
    (records / MANIFEST).unlink()
    code, lines = command()
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize("level", ["quick", "decode"])
def test_a_forged_number_of_rows_ends_in_problems_at_once(records: Path, level: str) -> None:
    def forge(document: dict[str, Any]) -> None:
        split = document["splits"]["train"]
        split["shards"][0].update(rows=10**18, size_bytes=10**20)
        more = 10**18 + split["shards"][1]["rows"]
        split.update(found=more, images=more, class_counts=[more, 0, 0])

    reseal(records, forge)
    load_manifest(records)  # it does not contradict itself
    assert {"size"} <= kinds(look(records, level))


def test_forged_options_names_and_lines_are_problems(records: Path) -> None:
    def forge(document: dict[str, Any]) -> None:
        document["plan"], document["options"] = "", {"names": [1]}

    reseal(records, forge)
    path = records / "train" / "records.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    for number, name in enumerate((b"\\ud800/a.jpg", b"a/\\u0000b.jpg", b"")):
        before, after = re.split(rb'(?<="file_name":")[^"]*(?=")', lines[number])
        lines[number] = before + name + after
    path.write_bytes(gzip.compress(b"".join(lines)))
    found = [problem for problem in look(records, withhold=("shards",)).problems if problem.kind == "records"]
    assert [problem.file for problem in found] == ["train/records.jsonl.gz"]
    assert "line 1 is damaged" in found[0].detail


def test_a_shard_that_does_not_open_is_one_problem_beside_its_file_s(records: Path) -> None:
    path = place(records, "train/{}")
    a_length_and_brackets(path)
    file = "train/" + path.name
    found = [(problem.kind, problem.file) for problem in look(records, withhold=("shards",)).problems]
    assert sorted(found) == [("counts", MANIFEST), ("record", file), ("size", file)]


def test_rows_that_the_index_lacks_are_one_problem_of_the_first(records: Path) -> None:
    path = place(records, "train/{}.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM INDEXES WHERE ROW_ID >= 4")
    found = look(records, withhold=("shards",)).problems
    assert [problem.row for problem in found if problem.kind == "record"] == [4]
    assert {"rows", "index"} & {problem.kind for problem in found if problem.file == "train/" + path.name}


def test_problems_are_counted_while_it_runs_and_bounded_at_the_end(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in records.glob("*/*.mindrecord"):
        with Shard(path) as shard:
            places = [(int(shard.index.blob_start[row]) + 8, int(shard.index.blob_end[row])) for row in range(9)]
        with path.open("r+b") as file:
            for start, end in places:
                file.seek(start)
                file.write(bytes(end - start))
    states: list[Progress] = []
    result = verify(records, "decode", 1, states.append, withhold=("shards",))
    assert [problem.kind for problem in result.problems] == ["image"] * 36
    counts = [dict(state.counts)["problems"] for state in states]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    monkeypatch.setattr("imnet_prep.check.verify.MAX_PROBLEMS", 10)
    bounded = look(records, withhold=("shards",)).problems
    assert bounded[:10] == result.problems[:10]
    assert [problem.detail for problem in bounded[10:]] == ["26 more problems are not listed"]
