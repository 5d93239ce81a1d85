"""The browser page: what it shows is what is stored, it only reads, and it answers nobody else."""

from __future__ import annotations

import io
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imnet_prep.errors import RecordsError
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, Options, TrainOptions
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.mindrecord import Shard, index_path
from imnet_prep.records.record_list import write_lines
from imnet_prep.show.browse import create_app, host_is_ours, serve
from imnet_prep.show.browse_data import Library
from tests.chromium import Chromium, needs_chromium
from tests.imnet_prep.show.conftest import EVIL
from tests.records import copy, flip, make_records, read_records, rewrite_list, shard_files
from tests.synthetic import WNIDS

pytest.importorskip("flask")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("browse"), per_class={"train": 70, "val": 4}, shards=2)


@pytest.fixture(scope="module")
def client(records: Path) -> Any:
    return create_app(records).test_client()


def places(page: str) -> list[str]:
    """The records that a page links to: ``train/3``."""
    return re.findall(r'href="/record/(\w+/\d+)', page)


def test_overview_counts_what_there_is_and_leads_there(client: Any, records: Path) -> None:
    page = client.get("/").text
    assert "222 images in 3 classes" in page
    for link in ("/images?split=train", "/images?split=val", "/classes", "/rejected", "/duplicates"):
        assert f'href="{link}"' in page
        assert client.get(link).status_code == 200
    assert len(set(places(page))) == 32
    assert places(client.get("/?draw=1").text) != places(page) == places(client.get("/").text)


def test_classes_are_found_by_wnid_word_and_label(client: Any) -> None:
    for words, label in ((WNIDS[1], 1), ("tench", 0), ("great white", 2)):
        page = client.get("/classes", query_string={"q": words}).text
        assert f'href="/class/{label}"' in page
        assert page.count('href="/class/') == 1
    assert "No class matches" in client.get("/classes?q=zebra+crossing").text


def test_images_of_a_class_come_in_pages_each_once(client: Any, records: Path) -> None:
    links = [place for number in (1, 2) for place in places(client.get(f"/class/1?split=train&page={number}").text)]
    assert len(links) == len(set(links)) == 70
    assert len(places(client.get("/class/1?page=2").text)) == 14
    assert client.get("/class/1?split=train&page=3").status_code == 404


def test_image_is_the_stored_bytes_and_record_says_what_is_known(client: Any, records: Path) -> None:
    split = load_manifest(records).splits["train"]
    line = list(read_records(records, split))[41]
    with Shard(records / split.shards[line.shard].file) as shard:
        stored = shard.image(line.row)
    answer = client.get("/image/train/41")
    assert (answer.data, answer.mimetype) == (stored, "image/jpeg")
    page = client.get("/record/train/41").text
    for text in (line.file_name, line.sha256, line.source_sha256, split.shards[line.shard].file, f">{line.row}<"):
        assert text in page
    assert Image.open(io.BytesIO(client.get("/thumb/train/41").data)).size == (48, 40)


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(3, image_size=64, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment_ops=2, erasing_prob=0.5),
        EvalOptions(3, image_size=40),
    ],
)
def test_a_tile_shows_the_pixels_of_the_loader_in_its_epoch(records: Path, options: Options) -> None:
    library = Library(records)
    shown = set()
    with open_batches(records, "train", options, seed=7) as batches:
        for epoch in (0, 3):
            batch = next(batches.epoch(epoch))
            for row, position in enumerate(batches.order(epoch).positions[:3].tolist()):
                tile = library.view(position, options, 7, epoch)  # train is the first split
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(tile))), batch.image[row])
                shown.add(tile)
    assert len(shown) == (6 if isinstance(options, TrainOptions) else 3)


@pytest.mark.parametrize(
    "path",
    [
        "/image/train/99999999", "/image/none/0", "/image/train/-1", "/image/train/../val/0", "/thumb/train/0x1",
        "/..%2f..%2fetc/passwd", "/%2e%2e/manifest.json", "/manifest.json", "/static/style.css", "/class/9999",
        "/class/-2", "/images?page=9", "/kept/0", "/kept/99999999999", "/duplicates?across=x",
    ],
)  # fmt: skip
def test_what_is_not_a_record_is_not_found(client: Any, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "query", ["crop=7", "crop=nan", "flip=2", "ops=99", "jitter=-1", "seed=-1", "epoch=1e9", "epoch=9" * 30, "seed=٣"]
)
def test_bad_options_are_refused_and_named(client: Any, query: str) -> None:
    answer = client.get(f"/view/train/0?{query}")
    assert answer.status_code == 422
    assert "out of range" in answer.text or "not a number" in answer.text


def test_only_reading_is_answered(client: Any) -> None:
    for method in ("post", "put", "delete", "patch", "options"):
        assert getattr(client, method)("/").status_code == 405
    assert client.head("/").status_code == 200


def test_other_host_names_are_refused(client: Any) -> None:
    for name in ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "10.0.0.5:8642", ""):
        assert client.get("/", headers={"Host": name}).status_code in (400, 403), name
    for name in ("localhost:8642", "127.0.0.1", "[::1]:8642"):
        assert client.get("/", headers={"Host": name}).status_code == 200


