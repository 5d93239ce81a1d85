"""Records to batches: the same bytes however they are made, every record once, every bad one named."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.images.native import decoder_status, load
from imnet_prep.loader.adapters import to_dataset
from imnet_prep.loader.batches import CHUNK_ROWS, Batches, open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.records.mindrecord import Shard
from imnet_prep.types import Batch, record_id
from tests.records import Entry, entries, rewrite_list, write_folder
from tests.synthetic import picture

TRAIN, VAL = 150, 37
OPTIONS = TrainOptions(8, image_size=32)
EVERYTHING = TrainOptions(
    8, image_size=32, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment_ops=2, erasing_prob=0.5, mixup_alpha=0.2,
    cutmix_alpha=1.0,
)  # fmt: skip
NATIVES = ["off", pytest.param("on", marks=pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1]))]


@pytest.fixture(scope="module")
def train_entries() -> list[Entry]:
    return entries(TRAIN)


@pytest.fixture(scope="module")
def val_entries() -> list[Entry]:
    return entries(VAL, seed=1)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, train_entries: list[Entry], val_entries: list[Entry]) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "records"
    return write_folder(folder, {"train": train_entries, "val": val_entries}, shards=3)


@pytest.fixture
def copy(records: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(records, tmp_path / "records"))


@pytest.fixture(autouse=True)
def _no_thread_or_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No decode thread outlives a test, and none leaves a file in the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("imnet-decode")]
    assert list(work.iterdir()) == []


def _run(records: Path, options: TrainOptions | EvalOptions = OPTIONS, epoch: int = 0, **how: Any) -> list[Batch]:
    start = how.pop("start_step", 0)
    split = how.pop("split", "train")
    with open_batches(records, split, options, how.pop("seed", 5), **how) as batches:
        return list(batches.epoch(epoch, start))


def _same(one: list[Batch], other: list[Batch]) -> bool:
    def flat(batch: Batch) -> list[bytes]:
        parts = (batch.image, batch.label, batch.record_id, batch.mix_label, batch.mix_weight)
        return [b"" if part is None else part.tobytes() for part in parts]

    return [flat(batch) for batch in one] == [flat(batch) for batch in other]


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["crop", "everything"])
def test_batches_are_the_same_at_1_2_and_4_threads(records: Path, options: TrainOptions, native: str) -> None:
    first = _run(records, options, workers=1, native=native)
    assert len(first) == TRAIN // 8
    for workers in (2, 4):
        assert _same(first, _run(records, options, workers=workers, native=native))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", [EVERYTHING, EvalOptions(8, image_size=32)], ids=["train", "eval"])
def test_the_ranks_together_are_the_single_rank_run(
    records: Path, ranks: int, options: TrainOptions | EvalOptions
) -> None:
    alone = _run(records, options, epoch=1)
    shares = [_run(records, options, epoch=1, rank=rank, ranks=ranks) for rank in range(ranks)]
    union = [
        batch for step in range(len(shares[0])) for share in shares if step < len(share) for batch in [share[step]]
    ]
    if isinstance(options, TrainOptions):
        alone = alone[: len(union)]
    else:
        assert sum(len(batch) for batch in union) == TRAIN
    assert len(union) > 10
    assert _same(alone, union)


def test_a_global_batch_of_two_ranks_is_one_batch_of_twice_the_size(records: Path) -> None:
    large = _run(records, replace(OPTIONS, batch_size=16))
    halves = [_run(records, OPTIONS, rank=rank, ranks=2) for rank in range(2)]
    for step, whole in enumerate(large):
        assert np.array_equal(whole.image, np.concatenate([half[step].image for half in halves]))
        assert np.array_equal(whole.record_id, np.concatenate([half[step].record_id for half in halves]))


def test_an_epoch_starts_at_any_step(records: Path) -> None:
    whole = _run(records, EVERYTHING, epoch=2)
    assert _same(whole[17:], _run(records, EVERYTHING, epoch=2, start_step=17))
    assert _run(records, EVERYTHING, epoch=2, start_step=len(whole)) == []


def test_an_earlier_epoch_changes_nothing_in_a_later_one(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5) as batches:
        runs = [list(batches.epoch(number)) for number in (0, 1, 2, 1)]
    assert _same(runs[1], runs[3])
    assert _same(runs[2], _run(records, epoch=2))
    ids = [np.concatenate([batch.record_id for batch in run]) for run in runs[:3]]
    assert not any(np.array_equal(ids[a], ids[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_order_and_crops_do_not_depend_on_the_number_of_shards(
    records: Path, tmp_path: Path, train_entries: list[Entry]
) -> None:
    other = write_folder(tmp_path / "other", {"train": train_entries[::-1]}, shards=1)
    assert _same(_run(records), _run(other))


@pytest.mark.parametrize("native", NATIVES)
def test_evaluation_gives_every_row_once_in_stored_order(records: Path, val_entries: list[Entry], native: str) -> None:
    found = _run(records, EvalOptions(8, image_size=32), split="val", native=native)
    assert [len(batch) for batch in found] == [8, 8, 8, 8, 5]
    ids = np.concatenate([batch.record_id for batch in found])
    assert ids.tolist() == [record_id("val", name) for name, _, _ in val_entries]
    assert np.concatenate([batch.label for batch in found]).tolist() == [label for _, label, _ in val_entries]
    assert all(batch.image.dtype == np.uint8 and batch.image.flags.c_contiguous for batch in found)


def test_training_without_drop_last_visits_every_record_once(records: Path, train_entries: list[Entry]) -> None:
    for order in ("global", "blocks", "sequential"):
        found = _run(records, replace(OPTIONS, drop_last=False), order=order)
        ids = np.concatenate([batch.record_id for batch in found])
        assert sorted(ids.tolist()) == sorted(record_id("train", name) for name, _, _ in train_entries)


def test_native_and_portable_batches_agree(records: Path) -> None:
    built, why = decoder_status()
    if not built:
        pytest.skip(why)
    for one, other in zip(_run(records, native="on"), _run(records, native="off"), strict=True):
        assert np.array_equal(one.record_id, other.record_id)
        assert np.abs(one.image.astype(int) - other.image).max() <= 1


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
def test_a_bad_record_is_named_at_once(copy: Path, change: str, native: str) -> None:
    path, name = _spoil(copy, 1, 7, change)
    began = time.monotonic()
    with pytest.raises(PipelineError) as caught:
        _run(copy, native=native)
    assert time.monotonic() - began < 10
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
    expected = _run(copy, EvalOptions(8, image_size=32), native=native)
    name = _list_sizes(copy, size, 7)[0]
    with pytest.raises(
        PipelineError, match=rf"row 7 \({name}\).*({size[0]} x {size[1]}|{size[0] * size[1]} pixels) by the record list"
    ):
        _run(copy, native=native)
    found = _run(copy, EvalOptions(8, image_size=32), native=native, on_error="skip")
    assert [len(batch) for batch in found[:2]] == [7, 8]
    assert np.array_equal(found[0].image, expected[0].image[:7])
    assert _same(found[1:], expected[1:])


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("size", [(0, 0), (0, 50), (50, 0)])
def test_a_size_that_is_not_listed_is_read_from_the_header(copy: Path, size: tuple[int, int], native: str) -> None:
    expected = _run(copy, EVERYTHING, native=native)
    _list_sizes(copy, size, *range(0, TRAIN, 3), 7)
    assert _same(expected, _run(copy, EVERYTHING, native=native))


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
    expected = _run(records, EvalOptions(1, image_size=32), native=native)
    _list_sizes(records, (40, 60), 0)
    assert _same(expected, _run(records, EvalOptions(1, image_size=32), native=native))


@pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1])
def test_without_digests_the_native_decoder_still_tells_of_garbled_data(copy: Path) -> None:
    _, name = _spoil(copy, 1, 7, "zero the second half")
    with pytest.raises(PipelineError, match=f"{name}.*damaged image data"):
        _run(copy, EvalOptions(8, image_size=32), native="on", check="never")


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
        _run(copy, on_error="skip")


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


def test_leaving_an_epoch_early_stops_its_work(records: Path) -> None:
    with open_batches(records, "train", replace(OPTIONS, image_size=256), 5, workers=1) as batches:
        for number in range(5):
            next(batches.epoch(number))
        iterator = batches.epoch(0)
        next(iterator)
        iterator.close()
        assert list(iterator) == []
        assert _same(list(batches.epoch(2)), _run(records, replace(OPTIONS, image_size=256), epoch=2))


def test_no_more_batches_are_made_than_the_stated_bound(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5, prefetch=3, workers=2) as batches:
        iterator = batches.epoch(0)
        next(iterator)
        time.sleep(0.5)
        assert batches.times.images <= (3 + 1) * 8
        assert batches.memory_bytes == (3 + 2) * 8 * 32 * 32 * 3


def test_a_closed_pipeline_says_so(records: Path) -> None:
    batches = open_batches(records, "train", OPTIONS)
    iterator = batches.epoch(0)
    batches.close()
    batches.close()
    for use in (lambda: batches.epoch(0), lambda: next(iterator)):
        with pytest.raises(PipelineError, match="closed"):
            use()


def test_two_epochs_can_be_under_way_at_once(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5) as batches:
        pairs = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert _same([one for one, _ in pairs], _run(records, epoch=0))
    assert _same([other for _, other in pairs], _run(records, epoch=1))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"rank": 2, "ranks": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"order": "random"}, "global, blocks, sequential"),
        ({"on_error": "ignore"}, "raise, skip"),
        ({"native": "yes"}, "auto, on, off"),
        ({"check": "sometimes"}, "first, always, never"),
        ({"prefetch": 0}, "prefetch"),
        ({"options": TrainOptions(TRAIN + 1)}, "does not fill one batch"),
        ({"options": TrainOptions(TRAIN // 2, image_size=32), "ranks": 3}, "does not fill one batch"),
    ],
)
def test_an_argument_out_of_range_is_named(records: Path, how: dict[str, Any], named: str) -> None:
    with pytest.raises(PipelineError, match=named):
        open_batches(records, "train", **{"options": OPTIONS, **how})


def test_an_unknown_split_lists_those_that_are_there(records: Path) -> None:
    with pytest.raises(RecordsError, match=r"train \(150 images\), val \(37 images\)"):
        open_batches(records, "test", OPTIONS)


def test_to_dataset_gives_the_batches_and_the_next_epoch_each_time(records: Path) -> None:
    with open_batches(records, "train", EVERYTHING, 5) as batches:
        data = to_dataset(batches)
        assert data.get_dataset_size() == TRAIN // 8
        assert data.get_col_names() == ["image", "label", "mix_label", "mix_weight"]
        epochs: list[list[NDArray[np.uint8]]] = []
        iterator = data.create_tuple_iterator(num_epochs=2, output_numpy=True)
        epochs = [[row[0] for row in iterator] for _ in range(2)]
    for number, images in enumerate(epochs):
        expected = _run(records, EVERYTHING, epoch=number)
        assert len(images) == len(expected)
        assert all(np.array_equal(one, batch.image) for one, batch in zip(images, expected, strict=True))


def test_a_chunk_boundary_is_no_boundary(records: Path) -> None:
    options = replace(OPTIONS, batch_size=CHUNK_ROWS + 3, drop_last=False)
    large, small = (_run(records, one) for one in (options, replace(OPTIONS, drop_last=False)))
    for name in ("image", "label", "record_id"):
        one, other = (np.concatenate([getattr(batch, name) for batch in run]) for run in (large, small))
        assert np.array_equal(one, other)


def test_stage_times_add_up_to_the_images_made(records: Path) -> None:
    with open_batches(records, "val", EvalOptions(8, image_size=32)) as batches:
        assert isinstance(batches, Batches)
        list(batches)
        times = batches.times
    assert times.images == VAL
    assert min(times.read_s, times.check_s, times.decode_s) > 0


def test_an_unforeseen_failure_in_a_worker_reaches_the_caller(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with open_batches(records, "train", OPTIONS, native="off") as batches:
        monkeypatch.setattr(batches._decoder, "decode", fail)
        with pytest.raises(MemoryError, match="no room"):
            next(batches.epoch(0))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_gets_an_error_not_a_hang(records: Path) -> None:
    with open_batches(records, "train", OPTIONS) as batches:
        iterator = batches.epoch(0)
        next(iterator)
        child = os.fork()
        if child == 0:
            try:
                next(iterator)
            except PipelineError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_process_that_is_interrupted_ends_at_once(records: Path) -> None:
    program = (
        "import sys, time, pathlib; from imnet_prep import TrainOptions, open_batches\n"
        "batches = open_batches(pathlib.Path(sys.argv[1]), 'train', TrainOptions(8))\n"
        "iterator = batches.epoch(0); next(iterator); print('ready', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(records)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM


def test_iterating_again_is_the_next_epoch(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5) as batches:
        runs = [list(batches), list(batches)]
    assert _same(runs[0], _run(records, epoch=0))
    assert _same(runs[1], _run(records, epoch=1))


def test_without_the_library_opencv_decodes_and_asking_for_it_is_an_error(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("imnet_prep.loader.render", "imnet_prep.images.batch_decoder"):
        monkeypatch.setattr(f"{module}.decoder_status", lambda: (False, "the C++ decoder is not built"))
    with open_batches(records, "train", OPTIONS) as batches:
        assert "OpenCV" in batches.decoder
        assert len(next(batches.epoch(0))) == 8
    with pytest.raises(PipelineError, match="not built"):
        open_batches(records, "train", OPTIONS, native="on")


def test_a_library_that_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "imnet_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr("imnet_prep.images.native.LIBRARY", broken)
    library, why = load.__wrapped__()
    assert library is None
    assert "does not load" in why
    broken.unlink()
    assert "not built" in load.__wrapped__()[1]
