"""Download the parts of a divided list on Dask workers that share the folder, and unite what they say.

Each part is what ``--part I/N`` does on one machine, in a folder of its own, so the limits of each host hold without a
word between the workers. A Dask worker runs a part in another process (:mod:`imnet_prep.download.part_process`): its
own may not start any, and must go on answering the scheduler.
"""

import logging
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from imnet_prep.cluster import WorkerWatch, connected
from imnet_prep.download.journal import JOURNAL_NAME, Totals
from imnet_prep.download.options import DownloadOptions
from imnet_prep.download.result import DownloadResult, is_hopeless, too_many
from imnet_prep.errors import DownloadError, ImnetError, Interrupted
from imnet_prep.types import Progress, ProgressCallback, Stop

log = logging.getLogger(__name__)
PART = "part-{}-of-{}"
_PART_NAME = re.compile(r"part-[0-9]+-of-([0-9]+)")
_POLL_S = 0.2
_ASK_EVERY_S = 1.0  # a worker asks the scheduler whether to stop
_TOP = 5  # hosts named with their failures
_AGAIN = "run the same command again: finished URLs are kept"
STOP = b"s"  # what a part's process is told to make it end; the end of the pipe kills it
Ended = DownloadResult | ImnetError | None  # None is a part that did not begin before the run was stopped


def download_parts(
    options: DownloadOptions, scheduler: str, progress: ProgressCallback | None, stop: Stop
) -> DownloadResult:
    """Divide the hosts of the lists among the workers of a Dask cluster, and download each part there.

    Args:
        options: The lists, the folder and the limits. The lists and the folder have the same paths on all machines.
        scheduler: Address of the Dask scheduler.
        progress: Called with the sum of what the parts report.
        stop: Called often. Once it returns true, the parts finish what is in flight and end.

    Returns:
        The result of all parts together.

    Raises:
        DownloadError: The lists or the folder are not usable, or a part failed; then the others were stopped.
        Interrupted: It was stopped, and all workers are gone.
        PlanError: The cluster cannot be used, or was lost.
    """
    begun, name = time.monotonic(), f"imnet-prep-download-{uuid.uuid4().hex}"
    if Path("-") in options.urls:
        raise DownloadError("Dask workers cannot read standard input", remedy="write the list to a file they all see")
    if options.part is not None:
        raise DownloadError("--part and --executor dask exclude each other", expected="one of them")
    known = _parts_begun(options.out)
    with connected(scheduler, "part", _AGAIN) as client:
        from distributed import Event

        count = known or len(client.nthreads())
        stopped, watched = Event(name, client=client), _Watched(options, count, progress)
        client.subscribe_topic(name, watched.hear)
        waiting, workers = _submitted(client, options, count, name), WorkerWatch(client)
        try:
            while waiting:
                for number in [number for number, future in waiting.items() if future.done()]:
                    watched.ended[number] = waiting.pop(number).result()
                watched.report()
                if not watched.stopping and (stop() or watched.is_in_vain()):
                    watched.stopping = True
                    stopped.set()
                if waiting and workers.look() and watched.stopping:
                    raise Interrupted("interrupted; no Dask worker is left to say how far it got", remedy=_AGAIN)
                time.sleep(_POLL_S)
        finally:
            with suppress(OSError, RuntimeError, ValueError):  # the scheduler may be gone
                stopped.set()
    return watched.united(time.monotonic() - begun)


def _submitted(client: Any, options: DownloadOptions, count: int, name: str) -> dict[int, Any]:
    """Submit each part to a worker, or to another one if that dies; return the futures by number."""
    workers = sorted(client.nthreads())
    log.info("%d parts on %d Dask workers", count, len(workers))
    on_machine = Counter(urlsplit(worker).hostname for worker in workers)
    found = {}
    for number in range(1, count + 1):
        worker = workers[number % len(workers)]
        sharing = on_machine[urlsplit(worker).hostname]
        found[number] = client.submit(
            run_part, _options_of(options, number, count), sharing, name,
            key=f"{name}-{number}", pure=False, workers=[worker], allow_other_workers=True,
        )  # fmt: skip
    return found


