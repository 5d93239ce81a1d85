"""The results of a run: counted, buffered, and committed to the journal a few hundred at a time."""

from __future__ import annotations

import logging
import time
from collections import Counter

from imnet_prep.download.folder import INCOMING, land
from imnet_prep.download.journal import Journal, Outcome
from imnet_prep.download.messages import Task
from imnet_prep.download.options import FailReason
from imnet_prep.files import sync

log = logging.getLogger(__name__)
_COMMIT_EVERY_S, _COMMIT_ROWS = 0.25, 256


class Results:
    """Buffer results between the workers and the journal.

    Attributes:
        journal: Where results go.
        ended: Results by row that the journal does not have yet.
        counts: Ended URLs of this run, by reason of failure or "ok".
        size_bytes: Bytes of this run's images.
        old_spools: Spools of which every result has been added.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.ended: dict[int, Outcome] = {}
        self.counts = Counter[str]()
        self.size_bytes = 0
        self.old_spools: list[str] = []
        self._attempts: dict[int, int] = {}
        self._committed_at = 0.0

    def add(self, outcome: Outcome) -> None:
        """Take the end of a URL."""
        self.ended[outcome.row] = outcome
        self._attempts.pop(outcome.row, None)
        self.counts[outcome.reason or "ok"] += 1
        self.size_bytes += outcome.size_bytes

    def tried(self, task: Task) -> None:
        """Take the number of attempts of a URL that will be tried again."""
        self._attempts[task.row] = task.attempts

    def give_up(self, host: int, reason: FailReason, detail: str) -> None:
        """Fail every pending URL of a host without asking for it."""
        log.info("%s (%s)", detail, reason)
        self.commit()
        self.counts[reason] += self.journal.fail_host(host, reason, detail)

    def due_s(self) -> float:
        """Return the seconds until the next commit is due, at most one."""
        if not self.ended and not self._attempts:
            return 1.0
        left = self._committed_at + _COMMIT_EVERY_S - time.monotonic()
        return max(0.0, left) if len(self.ended) < _COMMIT_ROWS else 0.0

    def commit(self) -> None:
        """Commit the results to the journal, then give the images their names."""
        incoming = self.journal.folder / INCOMING
        temps = {outcome.temp for outcome in self.ended.values() if outcome.temp}
        if temps:
            sync(incoming)  # the files' names
        moves = self.journal.commit(self.ended.values(), self._attempts.items())
        land(self.journal, moves)
        unmoved = temps.difference(temp for temp, _ in moves)  # their rows had ended meanwhile
        for name in (*unmoved, *self.old_spools):
            (incoming / name).unlink(missing_ok=True)
        self.ended.clear()
        self._attempts.clear()
        self.old_spools.clear()
        self._committed_at = time.monotonic()
