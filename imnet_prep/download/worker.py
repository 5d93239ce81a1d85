"""A worker process: threads that fetch lanes, judge what comes, and leave it whole in the incoming folder.

A lane is the right to one connection to one host, with the URLs to fetch over it one after the other. Every finished
URL is appended to this worker's spool before it is reported, so that a SIGKILL of all processes loses only what was
in flight.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import random
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import requests

from imnet_prep.download.addresses import Resolver
from imnet_prep.download.content import judge
from imnet_prep.download.fetch import Body, Failure, Fetcher, Hop
from imnet_prep.download.folder import INCOMING, share_use, spool_line
from imnet_prep.download.journal import Outcome
from imnet_prep.download.net import make_session
from imnet_prep.download.options import DownloadOptions, FailReason

log = logging.getLogger(__name__)
_SPOOL_LINES = 5_000  # then a new spool, and the old one goes once the journal has its results
_GATHER_S = 0.02  # results that end within it are reported together
_LINGER_S = 0.05  # a host needs a moment to notice that we cut a connection before it may see the next


class Task(NamedTuple):
    """A URL to fetch. ``spent_s`` and ``hops`` are of this attempt's earlier hops; ``url`` is the next hop's."""

    row: int
    url: str
    attempts: int = 0
    hops: int = 0
    spent_s: float = 0.0


class Lane(NamedTuple):
    """Work for one connection to one host."""

    number: int
    host_slot: int
    tasks: tuple[Task, ...]


class Retry(NamedTuple):
    """An attempt that failed in a way that may pass."""

    task: Task
    failure: Failure


class Redirect(NamedTuple):
    """A hop: the same URL goes on at another address."""

    task: Task


class LaneDone(NamedTuple):
    """A lane came to its end; ``returned`` are tasks that it did not start."""

    number: int
    returned: tuple[Task, ...]


class Ready(NamedTuple):
    """A worker has started."""

    worker: int


class Broken(NamedTuple):
    """This machine cannot store images (a full disk): no fault of the URL, and the end of the run."""

    detail: str


class Rotated(NamedTuple):
    """A spool is complete: all its results have been reported before this."""

    spool: str


Message = Ready | Retry | Redirect | LaneDone | Outcome | Rotated | Broken


def user_agent() -> str:
    """Return the honest name under which hosts see us."""
    ours, theirs = version("imnet-prep"), requests.__version__
    return f"imnet-prep/{ours} (research image list downloader) python-requests/{theirs}"


def worker_main(
    options: DownloadOptions,
    threads: int,
    inbox: Connection,
    outbox: Connection,
    blocked_until: Any,
    started: Any,
    index: int,
) -> None:
    """Run a worker until its inbox closes; it never outlives its parent.

    Args:
        options: The run's.
        threads: Fetches at a time.
        inbox: Lanes from the parent; None or the parent's death ends the process.
        outbox: Lists of :data:`Message` to the parent.
        blocked_until: Shared float64 array: by host slot, the ``time.monotonic`` before which no request may go out.
        started: Shared int64 array: by thread, the row being fetched, for the parent to read after a crash.
        index: This worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(1)  # the cores are shared out among processes already
    held = share_use(options.out)
    work: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    sender = _Sender(outbox, options.out / INCOMING)
    session = make_session(options.fetch, Resolver(), options.polite.per_host, user_agent())
    fetcher = Fetcher(session, options.fetch)
    for thread in range(threads):
        runner = _Runner(options, fetcher, sender, blocked_until, started, index * threads + thread)
        threading.Thread(target=runner.serve, args=(work,), daemon=True, name=f"fetch-{thread}").start()
    sender.send(Ready(index))
    try:
        while (lanes := inbox.recv()) is not None:
            for lane in lanes:
                work.put(lane)
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone: what is whole is in the spool
    sender.close()
    held.close()
    os._exit(0)