def _parts_begun(out: Path) -> int | None:
    """Return the number of parts that a folder is divided into, or None if it is new.

    Raises:
        DownloadError: It is the folder of one machine, or of several divisions.
    """
    if (out / JOURNAL_NAME).exists():
        raise DownloadError(f"{out} is the folder of a download on one machine", remedy="choose another --out")
    counts = {int(found[1]) for path in out.glob("part-*") if (found := _PART_NAME.fullmatch(path.name))}
    if len(counts) > 1:
        several = "of " + " and ".join(map(str, sorted(counts)))
        raise DownloadError(f"{out} holds parts of several divisions", got=several, remedy="choose another --out")
    return next(iter(counts), None)


def _options_of(options: DownloadOptions, number: int, count: int) -> DownloadOptions:
    """Return the options of one part. Workers have other current folders."""
    return replace(
        options,
        urls=tuple(path.absolute() for path in options.urls),
        wnids=options.wnids and options.wnids.absolute(),
        out=options.out.absolute() / PART.format(number, count),
        part=(number, count),
        max_failed_frac=1.0,  # which all parts are judged by together
        executor="local",
        scheduler=None,
    )


class _Watched:
    """The parts of a run, as far as they are known.

    Attributes:
        ended: What the parts that have ended returned, by number.
        stopping: Whether the parts were told to stop.
    """

    def __init__(self, options: DownloadOptions, count: int, progress: ProgressCallback | None) -> None:
        self._options, self._count, self._progress = options, count, progress
        self._said: dict[int, Progress] = {}
        self._shown: Progress | None = None
        self._verdict: ImnetError | None = None
        self.ended: dict[int, Ended] = {}
        self.stopping = False

    def hear(self, event: tuple[float, Any]) -> None:
        """Take what a worker says of its part. Called by Dask, in another thread."""
        number, progress = pickle.loads(event[1])
        self._said[number] = progress

    def _sum(self) -> Progress | None:
        """Return the sum of what the parts say of their URLs; before that, the lines of the one that is furthest."""
        said = dict(self._said)
        urls = {number: one for number, one in said.items() if one.unit == "URLs"}
        if not urls:
            return max(said.values(), key=lambda one: one.done, default=None)
        counts: Counter[str] = Counter()
        for one in urls.values():
            counts.update(dict(one.counts))
        total = sum(one.total or 0 for one in urls.values()) if len(urls | self.ended) == self._count else None
        shown = (("ok", counts.pop("ok", 0)), *counts.most_common(5))
        done, size_bytes = (sum(getattr(one, name) for one in urls.values()) for name in ("done", "bytes_done"))
        return Progress(done, total, "URLs", size_bytes, shown)

    def report(self) -> None:
        """Show the sum of the parts' progress if it has changed."""
        found = self._sum()
        if self._progress and found is not None and found != self._shown:
            self._progress(found)
        self._shown = found

    def is_in_vain(self) -> bool:
        """Return whether the parts are to be stopped: one has failed, or too many URLs of all parts have."""
        found, limit = self._sum(), self._options.max_failed_frac
        if found is not None and found.total is not None:
            failed = dict(found.counts)
            ok = failed.pop("ok", 0)
            if is_hopeless(ok, found.done, found.total, limit):
                totals = Totals(found.total, ok, failed, found.total - found.done, 0, 0, found.bytes_done)
                self._verdict = too_many(totals, limit, stopped=True)
        return self._verdict is not None or any(_error_of(one) for one in self.ended.values())

    def united(self, seconds: float) -> DownloadResult:
        """Return the result of all parts together.

        Raises:
            DownloadError: A part's lists, folder or disk were not usable.
        """
        for number, end in sorted(self.ended.items()):
            if (error := _error_of(end)) is not None:
                what = f"part {number}/{self._count}: {error.what}"
                raise type(error)(what, expected=error.expected, got=error.got, remedy=error.remedy)
        results = [end for end in self.ended.values() if isinstance(end, DownloadResult)]
        totals = _union(one.totals for one in results)
        hosts = sorted((host for one in results for host in one.top_hosts), key=lambda host: -host[1])[:_TOP]
        verdict = self._verdict
        if len(results) < self._count or any(isinstance(one.verdict, Interrupted) for one in results):
            verdict = verdict or Interrupted("interrupted; downloads in progress were finished", remedy=_AGAIN)
        verdict = verdict or too_many(totals, self._options.max_failed_frac)
        return DownloadResult(totals, seconds, tuple(hosts), verdict)


