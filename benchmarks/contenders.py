"""Contenders that live in processes of their own: each sets up once, and measures whenever it is asked.

A contender's module calls :func:`serve` with what to run; the benchmark starts it as a :class:`Contender`. It may run
under another interpreter, so this module needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
WATCHER = ("sh", "-c", 'read _; kill -s KILL -- "-$0"')
"""Kills a process group when stdin ends, also because the benchmark is killed: what is stopped cannot see that."""


def serve(set_up: Callable[[], Callable[[], Mapping[str, float]]]) -> None:
    """Set up, say so, and measure once for every line on stdin.

    Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    measure = set_up()
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)
    os._exit(0)  # without waiting for threads and processes of the contender


def step_rate(run: Callable[[], object], steps: int, batch_size: int) -> dict[str, float]:
    """Return images/s of the median step, and the processor time an image."""
    times, cpu = [], time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    cpu_ms = 1000 * (time.process_time() - cpu) / steps / batch_size
    return {"images_per_s": batch_size / statistics.median(times), "cpu_ms": cpu_ms}


class Contender:
    """A process that serves, as a context manager; called, it measures once.

    While it is not asked, it is stopped with its children: loaders would work ahead while others are measured.

    Args:
        python: The interpreter.
        module: The module in this folder.
        words: Its arguments.
        environment: Variables that are added.
        cores: Let it run on so many cores alone.
    """

    def __init__(
        self,
        python: str | Path,
        module: str,
        *words: object,
        environment: Mapping[str, str] | None = None,
        cores: int | None = None,
    ):
        self._command = [*on_cores(cores), str(python), "-m", f"benchmarks.{module}", *map(str, words)]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **(environment or {})}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            cwd=ROOT, env=self._environment, process_group=0,
        )  # fmt: skip
        self._watcher = subprocess.Popen([*WATCHER, str(self.pid)], stdin=subprocess.PIPE, process_group=0)
        self._ready = False
        return self

    @property
    def pid(self) -> int:
        """The process, which is also its process group."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until it has set up, if it has not yet."""
        if not self._ready:
            self._answer()
            self._ready = True
            self._signal("SIGSTOP")

    def __call__(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self.wait_until_ready()
        self._signal("SIGCONT")
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._signal("SIGSTOP")
        return answer

    def _signal(self, name: str) -> None:
        os.killpg(self.pid, getattr(signal, name))  # type: ignore[attr-defined, unused-ignore]

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{' '.join(self._command)} failed:\n{self._log.read()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watcher.communicate()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()


def on_cores(cores: int | None) -> list[str]:
    """Return the start of a command that may run on so many of this process's cores alone; None: on all."""
    if cores is None:
        return []
    mine = sorted(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]
    return ["taskset", "--cpu-list", ",".join(map(str, mine[:cores]))]


@contextmanager
def together(contenders: Mapping[str, Contender]) -> Iterator[Mapping[str, Contender]]:
    """Start contenders together, wait until all are ready, and end them all."""
    with ExitStack() as stack:
        started = {name: stack.enter_context(contender) for name, contender in contenders.items()}
        for contender in started.values():
            contender.wait_until_ready()
        yield started


def children_s() -> float:
    """Return the processor time of all children that have ended, in seconds."""
    used = os.times()
    return used.children_user + used.children_system


def processor_s(pid: int) -> float:
    """Return the processor time of a process alone, in seconds; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    ticks: int = os.sysconf("SC_CLK_TCK")  # type: ignore[attr-defined, unused-ignore]
    return (int(fields[11]) + int(fields[12])) / ticks


def run_json(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the last line of a command's output, as JSON."""
    result: dict[str, Any] = json.loads(output_of(command, environment).strip().splitlines()[-1])
    return result


def output_of(command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must succeed, and return its output."""
    words = [str(word) for word in command]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        sys.exit(f"{' '.join(words)} failed:\n{run.stderr[-2000:]}")
    return run.stdout
