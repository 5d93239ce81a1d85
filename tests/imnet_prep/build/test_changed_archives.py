"""Archives that change during a conversion, and damaged ones in the whole command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.cli.prep import main
from imnet_prep.errors import BudgetError, ImnetError, Interrupted, PlanError, SourceError
from imnet_prep.files import file_digest
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.types import Progress
from tests.imnet_prep.obstacles import make_fifo
from tests.imnet_prep.sources.accounting import check_accounted
from tests.records import digests, run
from tests.synthetic import WNIDS, jpeg, tar_bytes


def images(count: int = 12) -> dict[str, bytes]:
    return {f"{WNIDS[k % 3]}/{k}.jpg": jpeg(k % 3, k) for k in range(count)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(images()))
    return path


def once(unit: str, change: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that makes a change when a step has ended."""
    done: list[Progress] = []

    def report(state: Progress) -> None:
        if state.unit == unit and not done and state.done == (state.total or state.done):
            done.append(state)
            change()

    return report


def converted(source: Path, out: Path, progress: Callable[[Progress], None]) -> None:
    options = ConvertOptions(workers=1, max_rejected="100%")
    convert([source], out, None, PlanOptions(), options, progress, lambda: False)


def overwrite(path: Path) -> None:
    """Change an image where it is, by bytes that make another one."""
    data, one, other = path.read_bytes(), jpeg(0, 0), jpeg(0, 1000)
    assert one in data
    path.write_bytes(data.replace(one, other[: len(one)].ljust(len(one), b"\x00")))
    os.utime(path, ns=(1, 1))  # however coarse the clock of the file system is


@pytest.mark.parametrize("form", ["file", "folder"])
def test_an_archive_changed_while_it_is_read_is_an_error(form: str, archive: Path, tmp_path: Path) -> None:
    source = archive
    if form == "folder":
        source, archive = tmp_path / "tars", tmp_path / "tars" / f"{WNIDS[0]}.tar"
        source.mkdir()
        archive.write_bytes(tar_bytes({"0.jpg": jpeg(0, 0), "1.jpg": jpeg(0, 1)}))
    before = archive.read_bytes()
    with pytest.raises(SourceError, match=f"{archive.name}: changed while it was read"):
        converted(source, tmp_path / "records", once("found", lambda: overwrite(archive)))
    assert not (tmp_path / "records").exists()
    assert not (tmp_path / "records.partial").exists()
    archive.write_bytes(before)
    run(source, tmp_path / "records")
    run(source, tmp_path / "again")
    assert digests(tmp_path / "records") == digests(tmp_path / "again")


@pytest.mark.parametrize(
    ("unit", "kinds"), [("found", (SourceError, PlanError, BudgetError)), ("bytes", (BudgetError,))]
)
def test_an_archive_replaced_by_a_fifo_is_an_error(
    unit: str, kinds: tuple[type[ImnetError], ...], archive: Path, tmp_path: Path
) -> None:
    """While it is listed it is hashed as well: the listing, the digest, or what reads its images may meet the FIFO."""

    def replace() -> None:
        archive.unlink()
        make_fifo(archive)

    with pytest.raises(kinds):
        converted(archive, tmp_path / "records", once(unit, replace))
    assert not (tmp_path / "records").exists()


def test_other_options_leave_the_digests_and_count_anew(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(
        tar_bytes({f"train/{name}": data for name, data in images().items()} | {"val/cat/1.jpg": jpeg()})
    )
    seen: list[str] = []
    options = ConvertOptions(workers=1)
    with pytest.raises(Interrupted):
        convert(
            [archive], tmp_path / "records", "train", PlanOptions(shards=4), options,
            lambda state: seen.append(state.unit), lambda: "images" in seen,
        )  # fmt: skip
    assert "bytes" in seen
    seen.clear()
    result = convert(
        [archive], tmp_path / "records", "val", PlanOptions(), ConvertOptions(workers=1, force=True),
        lambda state: seen.append(state.unit), lambda: False,
    )  # fmt: skip
    assert "bytes" not in seen
    assert [source["images"] for source in result.manifest.sources] == [1]
    assert result.manifest.sources[0]["sha256"] == file_digest(archive)


def damage(data: bytes, how: str) -> bytes:
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    fourth, end = headers[4], headers[-1]
    return {
        "zeroed header": data[:fourth] + bytes(512) + data[fourth + 512 :],
        "stretch": data[: fourth + 700] + bytes(range(256)) * 20 + data[fourth + 700 + 5120 :],
        "zeros": data[:fourth] + bytes(len(data) - fourth),
        "garbage": data + b"garbage" * 500,
        "cut": data[: end + 100],
    }[how]


@pytest.mark.parametrize("how", ["zeroed header", "stretch", "zeros", "garbage", "cut"])
def test_damage_is_an_error_and_salvage_says_what_is_skipped(how: str, archive: Path, tmp_path: Path) -> None:
    members = images(40)
    originals = {("train", name): data for name, data in members.items()}
    archive.write_bytes(damage(tar_bytes(members), how))
    out = tmp_path / "records"
    arguments = ["to-mindrecord", str(archive), "--out", str(out), "--workers", "1", "--max-rejected", "100%"]
    strict = CliRunner().invoke(main, arguments)
    assert strict.exit_code == 1
    assert "x.tar is" in strict.output
    assert strict.output.count("\n") == 1
    check_accounted(originals, out, strict.exit_code)
    result = CliRunner().invoke(main, [*arguments, "--salvage", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    manifest = RecordsFolder.open(out).manifest
    assert told["skipped_bytes"] == manifest.sources[0]["skipped_bytes"] > 0
    assert manifest.options["salvage"] is True
    assert any("bytes skipped" in note for note in told["notes"])
    assert told["images"] >= (4 if how == "zeros" else 33)
    check_accounted(originals, out, 0, salvaged=True)


def test_a_whole_archive_has_no_trace_of_salvage_but_the_option(archive: Path, tmp_path: Path) -> None:
    result = run(archive, tmp_path / "records", salvage=True)
    assert "skipped_bytes" not in result.manifest.sources[0]
    assert "skipped_bytes" not in result.to_json()
