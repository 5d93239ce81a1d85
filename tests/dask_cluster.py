"""A real Dask scheduler and workers, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_DASK = "distributed.cli.dask_"


class Cluster:
    """A scheduler, and workers of one thread each.

    Args:
        folder: Takes the scheduler's file, the workers' folders and the log.
        workers: Of each worker, the words before its command, such as those that enter a network namespace.
        around: The words before the scheduler's command.
        host: The scheduler's address.
        options: Of the workers.

    Attributes:
        address: The scheduler's. scheduler: Its process.
        workers: Their processes. Without a nanny, which is the default here, these do the work.
    """

    def __init__(
        self,
        folder: Path,
        workers: Sequence[Sequence[str]],
        *,
        around: Sequence[str] = (),
        host: str = "127.0.0.1",
        options: Sequence[str] = ("--no-nanny",),
    ) -> None:
        folder.mkdir()
        self._folder, self._options = folder, options
        self._has_nannies = "--no-nanny" not in options
        file, self.log = folder / "scheduler.json", folder / "log"
        self._output = self.log.open("wb")
        place = ["--port", "0", "--no-dashboard", "--host", host, "--scheduler-file", str(file)]
        self.scheduler = self._start([*around, sys.executable, "-m", f"{_DASK}scheduler", *place])
        self.workers: list[subprocess.Popen[bytes]] = []
        try:
            self.address = str(self._wait_for(file)["address"])
            for before in workers:
                self.add_worker(before)
            self._wait_for_workers()
        except BaseException:
            self.close()
            raise

    def add_worker(self, around: Sequence[str], after_s: int = 0) -> None:
        """Start a worker, after so many seconds."""
        late = ["sh", "-c", f'sleep {after_s}; exec "$@"', "sh"] if after_s else []
        command = [*late, *around, sys.executable, "-m", f"{_DASK}worker", self.address, "--nthreads", "1"]
        local = self._folder / f"worker-{len(self.workers)}"
        self.workers.append(self._start([*command, "--no-dashboard", "--local-directory", str(local), *self._options]))

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output)

    def _wait_for(self, file: Path) -> dict[str, object]:
        for _ in range(600):
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (FileNotFoundError, ValueError):
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text(encoding="utf-8"))

    def _wait_for_workers(self) -> None:
        """Wait until the scheduler has told of each: to ask it takes a process, which imports Dask."""
        for _ in range(600):
            if self.log.read_text(encoding="utf-8").count(" Register worker ") == len(self.workers):
                return
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End all processes."""
        for process in (*self.workers, self.scheduler):
            if self._has_nannies:
                process.terminate()  # a nanny ends its worker
            else:
                process.kill()
        for process in (*self.workers, self.scheduler):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._output.close()
