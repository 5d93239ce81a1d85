"""Records of a small drawn set, made the whole way: served, downloaded from URL lists, converted and verified."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.check.verify import VerifyResult, verify
from imnet_prep.cli.drawings import CLASSES, draw_set
from imnet_prep.download import DownloadOptions, FetchOptions, PoliteOptions, download
from imnet_prep.errors import IntegrityError
from imnet_prep.types import Progress, ProgressCallback, Stop

SEED = 0
BROKEN = ("gone", "page", "cut")  # a lost photograph, HTML in its place, a JPEG that ends early
Stage = Callable[[str], AbstractContextManager[ProgressCallback]]  # by the stage's name


def make_records(out: Path, per_class: Mapping[str, int], stage: Stage, stop: Stop = lambda: False) -> None:
    """Draw images, download them from a server on this machine, and convert them to ``out/records``.

    Args:
        out: A folder; the downloads of an earlier call in it are deleted.
        per_class: Images of each class, by split.
        stage: Called with a stage's name for a context manager that gives its progress callback.
        stop: Asked whether to leave after what is in hand.

    Raises:
        ImnetError: Whatever a stage raises.
    """
    with stage("draw") as progress:
        files = _draw(per_class, progress)
    shutil.rmtree(out / "download", ignore_errors=True)  # its URLs named another port
    with _serve(files) as address:
        for split in per_class:
            with stage(f"download {split}") as progress:
                _download(out, split, files, address, progress, stop)
    sources = [out / "download" / split for split in per_class]
    with stage("to-mindrecord") as progress:
        anew = ConvertOptions(force=True)  # what an earlier call began names another port
        convert(sources, out / "records", None, PlanOptions(seed=SEED), anew, progress, stop)


def verify_records(records: Path, stage: Stage) -> VerifyResult:
    """Decode every record and compare it with what was stored.

    Raises:
        IntegrityError: Something differs.
    """
    with stage("verify") as progress:
        checked = verify(records, "decode", None, progress)
    if not checked.ok:
        first = checked.problems[0]
        raise IntegrityError(f"{records}: {first.file}: {first.kind}", got=first.detail, remedy=f"delete {records}")
    return checked


def _draw(per_class: Mapping[str, int], progress: ProgressCallback) -> dict[str, bytes]:
    """Draw all images; by URL path, ``/<split>/<class>/<name>``."""
    total = sum(per_class.values()) * len(CLASSES)
    files: dict[str, bytes] = {}
    for done, image in enumerate(draw_set(SEED, dict(per_class)), 1):
        files[f"/{image.split}/{image.class_name}/{image.name}"] = image.jpeg
        progress(Progress(done, total))
    return files


@contextmanager
def _serve(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files on the loopback interface; gives the address."""
    whole = next(iter(files.values()))
    broken = {"/page": b"<html>This photo is no longer available</html>", "/cut": whole[: len(whole) // 2]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = files.get(self.path) or broken.get(self.path.rpartition(".")[0])
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            """Say nothing: the download accounts for every URL."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _download(
    out: Path, split: str, files: dict[str, bytes], address: str, progress: ProgressCallback, stop: Stop
) -> None:
    """Write the split's URL list, broken links among it, and download it."""
    paths = [path for path in files if path.startswith(f"/{split}/")]
    lines = [f"{path.split('/')[2]} {address}{path}" for path in paths]
    lines += [f"{CLASSES[0]} {address}/{kind}.jpg" for kind in BROKEN]
    urls = out / f"urls-{split}.txt"
    urls.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = download(
        DownloadOptions(
            (urls,),
            out / "download" / split,
            fetch=FetchOptions(allow_private=True),  # our own server
            polite=PoliteOptions(per_host=8),
        ),
        progress,
        stop,
    )
    if result.verdict is not None:
        raise result.verdict
