"""A download from beginning to end: read the lists, fetch, commit, and name the images.

Only the parent process writes the journal and renames files. :mod:`imnet_prep.download.folder` has the order of events.
"""

import logging
import math
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from imnet_prep.download.fetch import Failure
from imnet_prep.download.folder import (
    INCOMING,
    Results,
    bury,
    opened,
    read_spool,
    recover,
    retract_repeats,
    write_listings,
)
from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import Journal
from imnet_prep.download.messages import Died, LaneDone, Ready, Task
from imnet_prep.download.options import DownloadOptions, FailReason
from imnet_prep.download.parts import download_parts
from imnet_prep.download.pool import Pool
from imnet_prep.download.result import DownloadResult, is_hopeless, too_many
from imnet_prep.download.scheduler import Scheduler
from imnet_prep.download.urllist import is_class_name, lists_of, read_wnids
from imnet_prep.download.urls import host_of
from imnet_prep.errors import DownloadError, ImnetError, Interrupted
from imnet_prep.images.in_use import SLOWER_DOWNLOAD, describe_decoder
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Progress, ProgressCallback, Stop

log = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 0.2
_USUAL_S = 0.3  # of a photograph from a far host, with the pauses between
_LARGEST = 5
_CRASHES = 2  # of a worker under the same URL, then the URL is internal


def download(
    options: DownloadOptions, progress: ProgressCallback | None = None, stop: Stop = lambda: False
) -> DownloadResult:
    """Fetch every URL of the lists, here or on Dask workers, or resume a run that was cut short.

    Args:
        options: The lists, the folder and the limits.
        progress: Called now and then, first while lists are read (unit ``lines``), then with finished URLs.
        stop: Called often. Once it returns true, the run finishes what is in flight and ends.

    Returns:
        The result. Its ``verdict`` says whether the run failed or was interrupted.

    Raises:
        DownloadError: A list, the folder or the disk is not usable.
        PlanError: The Dask cluster cannot be used, or was lost.
        RecordsError: The folder is a records folder, or lies in one.
    """
    if options.scheduler is not None:
        return download_parts(options, options.scheduler, progress, stop)
    begun = time.monotonic()
    refuse_inside_records(options.out / INCOMING)
    if options.wnid is not None and not is_class_name(options.wnid):
        raise DownloadError("--wnid cannot be a folder name", expected="letters, digits, . _ -", got=repr(options.wnid))
    wnids = read_wnids(options.wnids) if options.wnids else None
    try:
        with opened(options.out) as journal:
            recover(journal)
            with lists_of(options.urls, options.out) as lists:
                journal.belongs_to(options.part)
                take_in(journal, lists, options.wnid, wnids, progress, options.columns, options.part)
            if options.retry_failed:
                log.info("%d failed URLs will be tried again", journal.reset_failed(options.lifted()))
            verdict = _fetch(options, journal, progress, stop)
            if journal.totals().pending == 0:
                if count := retract_repeats(journal, options.content):
                    log.info("%d images were placeholders by repetition", count)
                bury(journal)
            totals = journal.totals()
            verdict = verdict or too_many(totals, options.max_failed_frac)
            return DownloadResult(totals, time.monotonic() - begun, write_listings(journal), verdict)
    except (sqlite3.Error, OSError) as error:
        raise DownloadError(
            f"cannot continue in {options.out}", got=f"{error} ({_free(options)})", remedy="fix this and run it again"
        ) from error


