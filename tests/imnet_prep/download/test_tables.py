"""URL lists as people have them: tables of every form, compressed, with other columns, or of no use at all."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from imnet_prep.download import DownloadOptions, FetchOptions, Totals, download, read_finished
from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import Journal
from imnet_prep.download.options import BY_NAME, Columns
from imnet_prep.errors import DownloadError
from imnet_prep.records.folder import RecordsFolder
from tests.imnet_prep.download.servers import Server, images, picture
from tests.records import prep_json

ROWS = [
    {"url": "http://a.com/1.jpg", "label": "cat", "caption": 'a cat, "asleep"\nat home'},
    {"url": "http://a.com/2.jpg?x=1,2", "label": "dog", "caption": "ein Hündchen"},
    {"url": "http://a.com/3 .jpg", "label": "cat", "caption": ""},
]
EXPECTED = [("cat", "http://a.com/1.jpg"), ("dog", "http://a.com/2.jpg?x=1,2"), ("cat", "http://a.com/3%20.jpg")]


def as_csv(delimiter: str = ",") -> bytes:
    out = io.StringIO()
    rows = ROWS if delimiter == "," else [row | {"caption": row["caption"].replace("\n", " ")} for row in ROWS]
    writer = csv.DictWriter(out, list(ROWS[0]))
    if delimiter == "\t":
        writer = csv.DictWriter(out, list(ROWS[0]), delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_json_lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_parquet() -> bytes:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


def load(
    folder: Path, content: bytes, name: str = "list", columns: Columns = BY_NAME, wnid: str | None = None
) -> Journal:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    journal = Journal(folder)
    try:
        take_in(journal, (folder / name,), wnid, None, None, columns)
    except DownloadError:
        journal.close()
        raise
    return journal


def rows_of(journal: Journal) -> list[tuple[str, str]]:
    return journal.db.execute("SELECT wnid, url FROM urls ORDER BY row").fetchall()


@pytest.mark.parametrize("form", [as_csv, lambda: as_csv("\t"), as_json_lines, as_parquet])
@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, bz2.compress, lzma.compress])
def test_a_table_is_read_by_the_names_of_its_columns(
    tmp_path: Path, form: Callable[[], bytes], pack: Callable[[bytes], bytes]
) -> None:
    if form is as_parquet and pack is not gzip.compress:
        journal = load(tmp_path, form())
    elif form is as_parquet:
        pytest.skip("nobody compresses Parquet again")
    else:
        journal = load(tmp_path, pack(form()))
    assert rows_of(journal) == EXPECTED
    metas = [json.loads(text) for (text,) in journal.db.execute("SELECT json FROM meta_of_urls ORDER BY row")]
    assert [meta["caption"] for meta in metas][1] == "ein Hündchen"
    assert len(metas) == 2  # an empty caption says nothing
    assert journal.totals().requested == 3
    journal.close()


def test_columns_are_named_by_the_user_or_numbered_without_a_header(tmp_path: Path) -> None:
    content = b'a cat\thttp://a.com/1.jpg\nno "quotes\t http://a.com/2.jpg\n'
    journal = load(tmp_path / "a", content, "cc3m.tsv", Columns(url="2"), wnid="cc")
    assert [url for _, url in rows_of(journal)] == ["http://a.com/1.jpg", "http://a.com/2.jpg"]
    assert json.loads(journal.db.execute("SELECT json FROM meta_of_urls").fetchone()[0]) == {"1": "a cat"}
    journal.close()
    content = b"key,picture,synset\nk1,http://a.com/1.jpg,n01440764\nk2,http://a.com/2.jpg,n01440764\n"
    journal = load(tmp_path / "b", content, "x", Columns("picture", "synset", "key"))
    assert journal.db.execute("SELECT wnid, name FROM urls").fetchall() == [("n01440764", "k1"), ("n01440764", "k2")]
    journal.close()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"picture,text\nhttp://a.com/1.jpg,cat\n", ["CSV", "--url-column", "picture"]),
        ("a.csv", b"http://a.com/1.jpg,a cat\n", ["CSV", "--url-column", "number"]),
        ("a.tsv", b"http://a.com/1.jpg\ta cat\n", ["TSV", "--url-column"]),
        ("a.jsonl", b'{"picture": "http://a.com/1.jpg"}\n', ["JSON lines", "--url-column"]),
        ("a.json", b'[{"url": "http://a.com/1.jpg"}]', ["JSON array", "jq"]),
        ("a.txt", b"n01440764_1\nn01440764_2\n", ["no line", "no URL"]),
        ("a.txt", b"", ["empty"]),
        ("a.txt", b"\n\n", ["empty"]),
        ("a.txt", "http://a.com/1\n".encode("utf-16"), ["UTF-16", "iconv"]),
        ("a.csv", b"url,text\nhttp://a.com/1.jpg,cat\n", ["no line", "--class-column"]),
        ("a.parquet", b"PAR1" + bytes(200), ["damaged Parquet"]),
        ("a.bz2", bz2.compress(b"n01440764_1 http://a.com/1\n" * 9)[:-9], ["damaged bzip2"]),
        ("a.zst", b"(\xb5/\xfd" + bytes(100), ["zstd"]),
        ("a.zip", b"PK\x03\x04" + bytes(100), ["zip"]),
        ("a.csv", b'url,text,label\nhttp://a.com/1.jpg,"never closed,x\n' + b"a" * (1 << 21), ["damaged CSV"]),
        ("a.txt", b"<html><body>Not found</body></html>\n", ["no line"]),
    ],
)
def test_a_useless_list_is_an_error_that_says_what_it_is(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    with pytest.raises(DownloadError) as caught:
        load(tmp_path, content, name).close()
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    journal = Journal(tmp_path)
    assert journal.db.execute("SELECT count(*) FROM lists").fetchone() == (0,)
    journal.close()


def test_lines_of_all_systems_are_counted(tmp_path: Path) -> None:
    for number, end in enumerate(["\n", "\r\n", "\r"]):
        lines = "".join(f"n01440764_{line} http://a.com/{line}{end}" for line in range(5))
        journal = load(tmp_path / str(number), lines.encode())
        assert len(rows_of(journal)) == 5
        journal.close()
    long = b"n01440764_0 http://a.com/0".ljust((1 << 20) - 1) + b"\r\nn01440764_1 http://a.com/1\r"
    journal = load(tmp_path / "long", long[long.index(b"n") :])
    assert [line for (line,) in journal.db.execute("SELECT name FROM urls")] == ["n01440764_1"]  # the first is too long
    journal.close()


def test_with_a_class_given_text_after_a_url_is_no_part_of_it(tmp_path: Path) -> None:
    journal = load(tmp_path, b"http://a.com/0.jpg\nhttp://a.com/1.jpg\ta cat\n", wnid="cat")
    assert [url for _, url in rows_of(journal)] == ["http://a.com/0.jpg"]
    assert journal.totals().malformed == 1
    journal.close()


@pytest.mark.parametrize(
    "line",
    [
        "http:/user:secret@a.com/1.jpg", "ftp://user:secret@a.com/1", "http://user:secret@b@host:99999/",
        "n1 http://us:er:secret@[::1/x", "http:user:secret@x", "http://user:se/secret@host/1", "x\thttp://u:secret@/",
    ],
)  # fmt: skip
def test_no_password_is_kept(tmp_path: Path, line: str) -> None:
    journal = load(tmp_path, f"{line}\nn01440764_1 http://a.com/1\n".encode(), wnid="cat")
    journal.close()
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.name != "list")


@pytest.mark.parametrize(
    "name",
    ["failures.jsonl", "bad_lines.jsonl", "journal.sqlite", "Journal.SQLite-wal", "CON", "nul", "com1.x", "dot."],
)
def test_a_class_that_no_folder_can_have_is_malformed(tmp_path: Path, name: str) -> None:
    content = f"{name} http://a.com/1\n{name}_1\thttp://a.com/2\nn01440764_1 http://a.com/3\n"
    journal = load(tmp_path, content.encode())
    assert [url for _, url in rows_of(journal)][-1:] == ["http://a.com/3"]
    assert journal.db.execute("SELECT count(*) FROM urls WHERE wnid = ?", (name,)).fetchone() == (0,)
    journal.close()


def test_ids_that_differ_in_case_alone_are_one(tmp_path: Path) -> None:
    journal = load(tmp_path, b"Dog_1\thttp://a.com/1\ndog_1\thttp://a.com/2\ndog http://a.com/3\nDog http://a.com/4\n")
    assert [url for _, url in rows_of(journal)] == ["http://a.com/1", "http://a.com/3", "http://a.com/4"]
    assert journal.totals().repeated == 1
    journal.close()


@pytest.mark.slow
def test_the_other_columns_reach_the_records(tmp_path: Path) -> None:
    with Server(images) as server:
        lines = [{"url": server.url(f"/{n}.jpg"), "label": "ab"[n % 2], "caption": f"é {n}", "n": n} for n in range(6)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        place = ["--urls", "-", "--out", str(tmp_path / "images")]
        command = [sys.executable, "-m", "imnet_prep", "download", *place, "--allow-private", "--json"]
        done = subprocess.run(command, check=False, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ok"] == 6
        again = subprocess.run(command, check=False, input=text, capture_output=True, text=True)
        assert json.loads(again.stdout)["ok"] == 6
        assert sum(server.hits.values()) == 6
    prep_json("to-mindrecord", tmp_path / "images", "--out", tmp_path / "records")
    seen = {line.url: line.meta for line in RecordsFolder.open(tmp_path / "records").lines("train")}
    assert seen == {line["url"]: {"caption": line["caption"], "n": line["n"]} for line in lines}


@pytest.mark.slow
def test_deleted_images_are_noticed_and_fetched_again(tmp_path: Path) -> None:
    with Server(images) as server:
        (tmp_path / "list").write_text("".join(f"ab{n % 2} {server.url(f'/{n}.jpg')}\n" for n in range(8)))
        options = DownloadOptions((tmp_path / "list",), tmp_path / "out", fetch=FetchOptions(allow_private=True))
        assert download(options).totals.ok == 8
        images_there = [image.path for image in read_finished(tmp_path / "out")]
        for path in images_there[:2]:
            (tmp_path / "out" / path).unlink()
            (tmp_path / "out" / path).with_name("Thumbs.db").touch()
        totals = download(options).totals
        assert (totals.ok, totals.pending, sum(server.hits.values())) == (8, 0, 10)
    assert all((tmp_path / "out" / image.path).is_file() for image in read_finished(tmp_path / "out"))


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("n01440764_1 http://127.0.0.1:9/1\n")
    (tmp_path / "out" / "n01440764").mkdir(parents=True)
    mine = tmp_path / "out" / "n01440764" / "n01440764_1.jpg"
    mine.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="no download made"):
        download(DownloadOptions((tmp_path / "list",), tmp_path / "out"))
    assert mine.read_bytes() == b"mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["n01440764"]


@pytest.mark.slow
def test_parts_take_each_host_once_and_are_together_what_one_machine_gets(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(images)) for _ in range(12)]
        lines = [f"ab{n % 3}_{n % 70}\t{servers[n % 12].url(f'/{n % 90}.jpg')}" for n in range(100)]
        lines += ["ab0_500 nothing", f"x {servers[0].url('/0.jpg')}"]
        (tmp_path / "list").write_text("\n".join(lines) + "\n")

        def get(name: str, part: tuple[int, int] | None) -> tuple[Totals, set[tuple[str, str]]]:
            fetch = FetchOptions(allow_private=True)
            options = DownloadOptions((tmp_path / "list",), tmp_path / name, part=part, fetch=fetch)
            totals = download(options).totals
            return totals, {(image.path, image.url) for image in read_finished(tmp_path / name)}

        whole, expected = get("whole", None)
        parts = [get(f"part{number}", (number, 4)) for number in range(1, 5)]
    assert sum(len(found) for _, found in parts) == len(expected) == whole.ok
    assert set().union(*(found for _, found in parts)) == expected
    for totals, found in parts:
        assert totals.requested + totals.elsewhere == whole.requested
        assert (totals.repeated, totals.malformed) == (whole.repeated, whole.malformed)
        others = set().union(*(more for _, more in parts if more is not found))
        assert not {url.split("/")[2] for _, url in found} & {url.split("/")[2] for _, url in others}
    with pytest.raises(DownloadError, match="another part"):
        get("part1", (2, 4))
    with pytest.raises(DownloadError, match="another part"):
        get("whole", (1, 4))


@pytest.mark.slow
def test_sizes_that_are_not_wanted_are_counted_and_the_contact_is_sent(tmp_path: Path) -> None:
    sizes = {"/wide.jpg": (320, 90), "/large.jpg": (200, 200), "/fine.jpg": (150, 100), "/small.jpg": (90, 60)}
    with Server(lambda x: x.answer(200, picture(1, size=sizes[x.path]))) as server:
        (tmp_path / "list").write_text("".join(f"ab {server.url(path)}\n" for path in sizes))
        limits = ["--min-side", "80", "--max-area", "30000", "--max-aspect", "3", "--contact", "me@example.org"]
        result = prep_json(
            "download", "--urls", tmp_path / "list", "--out", tmp_path / "out", "--allow-private", *limits
        )
        assert "imnet-prep/" in next(iter(server.user_agents))
        assert "(me@example.org; " in next(iter(server.user_agents))
    assert (result["ok"], result["failed"]) == (1, {"placeholder": 1, "unwanted_size": 2})


def test_a_dry_run_reads_the_lists_and_writes_nothing(tmp_path: Path) -> None:
    content = "".join(f"ab{n % 2} http://h{n % 3}.com/{n}\n" for n in range(30)) + "ab0 http://h0.com/0\nx\n"
    (tmp_path / "list").write_text(content)
    found = prep_json("download", "--urls", tmp_path / "list", "--out", tmp_path / "out", "--dry-run")
    assert sorted(one["host"] for one in found.pop("largest_hosts")) == ["h0.com", "h1.com", "h2.com"]
    assert found.pop("seconds_estimated") >= 0
    counts = {"urls": 30, "classes": 2, "hosts": 3, "repeated": 1, "malformed": 1, "elsewhere": 0}
    assert found == counts
    assert not (tmp_path / "out").exists()


def taken_in(path: Path, text: bytes, columns: Columns = BY_NAME) -> list[tuple[str, str, str | None]]:
    """Return (class, URL, meta) of each row that a list brings to a journal."""
    path.write_bytes(text)
    folder = path.with_name("journal")
    folder.mkdir()
    journal = Journal(folder)
    take_in(journal, (path,), None, None, None, columns)
    query = "SELECT wnid, url, json FROM urls LEFT JOIN meta_of_urls USING (row) ORDER BY row"
    return journal.db.execute(query).fetchall()


def test_captions_that_are_not_utf_8_are_kept_as_well_as_may_be(tmp_path: Path) -> None:
    text = "url,label,caption\nhttp://a.com/1.jpg,cat,caf\xe9\n".encode("latin-1")
    assert taken_in(tmp_path / "a.csv", text) == [("cat", "http://a.com/1.jpg", '{"caption": "caf\ufffd"}')]


def test_json_lines_with_lone_surrogates_and_nan(tmp_path: Path) -> None:
    lines = (
        b'{"url": "http://a.com/1", "label": "cat", "caption": "\\ud800", "score": NaN}\n'
        b'{"url": "http://a.com/\\ud800", "label": "cat"}\n{"url": "http://a.com/2", "label": "\\udcff"}\n'
    )
    assert taken_in(tmp_path / "a.jsonl", lines) == [
        ("cat", "http://a.com/1", '{"caption": "\ufffd"}'),
        ("cat", "http://a.com/%EF%BF%BD", None),
    ]


def test_a_class_that_is_a_number_is_no_header(tmp_path: Path) -> None:
    rows = taken_in(tmp_path / "a.csv", b"1,http://a.com/1\n2,http://a.com/2\n", Columns(url="2", class_name="1"))
    assert rows == [("1", "http://a.com/1", None), ("2", "http://a.com/2", None)]


@pytest.mark.parametrize("text", [b'a,cat,"open\nhttp://a.com/2,dog,b\n', b'a,cat,"open\nb,dog,"x"\n'])
def test_an_open_quotation_mark_hides_no_line(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="damaged CSV") as caught:
        taken_in(tmp_path / "a.csv", b"url,label,caption\n" + text)
    assert "close quotation marks" in str(caught.value)
