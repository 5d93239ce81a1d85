"""The process in which a Dask worker downloads a part: ``python -m imnet_prep.download.part_process``.

Its task comes as a pickle on standard input, and its progress and result go as pickles to standard output. It dies with
the worker, which holds the other ends.
"""

import logging
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import replace

from imnet_prep.cpu import cpu_count
from imnet_prep.download.folder import wait_for_run
from imnet_prep.download.parts import STOP
from imnet_prep.download.result import DownloadResult
from imnet_prep.download.run import download
from imnet_prep.errors import ImnetError
from imnet_prep.process_pool import STOP_SIGNALS
from imnet_prep.types import Progress

_SAY_EVERY_S = 1.0


def main() -> None:
    """Download the part that standard input names."""
    for number in STOP_SIGNALS:  # they are for the worker, which tells us
        signal.signal(number, signal.SIG_IGN)
    options, sharing = pickle.load(sys.stdin.buffer)
    name = "/".join(map(str, options.part))
    logging.basicConfig(level=logging.INFO, format=f"part {name}: %(message)s", stream=sys.stderr)
    stopped = threading.Event()
    threading.Thread(target=_obey, args=(stopped,), daemon=True, name="worker").start()
    end: DownloadResult | ImnetError
    try:
        wait_for_run(options.out)
        end = download(replace(options, processes=max(1, cpu_count() // sharing)), _Reporter().report, stopped.is_set)
    except ImnetError as error:
        end = error
    _say(end)
    os._exit(0)  # without the thread that waits for the worker


def _obey(stopped: threading.Event) -> None:
    while (word := sys.stdin.buffer.read(1)) == STOP:
        stopped.set()
    assert not word
    os._exit(1)  # the worker is gone; what was finished is in the journal and the spools


class _Reporter:
    """Pass on the progress, at most once a second."""

    def __init__(self) -> None:
        self._said_at = 0.0

    def report(self, progress: Progress) -> None:
        if time.monotonic() - self._said_at >= _SAY_EVERY_S:
            self._said_at = time.monotonic()
            _say(progress)


def _say(what: Progress | DownloadResult | ImnetError) -> None:
    try:
        pickle.dump(what, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except OSError:
        os._exit(1)  # the worker is gone


if __name__ == "__main__":
    main()