def dry_run(options: DownloadOptions, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Read the lists, and remove everything written.

    Returns:
        The object that ``--json`` prints: URLs, classes, hosts, the largest of them, repeated and malformed lines, and
        the seconds that the download will take at least.

    Raises:
        DownloadError: A list is not usable.
    """
    wnids = read_wnids(options.wnids) if options.wnids else None
    with tempfile.TemporaryDirectory(prefix="imnet-prep-") as folder, closing(Journal(Path(folder))) as journal:
        with lists_of(options.urls, Path(folder)) as lists:
            take_in(journal, lists, options.wnid, wnids, progress, options.columns, options.part)
        totals, hosts = journal.totals(), journal.hosts_with_pending()
        largest = [
            {"host": host_of(journal.pending_of(key, 0, 1)[0][1]), "urls": count} for key, count in hosts[:_LARGEST]
        ]
        classes = journal.db.execute("SELECT count(DISTINCT wnid) FROM urls WHERE state = 0").fetchone()[0]
    polite = options.polite
    busiest = max((count for _, count in hosts), default=0)
    seconds = max(totals.requested / polite.concurrency, busiest / polite.per_host) * _USUAL_S
    if polite.rate_per_host:
        seconds = max(seconds, busiest / polite.rate_per_host)
    return {
        "urls": totals.requested,
        "classes": classes,
        "hosts": len(hosts),
        "largest_hosts": largest,
        "repeated": totals.repeated,
        "malformed": totals.malformed,
        "elsewhere": totals.elsewhere,
        "seconds_estimated": round(seconds),
    }


def _free(options: DownloadOptions) -> str:
    try:
        return f"{shutil.disk_usage(options.out).free} bytes are free"
    except OSError:
        return "the folder is gone"


def _fetch(
    options: DownloadOptions, journal: Journal, progress: ProgressCallback | None, stop: Stop
) -> ImnetError | None:
    """Fetch until nothing is pending, the user stops it, or too much fails. Return the verdict."""
    pending = journal.hosts_with_pending()
    if not pending:
        return None
    with closing(Pool(options)) as pool:
        log.info(
            "%s; processes: %d, threads in each: %d", describe_decoder(SLOWER_DOWNLOAD), pool.processes, pool.threads
        )
        verdict = _Run(options, journal, progress, stop, pool, pending).loop()
    for spool in (journal.folder / INCOMING).glob("spool-*"):  # after an error the next run takes over what is in them
        spool.unlink(missing_ok=True)
    return verdict


class _Run:
    """Move tasks from the scheduler to the workers, and what they report to the scheduler and the results."""

    def __init__(
        self,
        options: DownloadOptions,
        journal: Journal,
        progress: ProgressCallback | None,
        stop: Stop,
        pool: Pool,
        pending: Sequence[tuple[int, int]],
    ) -> None:
        self.options, self.progress, self.stop, self.pool = options, progress, stop, pool
        self.incoming = journal.folder / INCOMING
        self.total = sum(count for _, count in pending)
        self.results = Results(journal)
        self.scheduler = Scheduler(
            options.polite, pool.processes, [key for key, _ in pending], self.results, pool.pauses
        )
        self.crashes: Counter[int] = Counter()
        self.reported_at = 0.0
        self.broken = ""

    def loop(self) -> ImnetError | None:
        """Run until all is done or a verdict is reached, and commit what has ended."""
        verdict: ImnetError | None = None
        while True:
            now = time.monotonic()
            verdict = verdict or self._verdict()
            if verdict is None:
                self.pool.send(self.scheduler.assign(now))
            elif self.scheduler.lanes:
                self.pool.pauses[:] = [math.inf] * len(self.pool.pauses)  # every lane stops after the URL in hand
            if not self.scheduler.lanes and (verdict or not self.scheduler.hosts):
                self.results.commit()
                return verdict
            self._report(now)
            timeout_s = min(self.results.due_s(), 0.1 if verdict else self.scheduler.next_event(now))
            for message in self.pool.receive(timeout_s):
                self._take(message, time.monotonic())
            if self.results.due_s() <= 0:
                self.results.commit()

    def _verdict(self) -> ImnetError | None:
        if self.broken:
            remedy = f"{_free(self.options)}; free more and run the same command again"
            return DownloadError(f"cannot store images in {self.options.out}", got=self.broken, remedy=remedy)
        if self.stop():
            return Interrupted("interrupted; downloads in progress were finished", remedy="run it again to continue")
        limit, counts = self.options.max_failed_frac, self.results.counts
        if is_hopeless(counts["ok"], counts.total(), self.total, limit):
            return too_many(self.results.journal.totals(), limit, stopped=True)
        return None

    def _take(self, message: LaneDone | Ready | Died, now: float) -> None:
        match message:
            case LaneDone():
                self.scheduler.lane_done(message, now)
                self.results.leftovers.append(message.spool)
                self.broken = self.broken or message.broken
            case Ready(worker):
                self.scheduler.ready(worker, self.pool.threads)
            case Died():
                self._take_over(message, now)

    def _take_over(self, died: Died, now: float) -> None:
        """Take over what a dead worker had finished, and blame the URLs that it was fetching. The rest is queued."""
        spooled = {outcome.row: outcome for name in died.spools for outcome in read_spool(self.incoming / name)}

        def goes_on(task: Task) -> bool:
            outcome = spooled.get(task.row)
            if outcome is None and task.row in died.rows:
                self.crashes[task.row] += 1
                if self.crashes[task.row] >= _CRASHES:
                    outcome = task.failed(
                        Failure(
                            FailReason.INTERNAL, "a worker died while fetching or checking it, twice", transient=True
                        )
                    )
            if outcome:
                self.results.add(outcome)
            return outcome is None

        self.scheduler.died(died.worker, goes_on, now)
        self.results.leftovers += died.spools

    def _report(self, now: float) -> None:
        if self.progress and now - self.reported_at >= _PROGRESS_EVERY_S:
            self.reported_at = now
            counts = self.results.counts
            shown = (("ok", counts["ok"]), *((key, n) for key, n in counts.most_common(6) if key != "ok"))
            self.progress(Progress(counts.total(), self.total, "URLs", self.results.size_bytes, shown))
