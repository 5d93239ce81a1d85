"""Count the results of a run, write them to the journal, and commit them a few times a second."""

import logging
import time
from collections import Counter

from imnet_prep.download.folder import INCOMING, land
from imnet_prep.download.journal import Journal, Outcome
from imnet_prep.download.messages import Task
from imnet_prep.download.options import FailReason
from imnet_prep.files import sync

log = logging.getLogger(__name__)
_COMMIT_EVERY_S = 0.25


class Results:
    """Write results to the journal, and commit them a few times a second.

    Attributes:
        journal: Where results go.
        counts: Ended URLs of this run, by reason of failure or "ok".
        size_bytes: Bytes of this run's images.
        leftovers: Files of the incoming folder that are needless after the next commit.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.counts = Counter[str]()
        self.size_bytes = 0
        self.leftovers: list[str] = []
        self._moves: list[tuple[str, str]] = []
        self._due_at = 0.0

    def add(self, outcome: Outcome) -> None:
        """Take the end of a URL."""
        self.counts[outcome.reason or "ok"] += 1
        self.size_bytes += outcome.size_bytes
        self._begin()
        if place := self.journal.finish(outcome):
            self._moves.append((outcome.temp, place))
        elif outcome.temp:  # its row had ended meanwhile
            self.leftovers.append(outcome.temp)

    def tried(self, task: Task) -> None:
        """Take the number of attempts of a URL that will be tried again."""
        self._begin()
        self.journal.db.execute("UPDATE urls SET attempts = ?2 WHERE row = ?1 AND state = 0", (task.row, task.attempts))

    def _begin(self) -> None:
        if not self.journal.db.in_transaction:
            self.journal.db.execute("BEGIN IMMEDIATE")
            self._due_at = time.monotonic() + _COMMIT_EVERY_S

    def give_up(self, host: int, reason: FailReason, detail: str) -> None:
        """Fail every pending URL of a host without asking for it."""
        log.info("%s (%s)", detail, reason)
        self.commit()
        self.counts[reason] += self.journal.fail_host(host, reason, detail)

    def due_s(self) -> float:
        """Return the seconds until the next commit is due, at most one."""
        return max(0.0, self._due_at - time.monotonic()) if self.journal.db.in_transaction else 1.0

    def commit(self) -> None:
        """Commit the results to the journal, then give the images their names."""
        incoming = self.journal.folder / INCOMING
        if self._moves:
            sync(incoming)  # the files' names
        self.journal.db.commit()
        land(self.journal, self._moves)
        for name in self.leftovers:
            (incoming / name).unlink(missing_ok=True)
        self._moves.clear()
        self.leftovers.clear()
