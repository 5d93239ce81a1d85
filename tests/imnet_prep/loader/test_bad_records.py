"""Bad records are named or skipped, and damaged folders are refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.images.native import decoder_status
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions
from imnet_prep.records.mindrecord import Shard
from imnet_prep.types import record_id
from tests.imnet_prep.loader.runs import EVERYTHING, NATIVES, OPTIONS, TRAIN, run_epoch, same
from tests.records import Entry, rewrite_list, write_folder
from tests.synthetic import picture


def _spoil(folder: Path, shard: int, row: int, change: str) -> tuple[Path, str]:
    """Damage one image in place; gives the shard and the file name."""
    path = sorted((folder / "train").glob("*.mindrecord"))[shard]
    with Shard(path) as opened:
        start, end = int(opened.index.blob_start[row]) + 8, int(opened.index.blob_end[row])
        name = str(opened.fields(row)["file_name"])
    path.chmod(0o600)
    with path.open("r+b") as file:
        if change == "flip a byte":
            file.seek((start + end) // 2)
            byte = file.read(1)[0]
            file.seek((start + end) // 2)
            file.write(bytes([byte ^ 0x10]))
        elif change == "zero the second half":
            file.seek((start + end) // 2)
            file.write(bytes(end - (start + end) // 2))
        else:  # damage the length before the image
            file.seek(start - 8)
            file.write((1 << 40).to_bytes(8, "little"))
    return path, name


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("change", ["flip a byte", "zero the second half", "damage the length"])
def test_a_bad_record_is_named(copy: Path, change: str, native: str) -> None:
    path, name = _spoil(copy, 1, 7, change)
    with pytest.raises(PipelineError) as caught:
        run_epoch(copy, native=native)
    for part in (str(path), "row 7", name):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def _list_sizes(folder: Path, size: tuple[int, int], *rows: int) -> list[str]:
    """Write another width and height into lines of the record list; return the file names."""
    names: list[str] = []

    def change(lines: list[str]) -> list[str]:
        for row in rows:
            values = json.loads(lines[row])
            names.append(values["file_name"])
            lines[row] = json.dumps({**values, "width": size[0], "height": size[1]}, sort_keys=True)
        return lines

    rewrite_list(folder, change)
    return names


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("size", [(30, 31), (2000, 1000), (40, 4_000_000), (50_000, 50_000)])
def test_a_record_whose_listed_size_is_not_its_headers_is_a_bad_record(
    copy: Path, size: tuple[int, int], native: str
) -> None:
    expected = run_epoch(copy, EvalOptions(8, image_size=32), native=native)
    name = _list_sizes(copy, size, 7)[0]
    with pytest.raises(
        PipelineError, match=rf"row 7 \({name}\).*({size[0]} x {size[1]}|{size[0] * size[1]} pixels) by the record list"
    ):
        run_epoch(copy, native=native)
    found = run_epoch(copy, EvalOptions(8, image_size=32), native=native, on_error="skip")
    assert [len(batch) for batch in found[:2]] == [7, 8]
    assert np.array_equal(found[0].image, expected[0].image[:7])
    assert same(found[1:], expected[1:])


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("size", [(0, 0), (0, 50), (50, 0)])
def test_a_size_that_is_not_listed_is_read_from_the_header(copy: Path, size: tuple[int, int], native: str) -> None:
    expected = run_epoch(copy, EVERYTHING, native=native)
    _list_sizes(copy, size, *range(0, TRAIN, 3), 7)
    assert same(expected, run_epoch(copy, EVERYTHING, native=native))


@pytest.mark.parametrize("native", NATIVES)
def test_only_headers_whose_size_is_not_listed_are_parsed(
    copy: Path, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _list_sizes(copy, (0, 0), 3, 60)
    parsed: list[int] = []
    with open_batches(copy, "train", EvalOptions(8, image_size=32), native=native) as batches:
        sizes = batches._decoder.sizes

        def count(images: Sequence[bytes]) -> tuple[NDArray[np.int32], dict[int, str]]:
            parsed.append(len(images))
            return sizes(images)

        monkeypatch.setattr(batches._decoder, "sizes", count)
        assert sum(len(batch) for batch in batches) == TRAIN
    assert sum(parsed) == 2


@pytest.mark.parametrize("native", NATIVES)
def test_an_image_of_another_format_may_be_listed_upright(tmp_path: Path, native: str) -> None:
    image = Image.fromarray(picture(0, 0, 60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    records = write_folder(tmp_path / "records", {"train": [("n0/a.png", 0, buffer.getvalue())]}, shards=1)
    expected = run_epoch(records, EvalOptions(1, image_size=32), native=native)
    _list_sizes(records, (40, 60), 0)
    assert same(expected, run_epoch(records, EvalOptions(1, image_size=32), native=native))


@pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1])
def test_without_digests_the_native_decoder_still_tells_of_garbled_data(copy: Path) -> None:
    _, name = _spoil(copy, 1, 7, "zero the second half")
    with pytest.raises(PipelineError, match=f"{name}.*damaged image data"):
        run_epoch(copy, EvalOptions(8, image_size=32), native="on", check="never")


def test_skipped_rows_are_counted_and_named_and_training_keeps_its_shape(
    copy: Path, train_entries: list[Entry]
) -> None:
    names = {_spoil(copy, shard, row, "flip a byte")[1] for shard, row in ((0, 3), (1, 7), (1, 8))}
    bad = {record_id("train", name) for name in names}
    with open_batches(copy, "train", OPTIONS, 5, on_error="skip") as batches:
        found = list(batches.epoch(0))
        assert [len(batch) for batch in found] == [8] * (TRAIN // 8)
        assert 1 <= batches.skipped <= 3  # a record may be among those that did not fill a batch
        assert all(any(name in row.where for name in names) for row in batches.skipped_rows)
        labels = {record_id("train", name): label for name, label, _ in train_entries}
        for batch in found:
            assert not bad & set(batch.record_id.tolist())
            assert [labels[one] for one in batch.record_id.tolist()] == batch.label.tolist()
    with open_batches(copy, "train", EvalOptions(1, image_size=32), on_error="skip") as batches:
        assert [len(batch) for batch in batches] == [1] * (TRAIN - 3)  # a batch with no row left is none
    with open_batches(copy, "train", EvalOptions(8, image_size=32), on_error="skip") as batches:
        ids = [one for batch in batches for one in batch.record_id.tolist()]
        assert batches.skipped == 3
        assert len(ids) == len(set(ids)) == TRAIN - 3
        assert not bad & set(ids)


def test_a_batch_of_bad_rows_alone_raises_in_training(copy: Path) -> None:
    for row in range(50):
        for shard in range(3):
            _spoil(copy, shard, row, "flip a byte")
    with pytest.raises(PipelineError, match="SHA-256"):
        run_epoch(copy, on_error="skip")


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_remove, _cut])
@pytest.mark.parametrize("suffix", [".mindrecord", ".mindrecord.db", ".jsonl.gz"])
def test_a_missing_or_cut_file_is_named_on_opening(copy: Path, damage: Any, suffix: str) -> None:
    path = next(path for path in sorted((copy / "train").iterdir()) if path.name.endswith(suffix))
    path.chmod(0o600)
    damage(path)
    with pytest.raises(RecordsError) as caught:
        open_batches(copy, "train", OPTIONS)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_while_open_is_an_error_not_a_hang(copy: Path) -> None:
    with open_batches(copy, "train", OPTIONS, 5) as batches:
        for path in (copy / "train").glob("*.mindrecord"):
            path.unlink()
        with pytest.raises(ImnetError, match="cannot be"):
            list(batches.epoch(0))


def test_a_shard_cut_while_open_is_an_error_that_names_the_row(copy: Path) -> None:
    with open_batches(copy, "train", OPTIONS, 5) as batches:
        for path in (copy / "train").glob("*.mindrecord"):
            path.chmod(0o600)
            os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(PipelineError, match=r"row \d+ \(n\d+/n\d+_\d+.JPEG\): .*cut off"):
            list(batches.epoch(0))
