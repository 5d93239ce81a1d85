"""Starting MindSpore in a process of any history."""

from __future__ import annotations

import subprocess
import sys

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
