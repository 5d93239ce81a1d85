"""What a command writes: never into a records folder, and wherever it cannot be written, that is one line."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from imnet_prep.cli.mobilenet import main as mobilenet
from imnet_prep.cli.prep import main as prep
from tests.imnet_prep.obstacles import make_fifo
from tests.records import copy, keep_permissions, make_records
from tests.synthetic import make_image_folder

# How every report has begun since the first version.
OPENING = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'\">\n"
)
RUN = {"imnet-prep": prep, "mbv2": mobilenet}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("outputs"), per_class=2)


@pytest.fixture
def records(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path / "records")


def state(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its digest."""
    return {
        str(path): "link" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refusal(*arguments: object) -> str:
    """The one line of a command that ends with exit 1."""
    program, *rest = map(str, arguments)
    result = CliRunner().invoke(RUN[program], rest)
    assert result.exit_code == 1, (arguments, result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# What it reads is not there: the refusal comes before it is looked for.
COMMANDS = [
    "imnet-prep report none --out OUT",
    "imnet-prep report none --force --out OUT",
    "mbv2 report none --out OUT",
    "mbv2 report none --force --out OUT",
    "mbv2 export --checkpoint none --format onnx --out OUT",
    "mbv2 convert none --from timm --out OUT",
    "mbv2 convert none --to timm --out OUT",
    "mbv2 eval --records none --checkpoint none --per-class OUT",
    "mbv2 eval --records none --checkpoint none --confusion OUT",
    "mbv2 predict none --checkpoint none --sheet OUT",
    "mbv2 train --records none --out OUT",
    "mbv2 train --records none --out run --features OUT",
    "imnet-prep download --urls none --out OUT",
    "imnet-prep demo --out OUT",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_a_records_folder(
    command: str, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "made.partial" / ".work"
    work.mkdir(parents=True)
    (tmp_path / "folder-link").symlink_to(records / "train")
    (tmp_path / "file-link").symlink_to(records / "manifest.json")
    (records / "out-link").symlink_to(tmp_path / "elsewhere")
    before = state(tmp_path)
    shard = min((records / "train").glob("*.mindrecord")).relative_to(tmp_path)
    places = [shard, "records/manifest.json", "records/new", "records/no/new", "folder-link/new", "file-link",
              "made.partial/new", "made.partial/.work/new"]  # fmt: skip
    if not command.startswith(("mbv2 train", "imnet-prep d")):  # a folder is made behind the link, not in its place
        places.append("records/out-link")
    for place in map(str, places):
        assert "lies in the records folder" in refusal(*command.replace("OUT", place).split()), place
    assert state(tmp_path) == before


@pytest.mark.parametrize("command", ["mbv2 train --records none", "imnet-prep download --urls none", "imnet-prep demo"])
def test_a_records_folder_is_no_place_for_a_run_or_a_download(command: str, records: Path) -> None:
    before = state(records)
    assert "lies in the records folder" in refusal(*command.split(), "--out", records)
    assert state(records) == before


def test_a_file_that_no_report_wrote_stays_unless_forced(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.html"
    report = ("report", str(records), "--workers", "1", "--out", str(out))
    for text in ("", "notes", "<!doctype html>\n<html lang='en'>", OPENING[:-1]):
        out.write_text(text)
        assert "is not a report" in refusal("imnet-prep", *report)
        assert "is not a report" in refusal("mbv2", "report", tmp_path, "--out", out)
        assert out.read_text() == text
    assert CliRunner().invoke(prep, [*report, "--force"]).exit_code == 0
    assert out.read_text().startswith(OPENING)
    out.write_text(OPENING + "of an earlier version")
    assert CliRunner().invoke(prep, report).exit_code == 0
    assert "of an earlier version" not in out.read_text()


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("program", ["imnet-prep", "mbv2"])
def test_a_report_replaces_files_alone(program: str, force: tuple[str, ...], records: Path, tmp_path: Path) -> None:
    """What stands at the places stays what it is, devices above all: root may replace them."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    make_fifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    names = ("pipe", "folder", "folder/", "file/x.html", "dangling", "loop", "loop/x.html", "none/x.html", "socket", "")
    places = [os.path.join(tmp_path, name) for name in names]  # a Path drops the last slash
    for place in (*places, "/dev/full", "/dev/null"):
        line = refusal(program, "report", tmp_path / "nothing", "--out", place, *force)
        assert "cannot be" in line, place
        assert "nothing" not in line
    assert Path("/dev/full").is_char_device()
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "socket").is_socket()


def run(*arguments: str | Path, prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; one that hangs fails."""
    command = [sys.executable, "-m", "imnet_prep", *arguments]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        command, preexec_fn=prepare, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def small_files() -> None:
    """Let no file grow beyond 8 kB, as a disk that is full."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_nothing(records: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for out, prepare in (
        (tmp_path / "full.html", small_files),
        (closed / "x.html", keep_permissions),
        (tmp_path / ("long" * 63 + ".html"), keep_permissions),
    ):
        done = run("report", records, "--workers", "1", "--out", out, prepare=prepare)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith(f"error: {out}: cannot be written")
        assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "records"]


def test_names_that_are_not_utf8_are_shown_and_written_to(records: Path, tmp_path: Path) -> None:
    source, folder, out = (tmp_path / os.fsdecode(name) for name in (b"s\xff", b"r\xff", b"o\xff"))
    records.rename(folder)
    make_image_folder(source, 2, 3)
    for command in (
        ("info", folder),
        ("verify", folder, "--level", "decode", "--workers", "1"),
        ("report", folder, "--workers", "1", "--out", tmp_path / os.fsdecode(b"p\xff.html")),
        ("reshard", folder, "--workers", "1", "--shards", "1", "--out", out),
        ("repair-index", out),
        ("adopt", out, "--force", "--workers", "1"),
        ("to-mindrecord", source, "--workers", "1", "--out", tmp_path / os.fsdecode(b"t\xff")),
    ):
        for arguments in (command, (*command, "--json")):
            result = CliRunner().invoke(prep, list(map(str, arguments)))
            assert result.exit_code == 0, (command, result)
            if "--json" in arguments:
                json.loads(result.stdout)
    for name in ("info", "verify", "report", "browse", "repair-index", "adopt"):
        assert "none\\udcff" in refusal("imnet-prep", name, source / os.fsdecode(b"none\xff"))
    done = run("info", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "r\\udcff" in done.stdout
