"""One host and how politely it is treated: its queue, its connections, its pauses and its circuit breaker."""

from collections import Counter, deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from imnet_prep.download.messages import Task
from imnet_prep.download.options import PoliteOptions

_LANE_S = 0.5  # how long a lane should keep a thread
_LANE_TASKS = 32
_CAP_UP_EVERY = 20  # good answers after which a host that said 429 gets a lane back


@dataclass(slots=True, eq=False)
class Host:
    """A host that has work or had some lately.

    Attributes:
        key: See :func:`imnet_prep.download.urls.host_key`.
        options: How to treat it.
        pauses: Shared array by slot: the ``time.monotonic`` before which no request may go out. Workers write it too.
        slot: The host's place in ``pauses``.
        quota: Most lanes, by process. lanes: Lanes at work, by process. cap: Most lanes now, lowered by 429.
        queue: Tasks at hand. cursor: Last row read from the journal. more: Whether the journal may hold more.
        waiting: Tasks that wait for a retry. next_at: No lane before, by ``rate_per_host``.
        streak: Attempts in a row without any HTTP answer. probes: Failed probes of the open breaker, -1 while closed.
        task_s: Moving average of seconds a URL. served: Number of its latest lane.
    """

    key: int
    options: PoliteOptions
    pauses: MutableSequence[float]
    slot: int
    quota: Counter[int]
    cap: int
    lanes: Counter[int] = field(default_factory=Counter)
    queue: deque[Task] = field(default_factory=deque)
    cursor: int = 0
    more: bool = True
    waiting: int = 0
    next_at: float = 0.0
    streak: int = 0
    probes: int = -1
    good: int = 0
    task_s: float = 0.25
    served: int = 0

    def at_work(self) -> int:
        """Return the number of lanes at work."""
        return self.lanes.total()

    def free_at(self) -> float:
        """Return the time before which no lane may begin."""
        return max(self.pauses[self.slot], self.next_at)

    def is_willing(self, process: int, now: float) -> bool:
        """Return whether a process may have another lane of this host now."""
        return (
            self.lanes[process] < self.quota[process]
            and self.free_at() <= now
            and self.at_work() < (1 if self.probes >= 0 else self.cap)
        )

    def next_tasks(self) -> tuple[Task, ...]:
        """Take the tasks for one lane from the queue."""
        count = 1
        if not self.options.rate_per_host and self.probes < 0:
            fair = -(-len(self.queue) // max(1, self.cap))  # the last URLs are shared among the lanes
            count = max(1, min(_LANE_TASKS, int(_LANE_S / max(self.task_s, 1e-3)), fair))
        return tuple(self.queue.popleft() for _ in range(count))

    def pause(self, until: float) -> None:
        """Let no request go out before a time, in any process."""
        self.pauses[self.slot] = max(self.pauses[self.slot], until)

    def answered(self) -> None:
        """Note an HTTP answer, which closes the circuit breaker."""
        self.streak, self.probes = 0, -1
        self.good += 1
        if self.good % _CAP_UP_EVERY == 0:
            self.cap = min(self.cap + 1, self.options.per_host)

    def unanswered(self, now: float) -> bool:
        """Note an attempt without an HTTP answer, and return whether to give the host up.

        Many such attempts in a row open the circuit breaker: the host is paused, then probed with single requests.
        """
        self.streak += 1
        if self.probes < 0:
            opened = self.streak >= self.options.dead_after
        else:  # an attempt that began before the pause is no probe
            opened = self.at_work() <= 1 and self.pauses[self.slot] <= now
        if opened:
            self.probes += 1
            self.pause(now + self.options.probe_pause_s * 2.0**self.probes)
        return self.probes >= self.options.dead_probes
