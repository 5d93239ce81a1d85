"""The decodes of a download hold so many pixels at a time, over all threads and processes."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from imnet_prep.download.memory import PixelBudget, pixels_of
from tests import synthetic

LARGE = 30_000_000


def test_small_images_share_the_budget_and_wait_for_it(tmp_path: Path) -> None:
    budget, lock, held, most = PixelBudget(tmp_path), threading.Lock(), 0, 0

    def decode() -> None:
        nonlocal held, most
        with budget.hold(5_000_000):
            with lock:
                held += 5_000_000
                most = max(most, held)
            time.sleep(0.02)
            with lock:
                held -= 5_000_000

    threads = [threading.Thread(target=decode) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 20_000_000  # four at a time


def test_a_large_image_is_alone_over_all_processes_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from imnet_prep.download.memory import PixelBudget\n"
        f"with PixelBudget(Path(sys.argv[1])).hold({LARGE}): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        entered = threading.Event()

        def wait() -> None:
            with PixelBudget(tmp_path).hold(LARGE):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3)
        other.kill()
        assert entered.wait(10)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_counted_by_the_header() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(out, "WEBP")
    assert pixels_of(out.getvalue()) == 1200
    assert pixels_of(synthetic.png_header_bomb()) == 0  # Pillow refuses it
    assert pixels_of(synthetic.many_scans(640, 48, 1)) == 640 * 48
    assert pixels_of(b"<html>") == pixels_of(b"") == pixels_of(b"\xff\xd8\xff") == 0
