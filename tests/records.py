"""Records folders for the tests: made by a conversion or row by row, looked at, damaged; and the command itself.

Pictures and sources are drawn by :mod:`tests.synthetic`.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from imnet_prep.build.convert import convert
from imnet_prep.build.job import ConvertResult
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.errors import IntegrityError
from imnet_prep.files import file_digest
from imnet_prep.images.batch_decoder import image_size
from imnet_prep.images.check import ValidateOptions
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo, _canonical, _self_digest, load_manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.records.record_list import RECORDS, RecordLine, read_lines, write_lines
from imnet_prep.records.shards import ShardWriter, choose_layout, read_back
from imnet_prep.types import Progress
from tests.synthetic import jpeg, make_image_folder

COMMAND = (sys.executable, "-m", "imnet_prep")


def quiet(_: Progress) -> None:
    """A progress callback that says nothing."""


def run(
    sources: Path | Sequence[Path],
    out: Path,
    *,
    split: str | None = None,
    short_side: int | None = None,
    workers: int = 1,
    max_rejected: str = "100%",
    force: bool = False,
    **plan: Any,
) -> ConvertResult:
    """Convert, with the options that differ from the defaults."""
    return convert(
        [sources] if isinstance(sources, Path) else list(sources),
        out,
        split,
        PlanOptions(store=ValidateOptions(short_side=short_side), **plan),
        ConvertOptions(workers=workers, max_rejected=max_rejected, force=force),
        quiet,
        lambda: False,
    )


def command(*arguments: object) -> list[str]:
    """The command line of ``imnet-prep`` in this interpreter."""
    return [*COMMAND, *map(str, arguments)]


def prep(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``imnet-prep`` to its end in this process: to start one takes longer than most commands do."""
    from imnet_prep.cli.prep import main

    words = list(map(str, arguments))
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def prep_process(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``imnet-prep`` to its end in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)


def prep_json(*arguments: object) -> dict[str, Any]:
    """Run ``imnet-prep ... --json`` that must succeed, and give its object."""
    done = prep(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by relative name of every file in a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    """What lies directly in a folder."""
    return {path.name for path in folder.iterdir()}


def make_records(
    folder: Path,
    *,
    classes: int = 3,
    per_class: int | Mapping[str, int] = 6,
    shards: int = 2,
    splits: tuple[str, ...] = ("train", "val"),
    seed: int = 0,
    add: Callable[[Path], object] = lambda source: None,
) -> Path:
    """Draw images, let ``add`` change them, and convert them to ``folder/records``."""
    source = make_image_folder(folder / "source", classes, per_class, splits, seed=seed)
    add(source)
    options = ConvertOptions(workers=1, max_rejected="50%")
    convert([source], folder / "records", None, PlanOptions(shards=shards), options, quiet, lambda: False)
    return folder / "records"


def read_records(records: Path, split: SplitInfo) -> Iterator[RecordLine]:
    """Read the record list of a split."""
    return read_lines(records / str(split.records["file"]))


def copy(records: Path, to: Path) -> Path:
    """Copy a records folder, so that it can be damaged."""
    return Path(shutil.copytree(records, to))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([value ^ (1 << bit % 8)]))


def keep_permissions() -> None:
    """Give up root's right to pass over permissions, in a process about to start: see ``preexec_fn``."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused to others, who have not that right


def shard_files(records: Path) -> list[Path]:
    """Every data file and index."""
    found = sorted(records.glob("*/*.mindrecord*"))
    assert found
    return found


def reseal(records: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and give it a right digest of itself again, as someone who means it would.

    It may be refused for another reason than that digest.
    """
    document = json.loads((records / MANIFEST).read_bytes())
    change(document)
    document["self_sha256"] = _self_digest(document)
    (records / MANIFEST).write_bytes(_canonical(document))
    refused = ""
    try:
        load_manifest(records)
    except IntegrityError as error:
        refused = str(error)
    assert "was changed after it was written" not in refused


