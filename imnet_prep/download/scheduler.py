"""Decide which URL is fetched next, fairly across hosts. This is bookkeeping without clocks, threads or sockets.

A host may have ``per_host`` lanes. Each lane is tied to one worker process, so the connections that all processes keep
open never exceed that number. The host with the fewest lanes at work comes first, then the one served longest ago. A
host that answers slowly therefore holds its own lanes and nobody else's.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from imnet_prep.download.fetch import Failure
from imnet_prep.download.folder import Results
from imnet_prep.download.journal import Outcome
from imnet_prep.download.messages import LANE_S, Lane, LaneDone, Retry, Task
from imnet_prep.download.options import FailReason, PoliteOptions
from imnet_prep.download.urls import host_key, host_of

_REFILL_BELOW, _REFILL = 64, 256  # URLs of a host held in memory
_HOSTS_AT_WORK = 256  # hosts with work at hand; paused ones do not count
_LANE_TASKS = 32
_FIRST_GAP_S, _LEAST_GAP_S, _GAP_DOWN = 0.05, 0.01, 0.9  # requests to a host that said 429: see `Host.not_served`
_REFUSALS = 2  # of single URLs (a broken script) before they are the host's


@dataclass(slots=True, eq=False)
class Host:
    """A host that has work or had some lately, and how politely it is treated.

    Attributes:
        key: See :func:`imnet_prep.download.urls.host_key`.
        options: How to treat it.
        pauses: Shared array by slot: the ``time.monotonic`` before which no request may go out. Workers write it too.
        slot: The host's place in ``pauses``.
        quota: Most lanes, by process. lanes: Lanes at work, by process.
        queue: Tasks at hand. cursor: Last row read from the journal. more: Whether the journal may hold more.
        waiting: Tasks that wait for a retry. next_at: No lane before, by ``least_gap_s``.
        streak: Attempts in a row that it did not serve. probes: Failed probes of the open breaker, -1 while closed.
        has_served: Whether it ever served anything in this run.
        gap_s: Least seconds between the beginnings of two requests, since it said 429.
        refusals: Rounds in a row in which it asked for a pause or refused. refused_at: When the latest was heard of.
        waiting_since: When the first attempt of the streak ended.
        task_s: Moving average of seconds a URL. turn: Number of its latest lane.
    """

    key: int
    options: PoliteOptions
    pauses: MutableSequence[float]
    slot: int
    quota: Counter[int]
    lanes: Counter[int] = field(default_factory=Counter)
    queue: deque[Task] = field(default_factory=deque)
    cursor: int = 0
    more: bool = True
    waiting: int = 0
    next_at: float = 0.0
    streak: int = 0
    probes: int = -1
    has_served: bool = False
    waiting_since: float = 0.0
    gap_s: float = 0.0
    refusals: int = 0
    refused_at: float = -math.inf
    task_s: float = 0.25
    turn: int = 0

    def free_at(self) -> float:
        """Return the time before which no lane may begin."""
        return max(self.pauses[self.slot], self.next_at)

    def is_willing(self, process: int, now: float) -> bool:
        """Return whether a process may have another lane of this host now."""
        return (
            self.lanes[process] < self.quota[process]
            and self.free_at() <= now
            and self.lanes.total() < (1 if self.probes >= 0 else self.options.per_host)
        )

    def next_tasks(self) -> tuple[Task, ...]:
        """Take the tasks for one lane from the queue."""
        count = 1
        if self.probes >= 0:  # a URL that failed before tells less of the host
            probe = min(self.queue, key=lambda task: task.attempts)
            self.queue.remove(probe)
            return (probe,)
        if not self.least_gap_s():
            fair = -(-len(self.queue) // self.options.per_host)  # the last URLs are shared among the lanes
            count = max(1, min(_LANE_TASKS, int(LANE_S / max(self.task_s, 1e-3)), fair))
        return tuple(self.queue.popleft() for _ in range(count))

    def least_gap_s(self) -> float:
        """Return the least seconds between the beginnings of two requests, 0 for none."""
        rate = self.options.rate_per_host
        return max(self.gap_s, 1.0 / rate if rate else 0.0)

    def pause(self, until: float) -> None:
        """Let no request go out before a time, in any process."""
        self.pauses[self.slot] = max(self.pauses[self.slot], until)

    def served(self) -> None:
        """Note an image, or an answer that will not change, which closes the circuit breaker."""
        self.streak, self.refusals, self.probes, self.has_served = 0, 0, -1, True
        self.gap_s = 0.0 if self.gap_s < _LEAST_GAP_S else self.gap_s * _GAP_DOWN

    def not_served(self, found: Outcome | Failure, begun: float, now: float, *, is_probe: bool) -> bool:
        """Note an attempt that the host did not serve, and return whether to give the host up.

        A host that asks for a pause, or refuses again and again (5xx), is paused, each time for longer. What was in
        flight together is one refusal.

        Each refusal for the rate of requests (429, Retry-After) doubles the gap between them, and each answer that is
        served shortens it by a tenth, so that about one request of six finds the limit again.

        Many attempts in a row that are not served open the circuit breaker: the host is paused, then probed with single
        requests. An attempt that began before the pause is no probe. A host that serves nothing for longer than two of
        the longest pauses, or four where it has served before, is given up as well.
        """
        options, asked = self.options, found.retry_after_s or 0.0
        last_probe = options.dead_probes * (2 if self.has_served else 1)
        dead_after = options.dead_after * (3 if self.has_served else 1)
        is_too_long = asked > options.max_retry_after_s
        if self.streak == 0:
            self.waiting_since = now
        self.streak += 1
        is_asked = bool(asked) or found.status == 429
        if begun > self.refused_at and (is_asked or ((found.status or 0) >= 500 and self.streak > _REFUSALS)):
            self.pause(now + max(min(asked, options.max_retry_after_s), options.backoff(self.refusals)))
            if is_asked:
                self.gap_s = min(max(2 * self.gap_s, _FIRST_GAP_S), options.max_backoff_s)
            self.refusals, self.refused_at = self.refusals + 1, now
        if now - self.waiting_since > (4 if self.has_served else 2) * options.max_retry_after_s:
            return True
        if is_probe:
            self.probes += 1
        elif is_too_long:
            self.probes = max(self.probes, last_probe - 1 if self.has_served else last_probe)
        elif self.probes < 0 and self.streak >= dead_after:
            self.probes = 0
        else:
            return False
        self.pause(now + min(options.probe_pause_s * 2.0**self.probes, options.max_retry_after_s))
        return self.probes >= last_probe


class _OpenLane(NamedTuple):
    host: Host
    process: int
    begun: float
    tasks: tuple[Task, ...]
    is_probe: bool


class Scheduler:
    """Hold hosts, lanes and retries. The caller reports what happened and when, and asks for lanes.

    Args:
        options: Politeness.
        processes: Number of worker processes.
        backlog: Keys of hosts with pending URLs, in the order of their turn.
        results: Where a host's pending URLs are read, and where it is given up.
        pauses: See :class:`Host`. Its length is the number of hosts that are held at a time.

    Attributes:
        hosts: Hosts with work, by key.
        lanes: Lanes at work, by number.
    """

    def __init__(
        self,
        options: PoliteOptions,
        processes: int,
        backlog: Iterable[int],
        results: Results,
        pauses: MutableSequence[float],
    ) -> None:
        self._options, self._backlog = options, iter(backlog)
        self._results, self._pauses = results, pauses
        self._free = [0] * processes  # threads without a lane; none before a process says that it is ready
        self._slots = list(range(len(pauses)))
        self.hosts: dict[int, Host] = {}
        self.lanes: dict[int, _OpenLane] = {}
        self._queued: dict[int, Host] = {}  # the hosts with a queue; many others may only wait for a retry
        self._rows: set[int] = set()  # rows in memory: queued, in a lane or waiting
        self._gone: dict[int, Failure] = {}  # why hosts were given up
        self._delayed: list[tuple[float, int, Host, Task]] = []
        self._numbers = itertools.count(1)

    def next_event(self, now: float) -> float:
        """Return the seconds until a pause or a retry ends, at most one."""
        pauses = (due for host in self._queued.values() if (due := host.free_at()) > now)
        return max(0.0, min([now + 1.0, *pauses, *(due for due, *_ in self._delayed[:1])]) - now)

    def assign(self, now: float) -> Iterator[tuple[int, Lane]]:
        """Yield (process, lane) as long as a thread and a willing host are free."""
        while self._delayed and self._delayed[0][0] <= now:
            _, _, host, task = heapq.heappop(self._delayed)
            host.waiting -= 1
            self._enqueue(task, host, now)
            self._settle(host)
        self._activate(now)
        for process in sorted(range(len(self._free)), key=lambda one: -self._free[one]):
            while self._free[process] > 0 and len(self.lanes) < self._options.concurrency:
                willing = (host for host in self._queued.values() if host.is_willing(process, now))
                best = min(willing, key=lambda host: (host.lanes.total(), host.turn), default=None)
                if best is None:
                    break
                yield process, self._open_lane(best, process, now)

    def _activate(self, now: float) -> None:
        """Open hosts of the backlog until enough have work that can begin now."""
        at_work = sum(host.pauses[host.slot] <= now for host in self._queued.values())
        fresh = (key for key in self._backlog if key not in self.hosts)
        while at_work < _HOSTS_AT_WORK and self._slots and (key := next(fresh, None)) is not None:
            host = self._open(key)
            self._settle(host)
            at_work += bool(host.queue)

    def _open_lane(self, host: Host, process: int, now: float) -> Lane:
        number, tasks = next(self._numbers), host.next_tasks()
        host.next_at = max(now, host.next_at) + host.least_gap_s()
        host.lanes[process] += 1
        host.turn = number
        self._free[process] -= 1
        self.lanes[number] = _OpenLane(host, process, now, tasks, host.probes >= 0)
        self._settle(host)
        return Lane(number, host.slot, tasks)

    def lane_done(self, done: LaneDone, now: float) -> None:
        """Take the results of a lane, and the tasks that it did not start."""
        lane = self.lanes[done.number]
        host = lane.host
        for result in done.results:
            match result:
                case Outcome():
                    self._rows.discard(result.row)
                    self._results.add(result)
                    self._judge(lane, result, now)
                case Retry(task, failure):
                    self._retry(host, task, failure, now)
                    self._judge(lane, failure, now)
                case Task():
                    host.served()
                    self._enqueue(result, host, now)
        if done.results:
            host.task_s += 0.3 * ((now - lane.begun) / len(done.results) - host.task_s)
        self._close_lane(done.number, done.returned, now)

    def ready(self, process: int, threads: int) -> None:
        """Note that a process has started. A lane given to it earlier would only wait, and spoil the pace."""
        self._free[process] = threads

    def died(self, process: int, goes_on: Callable[[Task], bool], now: float) -> None:
        """Note that a process has died, and queue those of its tasks again for which ``goes_on`` returns true."""
        for number in [number for number, lane in self.lanes.items() if lane.process == process]:
            tasks = self.lanes[number].tasks
            left = [task for task in tasks if goes_on(task)]
            self._rows.difference_update(task.row for task in set(tasks).difference(left))
            self._close_lane(number, left, now)
        self._free[process] = 0

    def _close_lane(self, number: int, left: Sequence[Task], now: float) -> None:
        lane = self.lanes.pop(number)
        lane.host.lanes[lane.process] -= 1
        self._free[lane.process] += 1
        for task in reversed(left):
            self._enqueue(task, lane.host, now)
        self._settle(lane.host)

    def _retry(self, host: Host, task: Task, failure: Failure, now: float) -> None:
        """Take a task back for another attempt, after a pause."""
        if host.key in self._gone:
            self._refuse(host.key, task)
            return
        self._results.tried(task)
        pause = max(failure.retry_after_s or 0.0, self._options.backoff(task.attempts - 1))
        self._delay(task, host, now + min(pause, self._options.max_retry_after_s))

    def _judge(self, lane: _OpenLane, found: Outcome | Failure, now: float) -> None:
        """Tell a host's circuit breaker about an attempt."""
        host = lane.host
        if found.reason is FailReason.INTERNAL or host.key in self._gone:
            return
        if found.reason is None or (found.answered and not found.transient):
            host.served()
        elif host.not_served(found, lane.begun, now, is_probe=lane.is_probe):
            if (asked := found.retry_after_s or 0.0) > self._options.max_retry_after_s:
                detail = f"host given up: Retry-After {asked:.0f} s is longer than we wait"
            else:
                detail = f"host given up after {host.streak} attempts that it did not serve: {found.detail}"
            self._abandon(host, found.reason, detail)

    def _abandon(self, host: Host, reason: FailReason, detail: str) -> None:
        """Fail all URLs of a host without asking for them, but for those in a lane."""
        self._gone[host.key] = Failure(reason, detail, transient=True, answered=False)
        for task in (*host.queue, *(task for _, _, origin, task in self._delayed if origin is host)):
            self._refuse(host.key, task)
        self._delayed = [item for item in self._delayed if item[2] is not host]
        heapq.heapify(self._delayed)
        host.queue.clear()
        host.more, host.waiting = False, 0
        in_hand = {task.row for lane in self.lanes.values() for task in lane.tasks}
        self._results.give_up(host.key, reason, detail, in_hand)
        self._settle(host)

    def _refuse(self, key: int, task: Task) -> None:
        """Fail a task of a host that was given up."""
        self._rows.discard(task.row)
        self._results.add(task.failed(self._gone[key]))

    def _delay(self, task: Task, host: Host, until: float) -> None:
        host.waiting += 1
        heapq.heappush(self._delayed, (until, next(self._numbers), host, task))

    def _enqueue(self, task: Task, origin: Host, now: float) -> None:
        """Put a task first in the queue of its URL's host. If no slot is free for that host, it waits at ``origin``."""
        key = host_key(host_of(task.url))
        if key in self._gone:
            self._refuse(key, task)
        elif key in self.hosts or self._slots:
            host = self.hosts.get(key) or self._open(key)
            if host.streak:  # other URLs tell more of the host than one that failed
                host.queue.append(task)
            else:
                host.queue.appendleft(task)
            self._settle(host)
        else:
            self._delay(task, origin, now + 1.0)

    def _open(self, key: int) -> Host:
        quota = Counter((key + lane) % len(self._free) for lane in range(self._options.per_host))
        slot = self._slots.pop()
        self._pauses[slot] = 0.0
        host = self.hosts[key] = Host(key, self._options, self._pauses, slot, quota)
        return host

    def _settle(self, host: Host) -> None:
        """Refill a host's queue from the journal, and let go of a host without work."""
        while host.more and len(host.queue) < _REFILL_BELOW:
            rows = self._results.journal.pending_of(host.key, host.cursor, _REFILL)
            host.more = len(rows) == _REFILL
            for row, url, attempts in rows:
                host.cursor = row
                if row not in self._rows:
                    self._rows.add(row)
                    host.queue.append(Task(row, url, attempts))
        if host.queue:
            self._queued[host.key] = host
            return
        self._queued.pop(host.key, None)
        if not host.waiting and not host.lanes.total():
            del self.hosts[host.key]
            self._slots.append(host.slot)
