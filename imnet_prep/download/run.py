"""The run: lists in, workers out, results into the journal, images under their names.

The parent alone writes the journal and renames files; see :mod:`imnet_prep.download.folder` for the order of events.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from imnet_prep.download.fetch import Failure
from imnet_prep.download.folder import INCOMING, bury, land, opened, read_spool, recover
from imnet_prep.download.hosts import Scheduler
from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import Journal, Outcome, Totals
from imnet_prep.download.listing import write_listings
from imnet_prep.download.options import DownloadOptions, FailReason
from imnet_prep.download.urllist import is_class_name, read_wnids
from imnet_prep.download.worker import (
    Broken,
    Lane,
    LaneDone,
    Message,
    Ready,
    Redirect,
    Retry,
    Rotated,
    Task,
    failed_outcome,
    worker_main,
)
from imnet_prep.errors import BudgetError, DownloadError, ImnetError, Interrupted
from imnet_prep.files import sync
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Progress, ProgressCallback

log = logging.getLogger(__name__)
_SPAWN = multiprocessing.get_context("spawn")
_COMMIT_EVERY_S, _COMMIT_ROWS = 0.25, 256
_PROGRESS_EVERY_S = 0.2
_HOST_SLOTS = 8192
_JUDGE_AFTER = 1000  # finished URLs before --max-failed may stop a run early
_CRASHES = 2  # of a worker under the same URL, then the URL is internal


@dataclass(frozen=True, slots=True)
class DownloadResult:
    """How a run ended.

    Attributes:
        totals: Where all URLs of the folder stand.
        seconds: Duration of this run.
        top_hosts: (host, failures) of the hosts with the most failed URLs.
        verdict: What is to be raised after the result is shown: interrupted, too many failures; or None.
    """

    totals: Totals
    seconds: float
    top_hosts: tuple[tuple[str, int], ...]
    verdict: ImnetError | None = None


def download(
    options: DownloadOptions, progress: ProgressCallback | None = None, stop: Callable[[], bool] = lambda: False
) -> DownloadResult:
    """Bring every URL of the lists to an end, or go on with a run that was cut short.

    Args:
        options: What and how.
        progress: Called now and then, first while lists are read (unit ``lines``), then with finished URLs.
        stop: Asked often; once true, what is in flight is finished and the run ends.

    Returns:
        The result; its ``verdict`` tells a failed or interrupted run.

    Raises:
        DownloadError: a list, the folder or the disk is not usable.
        RecordsError: the folder is, or lies in, a records folder.
    """
    begun = time.monotonic()
    refuse_inside_records(options.out / INCOMING)
    if options.wnid is not None and not is_class_name(options.wnid):
        raise DownloadError("--wnid cannot be a folder name", expected="letters, digits, . _ -", got=repr(options.wnid))
    wnids = read_wnids(options.wnids) if options.wnids else None
    try:
        with opened(options.out) as journal:
            recover(journal)
            take_in(journal, options.urls, options.wnid, wnids, progress)
            if options.retry_failed:
                log.info("%d failed URLs will be tried again", journal.reset_transient())
            verdict = _fetch(options, journal, progress, stop)
            if journal.totals().pending == 0:
                if count := journal.retract_repeats(options.content):
                    log.info("%d images were placeholders by repetition", count)
                bury(journal)
            totals = journal.totals()
            verdict = verdict or _too_many(totals, options.max_failed_frac)
            return DownloadResult(totals, time.monotonic() - begun, write_listings(journal), verdict)
    except (sqlite3.Error, OSError) as error:
        free = shutil.disk_usage(options.out).free
        raise DownloadError(
            f"cannot go on in {options.out}", got=f"{error} ({free} bytes free)", remedy="mend that, and run it again"
        ) from error


def _too_many(totals: Totals, allowed_frac: float, *, stopped: bool = False) -> BudgetError | None:
    """Return the verdict on more failures than allowed, or None."""
    share = totals.failed_frac()
    if share <= allowed_frac:
        return None
    failed = sum(totals.failed.values())
    mostly = ", ".join(f"{count} {reason}" for reason, count in Counter(totals.failed).most_common(3))
    return BudgetError(
        f"{'stopped: ' if stopped else ''}{failed} of {totals.ok + failed} URLs failed, mostly {mostly}",
        expected=f"at most {allowed_frac:.0%} (--max-failed)",
        got=f"{share:.1%}",
        remedy="see failures.jsonl" if not stopped else "the rest is pending; raise --max-failed to go on",
    )


def _fetch(
    options: DownloadOptions, journal: Journal, progress: ProgressCallback | None, stop: Callable[[], bool]
) -> ImnetError | None:
    """Fetch until nothing is pending, the user stops it, or too much fails; return the verdict."""
    pending = journal.hosts_with_pending()
    if not pending:
        return None
    run = _Run(options, journal, progress, stop, pending)
    try:
        run.workers = [run.start(index) for index in range(run.processes)]
        verdict = run.loop()
        run.commit()
    finally:
        run.end_workers()
    for spool in run.incoming.glob("spool-*"):  # after a failure the next run takes over what is in them
        spool.unlink(missing_ok=True)
    return verdict


class _Worker:
    """A process that fetches, as the parent sees it."""

    def __init__(self, index: int, options: DownloadOptions, threads: int, *shared: Any) -> None:
        their_in, self.inbox = _SPAWN.Pipe(duplex=False)
        self.outbox, their_out = _SPAWN.Pipe(duplex=False)
        self.process = _SPAWN.Process(
            target=worker_main,
            args=(options, threads, their_in, their_out, *shared, index),
            daemon=True,
            name=f"download-{index}",
        )
        self.process.start()
        their_in.close()
        their_out.close()

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()


class _Run:
    """The state of a run: the scheduler, the workers, and what is not committed yet."""

    def __init__(
        self,
        options: DownloadOptions,
        journal: Journal,
        progress: ProgressCallback | None,
        stop: Callable[[], bool],
        pending: Sequence[tuple[int, int]],
    ) -> None:
        self.options, self.journal, self.progress, self.stop = options, journal, progress, stop
        self.incoming = journal.folder / INCOMING
        self.total = sum(count for _, count in pending)
        self.processes = options.process_count()
        self.threads = -(-options.polite.concurrency // self.processes)
        self.blocked_until: Any = _SPAWN.RawArray("d", _HOST_SLOTS)
        self.started: Any = _SPAWN.RawArray("q", self.processes * self.threads)
        self.workers: list[_Worker] = []
        self.ended: dict[int, Outcome] = {}
        self.tried: dict[int, int] = {}
        self.old_spools: list[str] = []
        self.crashes: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.bytes_done = 0
        self.committed_at = self.reported_at = 0.0
        self.broken = ""
        self.scheduler = Scheduler(
            options.polite,
            self.processes,
            self.threads,
            [key for key, _ in pending],
            journal.pending_of,
            self._abandon,
            self.ended,
            self.blocked_until,
        )

    def start(self, index: int) -> _Worker:
        return _Worker(index, self.options, self.threads, self.blocked_until, self.started)

    def loop(self) -> ImnetError | None:
        verdict: ImnetError | None = None
        while True:
            now = time.monotonic()
            verdict = verdict or self._verdict()
            if verdict is None:
                self._hand_out(now)
            elif self.scheduler.in_flight():
                self.blocked_until[:] = [math.inf] * _HOST_SLOTS  # every lane stops after the URL in hand
            if not self.scheduler.in_flight() and (verdict or self.scheduler.idle()):
                return verdict
            self._report(now)
            due = self.committed_at + _COMMIT_EVERY_S - now if self.ended or self.tried else 1.0
            self._listen(max(0.0, min(due, 0.1 if verdict else self.scheduler.next_event(now))))
            late = time.monotonic() - self.committed_at >= _COMMIT_EVERY_S
            if len(self.ended) >= _COMMIT_ROWS or (late and (self.ended or self.tried)):
                self.commit()

    def _verdict(self) -> ImnetError | None:
        if self.broken:
            free = shutil.disk_usage(self.options.out).free
            remedy = f"{free} bytes are free; free more and run the same command again"
            return DownloadError(f"cannot store images in {self.options.out}", got=self.broken, remedy=remedy)
        if self.stop():
            return Interrupted("interrupted; what was in hand is finished", remedy="run the same command to go on")
        limit = self.options.max_failed_frac
        finished = self.counts.total()
        if limit < 1 and _JUDGE_AFTER <= finished < self.total and 1 - self.counts["ok"] / finished > limit:
            return _too_many(self.journal.totals(), limit, stopped=True)
        return None

    def _hand_out(self, now: float) -> None:
        parcels: dict[int, list[Lane]] = {}
        for index, lane in self.scheduler.assign(now):
            parcels.setdefault(index, []).append(lane)
        for index, lanes in parcels.items():
            with suppress(OSError):  # it has died: its sentinel will say so
                self.workers[index].inbox.send(lanes)

    def _listen(self, timeout: float) -> None:
        sources = [source for worker in self.workers for source in (worker.outbox, worker.process.sentinel)]
        ready = wait(sources, timeout)
        for index, worker in enumerate(self.workers):
            if worker.outbox in ready:
                self._receive(worker.outbox)
            if worker.process.sentinel in ready:
                self._replace_worker(index)

    def _receive(self, outbox: Connection) -> bool:
        """Take what a worker reports; False where it has died."""
        try:
            messages: list[Message] = outbox.recv()
        except (EOFError, OSError):
            return False
        now = time.monotonic()
        for message in messages:
            self._take(message, now)
        return True

    def _take(self, message: Message, now: float) -> None:
        match message:
            case Outcome():
                self._end(message)
                self.scheduler.ended(message, now)
            case LaneDone(number, returned):
                self.scheduler.lane_done(number, returned, now)
            case Redirect(task):
                self.scheduler.redirect(task, now)
            case Retry(task, failure):
                self.tried[task.row] = task.attempts
                self.scheduler.retry(task, failure, now)
            case Ready(worker):
                self.scheduler.ready(worker)
            case Rotated(spool):
                self.old_spools.append(spool)
            case Broken(detail):
                self.broken = detail

    def _end(self, outcome: Outcome) -> None:
        self.ended[outcome.row] = outcome
        self.tried.pop(outcome.row, None)
        self.counts[outcome.reason or "ok"] += 1
        self.bytes_done += outcome.size_bytes

    def _abandon(self, host: int, failure: Failure, tasks: Sequence[Task]) -> None:
        """Fail what is left of a dead host, at hand and in the journal, without asking it again."""
        log.info("%s (%s)", failure.detail, failure.reason)
        for task in tasks:
            self._end(failed_outcome(task, replace(failure, status=None, transient=True)))
        self.commit()
        self.counts[failure.reason] += self.journal.fail_host(host, failure.reason, failure.detail)

    def commit(self) -> None:
        temps = {outcome.temp for outcome in self.ended.values() if outcome.temp}
        if temps:
            sync(self.incoming)  # the files' names
        moves = self.journal.commit(list(self.ended.values()), self.tried.items())
        land(self.journal, moves)
        unmoved = temps.difference(temp for temp, _ in moves)  # their rows had ended meanwhile
        for name in (*unmoved, *self.old_spools):
            (self.incoming / name).unlink(missing_ok=True)
        self.ended.clear()
        self.tried.clear()
        self.old_spools.clear()
        self.committed_at = time.monotonic()

    def _report(self, now: float) -> None:
        if self.progress and now - self.reported_at >= _PROGRESS_EVERY_S:
            self.reported_at = now
            counts = (("ok", self.counts["ok"]), *((k, n) for k, n in self.counts.most_common(6) if k != "ok"))
            self.progress(Progress(self.counts.total(), self.total, "URLs", self.bytes_done, counts))

    # -- workers ------------------------------------------------------------------------------------------------------

    def _replace_worker(self, index: int) -> None:
        """Take over what a dead worker had finished, blame the URLs in its hands, and start another."""
        worker = self.workers[index]
        while worker.outbox.poll() and self._receive(worker.outbox):
            pass
        log.warning("a worker died (exit code %s); its URLs are tried again", worker.process.exitcode)
        own = slice(index * self.threads, (index + 1) * self.threads)
        in_hand = set(self.started[own])
        self.started[own] = [0] * self.threads
        lost = {task.row: task for task in self.scheduler.lost(index)}
        for spool in self.incoming.glob(f"spool-{worker.process.pid}-*"):
            for outcome in read_spool(spool):
                if outcome.row in lost and outcome.row not in self.ended:
                    self._end(outcome)
                    self.scheduler.drop(lost.pop(outcome.row))
            self.old_spools.append(spool.name)
        for row in in_hand & lost.keys():
            self.crashes[row] += 1
            if self.crashes[row] >= _CRASHES:
                twice = Failure(
                    FailReason.INTERNAL, "a worker died while fetching or checking it, twice", transient=True
                )
                self._end(failed_outcome(lost[row], twice))
                self.scheduler.drop(lost[row])
        worker.close()
        self.workers[index] = self.start(index)

    def end_workers(self) -> None:
        for worker in self.workers:
            with suppress(OSError):
                worker.inbox.send(None)
        for worker in self.workers:
            worker.process.join(5.0)
            worker.process.kill()
            worker.process.join()
            worker.close()
