"""A worker process: threads that fetch the URLs of lanes, check the answers, and store the images.

Images lie whole in the incoming folder, and every result is in the lane's spool, before the lane is reported. A SIGKILL
of all processes therefore loses only what was in flight.
"""

import json
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from imnet_prep.download.addresses import Resolver
from imnet_prep.download.content import judge
from imnet_prep.download.fetch import Body, Failure, Fetcher, Hop
from imnet_prep.download.folder import INCOMING, WORKER_LOCK
from imnet_prep.download.journal import Outcome
from imnet_prep.download.memory import NoRoom, Patience, PixelBudget, Stopped, pixels_held
from imnet_prep.download.messages import LANE_S, Lane, LaneDone, Ready, Retry, Task
from imnet_prep.download.options import DownloadOptions, FailReason
from imnet_prep.files import exclusive_lock
from imnet_prep.images.formats import sniff
from imnet_prep.process_pool import begin_worker, return_large_buffers
from imnet_prep.types import Sample

log = logging.getLogger(__name__)
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
_LINGER_S = 0.05  # a host needs a moment to notice that we cut a connection before it may see the next


def worker_main(options: DownloadOptions, threads: int, parent: Connection, pauses: Any, rows: Any, index: int) -> None:
    """Run a worker until the parent sends None. It never outlives its parent.

    Args:
        options: The run's.
        threads: Fetches at a time.
        parent: Brings each :class:`Lane`, and takes a :class:`LaneDone` for it.
        pauses: Shared float64 array: by host slot, the ``time.monotonic`` before which no request may go out.
        rows: Shared int64 array: by thread, the row that it fetches. The parent reads it after a crash.
        index: This worker's number.
    """
    begin_worker()
    return_large_buffers()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have our own limit
    with exclusive_lock(options.out / INCOMING / WORKER_LOCK.format(index)):
        work: queue.SimpleQueue[Lane] = queue.SimpleQueue()

        def stop() -> bool:
            return math.isinf(pauses[0])  # as all are, once the run ends

        fetcher = Fetcher(options.fetch, options.polite.per_host, Resolver(), stop)
        patience = Patience(2 * options.fetch.timeout_s, stop)  # with all else, an attempt takes four times as long
        budget = PixelBudget(options.out / INCOMING, patience)
        lock = threading.Lock()
        for place in range(index * threads, (index + 1) * threads):
            runner = _Runner(options, fetcher, budget, parent, lock, pauses, rows, place)
            threading.Thread(target=runner.serve, args=(work,), daemon=True, name=f"fetch-{place}").start()
        runner.send(Ready(index))
        try:
            while (lane := parent.recv()) is not None:
                work.put(lane)
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone; finished results are in the spools
    os._exit(0)  # without waiting for name look-ups


