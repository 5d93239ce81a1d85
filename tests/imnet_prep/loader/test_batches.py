"""Records to batches: the same bytes however they are made, and every record once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError, RecordsError
from imnet_prep.images.native import decoder_status, load
from imnet_prep.loader.adapters import to_dataset
from imnet_prep.loader.batches import CHUNK_ROWS, Batches, open_batches
from imnet_prep.loader.options import AHEAD_BYTES, EvalOptions, TrainOptions
from imnet_prep.types import record_id
from tests.imnet_prep.loader.runs import EVERYTHING, NATIVES, OPTIONS, TRAIN, VAL, run_epoch, same
from tests.records import Entry, write_folder


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["crop", "everything"])
def test_batches_are_the_same_at_1_2_and_4_threads(records: Path, options: TrainOptions, native: str) -> None:
    first = run_epoch(records, options, workers=1, native=native)
    assert len(first) == TRAIN // 8
    for workers in (2, 4):
        assert same(first, run_epoch(records, options, workers=workers, native=native))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", [EVERYTHING, EvalOptions(8, image_size=32)], ids=["train", "eval"])
def test_the_ranks_together_are_the_single_rank_run(
    records: Path, ranks: int, options: TrainOptions | EvalOptions
) -> None:
    alone = run_epoch(records, options, epoch=1)
    shares = [run_epoch(records, options, epoch=1, rank=rank, ranks=ranks) for rank in range(ranks)]
    union = [
        batch for step in range(len(shares[0])) for share in shares if step < len(share) for batch in [share[step]]
    ]
    if isinstance(options, TrainOptions):
        alone = alone[: len(union)]
    else:
        assert sum(len(batch) for batch in union) == TRAIN
    assert len(union) > 10
    assert same(alone, union)


def test_a_global_batch_of_two_ranks_is_one_batch_of_twice_the_size(records: Path) -> None:
    large = run_epoch(records, replace(OPTIONS, batch_size=16))
    halves = [run_epoch(records, OPTIONS, rank=rank, ranks=2) for rank in range(2)]
    for step, whole in enumerate(large):
        assert np.array_equal(whole.image, np.concatenate([half[step].image for half in halves]))
        assert np.array_equal(whole.record_id, np.concatenate([half[step].record_id for half in halves]))


def test_an_epoch_starts_at_any_step(records: Path) -> None:
    whole = run_epoch(records, EVERYTHING, epoch=2)
    assert same(whole[17:], run_epoch(records, EVERYTHING, epoch=2, start_step=17))
    assert run_epoch(records, EVERYTHING, epoch=2, start_step=len(whole)) == []


def test_balanced_batches_are_the_same_at_any_rank_worker_count_and_start(records: Path) -> None:
    how: dict[str, Any] = {"options": EVERYTHING, "order": "balanced", "epoch": 1}
    alone = run_epoch(records, workers=1, **how)
    labels = np.concatenate([batch.label for batch in alone])
    assert len(labels) == TRAIN // 8 * 8
    assert np.ptp(np.bincount(labels)) <= 8 + 1  # six images do not fill a batch
    assert same(alone, run_epoch(records, workers=4, **how))
    assert same(alone[5:], run_epoch(records, start_step=5, **how))
    shares = [run_epoch(records, rank=rank, ranks=2, **how) for rank in range(2)]
    union = [share[step] for step in range(len(shares[0])) for share in shares]
    assert same(alone[: len(union)], union)


def test_a_record_that_comes_again_in_an_epoch_is_cropped_anew(tmp_path: Path, train_entries: list[Entry]) -> None:
    few = next(entry for entry in train_entries if entry[1] == 1)
    many = [entry for entry in train_entries if entry[1] == 0][:15]
    folder = write_folder(tmp_path / "few", {"train": [*many, few]}, shards=1)
    found = run_epoch(folder, TrainOptions(16, image_size=32), order="balanced")
    rows = found[0].image[found[0].label == 1]
    assert len(rows) == 8
    assert len({row.tobytes() for row in rows}) == 8
    assert len(set(found[0].record_id[found[0].label == 1].tolist())) == 1


def test_an_earlier_epoch_changes_nothing_in_a_later_one(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5) as batches:
        runs = [list(batches.epoch(number)) for number in (0, 1, 2, 1)]
    assert same(runs[1], runs[3])
    assert same(runs[2], run_epoch(records, epoch=2))
    ids = [np.concatenate([batch.record_id for batch in run]) for run in runs[:3]]
    assert not any(np.array_equal(ids[a], ids[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_order_and_crops_do_not_depend_on_the_number_of_shards(
    records: Path, tmp_path: Path, train_entries: list[Entry]
) -> None:
    other = write_folder(tmp_path / "other", {"train": train_entries[::-1]}, shards=1)
    assert same(run_epoch(records), run_epoch(other))


@pytest.mark.parametrize("native", NATIVES)
def test_evaluation_gives_every_row_once_in_stored_order(records: Path, val_entries: list[Entry], native: str) -> None:
    found = run_epoch(records, EvalOptions(8, image_size=32), split="val", native=native)
    assert [len(batch) for batch in found] == [8, 8, 8, 8, 5]
    ids = np.concatenate([batch.record_id for batch in found])
    assert ids.tolist() == [record_id("val", name) for name, _, _ in val_entries]
    assert np.concatenate([batch.label for batch in found]).tolist() == [label for _, label, _ in val_entries]
    assert all(batch.image.dtype == np.uint8 and batch.image.flags.c_contiguous for batch in found)


def test_training_without_drop_last_visits_every_record_once(records: Path, train_entries: list[Entry]) -> None:
    for order in ("global", "blocks", "sequential"):
        found = run_epoch(records, replace(OPTIONS, drop_last=False), order=order)
        ids = np.concatenate([batch.record_id for batch in found])
        assert sorted(ids.tolist()) == sorted(record_id("train", name) for name, _, _ in train_entries)


def test_native_and_portable_batches_agree(records: Path) -> None:
    built, why = decoder_status()
    if not built:
        pytest.skip(why)
    for one, other in zip(run_epoch(records, native="on"), run_epoch(records, native="off"), strict=True):
        assert np.array_equal(one.record_id, other.record_id)
        assert np.abs(one.image.astype(int) - other.image).max() <= 1


def test_leaving_an_epoch_early_stops_its_work(records: Path) -> None:
    with open_batches(records, "train", replace(OPTIONS, image_size=256), 5, workers=1) as batches:
        for number in range(5):
            next(batches.epoch(number))
        iterator = batches.epoch(0)
        next(iterator)
        iterator.close()
        assert list(iterator) == []
        assert same(list(batches.epoch(2)), run_epoch(records, replace(OPTIONS, image_size=256), epoch=2))


def test_no_more_batches_are_made_than_the_stated_bound(records: Path) -> None:
    with open_batches(records, "train", OPTIONS, 5, prefetch=3, workers=2) as batches:
        iterator = batches.epoch(0)
        next(iterator)
        time.sleep(0.5)
        assert batches.times.images <= (3 + 1) * 8
        assert batches.memory_bytes == (3 + 2) * 8 * 32 * 32 * 3


def test_ranks_of_one_machine_share_its_cores_and_the_memory_for_batches_ahead(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imnet_prep.loader.batches.cpu_count", lambda: 64)

    def opened(ranks: int, **how: Any) -> tuple[int, int, int]:
        options = TrainOptions(how.pop("batch_size", 16), image_size=how.pop("image_size", 224))
        with open_batches(records, "train", options, local_ranks=ranks, **how) as batches:
            return batches.workers, batches.prefetch, batches.memory_bytes

    assert opened(1)[:2] == (64, 64 * CHUNK_ROWS // 16 + 1)
    workers, prefetch, memory = opened(8)
    assert (workers, prefetch) == (8, 8 * CHUNK_ROWS // 16 + 1)
    assert 8 * memory < 1 << 29
    assert opened(100)[:2] == (1, 3)
    _, prefetch, memory = opened(8, batch_size=4, image_size=1024)
    assert prefetch == AHEAD_BYTES // 8 // (4 * 1024**2 * 3)  # not the 65 that would keep the threads busy
    assert memory < (AHEAD_BYTES >> 3) + 2 * 4 * 1024**2 * 3
    assert opened(8, batch_size=4, image_size=4096)[1] == 2
    assert opened(8, workers=3)[0] == 3
    assert opened(8, prefetch=5)[1] == 5


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
    assert same([one for one, _ in pairs], run_epoch(records, epoch=0))
    assert same([other for _, other in pairs], run_epoch(records, epoch=1))


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
        ({"max_skipped": -1}, "max_skipped"),
        ({"local_ranks": 0}, "local_ranks"),
        ({"options": TrainOptions(TRAIN + 1)}, "does not fill one batch"),
        ({"options": TrainOptions(TRAIN // 2, image_size=32), "ranks": 3}, "does not fill one batch"),
    ],
)
def test_an_argument_out_of_range_is_named(records: Path, how: dict[str, Any], named: str) -> None:
    with pytest.raises(PipelineError, match=named):
        open_batches(records, "train", **{"options": OPTIONS, **how})


def test_an_unknown_keyword_is_refused(records: Path) -> None:
    with pytest.raises(TypeError, match="threads"):
        open_batches(records, "train", OPTIONS, threads=2)


def test_an_unknown_split_lists_those_that_are_there(records: Path) -> None:
    with pytest.raises(RecordsError, match=r"train \(150 images\), val \(37 images\)"):
        open_batches(records, "test", OPTIONS)


def test_to_dataset_gives_the_batches_and_the_next_epoch_each_time(records: Path) -> None:
    pytest.importorskip("mindspore")
    with open_batches(records, "train", EVERYTHING, 5) as batches:
        data = to_dataset(batches)
        assert data.get_dataset_size() == TRAIN // 8
        assert data.get_col_names() == ["image", "label", "mix_label", "mix_weight"]
        epochs: list[list[NDArray[np.uint8]]] = []
        iterator = data.create_tuple_iterator(num_epochs=2, output_numpy=True)
        epochs = [[row[0] for row in iterator] for _ in range(2)]
    for number, images in enumerate(epochs):
        expected = run_epoch(records, EVERYTHING, epoch=number)
        assert len(images) == len(expected)
        assert all(np.array_equal(one, batch.image) for one, batch in zip(images, expected, strict=True))


def test_a_chunk_boundary_is_no_boundary(records: Path) -> None:
    options = replace(OPTIONS, batch_size=CHUNK_ROWS + 3, drop_last=False)
    large, small = (run_epoch(records, one) for one in (options, replace(OPTIONS, drop_last=False)))
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
    if sys.platform == "win32":
        pytest.skip("Windows has no fork")
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
    assert same(runs[0], run_epoch(records, epoch=0))
    assert same(runs[1], run_epoch(records, epoch=1))


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


def test_the_memory_of_a_batch_is_used_again_once_no_view_of_it_is_held(records: Path) -> None:
    with open_batches(records, "train", TrainOptions(8, 32), workers=2, prefetch=1) as batches:
        kept = [(batch.image[1:3, ::2].reshape(-1), batch.image.copy()) for batch in batches]
        again = [batch.image for batch in batches.epoch(0)]
        for (view, image), second in zip(kept, again, strict=True):
            np.testing.assert_array_equal(view, image[1:3, ::2].reshape(-1))
            np.testing.assert_array_equal(second, image)
            assert not np.shares_memory(view, second)
        address = {image.ctypes.data for image in again}
        del kept, again, view, image, second
        assert next(batches.epoch(0)).image.ctypes.data in address


def test_a_tensor_that_shares_the_memory_of_a_batch_keeps_it(records: Path) -> None:
    ms = pytest.importorskip("mindspore")
    with open_batches(records, "train", TrainOptions(8, 32), workers=2, prefetch=1) as batches:
        shared = [(ms.Tensor.from_numpy(batch.image), batch.image.copy()) for batch in batches]
        assert sum(len(batch) for batch in batches.epoch(1))  # which the freed blocks take
        for tensor, image in shared:
            np.testing.assert_array_equal(tensor.asnumpy(), image)
