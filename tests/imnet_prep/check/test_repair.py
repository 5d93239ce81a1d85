"""Repair: indexes and shards that come back bit for bit, and the whole rows of what does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.check.repair import RepairResult, repair_index
from imnet_prep.check.verify import verify
from imnet_prep.errors import RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.mindrecord import Shard, index_path, read_header
from imnet_prep.records.publish import DAMAGED_FOLDER
from tests.imnet_prep.obstacles import make_fifo, names_below, shared_folder, unprivileged
from tests.records import copy, flip, make_records, prep, prep_process, quiet, read_records
from tests.records import digests as all_digests
from tests.synthetic import WNIDS, jpeg


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("repair"), per_class=20)


@pytest.fixture
def records(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path / "records")


def repair(records: Path) -> RepairResult:
    return repair_index(records, quiet)


def states(result: RepairResult) -> list[str]:
    return [shard.state for shard in result.shards]


def digests(records: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(records.glob("*/*")) if path.is_file()}


def flip_in(path: Path, text: bytes, place: int = 0) -> None:
    """Flip the lowest bit of a byte of the first such text in a file."""
    flip(path, 8 * (path.read_bytes().index(text) + place))


def read_by_mindspore(files: list[Path]) -> list[dict[str, Any]]:
    ds = pytest.importorskip("mindspore.dataset")

    data = ds.MindDataset([str(path) for path in files], shuffle=False, num_parallel_workers=1)
    rows = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    return [{name: value.item() if value.ndim == 0 else value.tobytes() for name, value in row.items()} for row in rows]


def test_whole_folder_stays_as_it_is(records: Path, whole: Path) -> None:
    result = repair(records)
    assert result.ok
    assert states(result) == ["intact"] * 4
    assert digests(records) == digests(whole)


def test_every_deleted_index_comes_back_bit_for_bit_and_mindspore_reads_the_same_rows(
    records: Path, whole: Path
) -> None:
    for index in records.glob("*/*.db"):
        index.unlink()
    result = repair(records)
    assert result.ok
    assert states(result) == ["rebuilt"] * 4
    assert digests(records) == digests(whole)
    assert verify(records, "hash", 1, quiet).ok
    pair = [sorted(folder.glob("train/*.mindrecord")) for folder in (records, whole)]
    assert read_by_mindspore(pair[0]) == read_by_mindspore(pair[1])


def test_damaged_index_is_replaced(records: Path, whole: Path) -> None:
    first, second, third, _ = sorted(records.glob("*/*.db"))
    flip(first, 8 * 5000)
    first.chmod(0o644)
    second.write_bytes(b"not a database")
    third.write_bytes(b"")
    assert states(repair(records)) == ["rebuilt"] * 3 + ["intact"]
    assert digests(records) == digests(whole)


@pytest.mark.parametrize("where", ["header", "raw", "raw length", "cut to the images", "cut and no index"])
def test_whatever_is_not_an_image_comes_back_bit_for_bit(records: Path, whole: Path, where: str) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[0]
    header = read_header(path)
    raw = next(page for page in header.pages if page.kind == "RAW_DATA")
    if where == "header":
        path.open("r+b").write(b"\x00" * 300)
    elif where == "raw":
        flip(path, 8 * (header.offset(raw.page_id) + 60))
        index_path(path).unlink()
    elif where == "raw length":
        flip(path, 8 * header.offset(raw.page_id) + 20)
        index_path(path).unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(header.offset(raw.page_id))
        if where == "cut and no index":
            index_path(path).unlink()
    result = repair(records)
    assert states(result)[:1] == ["restored"], result
    assert result.ok
    assert digests(records) == digests(whole)
    assert not (records / DAMAGED_FOLDER).exists()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_data_file_gives_back_every_whole_row(records: Path, whole: Path, share: float) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[1]
    with Shard(path) as shard:
        first, last = int(shard.index.blob_start[0]), int(shard.index.blob_end[-1])
        end = first + int((last - first) * share)
        there = int((shard.index.blob_end <= end).sum())
    with path.open("r+b") as file:
        file.truncate(end)
    result = repair(records)
    assert not result.ok
    mine = result.shards[1]
    assert (mine.state, mine.rows, mine.exact) == ("salvaged", there, False)
    assert 0 < there < mine.expected
    assert result.to_json()["rows_lost"] == mine.expected - there
    lines = [line for line in read_records(whole, load_manifest(whole).splits["train"]) if line.shard == 1]
    expected = [(line.file_name, line.label) for line in lines[:there]]
    original = whole / path.relative_to(records)
    with Shard(path) as left, Shard(original) as right:
        assert [left.image(row) for row in range(there)] == [right.image(row) for row in range(there)]
    rows = read_by_mindspore([path])
    assert [(row["file_name"], row["label"]) for row in rows] == expected
    assert (records / DAMAGED_FOLDER / path.relative_to(records)).stat().st_size == end


def test_repairing_twice_keeps_the_first_damaged_file(records: Path) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    kept = file_digest(path)
    first = repair(records)
    second = repair(records)
    assert (states(first)[0], states(second)[0]) == ("salvaged", "salvaged")
    assert first.shards[0].rows == second.shards[0].rows
    assert file_digest(records / DAMAGED_FOLDER / path.relative_to(records)) == kept


def test_an_image_damaged_in_the_middle_costs_one_row(records: Path) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[0]
    with Shard(path) as shard:
        place = int(shard.index.blob_start[7]) + 100
    flip(path, 8 * place)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    mine = repair(records).shards[0]
    assert (mine.state, mine.expected - mine.rows) == ("salvaged", 1)
    assert str(list(read_records(records, load_manifest(records).splits["train"]))[7].file_name) in mine.detail


def test_a_data_file_that_is_gone_is_lost(records: Path) -> None:
    sorted(records.glob("val/*.mindrecord"))[0].unlink()
    result = repair(records)
    assert not result.ok
    assert [shard.state for shard in result.shards if not shard.exact] == ["lost"]


@pytest.mark.parametrize(
    ("text", "place"), [(b"\xa5label", 6), (b"\xa9file_name", 20), (b'"desc"', 2), (b'"page_type_id"', 15)]
)
def test_a_flipped_byte_outside_the_images_is_restored(records: Path, whole: Path, text: bytes, place: int) -> None:
    """A label, a file_name, and two bytes of the header: the files open as before, and sizes and indexes are right."""
    path = sorted(records.glob("train/*.mindrecord"))[0]
    flip_in(path, text, place)
    assert digests(records) != digests(whole)
    result = repair(records)
    assert states(result) == ["restored", "intact", "intact", "intact"]
    assert result.ok
    assert all_digests(records) == all_digests(whole)


def test_a_flipped_length_of_an_image_is_restored(records: Path, whole: Path) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[0]
    with Shard(path) as shard:
        flip(path, 8 * int(shard.index.blob_start[3]))
    assert states(repair(records))[0] == "restored"
    assert all_digests(records) == all_digests(whole)


@pytest.mark.parametrize("index", ["whole", "gone", "garbled"])
def test_a_changed_image_is_named_and_stays_as_it_is(records: Path, whole: Path, index: str) -> None:
    path = sorted(records.glob("train/*.mindrecord"))[0]
    with Shard(path) as shard:
        flip(path, 8 * (int(shard.index.blob_start[7]) + 300))
    changed = digests(records)
    if index == "gone":
        index_path(path).unlink()
    elif index == "garbled":
        index_path(path).write_bytes(b"no index")
    name = list(read_records(records, load_manifest(records).splits["train"]))[7].file_name
    done = prep("repair-index", records, "--json")
    assert done.returncode == 3, done.stderr
    result = repair(records)
    mine = result.shards[0]
    assert (result.ok, mine.state, mine.rows) == (False, "damaged", mine.expected)
    assert f"1 rows ({name}) are damaged" in mine.detail
    assert "verify --level decode" in mine.detail
    assert result.to_json()["damaged"] == 1
    assert digests(records) == changed
    assert names_below(records) == names_below(whole)


def test_the_same_image_elsewhere_in_the_shard_restores_a_damaged_one(tmp_path: Path) -> None:
    def twice(source: Path) -> None:
        for split in ("train", "val"):
            folder = source / split / WNIDS[0]
            (folder / "again.jpg").write_bytes(sorted(folder.glob("*.jpg"))[0].read_bytes())

    records = make_records(tmp_path, shards=1, add=twice)
    before = all_digests(records)
    path = min(records.glob("train/*.mindrecord"))
    lines = list(read_records(records, load_manifest(records).splits["train"]))
    row = next(line.row for line in lines if line.file_name.endswith("again.jpg"))
    with Shard(path) as shard:
        flip(path, 8 * (int(shard.index.blob_start[row]) + 300))
    assert states(repair(records))[0] == "restored"
    assert all_digests(records) == before


def test_without_its_record_list_a_damaged_shard_is_left_alone(records: Path) -> None:
    first, second = sorted(records.glob("train/*.mindrecord"))
    flip_in(first, b"\xa5label", 6)
    second.open("r+b").write(b"\x00" * 300)
    with (records / "train" / "records.jsonl.gz").open("ab") as file:
        file.write(b"\x00")
    before = all_digests(records)
    result = repair(records)
    assert states(result) == ["damaged", "lost", "intact", "intact"]
    assert "restore it first" in result.shards[1].detail
    assert all_digests(records) == before


def test_a_folder_in_place_of_an_index_is_kept_aside(records: Path, whole: Path) -> None:
    index = sorted(records.glob("train/*.db"))[0]
    index.unlink()
    index.mkdir()
    (index / "mine.txt").write_text("mine")
    result = repair(records)
    assert (states(result)[0], result.ok) == ("rebuilt", True)
    assert digests(records) == digests(whole)
    aside = records / DAMAGED_FOLDER / index.relative_to(records)
    assert (aside / "mine.txt").read_text() == "mine"
    index.unlink()
    index.mkdir()
    before = all_digests(records)
    with pytest.raises(RecordsError, match=r"is a folder.*move it away"):  # never over what was kept before
        repair(records)
    assert all_digests(records) == before
    index.rmdir()
    assert repair(records).ok


@pytest.mark.parametrize("state", ["intact", "index gone", "shard damaged"])
def test_things_that_are_no_files_do_not_hang(records: Path, whole: Path, state: str) -> None:
    shards = sorted(records.glob("train/*.mindrecord"))
    shards[0].unlink()
    make_fifo(shards[0])
    index_path(shards[1]).unlink()
    make_fifo(index_path(shards[1]))
    if state == "index gone":
        index_path(shards[0]).unlink()
    elif state == "shard damaged":
        flip_in(shards[1], b"\xa5label", 6)
    done = prep_process("repair-index", records, "--json", timeout_s=60)
    assert done.returncode == 3, done.stderr
    result = repair(records)
    assert states(result) == ["lost", "intact", "intact", "intact"]
    assert "not a regular file" in result.shards[0].detail
    assert digests_of(records, shards[1]) == digests_of(whole, shards[1])
    assert shards[0].is_fifo()


def digests_of(records: Path, path: Path) -> tuple[str, str]:
    path = records / "train" / path.name
    return file_digest(path), file_digest(index_path(path))


def test_a_shard_that_may_not_be_read_is_lost_and_one_named_error_says_what_may_not_be_written(whole: Path) -> None:
    repair(whole)  # imports what it needs
    with shared_folder() as folder:
        records = copy(whole, folder / "records")
        for path in (records, records / "train", records / "val"):
            path.chmod(0o777)
        shard = sorted(records.glob("train/*.mindrecord"))[0]
        shard.chmod(0)
        before = names_below(records)
        with unprivileged():
            result = repair(records)
        assert states(result) == ["lost", "intact", "intact", "intact"]
        assert "Permission denied" in result.shards[0].detail
        shard.chmod(0o644)
        sorted(records.glob("val/*.db"))[0].unlink()
        (records / "val").chmod(0o555)
        with unprivileged(), pytest.raises(RecordsError, match="val: cannot be written"):
            repair(records)
        records.chmod(0o555)
        with unprivileged(), pytest.raises(RecordsError, match=r"cannot be written or read; got Permission denied"):
            repair(records)
        assert names_below(records) == before - {f"val/{path.name}" for path in (whole / "val").glob("*00000-of*.db")}
        for path in (records, records / "val"):
            path.chmod(0o777)
        assert repair(records).ok


def test_an_interrupted_repair_is_finished_first(records: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(records.glob("train/*.mindrecord"))
    first.open("r+b").write(b"\x00" * 300)
    index_path(second).unlink()

    class Killed(BaseException):
        """The process ends here."""

    def die(one: Path, other: Path, rename: Any = os.replace) -> None:
        if other == index_path(first):
            raise Killed
        rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            repair(records)
    assert file_digest(first) == file_digest(whole / "train" / first.name)  # the one rename, and not the other
    with pytest.raises(RecordsError, match="repair-index` was interrupted"):
        RecordsFolder.open(records)
    assert states(repair(records)) == ["intact", "rebuilt", "intact", "intact"]
    assert all_digests(records) == all_digests(whole)


def test_other_writers_files_keep_the_rows_before_the_cut(tmp_path: Path) -> None:
    from imnet_prep.records.salvage import salvage_rows, write_index_of

    path = tmp_path / "made" / "a.mindrecord"
    write_foreign(path, rows=24)
    before = read_by_mindspore([path])
    index_path(path).unlink()
    write_index_of(path, path)
    assert read_by_mindspore([path]) == before
    with path.open("r+b") as file:
        file.truncate((1 << 16) + 5 * (1 << 15) + 700)
    (tmp_path / "cut").mkdir()
    rows = salvage_rows(path, tmp_path / "cut" / path.name)
    write_index_of(tmp_path / "cut" / path.name, tmp_path / "cut" / path.name)
    assert 0 < rows < 24
    assert read_by_mindspore([tmp_path / "cut" / path.name]) == before[:rows]


def write_foreign(path: Path, rows: int) -> None:
    """A file as a hand-written script makes it: small pages, several writes, more fields, all of them indexed."""
    FileWriter = pytest.importorskip("mindspore.mindrecord").FileWriter

    path.parent.mkdir()
    writer = FileWriter(str(path), shard_num=1)
    writer.set_header_size(1 << 16)
    writer.set_page_size(1 << 15)
    fields = {"data": "bytes", "label": "int64", "note": "string", "weight": "float32"}
    writer.add_schema({name: {"type": kind} for name, kind in fields.items()}, "by hand")
    made = [
        {"data": jpeg(k % 3, k, 160, 120), "label": k % 3, "note": f"{WNIDS[k % 3]} {k}", "weight": k / 7}
        for k in range(rows)
    ]
    for start in range(0, rows, 5):
        writer.write_raw_data(made[start : start + 5])
    writer.commit()
