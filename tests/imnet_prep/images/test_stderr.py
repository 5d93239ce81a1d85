"""Captured stderr: a decoder's messages are read, and nothing that other threads write is lost or mixed in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from imnet_prep.images import native
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.stderr import captured_stderr
from imnet_prep.types import ImageRef, RawImage, Reason, Rejected
from tests.imnet_prep.images.libraries import without_library
from tests.synthetic import odd_images

DAMAGE = b"Corrupt JPEG data: bad Huffman code\n"


def test_messages_of_decoders_are_read_and_other_lines_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        b"a log line\n",
        DAMAGE,
        b"ValueError: of another thread\n",
        b"TIFFReadDirectory: Warning, a tag.\n",
        b"last",
    ]
    with captured_stderr() as messages:
        for line in lines:
            os.write(2, line)
        assert messages == []
    assert messages == ["Corrupt JPEG data: bad Huffman code", "TIFFReadDirectory: Warning, a tag."]
    assert capfd.readouterr().err == "a log line\nValueError: of another thread\nlast"


def test_a_progress_bar_without_a_line_end_hides_no_damage(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as messages:
        os.write(2, b"\r 35%|###  ")
        os.write(2, DAMAGE)
    assert messages == [DAMAGE.decode().strip()]
    assert capfd.readouterr().err == "\r 35%|###  "


def test_nothing_that_a_thread_writes_meanwhile_is_lost(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the C++ library, where OpenCV decodes and its stderr is captured for each image."""
    without_library(monkeypatch)
    data, done = odd_images()["garbled"].data, threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not done.is_set():
            os.write(2, b"line %d\n" % written)
            written += 1

    def decode() -> None:
        raw = RawImage(ImageRef("train", "c", "c/x.jpg", "x.jpg", 0, len(data)), data)
        for _ in range(50):
            results.append(validate(raw, ValidateOptions()))

    results: list[object] = []
    writer = threading.Thread(target=write)
    writer.start()
    run_in_threads(decode, 3)
    done.set()
    writer.join()
    with captured_stderr():  # passes on what was still being written at the end of the last capture
        pass
    assert len(results) == 150
    assert all(isinstance(result, Rejected) and result.reason is Reason.CORRUPT for result in results)
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(f"line {number}" for number in range(written))
    assert written > 100


def run_in_threads(target: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", ["garbled", "progressive", "png", "grey"])
def test_with_the_library_stderr_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.decoder_status()[0]:
        pytest.skip(native.decoder_status()[1])
    used: list[str] = []
    monkeypatch.setattr("imnet_prep.images.decode.captured_stderr", lambda: used.append(name))
    data = odd_images()[name].data
    for short_side in (None, 16):
        validate(
            RawImage(ImageRef("train", "c", "c/x", "x", 0, len(data)), data), ValidateOptions(short_side=short_side)
        )
    assert used == []


def test_a_system_without_linuxs_calls_captures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memfd_create", "pread", "register_at_fork", "fork"):
        monkeypatch.delattr(os, name, raising=False)
    with captured_stderr() as messages:
        os.write(2, DAMAGE)
    assert messages == [DAMAGE.decode().strip()]
