"""A worker process: threads that fetch lanes, judge what comes, and leave it whole in the incoming folder.

A lane is the right to one connection to one host, with the URLs to fetch over it one after the other. Every finished
URL is appended to this worker's spool before it is reported, so that a SIGKILL of all processes loses only what was
in flight.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import random
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2

from imnet_prep.download.addresses import Resolver
from imnet_prep.download.content import Refused, is_placeholder_url, judge
from imnet_prep.download.fetch import Body, Failure, Fetcher, Hop
from imnet_prep.download.journal import Outcome
from imnet_prep.download.net import make_session
from imnet_prep.download.options import DownloadOptions, FailReason

log = logging.getLogger(__name__)
INCOMING = ".incoming"  # in the download folder: whole images that wait for their row, and the spools
USERS_LOCK = "users.lock"
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


class Answered(NamedTuple):
    """A final outcome, with what the breaker wants to know: ``answered`` whether there was an HTTP answer."""

    outcome: Outcome
    answered: bool


class Rotated(NamedTuple):
    """A spool is complete: all its results have been reported before this."""

    spool: str


Message = Ready | Retry | Redirect | LaneDone | Answered | Rotated | Broken


def user_agent() -> str:
    """Give the honest name under which hosts see us."""
    import importlib.metadata

    import requests

    version = importlib.metadata.version("imnet-prep")
    return f"imnet-prep/{version} (research image list downloader) python-requests/{requests.__version__}"


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
    incoming = options.out / INCOMING
    users = (incoming / USERS_LOCK).open("ab")
    fcntl.flock(users, fcntl.LOCK_SH)  # the next run waits for stragglers of a killed one
    work: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    sender = _Sender(outbox, incoming)
    resolver = Resolver()
    session = make_session(options.fetch, resolver, options.polite.per_host, user_agent())
    for thread in range(threads):
        runner = _Runner(
            options, Fetcher(session, options.fetch), sender, blocked_until, started, index * threads + thread
        )
        threading.Thread(target=runner.serve, args=(work,), daemon=True, name=f"fetch-{thread}").start()
    sender.send(Ready(index))
    try:
        while (lanes := inbox.recv()) is not None:
            for lane in lanes:
                work.put(lane)
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone: what is whole is in the spool
    sender.close()
    os._exit(0)


class _Sender:
    """Reports to the parent in batches from a thread of its own; results first go to the spool."""

    def __init__(self, outbox: Connection, incoming: Path) -> None:
        self._outbox, self._incoming = outbox, incoming
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._spool: IO[bytes] | None = None
        self._spool_name, self._lines, self._spools = "", 0, 0
        self._thread = threading.Thread(target=self._pump, daemon=True, name="sender")
        self._thread.start()

    def send(self, message: Message) -> None:
        """Report a message; an :class:`Answered` one is spooled first."""
        if not isinstance(message, Answered):
            self._queue.put(message)
            return
        line = spool_line(message.outcome)
        with self._lock:
            try:
                full = self._append(line)
            except OSError as error:  # a full disk: the result still goes by the pipe, and the run ends
                full = False
                self._queue.put(Broken(error.strerror or str(error)))
            self._queue.put(message)
            if full and self._spool:
                self._spool.close()
                self._spool = None
                self._queue.put(Rotated(self._spool_name))

    def _append(self, line: bytes) -> bool:
        if self._spool is None:
            self._spools += 1
            self._spool_name = f"spool-{os.getpid()}-{time.time_ns()}-{self._spools}"
            self._spool = (self._incoming / self._spool_name).open("ab", buffering=0)
            self._lines = 0
        self._spool.write(line)
        self._lines += 1
        return self._lines >= _SPOOL_LINES

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
            while isinstance(batch[-1], Answered) and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(self._queue.get(timeout=left))
                except queue.Empty:
                    break
            while not self._queue.empty():
                batch.append(self._queue.get())
            ended = None in batch
            try:
                self._outbox.send([message for message in batch if message is not None])
            except (BrokenPipeError, OSError):
                os._exit(1)


def spool_line(outcome: Outcome) -> bytes:
    """Write an outcome as one line of JSON."""
    fields = outcome._asdict()
    fields["sha256"] = outcome.sha256.hex()
    fields["stored_sha256"] = outcome.stored_sha256.hex() if outcome.stored_sha256 else None
    return json.dumps(fields, ensure_ascii=True).encode() + b"\n"


def read_spool_line(line: bytes) -> Outcome | None:
    """Read it back; None for a line that was cut by a crash."""
    try:
        fields = json.loads(line)
        fields["sha256"] = bytes.fromhex(fields["sha256"])
        fields["stored_sha256"] = bytes.fromhex(fields["stored_sha256"]) if fields["stored_sha256"] else None
        fields["reason"] = FailReason(fields["reason"]) if fields["reason"] else None
        return Outcome(**fields)
    except (ValueError, TypeError, KeyError):
        return None


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
            self._lane(work.get())

    def _lane(self, lane: Lane) -> None:
        done = 0
        for task in lane.tasks:
            if self.blocked_until[lane.host_slot] > time.monotonic():
                break
            self.started[self.place] = task.row
            done += 1
            if not self._task(task, lane.host_slot):
                break
        self.started[self.place] = 0
        self.sender.send(LaneDone(lane.number, lane.tasks[done:]))

    def _task(self, task: Task, slot: int) -> bool:
        """Fetch a task and report it; False where the host should now be left to the scheduler."""
        begun = time.monotonic()
        if is_placeholder_url(task.url):
            failure = Failure(FailReason.PLACEHOLDER, "the host's placeholder, by its URL")
            self.sender.send(Answered(_outcome(task, failure), True))
            return True
        try:
            result = self.fetcher.fetch(task.url, task.spent_s)
        except Exception as error:  # a fault of ours costs one URL, is counted and is seen
            log.exception("internal fault")
            result = Failure(FailReason.INTERNAL, f"{type(error).__name__}: {error}", transient=True)
        if isinstance(result, Body):
            return self._keep(task, result)
        spent = task.spent_s + time.monotonic() - begun
        if isinstance(result, Hop):
            if task.hops >= self.options.fetch.max_redirects:
                failure = Failure(FailReason.REDIRECT_REFUSED, f"more than {task.hops} redirects", result.status)
                self.sender.send(Answered(_outcome(task, failure), True))
            else:
                self.sender.send(Redirect(task._replace(url=result.url, hops=task.hops + 1, spent_s=spent)))
            return True
        return self._failed(task, result, slot)

    def _failed(self, task: Task, failure: Failure, slot: int) -> bool:
        polite = self.options.polite
        if failure.retry_after_s is not None or failure.status == 429:
            # Everybody in every process sees this at once, before anything else is said.
            pause = failure.retry_after_s
            if pause is None:
                pause = backoff_s(polite.backoff_s * 4, polite.max_backoff_s, task.attempts)
            self.blocked_until[slot] = max(
                self.blocked_until[slot], time.monotonic() + min(pause, polite.max_retry_after_s)
            )
        if failure.aborted:
            time.sleep(_LINGER_S)
        if failure.transient and task.attempts < polite.retries:
            self.sender.send(Retry(task._replace(attempts=task.attempts + 1), failure))
        else:
            self.sender.send(Answered(_outcome(task, failure), failure.answered))
        return failure.answered and failure.retry_after_s is None and failure.status != 429

    def _keep(self, task: Task, body: Body) -> bool:
        found = judge(body.data, self.options.content)
        if isinstance(found, Refused):
            failure = Failure(found.reason, found.detail, body.status)
            self.sender.send(Answered(_outcome(task, failure), True))
            return True
        temp = f"{task.row}-{os.getpid()}-{threading.get_native_id()}.{found.ext}"
        try:
            _write_whole(self.options.out / INCOMING / temp, found.data)
        except OSError as error:
            self.sender.send(Broken(error.strerror or str(error)))
            return False
        outcome = _outcome(task, None, body.status)._replace(
            ext=found.ext,
            size_bytes=len(body.data),
            sha256=found.sha256,
            width=found.width,
            height=found.height,
            flat=found.flat,
            stored_bytes=len(found.data) if found.reencoded else None,
            stored_sha256=found.stored_sha256 if found.reencoded else None,
            temp=temp,
        )
        self.sender.send(Answered(outcome, True))
        return True


def _write_whole(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _outcome(task: Task, failure: Failure | None, status: int | None = None) -> Outcome:
    return Outcome(
        row=task.row,
        reason=failure.reason if failure else None,
        transient=failure.transient if failure else False,
        attempts=task.attempts + 1,
        status=failure.status if failure else status,
        final_url=task.url,
        detail=failure.detail if failure else "",
        time_s=time.time(),
    )


def backoff_s(base_s: float, most_s: float, attempts: int) -> float:
    """Give the pause before a retry: exponential, with full jitter above half, so that retries spread out."""
    return min(most_s, base_s * 2.0 ** min(attempts, 16)) * random.uniform(0.5, 1.0)
