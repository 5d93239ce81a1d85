"""One shard: its sizes, its bytes, its limits, and what reading back finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.errors import IntegrityError, PlanError
from imnet_prep.files import file_digest
from imnet_prep.records.mindrecord import index_path
from imnet_prep.records.shards import Layout, LayoutTooSmall, ShardWriter, Written, choose_layout, read_back


def write(path: Path, sizes: list[int], layout: Layout, seed: int = 0) -> Written:
    rng = np.random.default_rng(seed)
    writer = ShardWriter(path, layout)
    for number, size in enumerate(sizes):
        writer.add(rng.bytes(size), number % 10, f"c{number % 10}/{number}.jpg")
    return writer.finish()


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ([2200] * 5000, 0.03),  # Tiny-ImageNet
        ([1000] * 30_000, 0.03),
        ([110_000] * 600, 0.03),  # ImageNet, a usual shard
        ([1] * 3000, None),
        ([2000] * 20, None),
    ],
)
def test_sizes_waste_little(tmp_path: Path, sizes: list[int], limit: float | None) -> None:
    path = tmp_path / "x.mindrecord"
    layout = choose_layout(len(sizes), sum(sizes), max(sizes))
    info = read_back(path, "train/x.mindrecord", write(path, sizes, layout))
    allowed = (1 << 17 if limit is None else limit * sum(sizes)) + 150 * len(sizes) + 60 * len(sizes)
    assert info.size_bytes + info.index_size_bytes <= sum(sizes) + allowed


@pytest.mark.parametrize(
    ("rows", "total", "largest"),
    [(1, 1, 1), (1, 20 << 20, 20 << 20), (100_000, 21 << 20, 20 << 20), (10_000, 1 << 30, 15 << 20), (5, 0, 0)],
)
def test_largest_image_always_fits(rows: int, total: int, largest: int) -> None:
    layout = choose_layout(rows, total, largest)
    assert layout.page_size >= largest + 8
    assert layout.header_size >= 1 << 14


def test_one_large_image_among_tiny_ones_takes_no_disk_for_its_empty_pages(tmp_path: Path) -> None:
    sizes = [100] * 2000 + [5 << 20] + [100] * 2000
    path = tmp_path / "x.mindrecord"
    read_back(path, "train/x.mindrecord", write(path, sizes, choose_layout(len(sizes), sum(sizes), max(sizes))))
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    assert path.stat().st_blocks * 512 <= 1.1 * sum(sizes) + 100 * len(sizes) + (1 << 17)


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x.mindrecord"
        write(path, [50] * 300, Layout(1 << 14, 1 << 15))
        found.append((file_digest(path), file_digest(index_path(path))))
    assert found[0] == found[1]


@pytest.mark.parametrize(("size", "doublings"), [(32_761, 1), (65_528, 1), (65_529, 2), (200_000, 3)])
def test_row_beyond_a_page_says_how_much_is_needed(tmp_path: Path, size: int, doublings: int) -> None:
    writer = ShardWriter(tmp_path / "x", Layout(1 << 14, 1 << 15))
    with pytest.raises(LayoutTooSmall) as caught:
        writer.add(b"x" * size, 0, "c/x.jpg")
    writer.close()
    assert caught.value.doublings == doublings
    write(tmp_path / "y", [size], Layout(1 << 14, 1 << 15).grown(doublings))


def test_header_that_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(LayoutTooSmall):
        write(tmp_path / "x", [20_000] * 120, Layout(1 << 14, 1 << 15))


@pytest.mark.parametrize("sizes", [(1 << 13, 1 << 15), (1 << 14, 100_000), (1 << 28, 1 << 15), (1 << 14, 1 << 29)])
def test_sizes_that_mindspore_does_not_take_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match="power of two"):
        Layout(*sizes)


def test_one_flipped_bit_anywhere_is_found_when_reading_back(tmp_path: Path) -> None:
    path = tmp_path / "x.mindrecord"
    written = write(path, [900] * 200, Layout(1 << 14, 1 << 15))
    whole, index = path.read_bytes(), index_path(path).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(60):
        place = int(rng.integers(len(whole)))
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            read_back(path, "train/x.mindrecord", written)
    path.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError):
        read_back(path, "train/x.mindrecord", written)
    path.write_bytes(whole)
    index_path(path).write_bytes(index[: len(index) // 2])
    with pytest.raises(IntegrityError):
        read_back(path, "train/x.mindrecord", written)


def test_writer_holds_no_images(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        writer = ShardWriter(tmp_path / f"{count}", Layout(1 << 18, 1 << 16))
        image = os.urandom(10_000)
        tracemalloc.start()
        for number in range(count):
            writer.add(image, 1, f"n00000000/{number}.JPEG")
        writer.finish()
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    few, many = peak(200), peak(3000)
    assert many - few < 2800 * 800  # fields, places and page entries of rows of 10,000 bytes each


@pytest.mark.slow
@pytest.mark.parametrize("rows", [30_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_rows(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "x.mindrecord"
    sizes = [20] * rows
    info = read_back(path, "train/x", write(path, sizes, choose_layout(len(sizes), sum(sizes), 20)))
    assert info.rows == rows
    assert info.size_bytes + info.index_size_bytes <= 1.03 * sum(sizes) + 200 * len(sizes)
