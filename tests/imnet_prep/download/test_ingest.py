"""Lists come into the journal whole, once, and in order."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import Journal
from imnet_prep.download.urllist import parse_line
from imnet_prep.download.urls import BadUrl
from imnet_prep.errors import DownloadError


def _rows(journal: Journal) -> list[tuple[str, str, str]]:
    return journal.db.execute("SELECT wnid, name, url FROM urls ORDER BY row").fetchall()


def _load(folder: Path, *contents: bytes, wnid: str | None = None, wnids: frozenset[str] | None = None) -> Journal:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"list{number}")
        paths[-1].write_bytes(content)
    journal = Journal(folder)
    take_in(journal, tuple(paths), wnid, wnids, None)
    return journal


def _random_list(seed: int, lines: int) -> bytes:
    rng = random.Random(seed)
    out = []
    for _ in range(lines):
        name = f"n0000000{rng.randrange(3)}_{rng.randrange(lines // 2)}"
        host = rng.choice(["a.com", "B.com", "c.com:81", "d..com", "é.com", "photos.example.org"])
        path = rng.choice(["x.jpg", "y z", "%41", "ü", "", "q?a=b#c"]) + str(rng.randrange(lines // 3))
        form = rng.choice(["{0}\thttp://{1}/{2}", "{0} http://{1}/{2}\r", "{0}", "http://{1}/{2}", "", "junk\x00"])
        out.append(form.format(name, host, path).encode(rng.choice(["utf-8", "latin-1"])))
    return b"\n".join(out)


@pytest.mark.parametrize("seed", range(4))
def test_the_fast_reader_equals_the_obvious_one(tmp_path: Path, seed: int) -> None:
    content = _random_list(seed, 3000)
    expected, names, urls = [], set(), set()
    malformed = repeated = 0
    for raw in content.split(b"\n"):
        try:
            line = parse_line(raw, "n09999999")
        except BadUrl:
            malformed += 1
            continue
        if line and (line.name in names or line.url in urls):
            repeated += 1
        elif line:
            names.add(line.name)
            urls.add(line.url)
            expected.append(tuple(line))
    journal = _load(tmp_path / "out", content, wnid="n09999999")
    assert _rows(journal) == expected
    totals = journal.totals()
    assert (totals.requested, totals.malformed, totals.repeated) == (len(expected), malformed, repeated)
    assert totals.pending == totals.requested
    listed = journal.db.execute("SELECT kind, count(*) FROM bad_lines GROUP BY kind").fetchall()
    assert dict(listed) == {"malformed": malformed, "repeated": repeated}
    journal.close()


def test_a_repeated_line_is_one_whose_url_or_id_an_earlier_kept_line_has(tmp_path: Path) -> None:
    content = (
        b"n00000001_1 http://a.com/1\n"
        b"n00000001_1 http://a.com/2\n"  # the id again
        b"n00000001_2 http://a.com/2\n"  # its URL was only in a line that was not kept
        b"n00000001_3 http://a.com/1\n"  # the URL again
        b"n00000001_3 http://a.com/3\n"
        b"n00000001_1 http://a.com/1\n"
    )
    journal = _load(tmp_path / "out", content)
    assert [name for _, name, _ in _rows(journal)] == ["n00000001_1", "n00000001_2", "n00000001_3"]
    lines = journal.db.execute("SELECT line FROM bad_lines WHERE kind = 'repeated' ORDER BY line").fetchall()
    assert lines == [(2,), (4,), (6,)]
    journal.close()


def test_a_second_list_adds_only_what_is_new(tmp_path: Path) -> None:
    first = b"n00000001_1 http://a.com/1\nbad\n"
    journal = _load(tmp_path / "out", first, first + b"n00000001_2 http://a.com/2\n")
    assert [name for _, name, _ in _rows(journal)] == ["n00000001_1", "n00000001_2"]
    assert journal.totals().repeated == 1
    journal.close()


def test_a_list_seen_before_is_not_read_again_even_under_another_name(tmp_path: Path) -> None:
    content = b"n00000001_1 http://a.com/1\nbad\n"
    journal = _load(tmp_path / "out", content)
    before = journal.totals()
    (tmp_path / "copy").write_bytes(content)
    take_in(journal, (tmp_path / "copy", tmp_path / "out" / "list0"), None, None, None)
    assert journal.totals() == before
    journal.close()


def test_the_classes_asked_for_are_kept_and_others_are_no_failures(tmp_path: Path) -> None:
    content = b"n00000001_1 http://a.com/1\nn00000002_1 http://a.com/2\n"
    journal = _load(tmp_path / "out", gzip.compress(content), wnids=frozenset({"n00000002"}))
    assert [name for _, name, _ in _rows(journal)] == ["n00000002_1"]
    assert journal.totals().malformed == 0
    assert journal.db.execute("SELECT unwanted FROM lists").fetchone() == (1,)
    journal.close()


@pytest.mark.slow
def test_a_list_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    good = b"n00000001_1 http://a.com/1\n"
    rng = random.Random(0)
    zipped = gzip.compress(
        b"".join(b"n00000002_%d http://a.com/%d\n" % (n, rng.getrandbits(64)) for n in range(99_999))
    )
    with pytest.raises(DownloadError, match="list1"):
        _load(tmp_path / "out", good, zipped[:-1000])
    journal = Journal(tmp_path / "out")
    assert len(_rows(journal)) == 1
    assert journal.totals().requested == 1
    take_in(journal, (tmp_path / "out" / "list0",), None, None, None)
    assert journal.pending_of(journal.hosts_with_pending()[0][0], 0, 9) == [(1, "http://a.com/1", 0)]
    journal.close()


def test_credentials_are_kept_nowhere(tmp_path: Path) -> None:
    content = (
        b"n00000001_1 http://user:hunter2@a.com/1\nn00000001_2 ftp://user:hunter2@a.com/1\nhttp://u:hunter2@b.com/\n"
    )
    journal = _load(tmp_path / "out", content)
    journal.close()
    (tmp_path / "out" / "list0").unlink()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
