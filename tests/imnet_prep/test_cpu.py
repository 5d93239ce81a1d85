"""Starting MindSpore in a process of any history, and how many cores there are to use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from imnet_prep import cpu
from imnet_prep.download.options import DownloadOptions
from imnet_prep.process_pool import process_count

USED_BEFORE = """
import numpy as np
import mindspore as ms
ms.ops.add(ms.Tensor(np.ones(2)), 1).asnumpy()
from mbv2.runtime import start_mindspore
assert start_mindspore("CPU").device_target == "CPU"
assert ms.ops.add(ms.Tensor(np.ones(2)), 1).asnumpy().tolist() == [2, 2]
"""


@pytest.mark.slow
def test_it_starts_where_the_caller_has_used_mindspore_before() -> None:
    pytest.importorskip("mindspore")
    done = subprocess.run([sys.executable, "-c", USED_BEFORE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 8), ("400000 100000\n", 4), ("50000 100000\n", 1), ("1600000 100000\n", 8), ("", 8)],
)
def test_a_container_s_quota_lowers_the_count_of_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu.cpu_count() == cores
    assert process_count(None) == cores
    assert DownloadOptions((tmp_path,), tmp_path).process_count() == cores


@pytest.mark.parametrize(
    ("own", "launcher", "quota", "processes", "cores"),
    [
        (64, 64, "max 100000\n", 8, 8),  # nobody is bound
        (8, 64, "max 100000\n", 8, 8),  # each is bound to its own cores
        (32, 64, "max 100000\n", 8, 8),  # four are bound to the cores of one node of memory
        (8, 8, "max 100000\n", 2, 4),  # the launcher itself was bound
        (64, 64, "1600000 100000\n", 8, 2),  # a container of 16 cores
        (8, None, "max 100000\n", 2, 4),  # the launcher has ended
        (2, 2, "max 100000\n", 5, 1),
        (64, 4, "max 100000\n", 1, 64),
    ],
)
def test_processes_of_one_launcher_share_its_cores(
    own: int, launcher: int | None, quota: str, processes: int, cores: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def affinity(process: int) -> set[int]:
        if process and launcher is None:
            raise ProcessLookupError
        return set(range((launcher or 0) if process else own))

    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    assert cpu.cpu_share(processes) == cores


VERSIONS = """
import json, sys
sys.path[:0] = sys.argv[1:]
from imnet_prep.cpu import library_versions
print(json.dumps(library_versions("pillow", "opencv")))
"""


@pytest.fixture
def versions_beside(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Ask a Python that has this one's packages but the distributions of OpenCV, and those named in their place."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in dict.fromkeys(path for path in sys.path if path.endswith("-packages")):
        for found in Path(folder).iterdir():
            of_opencv = found.name.startswith("opencv") and found.suffix == ".dist-info"
            if not of_opencv and found.suffix != ".pth" and not (packages / found.name).exists():
                (packages / found.name).symlink_to(found)

    def ask(*distributions: str) -> dict[str, str]:
        for name in distributions:
            metadata = packages / f"{name.replace('-', '_')}-4.99.0.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 4.99.0\n")
        command = [sys.executable, "-I", "-S", "-c", VERSIONS, str(Path(cpu.__file__).parents[1]), str(packages)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return dict(json.loads(done.stdout))

    return ask


@pytest.mark.parametrize(
    "name", ["opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"]
)
def test_opencv_s_version_is_that_of_whichever_distribution_is_there(
    name: str, versions_beside: Callable[..., dict[str, str]]
) -> None:
    assert versions_beside(name) == {"pillow": importlib.metadata.version("pillow"), name: "4.99.0"}


def test_opencv_without_a_distribution_tells_its_version_itself(
    versions_beside: Callable[..., dict[str, str]],
) -> None:
    assert versions_beside() == {"pillow": importlib.metadata.version("pillow"), "opencv": cv2.__version__}


def test_a_library_that_is_not_installed_fails_nothing() -> None:
    assert cpu.library_versions("no-such-distribution") == {"no-such-distribution": ""}
