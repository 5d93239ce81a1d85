"""Who is fetched next: politeness and fairness across hosts, as bookkeeping without clocks, threads or sockets.

A host may have ``per_host`` lanes. Each lane is tied to one worker process, so that the connections which a process
keeps open for reuse never add up to more than that. The host with the fewest lanes at work comes first, then the one
served longest ago: a host that answers slowly holds its own lanes and nobody else's.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field

from imnet_prep.download.fetch import Failure
from imnet_prep.download.options import FailReason, PoliteOptions
from imnet_prep.download.urls import host_key, host_of
from imnet_prep.download.worker import Lane, Task, backoff_s

_REFILL_BELOW, _REFILL = 64, 256  # URLs of a host held in memory
_LANE_S = 0.5  # how long a lane should keep a thread
_LANE_TASKS = 32
_HOSTS_AT_WORK = 256  # hosts with work at hand; paused ones do not count
_CAP_UP_EVERY = 20  # good answers after which a host that said 429 gets a lane back

ReadMore = Callable[[int, int, int], list[tuple[int, str, int]]]  # (host key, after row, limit) -> (row, url, attempts)


@dataclass(slots=True, eq=False)
class Host:
    """A host that has work or had some lately.

    Attributes:
        slot: Its place in the array that workers consult before each request.
        queue: URLs at hand. cursor: Last row read from the journal. more: Whether the journal may hold more.
        lanes: Lanes at work, by process. quota: Most lanes, by process. cap: Most lanes now, lowered by 429.
        held: Tasks at work or waiting for a retry. blocked_until: No request before.
        streak: Attempts in a row without any HTTP answer. probes: Failed probes of the open breaker, -1 while closed.
        task_s: Moving average of seconds a URL.
    """

    key: int
    slot: int
    quota: list[int]
    lanes: list[int]
    cap: int
    queue: deque[Task] = field(default_factory=deque)
    cursor: int = 0
    more: bool = True
    held: int = 0
    blocked_until: float = 0.0
    next_at: float = 0.0
    streak: int = 0
    probes: int = -1
    good: int = 0
    task_s: float = 0.25
    served: int = 0

    def at_work(self) -> int:
        """Give the number of lanes at work."""
        return sum(self.lanes)


@dataclass(slots=True, eq=False)
class _LaneState:
    host: Host
    process: int
    begun: float
    count: int
    tasks: dict[int, Task]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A host that is given up: ``tasks`` at hand and whatever the journal still has of it fail with ``reason``."""

    host: int
    reason: FailReason
    detail: str
    tasks: tuple[Task, ...]


