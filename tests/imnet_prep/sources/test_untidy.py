"""Of untidy folders drawn at random, every image is converted or rejected by name, or the layout is refused."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from imnet_prep.errors import BudgetError, SourceError
from imnet_prep.sources import Found, detect, merge, read
from imnet_prep.types import ImageRef, RawImage, Rejected
from tests.imnet_prep.obstacles import no_hang
from tests.imnet_prep.sources.accounting import stored_in
from tests.imnet_prep.sources.untidy import Untidy
from tests.records import run

SEEDS = range(200)
SAMPLE = 30


def check_found(untidy: Untidy) -> bool:
    """Assert that every image is found once or rejected by name; return False for a folder that is refused."""
    refused, found = "", list[Found]()
    try:
        found = list(merge(detect([untidy.root])))
    except SourceError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert str(untidy.root) in refused
        return False
    refs = [item for item in found if isinstance(item, ImageRef)]
    bad = Counter(os.path.basename(item.file_name) for item in found if isinstance(item, Rejected))
    read_from = {ref.path for ref in refs}
    for path in untidy.images():
        if str(path) not in read_from:
            name = os.fsencode(path.name).decode("utf-8", "backslashreplace").replace("\n", "\\n")
            assert bad[name] > 0, f"{untidy.said}: {path} is lost"
            bad[name] -= 1
    real = Counter(os.path.realpath(ref.path) for ref in refs if not os.path.islink(ref.path) and not ref.offset)
    assert not [path for path, count in real.items() if count > 1], untidy.said
    for ref in refs:
        above = Path(ref.path).relative_to(untidy.root).parts if not ref.offset else (ref.class_name,)
        assert not ref.class_name or ref.split == "val" or ref.class_name in above, untidy.said
    return True


def check_converted(untidy: Untidy, out: Path) -> bool:
    """Assert that a conversion stores or rejects every image that can be read; return False where it is refused."""
    try:
        result = run(untidy.root, out)
    except (SourceError, BudgetError):
        assert not out.exists()
        return False
    there, found = stored_in(out), list(merge(detect([untidy.root])))
    refs = {(ref.split, ref.file_name): ref for ref in found if isinstance(ref, ImageRef)}
    assert there.keys() <= refs.keys()
    rejected = (out / "rejected.jsonl").read_text().count("\n")
    assert len(there) + rejected == len(found), untidy.said
    for key, digest in there.items():
        raw = read(refs[key])
        assert isinstance(raw, RawImage)
        assert hashlib.sha256(raw.data).hexdigest() == digest
        assert key[1].startswith(f"{refs[key].class_name}/") or not refs[key].class_name
    assert result.to_json()["images"] == len(there)
    return True


def test_a_sample_of_untidy_folders_loses_nothing(tmp_path: Path) -> None:
    with no_hang(60):
        taken = sum(check_found(Untidy(tmp_path / f"{seed}", seed)) for seed in SEEDS[:SAMPLE])
    assert SAMPLE // 4 < taken < SAMPLE


@pytest.mark.slow
def test_a_few_untidy_folders_convert_whole(tmp_path: Path) -> None:
    with no_hang(120):
        done = [
            check_converted(Untidy(tmp_path / f"{seed}", seed), tmp_path / f"out{seed}") for seed in SEEDS[:SAMPLE:5]
        ]
    assert any(done)


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_an_untidy_folder_loses_nothing(tmp_path: Path, seed: int) -> None:
    with no_hang(120):
        if check_found(untidy := Untidy(tmp_path / "x", seed)):
            check_converted(untidy, tmp_path / "out")
