"""The whole way on an image set drawn on the spot: URL list, download, shards, verification, training, scoring."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.check.verify import VerifyResult, verify
from imnet_prep.cli.drawings import CLASSES, draw_set
from imnet_prep.download import DownloadOptions, FetchOptions, PoliteOptions, download
from imnet_prep.errors import IntegrityError
from imnet_prep.records.manifest import MANIFEST
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Progress, ProgressCallback
from mbv2.recipe import resolve_recipe
from mbv2.scoring.evaluate import evaluate_checkpoint
from mbv2.training.options import RunOptions
from mbv2.training.run import train

SEED = 0
PER_CLASS = {"train": 160, "val": 30}
RECIPE = "demo"
BROKEN = ("gone", "page", "cut")  # a lost photograph, HTML in its place, a JPEG that ends early
Stage = Callable[[str], AbstractContextManager[ProgressCallback]]  # by the stage's name
Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made: ``to_json`` is its last line, ``rows`` the table above it."""

    top1: float
    images: int
    records: int
    rows: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return the demo's last line."""
        return {"top1": self.top1, "images": self.images, "records": self.records}


def run_demo(out: Path, epochs: int | None, stage: Stage, stop: Stop = lambda: False) -> DemoResult:
    """Go the whole way. Records and a training run that are there already are gone on with.

    Args:
        out: The folder for everything.
        epochs: Training epochs; the recipe's where None.
        stage: Called with a stage's name for a context manager that gives its progress callback.
        stop: Asked whether to leave after what is in hand.

    Raises:
        ImnetError: Whatever a stage raises.
    """
    refuse_inside_records(out / "records")
    out.mkdir(parents=True, exist_ok=True)
    records, run = out / "records", out / "run"
    if not (records / MANIFEST).exists():
        _make_records(out, records, stage, stop)
    checked = _verify(records, stage)
    recipe = resolve_recipe(RECIPE, {"epochs": epochs}, {})
    resume = (run / "last.ckpt").exists()
    with stage("train") as progress:
        trained = train(RunOptions(records, run, recipe, SEED, resume=resume), stop=stop, progress=progress)
    with stage("eval") as progress:
        scores, _ = evaluate_checkpoint(records, trained.checkpoint, stop=stop, progress=progress)
    images = sum(PER_CLASS.values()) * len(CLASSES)
    rows = [
        ("images", f"{images} drawn in {len(CLASSES)} classes, served and downloaded to {out / 'download'}"),
        ("broken links", f"{len(BROKEN)} in each URL list, named in {out / 'download' / 'train' / 'failures.jsonl'}"),
        ("records", f"{records}: {checked.records} in {checked.shards} shards, verified at level {checked.level}"),
        (
            "run",
            f"{run}: {trained.epochs} epochs of MobileNetV2 {recipe.width:g} at {recipe.image_size} px, curves.png",
        ),
        ("checkpoint", str(trained.checkpoint)),
        ("top-1", f"{scores.top1:.3f} of {scores.images} validation images"),
    ]
    return DemoResult(scores.top1, images, checked.records, rows)


def _make_records(out: Path, records: Path, stage: Stage, stop: Stop) -> None:
    with stage("draw") as progress:
        files = _draw(progress)
    shutil.rmtree(out / "download", ignore_errors=True)  # its URLs named another port
    with _serve(files) as address:
        for split in PER_CLASS:
            with stage(f"download {split}") as progress:
                _download(out, split, files, address, progress, stop)
    sources = [out / "download" / split for split in PER_CLASS]
    with stage("to-mindrecord") as progress:
        convert(sources, records, None, PlanOptions(seed=SEED), ConvertOptions(), progress, stop)


def _draw(progress: ProgressCallback) -> dict[str, bytes]:
    """Draw all images; by URL path, ``/<split>/<class>/<name>``."""
    total = sum(PER_CLASS.values()) * len(CLASSES)
    files: dict[str, bytes] = {}
    for done, image in enumerate(draw_set(SEED, PER_CLASS), 1):
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


def _verify(records: Path, stage: Stage) -> VerifyResult:
    with stage("verify") as progress:
        checked = verify(records, "decode", None, progress)
    if not checked.ok:
        first = checked.problems[0]
        raise IntegrityError(f"{records}: {first.file}: {first.kind}", got=first.detail, remedy=f"delete {records}")
    return checked