class Scheduler:
    """Holds hosts, lanes and retries; the caller tells it what happened and when, and asks for lanes.

    Args:
        options: Politeness.
        processes: Number of worker processes. threads: Threads in each.
        hosts: Keys of hosts with pending URLs, in the order of their turn.
        read_more: Reads a host's next pending URLs from the journal.
        ended: Rows that have ended without the journal knowing yet.
        blocked_until: Shared array by host slot; the scheduler writes pauses into it, workers read it.
    """

    def __init__(
        self,
        options: PoliteOptions,
        processes: int,
        threads: int,
        hosts: Sequence[int],
        read_more: ReadMore,
        ended: Container[int],
        blocked_until: MutableSequence[float],
    ) -> None:
        self._options, self._processes = options, processes
        self._threads = threads
        self._free = [0] * processes  # none before the process says that it is ready
        self._left = options.concurrency
        self._backlog = iter(hosts)
        self._read_more, self._ended, self._shared = read_more, ended, blocked_until
        self._slots = list(range(len(blocked_until) - 1, -1, -1))
        self._hosts: dict[int, Host] = {}
        self._queued: dict[int, Host] = {}  # those of them with URLs at hand; many others may wait for a retry
        self._lanes: dict[int, _LaneState] = {}
        self._rows: dict[int, int] = {}  # rows in memory -> their lane, 0 while queued or waiting
        self._gone: dict[int, tuple[FailReason, str]] = {}  # hosts that were given up, and why
        self._delayed: list[tuple[float, int, Host, Task]] = []
        self._numbers = itertools.count(1)

    # -- asking -------------------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Say whether nothing is left to do."""
        return not self._hosts

    def in_flight(self) -> int:
        """Give the number of lanes at work."""
        return len(self._lanes)

    def next_event(self, now: float) -> float:
        """Give the seconds until a pause or a retry ends, at most one."""
        soonest = self._delayed[0][0] if self._delayed else now + 1.0
        for host in self._queued.values():
            due = max(host.blocked_until, host.next_at)
            if due > now:
                soonest = min(soonest, due)
        return max(0.0, min(1.0, soonest - now))

    def assign(self, now: float) -> Iterator[tuple[int, Lane]]:
        """Yield (process, lane) as long as a thread and a willing host are free."""
        self._wake(now)
        self._activate(now)
        for process in sorted(range(self._processes), key=lambda one: -self._free[one]):
            while self._free[process] > 0 and self._left > 0:
                host = self._choose(process, now)
                if host is None:
                    break
                yield process, self._make_lane(host, process, now)

    def _choose(self, process: int, now: float) -> Host | None:
        best: Host | None = None
        best_rank = (0, 0)
        for host in self._queued.values():
            if host.lanes[process] >= host.quota[process]:
                continue
            at_work = sum(host.lanes)
            if host.blocked_until > now or host.next_at > now or at_work >= (1 if host.probes >= 0 else host.cap):
                continue
            rank = (at_work, host.served)
            if best is None or rank < best_rank:
                best, best_rank = host, rank
        return best

    def _make_lane(self, host: Host, process: int, now: float) -> Lane:
        number = next(self._numbers)
        count = self._lane_length(host)
        tasks = tuple(host.queue.popleft() for _ in range(count))
        if self._options.rate_per_host:
            host.next_at = max(now, host.next_at) + 1.0 / self._options.rate_per_host
        host.lanes[process] += 1
        host.held += count
        host.served = number
        self._free[process] -= 1
        self._left -= 1
        self._lanes[number] = _LaneState(host, process, now, count, {task.row: task for task in tasks})
        for task in tasks:
            self._rows[task.row] = number
        self._refill(host)
        if not host.queue:
            self._queued.pop(host.key, None)
        return Lane(number, host.slot, tasks)

    def _lane_length(self, host: Host) -> int:
        if self._options.rate_per_host or host.probes >= 0:
            return 1
        fair = -(-len(host.queue) // max(1, host.cap))  # the last URLs are shared among the lanes
        return max(1, min(_LANE_TASKS, int(_LANE_S / max(host.task_s, 1e-3)), fair))

    # -- telling ------------------------------------------------------------------------------------------------------

    def ready(self, process: int) -> None:
        """Take note that a process has started: until then a lane given to it would only wait, and spoil the pace."""
        self._free[process] = self._threads

    def ended(self, row: int, answered: bool, reason: FailReason | None, detail: str, now: float) -> Abandoned | None:
        """Take note that a URL has ended; ``answered`` says whether its host gave any HTTP answer."""
        host = self._take(row)
        if host is None:
            return None
        del self._rows[row]
        host.held -= 1
        return self._judge(host, answered, reason or FailReason.CONNECT, detail, now)

    def retry(self, task: Task, failure: Failure, now: float) -> Abandoned | None:
        """Take a task back for another attempt, after a pause."""
        host = self._take(task.row)
        if host is None:
            return None
        options = self._options
        pause = backoff_s(options.backoff_s, options.max_backoff_s, task.attempts - 1)
        if host.key in self._gone:
            return self._refuse(host, (task,))
        self._rows[task.row] = 0
        if failure.retry_after_s is not None or failure.status == 429:
            pause = failure.retry_after_s if failure.retry_after_s is not None else pause * 4
            host.cap = max(1, host.at_work() // 2)
            host.good = 0
            if pause > options.max_retry_after_s:
                host.queue.append(task)
                host.held -= 1
                return self._abandon(host, failure.reason, f"Retry-After {pause:.0f} s is longer than we wait")
            self._block(host, now + pause)
        heapq.heappush(self._delayed, (now + pause, next(self._numbers), host, task))
        return self._judge(host, failure.answered, failure.reason, failure.detail, now)

    def redirect(self, task: Task, now: float) -> Abandoned | None:
        """Hand a task on to the host that its redirect names."""
        host = self._take(task.row)
        if host is None:
            return None
        self._judge(host, True, FailReason.CONNECT, "", now)
        key = host_key(host_of(task.url))
        if key in self._gone:
            host.held -= 1
            self._rows.pop(task.row, None)
            return Abandoned(key, *self._gone[key], (task,))
        self._rows[task.row] = 0
        target = self._host(key)
        if target is None:  # no slot is free: it waits at the host it came from
            heapq.heappush(self._delayed, (now + 1.0, next(self._numbers), host, task))
        else:
            host.held -= 1
            self._push(target, task)
        return None

    def lane_done(self, number: int, returned: Sequence[Task], now: float) -> Abandoned | None:
        """Take a lane back, with the tasks that it did not start."""
        lane = self._lanes.pop(number, None)
        if lane is None:
            return None
        host = lane.host
        done = lane.count - len(returned)
        if done:
            host.task_s += 0.3 * ((now - lane.begun) / done - host.task_s)
        host.lanes[lane.process] -= 1
        self._free[lane.process] += 1
        self._left += 1
        abandoned = None
        if host.key in self._gone and returned:
            abandoned = self._refuse(host, returned)
        else:
            for task in reversed(returned):
                self._push(host, task)
                host.held -= 1
                self._rows[task.row] = 0
            # The worker that hears a Retry-After pauses the host for all workers before it tells us.
            host.blocked_until = max(host.blocked_until, self._shared[host.slot])
        self._retire(host)
        return abandoned

    def lost(self, process: int, now: float) -> list[Task]:
        """Take note that a process has died, and give the tasks whose end is not known; each is to be told of next."""
        tasks = []
        self._free[process] = 0
        for number, lane in [item for item in self._lanes.items() if item[1].process == process]:
            tasks += list(lane.tasks.values())
            del self._lanes[number]
            lane.host.lanes[process] -= 1
            self._left += 1
            for task in lane.tasks.values():
                self._rows[task.row] = 0
                lane.host.held -= 1
                self._push(lane.host, task)
        return tasks

    def drop(self, row: int) -> None:
        """Forget a queued task: its URL has ended by other means."""
        for host in list(self._hosts.values()):
            for task in host.queue:
                if task.row == row:
                    host.queue.remove(task)
                    if not host.queue:
                        self._queued.pop(host.key, None)
                    self._rows.pop(row, None)
                    self._retire(host)
                    return

    # -- inside -------------------------------------------------------------------------------------------------------

    def _take(self, row: int) -> Host | None:
        lane = self._lanes.get(self._rows.get(row, 0))
        if lane is None:
            return None
        lane.tasks.pop(row, None)
        return lane.host

    def _judge(self, host: Host, answered: bool, reason: FailReason, detail: str, now: float) -> Abandoned | None:
        """The circuit breaker: many attempts in a row without an answer pause a host, failed probes end it."""
        if answered:
            host.streak, host.probes = 0, -1
            host.good += 1
            if host.good % _CAP_UP_EVERY == 0 and host.cap < self._options.per_host:
                host.cap += 1
            return None
        host.streak += 1
        options = self._options
        if host.probes < 0:
            if host.streak >= options.dead_after:
                host.probes = 0
                self._block(host, now + options.probe_pause_s)
            return None
        if host.at_work() > 1 or host.blocked_until > now:  # a straggler from before the pause, not a probe
            return None
        host.probes += 1
        if host.probes >= options.dead_probes:
            return self._abandon(
                host, reason, f"host given up after {host.streak} attempts without an answer: {detail}"
            )
        self._block(host, now + options.probe_pause_s * 2.0**host.probes)
        return None

    def _block(self, host: Host, until: float) -> None:
        host.blocked_until = max(host.blocked_until, until)
        self._shared[host.slot] = max(self._shared[host.slot], until)

    def _refuse(self, host: Host, tasks: Sequence[Task]) -> Abandoned:
        """Fail tasks that come back to a host which was given up meanwhile."""
        host.held -= len(tasks)
        for task in tasks:
            self._rows.pop(task.row, None)
        return Abandoned(host.key, *self._gone[host.key], tuple(tasks))

    def _abandon(self, host: Host, reason: FailReason, detail: str) -> Abandoned:
        self._gone[host.key] = (reason, detail)
        waiting = [item for item in self._delayed if item[2] is host]
        self._delayed = [item for item in self._delayed if item[2] is not host]
        heapq.heapify(self._delayed)
        tasks = (*host.queue, *(item[3] for item in waiting))
        host.held -= len(waiting)
        host.queue.clear()
        self._queued.pop(host.key, None)
        host.more = False
        for task in tasks:
            self._rows.pop(task.row, None)
        self._retire(host)
        return Abandoned(host.key, reason, detail, tasks)

    def _wake(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            _, _, host, task = heapq.heappop(self._delayed)
            host.held -= 1
            if host_key(host_of(task.url)) != host.key:
                target = self._host(host_key(host_of(task.url)))
                if target is None:
                    host.held += 1
                    heapq.heappush(self._delayed, (now + 1.0, next(self._numbers), host, task))
                    return
                self._push(target, task)
                self._retire(host)
            else:
                self._push(host, task)

    def _push(self, host: Host, task: Task) -> None:
        host.queue.appendleft(task)
        self._queued[host.key] = host

    def _activate(self, now: float) -> None:
        at_work = sum(1 for host in self._queued.values() if host.blocked_until <= now)
        while at_work < _HOSTS_AT_WORK and self._slots:
            key = next(self._backlog, None)
            if key is None:
                return
            if key not in self._hosts:
                host = self._host(key)
                assert host is not None  # a slot is free
                self._retire(host)
                at_work += bool(host.queue)

    def _host(self, key: int) -> Host | None:
        host = self._hosts.get(key)
        if host is None and self._slots:
            per_host, processes = self._options.per_host, self._processes
            quota = [0] * processes
            for lane in range(per_host):
                quota[(key + lane) % processes] += 1
            host = Host(key, self._slots.pop(), quota, [0] * processes, per_host)
            self._shared[host.slot] = 0.0
            self._hosts[key] = host
            self._refill(host)
        return host

    def _refill(self, host: Host) -> None:
        while host.more and len(host.queue) < _REFILL_BELOW:
            rows = self._read_more(host.key, host.cursor, _REFILL)
            host.more = len(rows) == _REFILL
            for row, url, attempts in rows:
                host.cursor = row
                if row not in self._rows and row not in self._ended:
                    self._rows[row] = 0
                    host.queue.append(Task(row, url, attempts))
        if host.queue:
            self._queued[host.key] = host

    def _retire(self, host: Host) -> bool:
        """Let go of a host without work; True if it went."""
        if host.queue or host.held or host.more or host.at_work():
            return False
        if self._hosts.get(host.key) is host:
            del self._hosts[host.key]
            self._slots.append(host.slot)
        return True