def _error_of(end: Ended) -> ImnetError | None:
    """Return the error that ended a part before its time, if it was not told to stop."""
    if isinstance(end, DownloadResult):
        return None if isinstance(end.verdict, Interrupted) else end.verdict
    return end


def _union(totals: Iterable[Totals]) -> Totals:
    """Add the totals of parts. Each part sees all malformed and repeated lines of the lists."""
    found = list(totals)
    failed: Counter[str] = Counter()
    for one in found:
        failed.update(one.failed)
    return Totals(
        requested=sum(one.requested for one in found),
        ok=sum(one.ok for one in found),
        failed=dict(sorted(failed.items())),
        pending=sum(one.pending for one in found),
        malformed=max((one.malformed for one in found), default=0),
        repeated=max((one.repeated for one in found), default=0),
        bytes=sum(one.bytes for one in found),
    )


def run_part(options: DownloadOptions, sharing: int, name: str) -> Ended:
    """Download one part; called by Dask on a worker.

    Args:
        options: Of the part.
        sharing: Number of Dask workers on this machine, which share its cores.
        name: Of the event that tells the parts to stop, and of the topic that takes their progress.

    Returns:
        The result of the part, or the error that ended it; None if the run was stopped before it ever began.
    """
    from distributed import Event, get_worker

    worker, stopped = get_worker(), Event(name)
    if stopped.is_set() and not (options.out / JOURNAL_NAME).exists():
        return None
    number = options.part[0] if options.part else 1

    def tell(progress: Progress) -> None:
        worker.log_event(name, pickle.dumps((number, progress)))

    command = [sys.executable, "-P", "-m", "imnet_prep.download.part_process"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        return _attend(child, (options, sharing), stopped.is_set, tell)
    finally:
        with suppress(OSError):
            _to(child).close()  # which kills it if it has not ended
        child.wait()


def _attend(
    child: subprocess.Popen[bytes],
    task: tuple[DownloadOptions, int],
    is_stopped: Stop,
    tell: Callable[[Progress], None],
) -> Ended:
    """Send a part's process its task, and pass on what it says until it ends."""
    said: queue.SimpleQueue[Progress | Ended] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(child, said), daemon=True).start()
    with suppress(OSError):  # it has died, which its silence tells
        pickle.dump(task, _to(child))
        _to(child).flush()
    is_told, asked_at = False, time.monotonic()
    while True:
        if not is_told and time.monotonic() - asked_at >= _ASK_EVERY_S:
            asked_at = time.monotonic()
            with suppress(OSError):  # of the scheduler, and it is asked again; a worker that has lost it ends
                if is_stopped():
                    is_told = True
                    _to(child).write(STOP)
                    _to(child).flush()
        try:
            message = said.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if isinstance(message, Progress):
            tell(message)
        elif message is not None:
            return message
        else:
            got = f"exit code {child.wait()}"
            return DownloadError("its process ended early", got=got, remedy=f"see the log of the Dask worker; {_AGAIN}")


def _to(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdin is not None
    return child.stdin


def _listen(child: subprocess.Popen[bytes], said: "queue.SimpleQueue[Progress | Ended]") -> None:
    """Put what a process says into a queue, and None at its end."""
    assert child.stdout is not None
    with child.stdout, suppress(EOFError, pickle.UnpicklingError):
        while True:
            said.put(pickle.load(child.stdout))
    said.put(None)
