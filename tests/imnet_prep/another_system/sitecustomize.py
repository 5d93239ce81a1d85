"""Make Linux look like another system to this project's modules; Python runs it at each start, in workers too.

Imports of this project get neither what only some systems have nor, below the folder of IMNET_TEST_FOLDER, a rename or
a deletion of a file that a process of this session has open: Windows refuses both. All other modules keep everything.
With IMNET_TEST_STALL a worker waits for ever before the third note of a finished shard, so that it is surely killed.
"""

from __future__ import annotations

import builtins
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("imnet_prep", "mbv2", "cli")
MISSING_MODULES = ("fcntl", "resource", "grp", "pwd", "termios")
MISSING = {
    "os": """
        pread preadv pwrite pwritev readv writev fchmod fchown O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK posix_fadvise
        posix_fallocate sendfile fork forkpty register_at_fork sched_getaffinity sched_setaffinity memfd_create getppid
        geteuid getuid getpgid killpg setsid statvfs sysconf mkfifo""",
    "signal": "SIGKILL SIGHUP SIGALRM SIGCHLD SIGUSR1 alarm pthread_sigmask sigwait",
}


class Partial(ModuleType):
    """A module without some of its names."""

    def __init__(self, module: ModuleType, missing: str) -> None:
        super().__init__(module.__name__)
        self._module, self._missing = module, missing.split()

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._module, name)


PARTIAL = {name: Partial(__import__(name), missing) for name, missing in MISSING.items()}
really_import = builtins.__import__


def import_as_there(
    name: str, globals: Mapping[str, object] | None = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> ModuleType:
    """Import as the other system would, where one of our modules asks."""
    asking = {str((globals or {}).get(key)).split(".")[0] for key in ("__name__", "__package__")}
    if asking.intersection(OURS) and level == 0:
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} on this system", name=name)
        if name in PARTIAL:
            return PARTIAL[name]
    return really_import(name, globals, locals, fromlist, level)


def opened() -> set[str]:
    """Return the paths that the processes of this session have open."""
    found = set[str]()
    if sys.platform != "linux":
        return found
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            if os.getsid(int(process)) == os.getsid(0):
                for descriptor in os.listdir(f"/proc/{process}/fd"):
                    with suppress(OSError):  # it is closed by now
                        found.add(os.readlink(f"/proc/{process}/fd/{descriptor}"))
    return found


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what Windows would refuse."""
    if event not in ("os.rename", "os.remove") or arguments[-1] != -1:  # with a folder's descriptor: shutil.rmtree
        return
    paths = [os.path.realpath(os.fsdecode(path)) for path in arguments[: 2 if event == "os.rename" else 1]]
    if not all(path.startswith(os.environ["IMNET_TEST_FOLDER"]) for path in paths) or paths[0].endswith(".lock"):
        return
    if busy := [file for file in opened() for path in paths if file == path or file.startswith(path + "/")]:
        raise PermissionError(13, f"{event} while it is open", busy[0])
    done = Path(paths[-1]).parent
    if "IMNET_TEST_STALL" in os.environ and done.name == "done" and len(list(done.glob("*.json"))) >= 2:
        time.sleep(600)


builtins.__import__ = import_as_there
sys.addaudithook(watch)
