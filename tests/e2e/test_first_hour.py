"""The first hour of a new user, who has photographs of two kinds and README: its commands as they stand, none added.

Only the download of the pretrained weights is replaced, by those in ``../shared/data``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import onnx
import pytest

from tests.e2e.pages import OWN_PHOTOGRAPHS, README, commands, run
from tests.e2e.photographs import KINDS, draw_photographs

pytestmark = [pytest.mark.long, pytest.mark.real_data, pytest.mark.timeout(900)]
Hour = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Hour:
    """The folder in which the hour was spent, and what each command printed, by its first two words."""
    root = tmp_path_factory.mktemp("hour")
    draw_photographs(root)
    (weights,) = re.findall(r"^curl -L -o (\S+) https://\S+$", README.read_text(encoding="utf-8"), re.MULTILINE)
    shutil.copy(shared_data / "mobilenetv2_100_tf.safetensors", root / weights)
    return root, {" ".join(shlex.split(line)[:2]): run(line, root) for line in commands(README, OWN_PHOTOGRAPHS)}


def test_the_two_kinds_are_told_apart(hour: Hour) -> None:
    scores = json.loads(hour[1]["mbv2 eval"])
    assert scores["images"] >= 20
    assert scores["top1"] >= 0.95


def test_a_new_photograph_is_recognised(hour: Hour) -> None:
    assert re.search(rf"photo\.jpg +{KINDS[1]} ", hour[1]["mbv2 predict"]), hour[1]["mbv2 predict"]


def test_the_exported_network_is_whole(hour: Hour) -> None:
    onnx.checker.check_model(str(hour[0] / "mobilenetv2.onnx"), full_check=True)


def test_both_reports_name_the_classes(hour: Hour) -> None:
    for name in ("report.html", "run.html"):
        page = (hour[0] / name).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{kind}\b", page) for kind in KINDS), name
