"""A download folder gives what its journal lists as finished, and names everything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from imnet_prep.download.journal import FAILED, OK, PENDING, Journal
from imnet_prep.errors import SourceError
from imnet_prep.sources import detect, read
from imnet_prep.types import ImageRef, RawImage, Reason, Rejected
from tests.synthetic import jpeg


def _download(folder: Path) -> dict[str, bytes]:
    """Make what ``imnet-prep download`` leaves: a journal, images, and a stray file that it does not list."""
    folder.mkdir()
    journal = Journal(folder)
    wanted = {}
    for row, (wnid, name, state) in enumerate(
        [("n02", "b", OK), ("n01", "z", OK), ("n01", "lost", FAILED), ("n02", "a", OK), ("n01", "later", PENDING)]
    ):
        data = jpeg(row)
        if state == OK:
            (folder / wnid).mkdir(exist_ok=True)
            (folder / wnid / f"{name}.jpg").write_bytes(data)
            wanted[f"{wnid}/{name}.jpg"] = data
        journal.db.execute(
            "INSERT INTO urls (row, wnid, name, url, host, state, status, ext, bytes, sha256, width, height)"
            " VALUES (?, ?, ?, ?, 0, ?, 200, 'jpg', ?, ?, 48, 40)",
            (row, wnid, name, f"http://example.org/{name}?a=1", state, len(data), hashlib.sha256(data).digest()),
        )
    (folder / "n01" / "stray.jpg").write_bytes(jpeg())
    journal.db.close()
    return wanted


def test_finished_images_come_in_order_with_their_url(tmp_path: Path) -> None:
    wanted = _download(tmp_path / "got")
    (source,) = detect([tmp_path / "got"])
    assert source.kind == "download"
    refs = [ref for ref in source.refs() if isinstance(ref, ImageRef)]
    assert [ref.file_name for ref in refs] == sorted(wanted)
    for ref in refs:
        raw = read(ref)
        assert isinstance(raw, RawImage)
        assert raw.data == wanted[ref.file_name]
        assert ref.url == f"http://example.org/{ref.file_name[4:-4]}?a=1"
        assert (ref.status, ref.split) == (200, "train")
    assert source.info()["images"] == 3


def test_images_that_the_journal_does_not_know_are_rejected_and_lost_ones_too(tmp_path: Path) -> None:
    wanted = _download(tmp_path / "got")
    for stray in ("top.jpg", "n02/deep/1.png", "cats/1.jpg"):
        (tmp_path / "got" / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / stray).write_bytes(jpeg())
    (tmp_path / "got" / ".incoming").mkdir(exist_ok=True)
    (tmp_path / "got" / ".incoming" / "half.jpg").write_bytes(jpeg())
    (tmp_path / "got" / "n02" / "a.jpg").unlink()
    found = list(detect([tmp_path / "got"])[0].refs())
    bad = {item.file_name: item.reason for item in found if isinstance(item, Rejected)}
    assert bad == dict.fromkeys(["cats/1.jpg", "n01/stray.jpg", "n02/deep/1.png", "top.jpg"], Reason.UNLABELLED)
    got = [read(item) for item in found if isinstance(item, ImageRef)]
    assert [item.file_name for item in got if isinstance(item, Rejected)] == ["n02/a.jpg"]
    assert len(got) == len(wanted)


def test_the_split_can_be_named(tmp_path: Path) -> None:
    _download(tmp_path / "got")
    assert {item.split for item in detect([tmp_path / "got"], "val")[0].refs()} == {"val"}


def test_a_damaged_journal_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(SourceError) as caught:
        list(detect([tmp_path])[0].refs())
    assert "\n" not in str(caught.value)
