"""Files behind URLs, from a real S3 server and a real web server; the connection lost, the object replaced."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from imnet_prep import remote
from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.errors import ImnetError, Interrupted, RemoteError, SourceError
from imnet_prep.types import Progress
from tests.imnet_prep.sources.parquets import rows_of, write_parquet
from tests.needs import needs
from tests.s3 import KEY, SECRET, put, s3_server
from tests.synthetic import jpeg, make_image_folder, make_imagenet, tar_bytes

needs("s3fs")
BIG = os.urandom(3 << 20)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests for little data, and no long waits."""
    monkeypatch.setattr(remote, "RANGE_BYTES", 1 << 18)
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.01))


def content(url: str) -> bytes:
    file = remote.look_up(url)
    assert file is not None
    return b"".join(remote.read(file))


def quiet(state: Progress) -> None:
    """Say nothing."""


def run(sources: list[Path | str], out: Path, progress: Any = quiet, stop: Any = lambda: False) -> dict[str, Any]:
    """Convert in one process, and return the manifest."""
    convert(sources, out, None, PlanOptions(), ConvertOptions(workers=1), progress, stop)
    return dict(json.loads((out / "manifest.json").read_bytes()))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two manifests differ in nothing but their sources."""
    return {**one, "sources": [], "self_sha256": ""} == {**other, "sources": [], "self_sha256": ""}


# --- the module ------------------------------------------------------------------------------------------------------


def test_an_object_is_read_in_order(s3: str) -> None:
    put(s3, "plain", {"a/big.bin": BIG, "a/empty": b"", "a/b/c": b"x"})
    file = remote.look_up("s3://plain/a/big.bin")
    assert file is not None
    assert (file.name, file.size_bytes) == ("big.bin", len(BIG))
    assert file.version.startswith("ETag")
    assert content("s3://plain/a/big.bin") == BIG
    assert content("s3://plain/a/empty") == b""
    assert remote.look_up("s3://plain/a") is remote.look_up("s3://plain/a/") is remote.look_up("s3://plain") is None
    assert list(remote.list_files("s3://plain/a")) == ["b/c", "big.bin", "empty"]


def test_memory_and_file_are_urls_too(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://some/x.bin", "wb") as file:
        file.write(BIG)
    assert content("memory://some/x.bin") == BIG
    (tmp_path / "x.bin").write_bytes(BIG)
    assert content(f"file://{tmp_path}/x.bin") == BIG


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://plain/none", "s3://plain/none does not exist"),
        ("s3://no-such-bucket/x", "does not exist"),
        ("gs://bucket/x", "pip install .* gcsfs"),
        ("what://x/y", "cannot be opened"),
        ("s3://", "cannot be opened"),
        ("http://127.0.0.1:1/x.tar", "does not exist or may not be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(s3: str, url: str, message: str) -> None:
    put(s3, "plain", {})
    with pytest.raises(RemoteError, match=message):
        content(url) if url != "s3://" else remote.list_files(url)


def test_what_is_secret_in_a_url_is_never_shown(s3: str) -> None:
    for url in (
        "s3://key:hunter2@plain/x",
        "s3://key:p@hunter2@plain/x",
        "http://user:hunter2@127.0.0.1:1/a/x.tar?X-Amz-Signature=hunter2",
    ):
        with pytest.raises(RemoteError) as error:
            content(url)
        assert "hunter2" not in str(error.value)
        assert "hunter2" not in remote.shown(url)
        assert "hunter2" not in repr(remote.RemoteFile(url, 1, ""))
    assert remote.base_name("https://h/a/x%20y.tar?sig=z") == "x y.tar"


def test_an_object_replaced_meanwhile_is_an_error(s3: str) -> None:
    put(s3, "plain", {"x": BIG})
    file = remote.look_up("s3://plain/x")
    assert file is not None
    parts = remote.read(file)
    next(parts)
    put(s3, "plain", {"x": BIG[::-1]})
    with pytest.raises(RemoteError, match="changed while it was read"):
        list(parts)


def test_without_fsspec_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(RemoteError, match=r"pip install 'imnet-prep\[remote\]'"):
        remote.look_up("s3://bucket/x")


# --- a web server ----------------------------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    """Serve :data:`BIG` by ranges; how badly is said by the path."""

    protocol_version = "HTTP/1.1"
    failed: set[str] = set()  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        if "endless" in self.path:
            self.chunks(b"")
        else:
            self.answer(b"", length=len(BIG))

    def chunks(self, data: bytes) -> None:
        """Answer without saying how much will come."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(data), 1 << 20):
            part = data[start : start + (1 << 20)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        if data:
            self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        if "endless" in self.path:
            self.chunks(BIG)
            return
        if span is None or "whole" in self.path:
            self.answer(BIG)
            return
        first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        data = BIG[first : last + 1]
        if "lost" in self.path and span not in self.failed:  # the first time
            self.failed.add(span)
            self.answer(data[: len(data) // 2], 206, span=f"bytes {first}-{last}/{len(BIG)}", length=len(data))
            self.close_connection = True
        elif "busy" in self.path and span not in self.failed:
            self.failed.add(span)
            self.answer(b"slow down", 503)
        elif "gone" in self.path and first > 1 << 20:
            self.answer(b"", 403)
        else:
            self.answer(data, 206, span=f"bytes {first}-{last}/{len(BIG)}")

    def answer(self, data: bytes, status: int = 200, *, span: str = "", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.send_header("ETag", '"1"')
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    Web.failed.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("how", ["good", "whole", "lost", "busy", "endless"])
def test_a_web_server_is_read_however_it_answers(how: str) -> None:
    with web() as address:
        assert content(f"{address}/{how}/x.tar?token=1") == BIG


def test_what_a_web_server_refuses_is_an_error_without_the_signature() -> None:
    with web() as address, pytest.raises(RemoteError, match="403") as error:
        content(f"{address}/gone/x.tar?token=hunter2")
    assert "hunter2" not in str(error.value)


# --- as sources ------------------------------------------------------------------------------------------------------


def test_archives_give_the_same_records_from_s3(tmp_path: Path, s3: str) -> None:
    net = make_imagenet(tmp_path / "net", odd=False, test=0)
    files = [net.train, net.val, net.devkit]
    plain = run(list(files), tmp_path / "plain")
    put(s3, "official", {f"some/{path.name}": path.read_bytes() for path in files})
    one_by_one = run([f"s3://official/some/{path.name}" for path in files], tmp_path / "other")
    assert same(plain, one_by_one)
    assert plain["sources"] == one_by_one["sources"]  # the names, sizes and digests of the objects
    assert same(plain, run(["s3://official/some"], tmp_path / "third"))
    assert not list(tmp_path.glob("*.partial"))


def test_compressed_tars_and_parquet_give_the_same_records_from_s3(tmp_path: Path, s3: str) -> None:
    folder = make_image_folder(tmp_path / "photos", 3, 6)
    plain = run([folder], tmp_path / "plain")
    members = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*/*")}
    for split, hub_split in (("train", "train"), ("val", "validation")):
        write_parquet(tmp_path / "hub" / f"{hub_split}-00000-of-00001.parquet", rows_of(folder / split))
    objects = {f"hub/data/{path.name}": path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    objects |= {"photos.tar.gz": gzip.compress(tar_bytes(members)), "hub/README.md": b"x", "hub/.gitattributes": b"x"}
    put(s3, "photos", objects)
    packed = run(["s3://photos/photos.tar.gz"], tmp_path / "tar")
    assert same(plain, packed)
    (entry,) = packed["sources"]
    assert (entry["name"], entry["sha256"]) == (
        "photos.tar.gz", hashlib.sha256(objects["photos.tar.gz"]).hexdigest()
    )  # fmt: skip
    assert same(plain, run(["s3://photos/hub/"], tmp_path / "parquet"))
    one = run(["s3://photos/hub/data/train-00000-of-00001.parquet"], tmp_path / "one")
    assert one["splits"]["train"] == plain["splits"]["train"]
    (entry,) = one["sources"]
    data = objects["hub/data/train-00000-of-00001.parquet"]
    assert (entry["name"], entry["sha256"]) == ("train-00000-of-00001.parquet", hashlib.sha256(data).hexdigest())


def test_errors_name_the_url_and_leave_nothing(tmp_path: Path, s3: str) -> None:
    put(s3, "bad", {"x.tar": BIG, "y.tar.gz": gzip.compress(BIG)[:-9], "z.parquet": BIG, "images/a.jpg": b"", "e": b""})
    for name in ("x.tar", "y.tar.gz", "z.parquet", "images", "e", "none"):
        with pytest.raises(ImnetError) as error:
            run([f"s3://bad/{name}"], tmp_path / "out")
        assert f"s3://bad/{name}" in str(error.value)
        assert ".work" not in str(error.value)
        assert not list(tmp_path.iterdir()), name


def test_no_credentials_are_written_or_said(tmp_path: Path, s3: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_image_folder(tmp_path / "photos", 2, 3, ())
    members = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}
    put(s3, "photos", {"x.tar": tar_bytes(members)})
    import boto3

    client = boto3.client("s3", endpoint_url=s3)
    url = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "x.tar"})
    client.close()
    assert "Signature" in url

    def check(state: Progress) -> None:
        for path in (tmp_path / "out.partial").rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert not any(secret.encode() in data for secret in (SECRET, KEY, "Signature")), path

    (entry,) = run(["s3://photos/x.tar"], tmp_path / "other", check)["sources"]
    assert entry["name"] == "x.tar"
    (entry,) = run([url], tmp_path / "out", check)["sources"]
    assert entry["name"] == "x.tar"
    assert not any(secret in "".join(capfd.readouterr()) for secret in (SECRET, KEY, "X-Amz-Signature="))


def test_stopped_it_goes_on_with_what_was_brought(tmp_path: Path, s3: str) -> None:
    folder = make_image_folder(tmp_path / "photos", 2, 4, ())
    plain = run([folder], tmp_path / "plain")
    parts = {label: {f"{label}/{path.name}": path.read_bytes() for path in (folder / label).iterdir()} for label in
             sorted(path.name for path in folder.iterdir())}  # fmt: skip
    put(s3, "parts", {f"{label}.tar": tar_bytes(members | {"notes.txt": BIG}) for label, members in parts.items()})
    urls: list[Path | str] = [f"s3://parts/{label}.tar" for label in parts]
    seen: list[str] = []

    def note(state: Progress) -> None:
        seen.append(state.note)

    with pytest.raises(Interrupted):
        run(urls, tmp_path / "out", note, lambda: f"{list(parts)[1]}.tar" in seen)
    seen.clear()
    assert same(plain, run(urls, tmp_path / "out", note))
    first, second = parts
    assert f"{first}.tar" not in seen
    assert f"{second}.tar" in seen


def test_a_source_without_library_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises((RemoteError, SourceError), match="gcsfs"):
        run(["gs://bucket/x.tar"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from imnet_prep.cli.prep import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def peak_kib(url: str, out: Path) -> int:
    """Return the peak memory of the process that converts a source, its workers aside."""
    command = [sys.executable, "-c", PEAK, "to-mindrecord", url, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("few", "many"),
    [pytest.param(400, 2000, marks=pytest.mark.slow), pytest.param(5000, 100_000, marks=pytest.mark.long)],
)
@pytest.mark.timeout(1500)
def test_memory_does_not_grow_with_the_images(tmp_path: Path, s3: str, few: int, many: int) -> None:
    pictures = [jpeg(number, number, 24, 16) for number in range(50)]
    peaks = []
    for count in (few, many):
        members = {f"c{k % 100:03d}/{k:06d}.jpg": pictures[k % 50] + b"%d" % k for k in range(count)}
        put(s3, "many", {f"{count}.tar": tar_bytes(members)})
        peaks.append(peak_kib(f"s3://many/{count}.tar", tmp_path / str(count)))
    in_flight_kib = 2 * 4 * 8 << 10  # ranges, of which the smaller file has few
    assert peaks[1] - peaks[0] < in_flight_kib, peaks