@dataclass(slots=True)
class _Runner:
    """One fetching thread."""

    options: DownloadOptions
    fetcher: Fetcher
    budget: PixelBudget
    parent: Connection
    lock: threading.Lock  # for ``parent``
    pauses: Any
    rows: Any
    place: int

    def serve(self, work: queue.SimpleQueue[Lane]) -> None:
        """Fetch one lane after the other."""
        while True:
            lane = work.get()
            name = f"spool-{os.getpid()}-{lane.number}"
            results: list[Outcome | Retry | Task] = []
            left, broken = deque(lane.tasks), ""
            until = time.monotonic() + LANE_S
            try:
                with (self.options.out / INCOMING / name).open("ab", buffering=0) as spool:
                    while left and self.pauses[lane.host_slot] <= time.monotonic() < until:
                        self.rows[self.place] = left[0].row
                        with ExitStack() as held:
                            result = self._result(left[0], lane.host_slot, held)
                        if isinstance(result, Outcome):
                            spool.write(json.dumps(result._asdict()).encode() + b"\n")
                        results.append(result)
                        left.popleft()
                        end = result.failure if isinstance(result, Retry) else result
                        if not isinstance(end, Task) and (end.transient or not end.answered):
                            break  # leave the host to the scheduler
            except Stopped:
                pass  # the URL in hand goes back
            except OSError as error:
                broken = error.strerror or str(error)
            self.rows[self.place] = 0
            self.send(LaneDone(lane.number, results, list(left), name, broken))

    def send(self, message: LaneDone | Ready) -> None:
        """Send a message to the parent."""
        with self.lock:
            try:
                self.parent.send(message)
            except OSError:
                os._exit(1)  # it is gone

    def _result(self, task: Task, slot: int, held: ExitStack) -> Outcome | Retry | Task:
        """Fetch a task. ``held`` takes the room in memory of its answer.

        Raises:
            OSError: The image cannot be stored.
            Stopped: The run ends while its answer waits for room in memory.
        """
        begun = time.monotonic()
        try:
            found = self._attempt(task, held)
        except NoRoom as error:  # ours, not the host's; it is tried again later, and this was no attempt
            pause_s = 2 * self.options.fetch.timeout_s  # so that those who wait become fewer
            return Retry(task, Failure(FailReason.INTERNAL, str(error), transient=True, retry_after_s=pause_s))
        if isinstance(found, Hop):
            if task.hops < self.options.fetch.max_redirects:
                return task._replace(url=found.url, hops=task.hops + 1, spent_s=task.spent_s + time.monotonic() - begun)
            found = Failure(FailReason.REDIRECT_REFUSED, f"more than {task.hops} redirects", found.status)
        task = task._replace(attempts=task.attempts + 1, hops=0, spent_s=0.0)
        return self._failed(task, found, slot) if isinstance(found, Failure) else self._keep(task, *found)

    def _attempt(self, task: Task, held: ExitStack) -> Hop | Failure | tuple[Body, Sample, bool]:
        """Make one request and check the answer. A fault of ours costs one URL, is counted and is seen."""
        try:
            found = self.fetcher.fetch(task.url, task.spent_s, held)
            if not isinstance(found, Body):
                return found
            with self.budget.hold(pixels_held(found.data, self.options.content.short_side)):
                judged = judge(found, self.options.content)
            return judged if isinstance(judged, Failure) else (found, *judged)
        except (Stopped, NoRoom):
            raise
        except Exception as error:
            log.exception("internal fault")
            return Failure(FailReason.INTERNAL, f"{type(error).__name__}: {error}", transient=True)

    def _failed(self, task: Task, failure: Failure, slot: int) -> Outcome | Retry:
        polite, pause = self.options.polite, failure.retry_after_s
        if pause is None and failure.status == 429:
            pause = polite.backoff(0)
        if pause is not None:
            # Every process sees this at once; the scheduler makes it longer for a host that goes on refusing.
            self.pauses[slot] = max(self.pauses[slot], time.monotonic() + min(pause, polite.max_retry_after_s))
        if failure.aborted:
            time.sleep(_LINGER_S)
        if failure.transient and task.attempts <= polite.retries:
            return Retry(task, failure)
        return task.failed(failure)

    def _keep(self, task: Task, body: Body, sample: Sample, flat: bool) -> Outcome:
        """Store an image in the incoming folder."""
        data = body.data if self.options.content.short_side is None else sample.image
        reencoded = data is not body.data
        ext = _EXTENSION[sniff(data)]
        temp = f"{task.row}-{os.getpid()}-{self.place}.{ext}"
        left = memoryview(data)
        with (self.options.out / INCOMING / temp).open("wb", buffering=0) as file:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        return Outcome(
            row=task.row,
            reason=None,
            attempts=task.attempts,
            status=body.status,
            final_url=task.url,
            ext=ext,
            size_bytes=len(body.data),
            sha256=sample.source_sha256,
            width=sample.width,
            height=sample.height,
            flat=flat,
            stored_bytes=len(data) if reencoded else None,
            stored_sha256=sample.sha256 if reencoded else None,
            temp=temp,
            time_s=time.time(),
        )
