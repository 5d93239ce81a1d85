"""Bad records are named or skipped, and damaged folders are refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.images.native import decoder_status
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.types import record_id
from tests.imnet_prep.loader.runs import EVERYTHING, NATIVES, OPTIONS, TRAIN, run_epoch, same
from tests.records import Entry, rewrite_list, spoil_image, write_folder
from tests.synthetic import picture


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("change", ["flip a byte", "zero the second half", "damage the length"])
def test_a_bad_record_is_named(copy: Path, change: str, native: str) -> None:
    path, name = spoil_image(copy, 1, 7, change)
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
    _, name = spoil_image(copy, 1, 7, "zero the second half")
    with pytest.raises(PipelineError, match=f"{name}.*damaged image data"):
        run_epoch(copy, EvalOptions(8, image_size=32), native="on", check="never")


BAD = ((0, 3), (0, 30), (1, 7), (1, 8), (2, 49))  # shard and row


def _spoil_five(folder: Path) -> set[int]:
    """Damage five images; return their record ids."""
    return {record_id("train", spoil_image(folder, shard, row, "flip a byte")[1]) for shard, row in BAD}


def _expected_ids(folder: Path, bad: set[int], epoch: int, order: str = "global") -> list[int]:
    """The obvious way: each bad record's place goes to the next good one, from the last place on to the first."""
    with open_batches(folder, "train", OPTIONS, 5, order=order) as batches:
        ids = batches._table.ids[batches.order(epoch).positions].tolist()
    return [next(one for one in (*ids[place:], *ids[:place]) if one not in bad) for place in range(TRAIN // 8 * 8)]


@pytest.mark.parametrize("order", ["global", "blocks", "sequential", "balanced"])
def test_in_training_the_next_good_record_of_the_order_takes_the_place_of_a_bad_one(
    copy: Path, train_entries: list[Entry], order: str
) -> None:
    bad = _spoil_five(copy)
    labels = {record_id("train", name): label for name, label, _ in train_entries}
    with open_batches(copy, "train", OPTIONS, 5, on_error="skip", max_skipped=5, order=order) as batches:
        for epoch in range(2):
            found = list(batches.epoch(epoch))
            assert [len(batch) for batch in found] == [8] * (TRAIN // 8)
            ids = np.concatenate([batch.record_id for batch in found]).tolist()
            assert ids == _expected_ids(copy, bad, epoch, order)
            assert [labels[one] for one in ids] == np.concatenate([batch.label for batch in found]).tolist()


def test_skipped_records_are_the_same_at_any_rank_worker_count_and_start(copy: Path) -> None:
    _spoil_five(copy)
    how: dict[str, Any] = {"on_error": "skip", "max_skipped": 5, "options": EVERYTHING}
    alone = run_epoch(copy, workers=1, **how)
    assert same(alone, run_epoch(copy, workers=4, **how))
    assert same(alone[7:], run_epoch(copy, start_step=7, **how))
    shares = [run_epoch(copy, rank=rank, ranks=2, **how) for rank in range(2)]
    union = [share[step] for step in range(len(shares[0])) for share in shares]
    assert same(alone[: len(union)], union)


def test_a_replaced_row_is_equal_to_the_one_at_the_records_own_place(copy: Path) -> None:
    bad = _spoil_five(copy)
    found = run_epoch(copy, on_error="skip", max_skipped=5)
    rows: dict[int, list[bytes]] = {}
    for batch in found:
        for one, image in zip(batch.record_id.tolist(), batch.image, strict=True):
            rows.setdefault(one, []).append(image.tobytes())
    assert not bad & rows.keys()
    assert (
        sum(len(copies) for copies in rows.values() if len(copies) > 1) >= 2 * 3
    )  # at least three are in whole batches
    assert all(len(set(copies)) == 1 for copies in rows.values())


def test_each_skipped_record_is_named_once_in_the_order_of_the_batches(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = _spoil_five(copy)
    options = TrainOptions(5, image_size=32)  # divides the images, so that none is left out
    with open_batches(copy, "train", options, 5, on_error="skip", max_skipped=5, prefetch=30) as batches:
        seen = 0
        for number, batch in enumerate(batches.epoch(0)):  # the threads are ahead; what was returned counts
            places = batches.order(0).positions[: 5 * (number + 1)]
            known = {int(batches._table.ids[row.position]) for row in batches.skipped}
            assert known >= bad & set(batches._table.ids[places].tolist())
            seen = max(seen, len(batches.skipped) - sum(int(one) in bad for one in batches._table.ids[places]))
            assert not bad & set(batch.record_id.tolist())
        assert seen <= 4  # met in the search for others
        list(batches.epoch(1))
        rows = batches.skipped
    assert {record_id("train", row.file_name) for row in rows} == bad
    assert len(rows) == 5
    assert all("SHA-256" in row.reason and row.file_name in row.where for row in rows)
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert len(warned) == 5
    assert all(row.where in text for row, text in zip(rows, warned, strict=True))


@pytest.mark.parametrize("options", [OPTIONS, EvalOptions(8, image_size=32)], ids=["train", "eval"])
def test_more_bad_records_than_allowed_are_an_error_that_names_them(copy: Path, options: Any) -> None:
    names = [spoil_image(copy, shard, row, "flip a byte")[1] for shard, row in BAD]
    with pytest.raises(PipelineError, match=r"'train' has more bad records than may be skipped.*at most 3 of 150") as e:
        run_epoch(copy, options, on_error="skip")
    assert sum(name in str(e.value) for name in names) >= 4
    with pytest.raises(PipelineError, match="at most 0 of 150"):
        run_epoch(copy, options, on_error="skip", max_skipped=0)


def test_the_default_budget_is_a_thousandth_of_the_split(copy: Path) -> None:
    with open_batches(copy, "train", OPTIONS) as batches:
        assert batches._bad.most == 3
    with open_batches(copy, "train", OPTIONS, max_skipped=1000) as batches:
        assert batches._bad.most == TRAIN - 1  # there must be something to put in their place


def test_records_that_an_interrupted_run_or_another_rank_skipped_count(copy: Path) -> None:
    spoil_image(copy, 0, 3, "flip a byte")
    with open_batches(copy, "train", EvalOptions(8, image_size=32), on_error="skip") as batches:
        batches.add_skipped({60: "no image", 70: "cut off", 3: "known from before"})
        assert sum(len(batch) for batch in batches) == TRAIN - 1
        assert [(row.position, row.reason) for row in batches.skipped][2] == (3, "known from before")
        with pytest.raises(PipelineError, match="at most 3 of 150"):
            batches.add_skipped({80: "empty"})


def test_evaluation_and_training_without_whole_batches_leave_bad_records_out(copy: Path) -> None:
    bad = _spoil_five(copy)
    how: dict[str, Any] = {"on_error": "skip", "max_skipped": 5}
    assert [len(one) for one in run_epoch(copy, EvalOptions(1, image_size=32), **how)] == [1] * (TRAIN - 5)
    for options in (EvalOptions(8, image_size=32), replace(OPTIONS, drop_last=False)):
        ids = [one for batch in run_epoch(copy, options, **how) for one in batch.record_id.tolist()]
        assert len(ids) == len(set(ids)) == TRAIN - 5
        assert not bad & set(ids)


def test_a_split_of_bad_records_alone_is_an_error_not_a_hang(copy: Path) -> None:
    for row in range(50):
        for shard in range(3):
            spoil_image(copy, shard, row, "flip a byte")
    for most in (None, 1000):
        with pytest.raises(PipelineError, match="more bad records than may be skipped"):
            run_epoch(copy, on_error="skip", max_skipped=most)


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
