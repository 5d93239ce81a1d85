"""A host that allows so many requests a second, in simulated time: nothing is lost, and little is asked in vain."""

import heapq
import random
from types import SimpleNamespace
from typing import cast

import pytest

from imnet_prep.download.fetch import Failure
from imnet_prep.download.folder import Results
from imnet_prep.download.journal import Outcome
from imnet_prep.download.messages import Lane, LaneDone, Retry, Task
from imnet_prep.download.options import FailReason, PoliteOptions
from imnet_prep.download.scheduler import Scheduler
from imnet_prep.download.urls import host_key

LATENCY_S = 0.1
REFUSED = Failure(FailReason.RATE_LIMITED, "429", 429, transient=True)


class Limited:
    """A host with a token bucket that answers 429 when it is empty, asked by a scheduler.

    Args:
        count: URLs. rate: Requests a second that are served. burst: Size of the bucket.
    """

    def __init__(self, count: int, rate: float, burst: float, per_host: int) -> None:
        self.served, self.failed, self.asked, self.now = 0, 0, 0, 1000.0
        self.rate, self.burst, self.tokens, self.filled = rate, burst, burst, self.now
        self.polite, self.pauses = PoliteOptions(per_host=per_host), [0.0]
        rows = [(row, f"http://h.example/{row}", 0) for row in range(1, count + 1)]
        journal = SimpleNamespace(pending_of=lambda key, cursor, most: rows[cursor : cursor + most])
        results = SimpleNamespace(journal=journal, add=self.end, tried=lambda task: None, give_up=None)
        self.scheduler = Scheduler(self.polite, 1, [host_key("h.example")], cast(Results, results), self.pauses)
        self.scheduler.ready(0, 64)

    def end(self, outcome: Outcome) -> None:
        """Count the end of a URL."""
        self.served += outcome.reason is None
        self.failed += outcome.reason is not None

    def answer(self, task: Task) -> Outcome | Retry:
        """Serve a task or refuse it."""
        self.tokens = min(self.burst, self.tokens + (self.now - self.filled) * self.rate)
        self.filled, self.asked = self.now, self.asked + 1
        task = task._replace(attempts=task.attempts + 1)
        if self.tokens >= 1:
            self.tokens -= 1
            return task.failed(REFUSED)._replace(reason=None)
        self.pauses[0] = max(self.pauses[0], self.now + self.polite.backoff(0))  # as the worker does
        return Retry(task, REFUSED) if task.attempts <= self.polite.retries else task.failed(REFUSED)

    def run(self, count: int) -> float:
        """Ask until all URLs have ended, and return the seconds that took."""
        lanes: list[tuple[float, int, Lane, list[Outcome | Retry | Task]]] = []  # by the time of their next answer
        begun = self.now
        while self.served + self.failed < count:
            for _, lane in self.scheduler.assign(self.now):
                heapq.heappush(lanes, (self.now + LATENCY_S, lane.number, lane, []))
            wake = self.now + self.scheduler.next_event(self.now) + 1e-3
            if not lanes or lanes[0][0] > wake:
                self.now = wake
                continue
            self.now, number, lane, results = heapq.heappop(lanes)
            results.append(self.answer(lane.tasks[len(results)]))
            left = lane.tasks[len(results) :]
            if left and isinstance(results[-1], Outcome) and self.pauses[0] <= self.now:
                heapq.heappush(lanes, (self.now + LATENCY_S, number, lane, results))
            else:
                self.scheduler.lane_done(LaneDone(number, results, list(left), "", ""), self.now)
        return self.now - begun


@pytest.mark.parametrize(
    ("rate", "burst"), [pytest.param(*case, id="{}/s, burst {}".format(*case)) for case in ((0.2, 1), (1, 10), (5, 5))]
)
@pytest.mark.parametrize("per_host", [6, 16])
def test_a_host_with_a_limited_rate_serves_all(rate: float, burst: int, per_host: int) -> None:
    random.seed(0)
    host = Limited(300, rate, burst, per_host)
    seconds = host.run(300)
    assert (host.served, host.failed) == (300, 0)
    assert host.asked <= 1.3 * 300
    assert seconds <= 1.5 * 300 / rate
