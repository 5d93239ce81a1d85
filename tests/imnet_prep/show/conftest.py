"""Records whose names would be HTML if they were not escaped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.records import make_records
from tests.synthetic import jpeg

EVIL = "<script>alert('x')<\"&amp;"


@pytest.fixture(scope="package")
def evil_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class, an image of it and a rejected one with hostile names, in a folder of such a name."""

    def add(source: Path) -> None:
        folder = source / "train" / EVIL
        folder.mkdir()
        (folder / f"{EVIL}.jpg").write_bytes(jpeg(0, 9))
        (folder / f"{EVIL}-cut.jpg").write_bytes(jpeg(0, 8)[:-80])

    return make_records(tmp_path_factory.mktemp(EVIL), per_class=2, add=add).rename(
        tmp_path_factory.mktemp("evil") / EVIL
    )
