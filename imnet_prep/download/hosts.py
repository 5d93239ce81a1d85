"""Who is fetched next: politeness and fairness across hosts, as bookkeeping without clocks, threads or sockets.

A host may have ``per_host`` lanes. Each lane is tied to one worker process, so that the connections which a process
keeps open for reuse never add up to more than that. The host with the fewest lanes at work comes first, then the one
served longest ago: a host that answers slowly holds its own lanes and nobody else's.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field, replace

from imnet_prep.download.fetch import Failure
from imnet_prep.download.journal import Outcome
from imnet_prep.download.options import FailReason, PoliteOptions
from imnet_prep.download.urls import host_key, host_of
from imnet_prep.download.worker import Lane, Task, backoff_s

_REFILL_BELOW, _REFILL = 64, 256  # URLs of a host held in memory
_LANE_S = 0.5  # how long a lane should keep a thread
_LANE_TASKS = 32
_HOSTS_AT_WORK = 256  # hosts with work at hand; paused ones do not count
_CAP_UP_EVERY = 20  # good answers after which a host that said 429 gets a lane back

ReadMore = Callable[[int, int, int], list[tuple[int, str, int]]]  # (host key, after row, limit) -> (row, url, attempts)
GiveUp = Callable[[int, Failure, Sequence[Task]], None]  # (host key, why, tasks at hand)


@dataclass(slots=True, eq=False)
class Host:
    """A host that has work or had some lately.

    Attributes:
        slot: Its place in the array that workers consult before each request.
        quota: Most lanes, by process. lanes: Lanes at work, by process. cap: Most lanes now, lowered by 429.
        queue: URLs at hand. cursor: Last row read from the journal. more: Whether the journal may hold more.
        held: Tasks at work or waiting for a retry. blocked_until: No request before.
        streak: Attempts in a row without any HTTP answer. probes: Failed probes of the open breaker, -1 while closed.
        task_s: Moving average of seconds a URL.
    """

    key: int
    slot: int
    quota: Counter[int]
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
        """Return the number of lanes at work."""
        return sum(self.lanes)

    def is_willing(self, process: int, now: float) -> bool:
        """Say whether a process may have another lane of this host now."""
        return (
            self.lanes[process] < self.quota[process]
            and max(self.blocked_until, self.next_at) <= now
            and self.at_work() < (1 if self.probes >= 0 else self.cap)
        )


@dataclass(slots=True, eq=False)
class _LaneState:
    host: Host
    process: int
    begun: float
    count: int
    tasks: dict[int, Task]


class Scheduler:
    """Holds hosts, lanes and retries; the caller tells it what happened and when, and asks for lanes.

    Args:
        options: Politeness.
        processes: Number of worker processes. threads: Threads in each.
        hosts: Keys of hosts with pending URLs, in the order of their turn.
        read_more: Reads a host's next pending URLs from the journal.
        give_up: Fails the tasks at hand of a host that is given up, and whatever the journal still has of it.
        ended: Rows that have ended without the journal knowing yet.
        blocked_until: Shared array by host slot; the scheduler writes pauses into it, workers read it.
    """

    def __init__(
        self,
        options: PoliteOptions,
        processes: int,
        threads: int,
        hosts: Iterable[int],
        read_more: ReadMore,
        give_up: GiveUp,
        ended: Container[int],
        blocked_until: MutableSequence[float],
    ) -> None:
        self._options, self._threads = options, threads
        self._free = [0] * processes  # none before the process says that it is ready
        self._left = options.concurrency
        self._backlog = iter(hosts)
        self._read_more, self._give_up = read_more, give_up
        self._ended, self._shared = ended, blocked_until
        self._slots = list(range(len(blocked_until) - 1, -1, -1))
        self._hosts: dict[int, Host] = {}
        self._queued: dict[int, Host] = {}  # those of them with URLs at hand; many others may wait for a retry
        self._lanes: dict[int, _LaneState] = {}
        self._rows: dict[int, int] = {}  # rows in memory -> their lane, 0 while queued or waiting
        self._gone: dict[int, Failure] = {}  # hosts that were given up, and why
        self._delayed: list[tuple[float, int, Host, Task]] = []
        self._numbers = itertools.count(1)

    # -- asking -------------------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Say whether nothing is left to do."""
        return not self._hosts

    def in_flight(self) -> int:
        """Return the number of lanes at work."""
        return len(self._lanes)

    def next_event(self, now: float) -> float:
        """Return the seconds until a pause or a retry ends, at most one."""
        pauses = (max(host.blocked_until, host.next_at) for host in self._queued.values())
        retries = (item[0] for item in self._delayed[:1])
        soonest = min([now + 1.0, *(due for due in pauses if due > now), *retries])
        return max(0.0, soonest - now)

    def assign(self, now: float) -> Iterator[tuple[int, Lane]]:
        """Yield (process, lane) as long as a thread and a willing host are free."""
        self._wake(now)
        self._activate(now)
        for process in sorted(range(len(self._free)), key=lambda one: -self._free[one]):
            while self._free[process] > 0 and self._left > 0:
                willing = (host for host in self._queued.values() if host.is_willing(process, now))
                host = min(willing, key=lambda host: (host.at_work(), host.served), default=None)
                if host is None:
                    break
                yield process, self._make_lane(host, process, now)

    def _make_lane(self, host: Host, process: int, now: float) -> Lane:
        number = next(self._numbers)
        tasks = tuple(host.queue.popleft() for _ in range(self._lane_length(host)))
        if self._options.rate_per_host:
            host.next_at = max(now, host.next_at) + 1.0 / self._options.rate_per_host
        host.lanes[process] += 1
        host.held += len(tasks)
        host.served = number
        self._free[process] -= 1
        self._left -= 1
        self._lanes[number] = _LaneState(host, process, now, len(tasks), {task.row: task for task in tasks})
        self._rows |= dict.fromkeys(self._lanes[number].tasks, number)
        self._refill(host)
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

    def ended(self, outcome: Outcome, now: float) -> None:
        """Take note that a URL has ended."""
        host = self._take(outcome.row)
        if host:
            del self._rows[outcome.row]
            failure = Failure(outcome.reason or FailReason.CONNECT, outcome.detail, answered=outcome.answered)
            self._judge(host, failure, now)

    def retry(self, task: Task, failure: Failure, now: float) -> None:
        """Take a task back for another attempt, after a pause."""
        host = self._take(task.row)
        if host is None:
            return
        if host.key in self._gone:
            self._refuse(host.key, (task,))
            return
        pause = backoff_s(self._options.backoff_s, self._options.max_backoff_s, task.attempts - 1)
        if failure.limited:
            pause = pause * 4 if failure.retry_after_s is None else failure.retry_after_s
            host.cap, host.good = max(1, host.at_work() // 2), 0
            if pause > self._options.max_retry_after_s:
                self._push(host, task)
                self._abandon(host, replace(failure, detail=f"Retry-After {pause:.0f} s is longer than we wait"))
                return
            self._block(host, now + pause)
        self._delay(host, task, now + pause)
        self._judge(host, failure, now)

    def redirect(self, task: Task, now: float) -> None:
        """Hand a task on to the host that its redirect names."""
        host = self._take(task.row)
        if host is None:
            return
        self._heard(host)
        key = host_key(host_of(task.url))
        if key in self._gone:
            self._refuse(key, (task,))
        else:
            self._move(host, key, task, now)

    def lane_done(self, number: int, returned: Sequence[Task], now: float) -> None:
        """Take a lane back, with the tasks that it did not start."""
        if number not in self._lanes:
            return
        lane = self._close(number)
        host, done = lane.host, lane.count - len(returned)
        if done:
            host.task_s += 0.3 * ((now - lane.begun) / done - host.task_s)
        host.held -= len(returned)
        if host.key in self._gone and returned:
            self._refuse(host.key, returned)
        else:
            for task in reversed(returned):
                self._push(host, task)
            # The worker that hears a Retry-After pauses the host for all workers before it tells us.
            host.blocked_until = max(host.blocked_until, self._shared[host.slot])
        self._retire(host)

    def lost(self, process: int) -> list[Task]:
        """Take note that a process has died, and return the tasks whose end is not known: they are queued again."""
        tasks: list[Task] = []
        for number in [number for number, lane in self._lanes.items() if lane.process == process]:
            lane = self._close(number)
            lane.host.held -= len(lane.tasks)
            for task in lane.tasks.values():
                self._push(lane.host, task)
            tasks += lane.tasks.values()
            self._retire(lane.host)
        self._free[process] = 0
        return tasks

    def drop(self, task: Task) -> None:
        """Forget a queued task: its URL has ended by other means."""
        host = self._hosts[host_key(host_of(task.url))]
        host.queue.remove(task)
        del self._rows[task.row]
        self._retire(host)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _take(self, row: int) -> Host | None:
        lane = self._lanes.get(self._rows.get(row, 0))
        if lane is None:
            return None
        del lane.tasks[row]
        lane.host.held -= 1
        return lane.host

    def _close(self, number: int) -> _LaneState:
        lane = self._lanes.pop(number)
        lane.host.lanes[lane.process] -= 1
        self._free[lane.process] += 1
        self._left += 1
        return lane

    def _judge(self, host: Host, failure: Failure, now: float) -> None:
        """The circuit breaker: many attempts in a row without an answer pause a host, failed probes end it."""
        if failure.answered:
            self._heard(host)
            return
        host.streak += 1
        if host.probes < 0:
            if host.streak >= self._options.dead_after:
                host.probes = 0
                self._block(host, now + self._options.probe_pause_s)
        elif host.at_work() <= 1 and host.blocked_until <= now:  # else a straggler from before the pause, no probe
            host.probes += 1
            if host.probes < self._options.dead_probes:
                self._block(host, now + self._options.probe_pause_s * 2.0**host.probes)
            else:
                detail = f"host given up after {host.streak} attempts without an answer: {failure.detail}"
                self._abandon(host, replace(failure, detail=detail))

    def _heard(self, host: Host) -> None:
        host.streak, host.probes = 0, -1
        host.good += 1
        if host.good % _CAP_UP_EVERY == 0 and host.cap < self._options.per_host:
            host.cap += 1

    def _block(self, host: Host, until: float) -> None:
        host.blocked_until = max(host.blocked_until, until)
        self._shared[host.slot] = max(self._shared[host.slot], until)

    def _refuse(self, key: int, tasks: Sequence[Task]) -> None:
        """Fail tasks of a host which was given up."""
        for task in tasks:
            self._rows.pop(task.row, None)
        self._give_up(key, self._gone[key], tasks)

    def _abandon(self, host: Host, failure: Failure) -> None:
        self._gone[host.key] = failure
        waiting = [item[3] for item in self._delayed if item[2] is host]
        self._delayed = [item for item in self._delayed if item[2] is not host]
        heapq.heapify(self._delayed)
        tasks = (*host.queue, *waiting)
        host.held -= len(waiting)
        host.queue.clear()
        host.more = False
        self._retire(host)
        self._refuse(host.key, tasks)

    def _wake(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            _, _, host, task = heapq.heappop(self._delayed)
            host.held -= 1
            if not self._move(host, host_key(host_of(task.url)), task, now):
                return

    def _delay(self, host: Host, task: Task, until: float) -> None:
        self._rows[task.row] = 0
        host.held += 1
        heapq.heappush(self._delayed, (until, next(self._numbers), host, task))

    def _move(self, host: Host, key: int, task: Task, now: float) -> bool:
        """Queue a task at the host of its URL; where no slot is free, it waits at the host that it came from."""
        self._rows[task.row] = 0  # known before the target reads its rows
        if key not in self._hosts and not self._slots:
            self._delay(host, task, now + 1.0)
            return False
        self._push(self._hosts.get(key) or self._open(key), task)
        self._retire(host)
        return True

    def _push(self, host: Host, task: Task) -> None:
        self._rows[task.row] = 0
        host.queue.appendleft(task)
        self._queued[host.key] = host

    def _activate(self, now: float) -> None:
        at_work = sum(host.blocked_until <= now for host in self._queued.values())
        fresh = (key for key in self._backlog if key not in self._hosts)
        while at_work < _HOSTS_AT_WORK and self._slots and (key := next(fresh, None)) is not None:
            host = self._open(key)
            self._retire(host)
            at_work += bool(host.queue)

    def _open(self, key: int) -> Host:
        per_host, processes = self._options.per_host, len(self._free)
        quota = Counter((key + lane) % processes for lane in range(per_host))
        host = self._hosts[key] = Host(key, self._slots.pop(), quota, [0] * processes, per_host)
        self._shared[host.slot] = 0.0
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
        self._note_queue(host)

    def _note_queue(self, host: Host) -> None:
        if host.queue:
            self._queued[host.key] = host
        else:
            self._queued.pop(host.key, None)

    def _retire(self, host: Host) -> None:
        """Let go of a host without work."""
        self._note_queue(host)
        if not (host.queue or host.held or host.more or host.at_work()) and self._hosts.get(host.key) is host:
            del self._hosts[host.key]
            self._slots.append(host.slot)
