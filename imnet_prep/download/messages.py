"""What the parent process and its workers tell each other."""

import time
from typing import NamedTuple

from imnet_prep.download.fetch import Failure
from imnet_prep.download.journal import Outcome

LANE_S = 0.5  # a lane begins no URL after this time; others may then take what is left


class Task(NamedTuple):
    """A URL to fetch. After a redirect, ``url`` is the next hop's; ``spent_s`` and ``hops`` are of this attempt."""

    row: int
    url: str
    attempts: int = 0
    hops: int = 0
    spent_s: float = 0.0

    def failed(self, failure: Failure) -> Outcome:
        """Return the end of a URL that brought no image."""
        return Outcome(
            row=self.row,
            reason=failure.reason,
            transient=failure.transient,
            attempts=self.attempts,
            status=failure.status,
            final_url=self.url,
            detail=failure.detail,
            answered=failure.answered,
            retry_after_s=failure.retry_after_s,
            time_s=time.time(),
        )


class Lane(NamedTuple):
    """The right to one connection to one host, with URLs to fetch over it one after the other."""

    number: int
    host_slot: int
    tasks: tuple[Task, ...]


class Retry(NamedTuple):
    """An attempt failed; a later one may succeed."""

    task: Task
    failure: Failure


class LaneDone(NamedTuple):
    """A lane has ended.

    Attributes:
        number: The lane's.
        results: Ends of URLs, failed attempts, and tasks that a redirect sends to another address, in order.
        returned: Tasks that brought no result.
        spool: Name of the spool that holds its outcomes, or empty.
        broken: Why this machine cannot store images (for example, the disk is full), or empty. The run ends then.
    """

    number: int
    results: list[Outcome | Retry | Task]
    returned: list[Task]
    spool: str
    broken: str


class Ready(NamedTuple):
    """A worker has started."""

    worker: int


class Died(NamedTuple):
    """A worker has died, with the rows that it was fetching and the spools that it left."""

    worker: int
    rows: frozenset[int]
    spools: tuple[str, ...]