class _Sender:
    """Reports to the parent in batches from a thread of its own; results first go to the spool."""

    def __init__(self, outbox: Connection, incoming: Path) -> None:
        self._outbox, self._incoming = outbox, incoming
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._spool: IO[bytes] | None = None
        self._spools, self._lines = itertools.count(1), 0
        self._thread = threading.Thread(target=self._pump, daemon=True, name="sender")
        self._thread.start()

    def send(self, message: Message) -> None:
        """Report a message; an :class:`Outcome` is spooled first."""
        if not isinstance(message, Outcome):
            self._queue.put(message)
            return
        line = spool_line(message)
        with self._lock:
            try:
                self._append(line)
            except OSError as error:  # a full disk: the result still goes by the pipe, and the run ends
                self._queue.put(Broken(error.strerror or str(error)))
            self._queue.put(message)
            if self._spool and self._lines == _SPOOL_LINES:
                self._spool.close()
                self._queue.put(Rotated(Path(self._spool.name).name))
                self._spool = None

    def _append(self, line: bytes) -> None:
        if self._spool is None:
            name = f"spool-{os.getpid()}-{time.time_ns()}-{next(self._spools)}"
            self._spool, self._lines = (self._incoming / name).open("ab", buffering=0), 0
        self._spool.write(line)
        self._lines += 1

    def close(self) -> None:
        """Send what is left."""
        self._queue.put(None)
        self._thread.join()

    def _pump(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            until = time.monotonic() + _GATHER_S
            # A result alone is in no hurry; the end of a lane is, for a connection lies idle.
            while isinstance(batch[-1], Outcome) and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(self._queue.get(timeout=left))
                except queue.Empty:
                    break
            while not self._queue.empty():
                batch.append(self._queue.get())
            ended = None in batch
            try:
                self._outbox.send([message for message in batch if message is not None])
            except OSError:
                os._exit(1)


@dataclass(slots=True)
class _Runner:
    """One fetching thread."""

    options: DownloadOptions
    fetcher: Fetcher
    sender: _Sender
    blocked_until: Any
    started: Any
    place: int

    def serve(self, work: queue.SimpleQueue[Lane]) -> None:
        while True:
            lane = work.get()
            left, goes_on = deque(lane.tasks), True
            while left and goes_on and self.blocked_until[lane.host_slot] <= time.monotonic():
                self.started[self.place] = left[0].row
                goes_on = self._task(left.popleft(), lane.host_slot)
            self.started[self.place] = 0
            self.sender.send(LaneDone(lane.number, tuple(left)))

    def _task(self, task: Task, slot: int) -> bool:
        """Fetch a task and report it; False where the host should now be left to the scheduler."""
        begun = time.monotonic()
        try:
            result = self.fetcher.fetch(task.url, task.spent_s)
        except Exception as error:  # a fault of ours costs one URL, is counted and is seen
            log.exception("internal fault")
            result = Failure(FailReason.INTERNAL, f"{type(error).__name__}: {error}", transient=True)
        found = self._keep(task, result) if isinstance(result, Body) else result
        match found:
            case Hop() if task.hops < self.options.fetch.max_redirects:
                spent = task.spent_s + time.monotonic() - begun
                self.sender.send(Redirect(task._replace(url=found.url, hops=task.hops + 1, spent_s=spent)))
                return True
            case Hop():
                found = Failure(FailReason.REDIRECT_REFUSED, f"more than {task.hops} redirects", found.status)
            case Outcome() | Broken():
                self.sender.send(found)
                return isinstance(found, Outcome)
        return self._failed(task, found, slot)

    def _failed(self, task: Task, failure: Failure, slot: int) -> bool:
        polite = self.options.polite
        if failure.limited:
            # Everybody in every process sees this at once, before anything else is said.
            own = backoff_s(polite.backoff_s * 4, polite.max_backoff_s, task.attempts)
            pause = own if failure.retry_after_s is None else failure.retry_after_s
            until = time.monotonic() + min(pause, polite.max_retry_after_s)
            self.blocked_until[slot] = max(self.blocked_until[slot], until)
        if failure.aborted:
            time.sleep(_LINGER_S)
        if failure.transient and task.attempts < polite.retries:
            self.sender.send(Retry(task._replace(attempts=task.attempts + 1), failure))
        else:
            self.sender.send(failed_outcome(task._replace(attempts=task.attempts + 1), failure))
        return failure.answered and not failure.limited

    def _keep(self, task: Task, body: Body) -> Outcome | Failure | Broken:
        """Leave an image in the incoming folder."""
        found = judge(body, self.options.content)
        if isinstance(found, Failure):
            return found
        temp = f"{task.row}-{os.getpid()}-{threading.get_native_id()}.{found.ext}"
        try:
            _write_whole(self.options.out / INCOMING / temp, found.data)
        except OSError as error:
            return Broken(error.strerror or str(error))
        sample, reencoded = found.sample, found.data is not body.data
        return Outcome(
            row=task.row,
            reason=None,
            attempts=task.attempts + 1,
            status=body.status,
            final_url=task.url,
            ext=found.ext,
            size_bytes=len(body.data),
            sha256=sample.source_sha256,
            width=sample.width,
            height=sample.height,
            flat=found.flat,
            stored_bytes=len(found.data) if reencoded else None,
            stored_sha256=sample.sha256 if reencoded else None,
            temp=temp,
            time_s=time.time(),
        )


def _write_whole(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def failed_outcome(task: Task, failure: Failure) -> Outcome:
    """Return the end of a URL that gave no image, after as many attempts as its task says."""
    return Outcome(
        row=task.row,
        reason=failure.reason,
        transient=failure.transient,
        attempts=task.attempts,
        status=failure.status,
        final_url=task.url,
        detail=failure.detail,
        answered=failure.answered,
        time_s=time.time(),
    )


def backoff_s(base_s: float, most_s: float, attempts: int) -> float:
    """Return the pause before a retry: exponential, with full jitter above half, so that retries spread out."""
    return min(most_s, base_s * 2.0 ** min(attempts, 16)) * random.uniform(0.5, 1.0)
