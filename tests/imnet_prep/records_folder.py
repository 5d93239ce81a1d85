"""Small records folders for the tests of what looks at, repairs or changes them, and ways to damage them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from imnet_prep.build.convert import convert
from imnet_prep.build.job import ConvertOptions
from imnet_prep.build.plan import PlanOptions
from imnet_prep.errors import IntegrityError
from imnet_prep.records.manifest import MANIFEST, SplitInfo, load_manifest
from imnet_prep.records.record_list import RecordLine, read_lines
from imnet_prep.types import Progress
from tests.synthetic import make_image_folder


def quiet(_: Progress) -> None:
    """A progress callback that says nothing."""


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
    import json

    from imnet_prep.records.manifest import _canonical, _self_digest

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
