"""URLs and list lines, byte by byte."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from imnet_prep.download.urllist import MAX_LINE_BYTES, Line, parse_line, read_lines, read_wnids
from imnet_prep.download.urls import BadUrl, host_key, host_of, join_redirect, normalise_url
from imnet_prep.errors import DownloadError


@pytest.mark.parametrize(
    ("raw", "url"),
    [
        (b"http://a.com/x.jpg", "http://a.com/x.jpg"),
        (b"HTTP://A.Com", "http://a.com/"),
        (b"http://a.com:80/x", "http://a.com/x"),
        (b"https://a.com:443/x", "https://a.com/x"),
        (b"http://a.com:8080/x", "http://a.com:8080/x"),
        (b"http://a.com/a b.jpg", "http://a.com/a%20b.jpg"),
        (b"http://a.com/\xe9.jpg", "http://a.com/%E9.jpg"),  # Latin-1 stays Latin-1
        ("http://a.com/é.jpg".encode(), "http://a.com/%C3%A9.jpg"),
        (b"http://a.com/100%.jpg", "http://a.com/100%25.jpg"),
        (b"http://a.com/%41%zz", "http://a.com/%41%25zz"),
        (b"http://a.com/x#part", "http://a.com/x"),
        (b"http://a.com?q=1", "http://a.com/?q=1"),
        (b"http://user:secret@a.com/x", "http://a.com/x"),
        (b"http://a@b@c.com/x", "http://c.com/x"),
        ("http://bücher.example/x".encode(), "http://xn--bcher-kva.example/x"),
        (b"http://[::1]:81/x", "http://[::1]:81/x"),
        (b"http://[FE80::1%25eth0]/x", "http://[fe80::1]/x"),
        (b"http://a.com\\@b.com/x", "http://a.com/%5C@b.com/x"),
        (b"http://under_score.com/x", "http://under_score.com/x"),
        (b"http://a.com/\"<>^`{|}\\", "http://a.com/%22%3C%3E%5E%60%7B%7C%7D%5C"),
    ],
)  # fmt: skip
def test_a_url_is_normalised(raw: bytes, url: str) -> None:
    assert normalise_url(raw) == url
    assert normalise_url(url.encode()) == url


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"a.com/x", b"file:///etc/passwd", b"ftp://a.com/x", b"javascript:alert(1)", b"http:///x", b"http://",
        b"http:/a.com/x", b"http://a.com:99999/", b"http://a.com:x/", b"http://[::1/x", b"http://[::1]x/",
        b"http://a..com/", b"http://-a.com/", b"http://a b.com/", b"http://\xff.com/", b"http://a.com:0/",
        b"http://" + b"a" * 300 + b".com/", b"http://a.com/" + b"x" * 20000,
    ],
)  # fmt: skip
def test_what_cannot_be_fetched_is_no_url(raw: bytes) -> None:
    with pytest.raises(BadUrl):
        normalise_url(raw)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        (b"/y", "http://a.com/y"),
        (b"y?z", "http://a.com/d/y?z"),
        (b"../y", "http://a.com/y"),
        (b"//b.com/y", "http://b.com/y"),
        (b"https://b.com", "https://b.com/"),
        (b"/\xc3\xa9", "http://a.com/%C3%A9"),
        (b"http://u:p@b.com/", "http://b.com/"),
        (b"?q", "http://a.com/d/x?q"),
    ],
)
def test_a_location_is_resolved(location: bytes, url: str) -> None:
    assert join_redirect("http://a.com/d/x", location) == url


@pytest.mark.parametrize("location", [b"", b" ", b"file:///x", b"FILE:/x", b"data:,x", b"http://[bad", b"mailto:a@b"])
def test_a_location_elsewhere_is_refused(location: bytes) -> None:
    with pytest.raises(BadUrl):
        join_redirect("http://a.com/d/x", location)


def test_a_host_is_a_name_and_a_port() -> None:
    assert host_of("http://a.com/x") == host_of("https://a.com/y") == "a.com"
    assert host_of("http://a.com:81/x") == "a.com:81"
    assert 0 <= host_key("a.com") < 1 << 63


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"n00004475_6590\thttp://a.com/x", Line("n00004475", "n00004475_6590", "http://a.com/x")),
        (b"n00004475_6590 http://a.com/x\r", Line("n00004475", "n00004475_6590", "http://a.com/x")),
        (b"n00004475_6590\thttp://a.com/x y", Line("n00004475", "n00004475_6590", "http://a.com/x%20y")),
        (b"  n00004475_1   http://a.com/x ", Line("n00004475", "n00004475_1", "http://a.com/x")),
        (b"red_fox_12\thttp://a.com/x", Line("red_fox", "red_fox_12", "http://a.com/x")),
    ],
)
def test_a_line_is_read(raw: bytes, line: Line) -> None:
    assert parse_line(raw, None) == line


def test_a_class_and_a_url_make_an_id_that_does_not_depend_on_the_place() -> None:
    line = parse_line(b"n00004475 http://a.com/x", None)
    assert isinstance(line, Line)
    assert line.wnid == "n00004475"
    assert line.name.startswith("n00004475_")
    assert parse_line(b"http://A.com/x", "n00004475") == line
    other = parse_line(b"my-cats http://a.com/x", None)
    assert isinstance(other, Line)
    assert other.wnid == "my-cats"


@pytest.mark.parametrize(
    "raw",
    [
        b"rubbish", b"n00004475_6590", b"n00004475_6590\tftp://a.com/x", b"../x http://a.com/x", b".. http://a.com/",
        b"a/b\thttp://a.com/x", b"n00004475_1\thttp://", b"# comment", b"n0\x00\thttp://a.com/x", b"file:///etc/passwd",
        b"http://a.com/x", b"\xff\xfe http://a.com/x", b"n00004475_1\tn00004475_2\thttp://a.com/x",
    ],
)  # fmt: skip
def test_a_line_that_says_nothing_is_malformed(raw: bytes) -> None:
    with pytest.raises(BadUrl):
        parse_line(raw, None)


@pytest.mark.parametrize("raw", [b"", b"\r", b"  \t "])
def test_a_blank_line_is_nothing(raw: bytes) -> None:
    assert parse_line(raw, None) is None


def test_lines_are_read_plain_and_gzip_with_bom_and_without_a_last_newline(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfone\r\n\ntwo\nthree"
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "zipped.txt").write_bytes(gzip.compress(data))
    expected = [(1, b"one\r"), (2, b""), (3, b"two"), (4, b"three")]
    assert list(read_lines(tmp_path / "plain")) == expected
    assert list(read_lines(tmp_path / "zipped.txt")) == expected


def test_an_endless_line_takes_no_memory_and_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"a\n" + b"x" * 5_000_000 + b"\nb\n" + b"y" * 100_000 + b"\nc\n" + b"z" * 3_000_000)
    found = list(read_lines(tmp_path / "list"))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [line[:1] for _, line in found] == [b"a", b"x", b"b", b"y", b"c", b"z"]
    assert all(len(line) > MAX_LINE_BYTES for number, line in found if number in (2, 4, 6))


@pytest.mark.parametrize("content", [gzip.compress(b"n0 http://a.com/\n" * 9999)[:-9], "x\n".encode("utf-16")])
def test_a_damaged_list_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad-list").write_bytes(content)
    with pytest.raises(DownloadError, match="bad-list"):
        list(read_lines(tmp_path / "bad-list"))


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="nowhere"):
        list(read_lines(tmp_path / "nowhere"))


def test_the_classes_to_keep_are_the_first_words(tmp_path: Path) -> None:
    (tmp_path / "wnids").write_text("n01440764 tench\n\n# no\nn01443537\r\n")
    assert read_wnids(tmp_path / "wnids") == {"n01440764", "n01443537"}
