"""The report of a records folder: what it says is so, it fetches nothing, and everybody can read it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sqlite3
from html import unescape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.show import gather as gathering
from imnet_prep.show.gather import gather
from imnet_prep.show.report import ReportOptions, write_report
from tests.chromium import BROWSER, Chromium, needs_chromium
from tests.imnet_prep.show.conftest import EVIL
from tests.records import copy, make_records, quiet, read_records, reseal
from tests.synthetic import encode, jpeg
from tests.synthetic import picture as drawn


def mess(source: Path) -> None:
    """A rejected image, converted ones, the same bytes twice, and a mirrored copy."""
    images = sorted((source / "train").rglob("*.jpg"))
    folder = images[0].parent
    (folder / "broken.jpg").write_bytes(jpeg(0, 1)[:-80])
    (folder / "drawn.png").write_bytes(encode(drawn(0, 5), "PNG"))
    shutil.copy(images[1], folder / "again.jpg")
    wide = drawn(2, 50, 320, 200)
    (folder / "wide.jpg").write_bytes(encode(wide))
    (source / "val" / folder.name / "mirrored.jpg").write_bytes(encode(wide[:, ::-1].copy(), quality=60))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("report"), per_class=8, add=mess)


@pytest.fixture(scope="module")
def made(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report.html"
    write_report(records, out, ReportOptions(workers=1), quiet)
    return out


def words(page: Path) -> str:
    """The text of a page."""
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")).split())


def test_report_says_what_is_in_the_records(made: Path, records: Path) -> None:
    said = words(made)
    manifest = load_manifest(records)
    assert manifest.digest in said
    assert "52 images in 3 classes" in said
    assert "truncated" in said
    assert "broken.jpg" in said
    assert re.search(r'<img src="data:image/jpeg[^>]+alt="train/[^"]+broken.jpg"', made.read_text(encoding="utf-8"))
    assert "Not a JPEG 1 converted to JPEG" in said
    assert "1 record with the same bytes" in said
    assert "same picture, mirrored" in said
    for split in manifest.splits.values():
        for shard in split.shards:
            assert shard.sha256 in said


def test_colours_are_those_of_the_pixels(records: Path) -> None:
    means, squares = [], []
    for path in sorted(records.glob("*/*.mindrecord")):
        with Shard(path) as shard:
            for row in range(len(shard)):
                pixels = cv2.imdecode(np.frombuffer(shard.image(row), np.uint8), 1)[:, :, ::-1].reshape(-1, 3) / 255
                means.append(pixels.mean(axis=0))
                squares.append((pixels**2).mean(axis=0))
    mean, deviation, _ = gather(records, 1, quiet).channels()
    expected = np.mean(means, axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_allclose(deviation, np.sqrt(np.mean(squares, axis=0) - expected**2), atol=1e-6)


def test_worker_count_changes_no_byte(records: Path, made: Path, tmp_path: Path) -> None:
    write_report(records, tmp_path / "report.html", ReportOptions(workers=2), quiet)
    assert (tmp_path / "report.html").read_bytes() == made.read_bytes()


def test_report_names_nothing_outside_itself(made: Path) -> None:
    page = made.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?!data:|#)[^"'#\s>]""", page)
    assert "default-src 'none'" in page


def test_pictures_can_be_left_out(records: Path, tmp_path: Path) -> None:
    write_report(records, tmp_path / "plain.html", ReportOptions(images=False, workers=1), quiet)
    assert "<img" not in (tmp_path / "plain.html").read_text()


@pytest.mark.slow
def test_report_of_many_classes_is_small(tmp_path: Path) -> None:
    """Under 5 MB, and with a browser's script a few screens tall, in pages that the keyboard turns."""
    records = make_records(tmp_path, classes=1000, per_class=1, splits=("train",))
    result = write_report(records, tmp_path / "r.html", ReportOptions(), quiet)
    assert result["bytes"] == (tmp_path / "r.html").stat().st_size < 5_000_000
    assert (tmp_path / "r.html").read_text().count("<img") >= 1000
    if BROWSER is None:
        return
    with Chromium() as browser:
        for width in (1280, 400):
            browser.open((tmp_path / "r.html").as_uri(), width, 900)
            assert browser.run("document.documentElement.scrollHeight") <= 6000, width
        shown = "[...document.querySelectorAll('.class')].filter(e => e.checkVisibility()).length"
        assert browser.run(shown) == 12
        browser.run("document.querySelector('.pager button:not([disabled])').focus()")
        browser.press("Enter")
        assert browser.run(shown) == 12
        assert browser.run("document.querySelector('.pager span').textContent") == "13 to 24 of 1000 in all"


def test_damaged_folder_and_bad_target_are_named_errors(records: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="no such folder"):
        write_report(tmp_path / "none", tmp_path / "r.html", ReportOptions(workers=1), quiet)
    with pytest.raises(RecordsError, match="cannot be written"):
        write_report(records, tmp_path / "none" / "r.html", ReportOptions(workers=1), quiet)