# --- row by row ------------------------------------------------------------------------------------------------------

Entry = tuple[str, int, bytes]
"""File name, label, image bytes."""


def entries(count: int, classes: int = 3, seed: int = 0, low: int = 40, high: int = 200) -> list[Entry]:
    """Draw ``count`` JPEGs of differing sizes, spread over classes."""
    sizes = np.random.default_rng(seed).integers(low, high, (count, 2)).tolist()
    return [
        (f"n{i % classes:08d}/n{i % classes:08d}_{i}.JPEG", i % classes, jpeg(i % classes, seed * 100003 + i, *size))
        for i, size in enumerate(sizes)
    ]


def write_folder(folder: Path, splits: dict[str, Sequence[Entry]], shards: int = 2, classes: int = 3) -> Path:
    """Write a records folder of exactly these rows, in their order."""
    infos = {name: _write_split(folder, name, rows, shards, classes) for name, rows in splits.items()}
    names = tuple(f"n{label:08d}" for label in range(classes))
    manifest = Manifest(names, ("",) * classes, "found", "sorted class name, from 0", 0, {}, (), {}, "", infos)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def _write_split(folder: Path, split: str, rows: Sequence[Entry], shards: int, classes: int) -> SplitInfo:
    (folder / split).mkdir(parents=True)
    sizes = [len(data) for _, _, data in rows]
    layout = choose_layout(len(rows), sum(sizes), max(sizes))
    cuts = np.linspace(0, len(rows), shards + 1).astype(int).tolist()
    infos, lines = [], []
    for number in range(shards):
        path = folder / split / f"{split}-{number:05d}-of-{shards:05d}.mindrecord"
        writer = ShardWriter(path, layout)
        for row, (name, label, data) in enumerate(rows[cuts[number] : cuts[number + 1]]):
            writer.add(data, label, name)
            digest = hashlib.sha256(data).hexdigest()
            lines.append(RecordLine(number, row, name, label, *image_size(data), digest, digest).to_json())
        infos.append(read_back(path, f"{split}/{path.name}", writer.finish()))
    listing = folder / split / RECORDS
    write_lines(listing, lines)
    counts = np.bincount([label for _, label, _ in rows], minlength=classes).tolist()
    record = {"file": f"{split}/{RECORDS}", "size_bytes": listing.stat().st_size, "sha256": file_digest(listing)}
    return SplitInfo(
        len(rows), len(rows), {}, {}, 0, tuple(counts), layout.header_size, layout.page_size, record, tuple(infos)
    )


def rewrite_list(records: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """Change the lines of the training split's record list; the shards stay."""
    path = records / "train" / RECORDS
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    write_lines(path, change(lines))
    return path


def spoil_image(
    folder: Path, shard: int, row: int, change: str = "flip a byte", split: str = "train"
) -> tuple[Path, str]:
    """Damage one stored image in place; return its shard and file name.

    Args:
        folder: The records folder.
        shard: Number of the shard, from 0.
        row: In the shard.
        change: ``flip a byte``, ``zero the second half``, or any other for the length before the image.
        split: The split.
    """
    path = sorted((folder / split).glob("*.mindrecord"))[shard]
    with Shard(path) as opened:
        start, end = int(opened.index.blob_start[row]) + 8, int(opened.index.blob_end[row])
        name = str(opened.fields(row)["file_name"])
    path.chmod(0o600)
    with path.open("r+b") as file:
        if change == "flip a byte":
            file.seek((start + end) // 2)
            byte = file.read(1)[0]
            file.seek((start + end) // 2)
            file.write(bytes([byte ^ 0x10]))
        elif change == "zero the second half":
            file.seek((start + end) // 2)
            file.write(bytes(end - (start + end) // 2))
        else:
            file.seek(start - 8)
            file.write((1 << 40).to_bytes(8, "little"))
    return path, name