def test_asked_to_listen_elsewhere_it_answers_to_addresses_there() -> None:
    assert host_is_ours("10.0.0.5:8642", "0.0.0.0")
    assert host_is_ours("box.lan:8642", "box.lan")
    assert not host_is_ours("evil.example", "0.0.0.0")
    assert not host_is_ours("10.0.0.5", "127.0.0.1")


def test_every_answer_forbids_scripts_and_frames_from_elsewhere(client: Any) -> None:
    for path in ("/", "/image/train/0", "/none"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_search_is_escaped(client: Any) -> None:
    page = client.get("/", query_string={"q": '"><script>alert(1)</script>'}).text
    assert "<script>alert" not in page


def test_names_of_classes_and_files_are_escaped(evil_records: Path) -> None:
    client = create_app(evil_records).test_client()
    place = places(client.get("/class/0").text)[0]
    for path in ("/", "/classes", "/class/0", "/images?name=script", "/rejected", f"/record/{place}"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert f">{EVIL}<" in unescape(page)  # the folder, in the navigation
        assert EVIL in unescape(page.replace("<wbr>", "")).split("<main")[1], path


def test_an_undecodable_image_is_an_error_page(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    path = sorted(damaged.glob("train/*.mindrecord"))[0]
    with Shard(path) as shard:
        start = int(shard.index.blob_start[0]) + 8
    for bit in range(16):
        flip(path, 8 * start + bit)
    answer = create_app(damaged).test_client().get("/thumb/train/0")
    assert answer.status_code == 422
    assert "row 0" in answer.text


def test_a_folder_whose_name_is_not_utf8_is_shown(records: Path, tmp_path: Path) -> None:
    client = create_app(copy(records, tmp_path / os.fsdecode(b"r\xff"))).test_client()
    for path in ("/", "/class/0", "/record/train/0"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert ">r?<" in answer.text


def test_a_record_list_of_other_records_is_an_error_page(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    client = create_app(damaged).test_client()
    lines = list(read_records(records, load_manifest(records).splits["train"]))
    write_lines(damaged / "train" / "records.jsonl.gz", [line.to_json() for line in lines[1:9]])
    for position, said in ((0, "row 1 here"), (200, "cannot be read")):
        answer = client.get(f"/record/train/{position}")
        assert answer.status_code == 422
        assert said in answer.text


def test_a_label_of_no_class_is_shown(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    rewrite_list(damaged, lambda lines: [re.sub('"label":[0-9]+', '"label":99', lines[0]), *lines[1:]])
    with closing(sqlite3.connect(index_path(shard_files(damaged)[0]))) as index:
        index.execute("UPDATE INDEXES SET label_0 = 99 WHERE ROW_ID = 0")
        index.commit()
    client = create_app(damaged).test_client()
    for path in ("/", "/classes", "/images", "/record/train/0", "/view/train/0"):
        assert client.get(path).status_code == 200, path
    assert "no label" in client.get("/record/train/0").text


def test_missing_folder_and_taken_port_are_named_errors(records: Path, tmp_path: Path) -> None:
    import socket

    with pytest.raises(RecordsError, match="no such folder"):
        create_app(tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecordsError, match="cannot listen"):
            serve(records, "127.0.0.1", taken.getsockname()[1], lambda url: None)


@pytest.fixture
def server(records: Path) -> Iterator[str]:
    """The command's own server, on a free port."""
    code = "import sys; from pathlib import Path; from imnet_prep.show.browse import serve; "
    code += "serve(Path(sys.argv[1]), '127.0.0.1', 0, print)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code, str(records)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()  # SIGINT is ignored by what a shell started in the background
    process.stdout.close()
    process.wait(timeout=20)


@needs_chromium
@pytest.mark.slow
def test_pages_in_a_browser_by_keyboard(server: str) -> None:
    with Chromium() as browser:
        for path in ("", "classes", "class/1?sort=large", "record/train/3", "rejected", "duplicates"):
            for width, dark in ((1200, False), (400, True)):
                browser.open(server + path, width, 900, dark=dark)
                assert not browser.scrolls_sideways(), (path, width)
                assert browser.violations() == []
            assert browser.broken_images() == []
        browser.open(server)
        browser.press("/", "/")
        assert browser.run("document.activeElement.id") == "name"
        browser.press("Tab")
        browser.press("Tab")
        assert browser.run("document.activeElement.id") == "q"
        browser.type("tench")
        browser.press("Enter")
        loaded = "document.readyState == 'complete'"  # its script listens to keys only then
        browser.wait_for(f"{loaded} && location.search == '?q=tench'")
        browser.run("document.querySelector('.cards a').focus()")
        browser.press("Enter")
        images = "document.querySelectorAll('.grid img').length"
        browser.wait_for(f"{loaded} && location.pathname == '/class/0' && {images} == 60")
        browser.press("ArrowRight")
        browser.wait_for(f"{loaded} && location.search.includes('page=2') && {images} == 14")
        browser.press("ArrowLeft")
        browser.wait_for(f"{loaded} && !location.search.includes('page') && {images} == 60")
        browser.open(server + "record/train/3")
        browser.press("ArrowRight")
        browser.wait_for("!location.pathname.endsWith('/3')")
        assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {server.split("/")[2]}
        assert browser.errors == []


def test_an_idle_server_leaves_no_file_behind(records: Path, server: str) -> None:
    before = sorted(os.listdir(records))
    time.sleep(0.1)
    assert server.startswith("http://127.0.0.1:")
    assert sorted(os.listdir(records)) == before
