"""Starting MindSpore in a process of any history, and how many cores there are to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imnet_prep import runtime
from imnet_prep.download.options import DownloadOptions
from imnet_prep.workers import process_count

USED_BEFORE = """
import numpy as np
import mindspore as ms
ms.ops.add(ms.Tensor(np.ones(2)), 1).asnumpy()
from imnet_prep.runtime import start_mindspore
assert start_mindspore("CPU").device_target == "CPU"
assert ms.ops.add(ms.Tensor(np.ones(2)), 1).asnumpy().tolist() == [2, 2]
"""


def test_it_starts_where_the_caller_has_used_mindspore_before() -> None:
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
    monkeypatch.setattr(runtime, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert runtime.cpu_count() == cores
    assert process_count(None) == cores
    assert DownloadOptions((tmp_path,), tmp_path).process_count() == cores
