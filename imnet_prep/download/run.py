"""The run: lists in, workers out, results into the journal, images under their names.

The parent alone writes the journal and renames files. Order of events for an image: whole and fsynced in the incoming
folder, a line in the worker's spool, a committed row, its final name. What a crash leaves between any two of them,
:func:`recover` mends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from imnet_prep.download.hosts import Abandoned, Scheduler
from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import OK, Journal, Outcome, Totals, file_path
from imnet_prep.download.listing import write_listings
from imnet_prep.download.options import DownloadOptions, FailReason
from imnet_prep.download.urllist import is_class_name, read_wnids
from imnet_prep.download.worker import (
    INCOMING,
    USERS_LOCK,
    Answered,
    Broken,
    Lane,
    LaneDone,
    Message,
    Ready,
    Redirect,
    Retry,
    Rotated,
    Task,
    read_spool_line,
    worker_main,
)
from imnet_prep.errors import BudgetError, DownloadError, ImnetError, Interrupted
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Progress, ProgressCallback

log = logging.getLogger(__name__)
LOCK_NAME = "download.lock"
_COMMIT_EVERY_S, _COMMIT_ROWS = 0.25, 256
_PROGRESS_EVERY_S = 0.2
_HOST_SLOTS = 8192
_JUDGE_AFTER = 1000  # finished URLs before --max-failed may stop a run early
_STRAGGLERS_S = 20.0  # how long the workers of a killed run may take to notice
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
        return _download(options, wnids, progress, stop, begun)
    except (sqlite3.Error, OSError) as error:
        free = shutil.disk_usage(options.out).free
        raise DownloadError(
            f"cannot go on in {options.out}", got=f"{error} ({free} bytes free)", remedy="mend that, and run it again"
        ) from error


def _download(
    options: DownloadOptions,
    wnids: frozenset[str] | None,
    progress: ProgressCallback | None,
    stop: Callable[[], bool],
    begun: float,
) -> DownloadResult:
    with _folder(options.out) as journal:
        recover(journal)
        take_in(journal, options.urls, options.wnid, wnids, progress)
        if options.retry_failed:
            log.info("%d failed URLs will be tried again", journal.reset_transient())
        verdict = _Run(options, journal, progress, stop).run()
        totals = journal.totals()
        if totals.pending == 0:
            _retract(journal, options)
            totals = journal.totals()
        finished = totals.ok + sum(totals.failed.values())
        if verdict is None and finished and sum(totals.failed.values()) / finished > options.max_failed_frac:
            verdict = _too_many(totals, options.max_failed_frac, stopped=False)
        top_hosts = write_listings(journal)
        return DownloadResult(totals, time.monotonic() - begun, top_hosts, verdict)


@contextmanager
def _folder(out: Path) -> Iterator[Journal]:
    """Open the folder for this process alone."""
    try:
        (out / INCOMING).mkdir(parents=True, exist_ok=True)
        lock = (out / INCOMING / LOCK_NAME).open("ab")
    except OSError as error:
        raise DownloadError(f"cannot write to {out}", got=error.strerror or str(error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"{out} is in use by another download", remedy="wait for it, or stop it") from error
        _wait_for_stragglers(out)
        journal = Journal(out)
        try:
            yield journal
        finally:
            journal.close()


def _wait_for_stragglers(out: Path) -> None:
    """Let the workers of a killed run die first: they notice at once, but may be inside a write."""
    with (out / INCOMING / USERS_LOCK).open("ab") as users:
        until = time.monotonic() + _STRAGGLERS_S
        while True:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > until:
                    raise DownloadError(f"workers of an earlier run still use {out}", remedy="stop them") from None
                time.sleep(0.05)


def recover(journal: Journal) -> None:
    """Mend what a crash left: spooled results, images without their name, files without their row.

    Every result that a worker had finished is taken over, provided that its file is whole by its digest.
    """
    incoming = journal.folder / INCOMING
    outcomes: list[Outcome] = []
    spools = sorted(incoming.glob("spool-*"))
    for spool in spools:
        outcomes += [one for one in spooled(spool) if one.reason is not None or _is_whole(incoming / one.temp, one)]
        if len(outcomes) > 10_000:
            _land(journal, journal.commit(outcomes))
            outcomes = []
    _land(journal, journal.commit(outcomes))
    for path in incoming.iterdir():
        row = path.name.partition("-")[0]
        if not row.isdigit():
            continue
        place = journal.place_of(int(row))
        if place and place[0] == OK and hashlib.sha256(path.read_bytes()).digest() == place[4]:
            _land(journal, [(path.name, file_path(*place[1:4]))])
        else:
            path.unlink()
    for spool in spools:
        spool.unlink()
    for scratch in journal.folder.glob(".loading-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    _bury(journal)


def spooled(spool: Path) -> list[Outcome]:
    """Read the results of a spool; a line that a crash cut is left out."""
    found = (read_spool_line(line) for line in spool.read_bytes().splitlines())
    return [outcome for outcome in found if outcome is not None]


def _is_whole(path: Path, outcome: Outcome) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).digest() == (outcome.stored_sha256 or outcome.sha256)
    except OSError:
        return False


def _land(journal: Journal, moves: list[tuple[str, str]]) -> None:
    """Give committed images their names."""
    for temp, place in moves:
        source, target = journal.folder / INCOMING / temp, journal.folder / place
        try:
            source.rename(target)
        except FileNotFoundError:
            target.parent.mkdir(exist_ok=True)
            source.rename(target)


def _retract(journal: Journal, options: DownloadOptions) -> None:
    count = journal.retract_repeats(options.content)
    if count:
        log.info("%d images were placeholders by repetition", count)
    _bury(journal)


def _bury(journal: Journal) -> None:
    doomed = journal.doomed()
    for path in doomed:
        (journal.folder / path).unlink(missing_ok=True)
    if doomed:
        journal.buried()


def _too_many(totals: Totals, allowed_frac: float, *, stopped: bool) -> BudgetError:
    failed = sum(totals.failed.values())
    finished = totals.ok + failed
    worst = sorted(totals.failed.items(), key=lambda item: -item[1])[:3]
    mostly = ", ".join(f"{count} {reason}" for reason, count in worst)
    return BudgetError(
        f"{'stopped: ' if stopped else ''}{failed} of {finished} URLs failed, mostly {mostly}",
        expected=f"at most {allowed_frac:.0%} (--max-failed)",
        got=f"{failed / max(1, finished):.1%}",
        remedy="see failures.jsonl" if not stopped else "the rest is pending; raise --max-failed to go on",
    )


@dataclass(slots=True)
class _Worker:
    process: Any
    inbox: Connection
    outbox: Connection


@dataclass(slots=True)
class _Run:
    """The state of a run: the scheduler, the workers, and what is not committed yet."""

    options: DownloadOptions
    journal: Journal
    progress: ProgressCallback | None
    stop: Callable[[], bool]
    ended: dict[int, Outcome] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    old_spools: list[str] = field(default_factory=list)
    crashes: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    bytes_done: int = 0
    committed_at: float = 0.0
    reported_at: float = 0.0
    broken: str = ""
    clean: bool = False
    called_off: bool = False
    workers: list[_Worker] = field(default_factory=list)
    threads: int = 0
    blocked_until: Any = None
    started: Any = None

    def run(self) -> ImnetError | None:
        """Fetch until nothing is pending, the user stops it, or too much fails; give the verdict."""
        hosts = self.journal.hosts_with_pending()
        total = sum(count for _, count in hosts)
        if not total:
            return None
        count = self.options.process_count()
        self.threads = -(-self.options.polite.concurrency // count)
        spawn = multiprocessing.get_context("spawn")
        self.blocked_until = spawn.RawArray("d", _HOST_SLOTS)
        self.started = spawn.RawArray("q", count * self.threads)
        scheduler = Scheduler(
            self.options.polite,
            count,
            self.threads,
            [key for key, _ in hosts],
            self.journal.pending_of,
            self.ended,
            self.blocked_until,
        )
        incoming = os.open(self.journal.folder / INCOMING, os.O_RDONLY)
        try:
            self.workers = [self._start(index) for index in range(count)]
            verdict = self._loop(scheduler, total, incoming)
            self._commit(incoming)
            self.clean = True
            return verdict
        finally:
            self._end_workers()
            os.close(incoming)

    def _loop(self, scheduler: Scheduler, total: int, incoming: int) -> ImnetError | None:
        verdict: ImnetError | None = None
        while True:
            now = time.monotonic()
            if verdict is None:
                verdict = self._verdict(total)
            if verdict is None:
                self._hand_out(scheduler, now)
            elif scheduler.in_flight():
                self._call_off()
            if not scheduler.in_flight() and (verdict is not None or scheduler.idle()):
                return verdict
            self._report(total, now)
            due = self.committed_at + _COMMIT_EVERY_S - now if self.ended or self.tried else 1.0
            timeout = max(0.0, min(due, scheduler.next_event(now) if verdict is None else 0.1))
            self._listen(scheduler, timeout)
            now = time.monotonic()
            if len(self.ended) >= _COMMIT_ROWS or (
                now - self.committed_at >= _COMMIT_EVERY_S and (self.ended or self.tried)
            ):
                self._commit(incoming)

    def _verdict(self, total: int) -> ImnetError | None:
        if self.broken:
            free = shutil.disk_usage(self.options.out).free
            raise_ = f"{free} bytes are free; free more and run the same command again"
            return DownloadError(f"cannot store images in {self.options.out}", got=self.broken, remedy=raise_)
        if self.stop():
            return Interrupted("interrupted; what was in hand is finished", remedy="run the same command to go on")
        limit = self.options.max_failed_frac
        finished = sum(self.counts.values())
        if limit < 1 and _JUDGE_AFTER <= finished < total and 1 - self.counts["ok"] / finished > limit:
            totals = self.journal.totals()
            if sum(totals.failed.values()) / max(1, totals.ok + sum(totals.failed.values())) > limit:
                return _too_many(totals, limit, stopped=True)
        return None

    def _hand_out(self, scheduler: Scheduler, now: float) -> None:
        parcels: dict[int, list[Lane]] = {}
        for index, lane in scheduler.assign(now):
            parcels.setdefault(index, []).append(lane)
        for index, lanes in parcels.items():
            try:
                self.workers[index].inbox.send(lanes)
            except OSError:  # it has died: its sentinel will say so
                log.debug("worker %d does not listen", index)

    def _call_off(self) -> None:
        """Make every lane stop after the URL in hand."""
        if not self.called_off:
            self.called_off = True
            self.blocked_until[:] = [float("inf")] * _HOST_SLOTS

    def _listen(self, scheduler: Scheduler, timeout: float) -> None:
        sources: dict[Any, int] = {worker.outbox: index for index, worker in enumerate(self.workers)}
        sources |= {worker.process.sentinel: index for index, worker in enumerate(self.workers)}
        ready = wait(list(sources), timeout)
        for source in ready:
            if isinstance(source, Connection):
                self._receive(scheduler, source)
        for index in {sources[source] for source in ready if not isinstance(source, Connection)}:
            self._bury_worker(scheduler, index)

    def _receive(self, scheduler: Scheduler, outbox: Connection) -> None:
        try:
            messages: list[Message] = outbox.recv()
        except (EOFError, OSError):
            return
        now = time.monotonic()
        for message in messages:
            self._take(scheduler, message, now)

    def _take(self, scheduler: Scheduler, message: Message, now: float) -> None:
        match message:
            case Answered(outcome, answered):
                self._end(outcome)
                self._abandon(scheduler.ended(outcome.row, answered, outcome.reason, outcome.detail, now))
            case LaneDone(number, returned):
                self._abandon(scheduler.lane_done(number, returned, now))
            case Redirect(task):
                self._abandon(scheduler.redirect(task, now))
            case Retry(task, failure):
                self.tried[task.row] = task.attempts
                self._abandon(scheduler.retry(task, failure, now))
            case Ready(worker):
                scheduler.ready(worker)
            case Rotated(spool):
                self.old_spools.append(spool)
            case Broken(detail):
                self.broken = detail

    def _end(self, outcome: Outcome) -> None:
        self.ended[outcome.row] = outcome
        self.tried.pop(outcome.row, None)
        self.counts["ok" if outcome.reason is None else str(outcome.reason)] += 1
        self.bytes_done += outcome.size_bytes

    def _abandon(self, abandoned: Abandoned | None) -> None:
        """Fail what is left of a dead host, at hand and in the journal, without asking it again."""
        if abandoned is None:
            return
        log.info("%s (%s)", abandoned.detail, abandoned.reason)
        for task in abandoned.tasks:
            self._end(_failed(task, abandoned.reason, abandoned.detail))
        self._commit(None)
        self.counts[str(abandoned.reason)] += self.journal.fail_host(abandoned.host, abandoned.reason, abandoned.detail)

    def _commit(self, incoming: int | None) -> None:
        outcomes = list(self.ended.values())
        if incoming is not None and any(outcome.temp for outcome in outcomes):
            os.fsync(incoming)  # the files' names in the incoming folder
        moves = self.journal.commit(outcomes, list(self.tried.items()))
        _land(self.journal, moves)
        moved = {temp for temp, _ in moves}
        for outcome in outcomes:
            if outcome.temp and outcome.temp not in moved:  # its row had ended meanwhile
                (self.journal.folder / INCOMING / outcome.temp).unlink(missing_ok=True)
        for spool in self.old_spools:
            (self.journal.folder / INCOMING / spool).unlink(missing_ok=True)
        self.ended.clear()
        self.tried.clear()
        self.old_spools.clear()
        self.committed_at = time.monotonic()

    def _report(self, total: int, now: float) -> None:
        if self.progress and now - self.reported_at >= _PROGRESS_EVERY_S:
            self.reported_at = now
            counts = (("ok", self.counts["ok"]), *((k, n) for k, n in self.counts.most_common(6) if k != "ok"))
            self.progress(Progress(sum(self.counts.values()), total, "URLs", self.bytes_done, counts))

    # -- workers ------------------------------------------------------------------------------------------------------

    def _start(self, index: int) -> _Worker:
        spawn = multiprocessing.get_context("spawn")
        their_in, our_in = spawn.Pipe(duplex=False)
        our_out, their_out = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=worker_main,
            args=(self.options, self.threads, their_in, their_out, self.blocked_until, self.started, index),
            daemon=True,
            name=f"download-{index}",
        )
        process.start()
        their_in.close()
        their_out.close()
        return _Worker(process, our_in, our_out)

    def _bury_worker(self, scheduler: Scheduler, index: int) -> None:
        """Take over what a dead worker had finished, blame the URLs in its hands, and start another."""
        worker = self.workers[index]
        while worker.outbox.poll():
            try:
                messages: list[Message] = worker.outbox.recv()
            except (EOFError, OSError):
                break
            for message in messages:
                self._take(scheduler, message, time.monotonic())
        log.warning("a worker died (exit code %s); its URLs are tried again", worker.process.exitcode)
        own = slice(index * self.threads, (index + 1) * self.threads)
        in_hand = set(self.started[own])
        self.started[own] = [0] * self.threads
        lost = {task.row: task for task in scheduler.lost(index, time.monotonic())}
        for spool in (self.journal.folder / INCOMING).glob(f"spool-{worker.process.pid}-*"):
            for outcome in spooled(spool):
                if outcome.row in lost and outcome.row not in self.ended:
                    self._end(outcome)
                    scheduler.drop(outcome.row)
                    lost.pop(outcome.row)
            self.old_spools.append(spool.name)
        for row in in_hand & lost.keys():
            self.crashes[row] += 1
            if self.crashes[row] >= _CRASHES:
                self._end(_failed(lost[row], FailReason.INTERNAL, "a worker died while fetching or checking it, twice"))
                scheduler.drop(row)
        worker.inbox.close()
        worker.outbox.close()
        self.workers[index] = self._start(index)

    def _end_workers(self) -> None:
        for worker in self.workers:
            try:
                worker.inbox.send(None)
            except OSError:
                continue
        for worker in self.workers:
            worker.process.join(5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.inbox.close()
            worker.outbox.close()
        for spool in (self.journal.folder / INCOMING).glob("spool-*"):
            if self.clean:  # else the next run takes over what is in them
                spool.unlink(missing_ok=True)


def _failed(task: Task, reason: FailReason, detail: str) -> Outcome:
    now = time.time()
    return Outcome(task.row, reason, True, attempts=task.attempts, final_url=task.url, detail=detail, time_s=now)
