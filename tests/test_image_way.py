"""``docs/architecture.md`` draws the files that an image passes; here an image passes them."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from imnet_prep import TrainOptions, open_batches
from imnet_prep.build import job
from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.build.shard_task import ShardResult, ShardTask, run_task
from tests.synthetic import make_imagenet
from tests.test_architecture import LADDER

ROOT = Path(__file__).parents[1]
BELOW = {f"{name}.py" for names in LADDER[:2] for name in names}  # what all rooms stand on
MOST = {"shard": 12, "batch": 8}


@contextmanager
def passed(names: set[str]) -> Iterator[None]:
    """Add the files of imnet_prep in which a function is called meanwhile, in this thread and those it starts."""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and path.is_relative_to(ROOT / "imnet_prep"):
            names.add(path.relative_to(ROOT / "imnet_prep").as_posix())

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The files passed from an archive to a shard, and from the shard to a batch."""
    folder, ways = tmp_path_factory.mktemp("way"), {"shard": set[str](), "batch": set[str]()}
    make_imagenet(folder, per_class=2, odd=False)

    def traced(task: ShardTask, _report: object) -> ShardResult:
        with passed(ways["shard"]):
            return run_task(task, lambda *_: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_task", traced)
        options = PlanOptions(shards=1), ConvertOptions(workers=1)
        convert(sorted(folder.glob("ILSVRC*")), folder / "records", None, *options, lambda _: None, lambda: False)
    with (
        open_batches(folder / "records", "train", TrainOptions(batch_size=4, image_size=32)) as batches,
        passed(ways["batch"]),
    ):
        assert sum(batch.label.size for batch in batches) > 4
    return ways


@pytest.mark.parametrize("goal", ["shard", "batch"])
def test_the_files_that_an_image_passes_are_drawn_and_few(goal: str, ways: dict[str, set[str]]) -> None:
    drawing = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.DOTALL)
    assert drawing
    before, after = drawing[1].split("manifest.json")
    drawn = set(re.findall(r"[a-z_]+(?:/[a-z_]+)*\.py", before if goal == "shard" else after))
    assert ways[goal] - BELOW == drawn - BELOW
    assert len(ways[goal] - BELOW) <= MOST[goal]


def test_every_module_is_described() -> None:
    """Each room has a table of its modules, and of nothing else."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    tables = dict(re.findall(r"^### (\w+)(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    rooms: dict[str, set[str]] = {"Below": set()}
    for package in ("imnet_prep", "mbv2", "cli"):
        for path in (ROOT / package).rglob("*.py"):
            inner = path.relative_to(ROOT / package).parts[:-1]
            room = package if package != "imnet_prep" else inner[0] if inner else "Below"
            if not path.name.startswith("__"):
                rooms.setdefault(room, set()).add(path.name)
    assert {room: set(re.findall(r"`(?:\w+/)*(\w+\.py)`", table)) for room, table in tables.items()} == rooms
