"""Start, replace and end the worker processes, and pass messages to and from them."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from imnet_prep.download.folder import INCOMING
from imnet_prep.download.messages import Died, Lane, LaneDone, Ready
from imnet_prep.download.options import DownloadOptions
from imnet_prep.download.worker import worker_main
from imnet_prep.errors import DownloadError
from imnet_prep.process_pool import SPAWN

log = logging.getLogger(__name__)
_HOST_SLOTS = 8192
_STARTS = 3  # of a worker in a row that may fail
_END_S = 5.0  # then a worker that does not end is killed


class _Worker(NamedTuple):
    process: Any
    pipe: Any  # another class on Windows


class Pool:
    """Worker processes with several fetching threads each.

    Attributes:
        processes: Number of processes.
        threads: Threads in each.
        pauses: Shared array by host slot: the ``time.monotonic`` before which no request may go out.
    """

    def __init__(self, options: DownloadOptions) -> None:
        self._options = options
        self.processes = options.process_count()
        self.threads = -(-options.polite.concurrency // self.processes)
        self.pauses: Any = SPAWN.RawArray("d", _HOST_SLOTS)
        self._rows: Any = SPAWN.RawArray("q", self.processes * self.threads)  # the row that each thread fetches
        self._starts = [0] * self.processes  # of each worker since it last was ready
        self._workers = [self._start(index) for index in range(self.processes)]

    def _start(self, index: int) -> _Worker:
        self._starts[index] += 1
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(
            target=worker_main,
            args=(self._options, self.threads, theirs, self.pauses, self._rows, index),
            daemon=True,
            name=f"download-{index}",
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def send(self, lanes: Iterable[tuple[int, Lane]]) -> None:
        """Send lanes to the processes that they name."""
        for index, lane in lanes:
            with suppress(OSError):  # it has died, which receive() will notice
                self._workers[index].pipe.send(lane)

    def receive(self, timeout_s: float) -> Iterator[LaneDone | Ready | Died]:
        """Yield what the workers report; wait for it if need be. A worker that died is replaced.

        Raises:
            DownloadError: A worker died three times before it was ready.
        """
        ready = wait(
            [source for worker in self._workers for source in (worker.pipe, worker.process.sentinel)], timeout_s
        )
        for index, worker in enumerate(self._workers):
            died = worker.process.sentinel in ready
            with suppress(EOFError, OSError):
                while worker.pipe.poll():
                    message = worker.pipe.recv()
                    if isinstance(message, Ready):
                        self._starts[index] = 0
                    yield message
            if died:
                yield self._replace(index)

    def _replace(self, index: int) -> Died:
        worker = self._workers[index]
        worker.process.join()  # its pipes close a moment before its exit code is known
        if self._starts[index] >= _STARTS:
            raise DownloadError(
                f"a worker process ended {_STARTS} times before it was ready",
                got=f"exit code {worker.process.exitcode}",
                remedy="its own message is above; fix this and run the same command again",
            )
        log.warning("a worker died (exit code %s); its URLs are tried again", worker.process.exitcode)
        own = slice(index * self.threads, (index + 1) * self.threads)
        spools = (self._options.out / INCOMING).glob(f"spool-{worker.process.pid}-*")
        died = Died(index, frozenset(self._rows[own]), tuple(path.name for path in spools))
        self._rows[own] = [0] * self.threads
        worker.pipe.close()
        self._workers[index] = self._start(index)
        return died

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            with suppress(OSError):
                worker.pipe.send(None)
        for worker in self._workers:
            worker.process.join(_END_S)
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