def test_a_record_list_that_no_writer_made_is_refused(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    split = load_manifest(records).splits["train"]
    lines = [json.loads(line.to_json()) for line in read_records(records, split)]
    path = damaged / "train" / "records.jsonl.gz"

    def put(changed: list[dict[str, Any]]) -> None:
        """Write the list and give the manifest its digest, as an enemy would."""
        with gzip.open(path, "wt") as packed:
            packed.writelines(json.dumps(line) + "\n" for line in changed)
        entry = {"file": split.records["file"], "size_bytes": path.stat().st_size, "sha256": file_digest(path)}
        reseal(damaged, lambda document: document["splits"]["train"].update(records=entry))  # type: ignore[index]

    for wrong in (
        {"width": 10**12}, {"label": -2}, {"height": 4.0}, {"sha256": ""}, {"sha256": "a b " * 16}, {"sha256": 5},
        {"url": 5}, {"file_name": None}, {"changes": 5}, {"changes": [["cmyk"]]}, {"row": 7}, {"shard": True},
        {"file_name": "a\x01b"}, {"source_sha256": "zz"}, {"url": "\ud800"}, {"status": [1]},
    ):  # fmt: skip
        put([{**lines[0], **wrong}, *lines[1:]])
        with pytest.raises(RecordsError, match="line 1 is"):
            write_report(damaged, tmp_path / "r.html", ReportOptions(workers=1), quiet)
    put([{**line, "url": "http://["} for line in lines])
    write_report(damaged, tmp_path / "r.html", ReportOptions(workers=1), quiet)
    assert f"{len(lines)} records from 1 host" in words(tmp_path / "r.html")
    with gzip.open(path, "wt") as packed:
        packed.writelines(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(IntegrityError, match="the record list is not the manifest's"):
        write_report(damaged, tmp_path / "r.html", ReportOptions(workers=1), quiet)


def test_a_list_of_rejected_images_that_is_another_is_refused(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    with (damaged / "rejected.jsonl").open("a") as lines:
        lines.write("{}\n")
    with pytest.raises(IntegrityError, match="not the manifest's"):
        write_report(damaged, tmp_path / "r.html", ReportOptions(workers=1), quiet)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("prints", [True, False])
def test_a_row_that_is_not_there_is_named(
    prints: bool, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neither its colours nor its picture are asked for."""
    if not prints:
        monkeypatch.setattr(gathering, "MAX_PRINTS", 1)
        monkeypatch.setattr(gathering, "MAX_COLOURS", 1)
    damaged = copy(records, tmp_path / "records")
    path = sorted(damaged.glob("train/*.mindrecord"))[-1]
    with sqlite3.connect(f"{path}.db") as index:
        index.execute("DELETE FROM INDEXES WHERE ROW_ID = (SELECT MAX(ROW_ID) FROM INDEXES)")
    index.close()
    with pytest.raises(RecordsError, match=re.escape(path.name)):
        write_report(damaged, tmp_path / "r.html", ReportOptions(workers=1), quiet)


def test_names_of_classes_and_files_are_escaped(evil_records: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(evil_records, out, ReportOptions(workers=1), quiet)
    assert out.read_text(encoding="utf-8").count("<script") == 1  # its own
    for text in (f"Records: {EVIL}", f"0 {EVIL}", f"train/{EVIL}/{EVIL}-cut.jpg"):
        assert text in unescape(words(out))


@needs_chromium
@pytest.mark.slow
def test_report_in_a_browser(made: Path, tmp_path: Path) -> None:
    with Chromium() as browser:
        for width, dark in ((1200, False), (400, False), (400, True), (320, False)):
            browser.open(made.as_uri(), width, 900, dark=dark)
            assert not browser.scrolls_sideways(), width
            assert browser.violations() == []
        assert browser.run("[...document.querySelectorAll('.axes')].every(e => e.querySelector('.y-name').textContent)")
        assert browser.run("[...document.querySelectorAll('.axes')].every(e => e.querySelector('.x-name').textContent)")
        assert browser.broken_images() == []
        assert browser.run(
            "['header', 'nav', 'main', 'footer', 'h1'].every(n => document.querySelectorAll(n).length == 1)"
        )
        # Search by the keyboard alone, then leave it.
        browser.run("document.querySelector('#class-search').focus()")
        browser.type("n01443537")
        shown = "[...document.querySelectorAll('.class')].filter(e => e.checkVisibility()).length"
        assert browser.run(shown) == 1
        assert browser.run("document.querySelector('[aria-live]').textContent") == "1 found, 3 in all"
        browser.press("Escape")
        assert browser.run(shown) == 3
        browser.open(made.as_uri(), 400, 900)
        browser.press("Tab")
        assert browser.run("document.activeElement.className") == "skip"
        browser.press("Enter")
        assert browser.run("document.activeElement.id") == "main"
        assert [url for url in browser.requests if not url.startswith(("data:", made.as_uri()))] == []
        assert browser.errors == []
        assert json.loads(json.dumps(browser.run("document.title"))) == "Records: records"
