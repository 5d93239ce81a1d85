"""Make Linux look like Windows to this project's modules; Python runs it at each start, in workers too.

Imports of this project get the ``sys.platform`` of Windows, and nothing that only some systems have; all other modules
keep everything. Below the folder of IMNET_TEST_FOLDER, files obey the rules of Windows in the whole process: what a
process of this session has open, or as its current folder, is neither renamed nor deleted, nor is a folder that holds
it; ``os.rename`` replaces nothing and ``os.replace`` no folder; and a name is found in capital and in small letters.
With IMNET_TEST_STALL a worker waits for ever before the third note of a finished shard, so that it is surely killed.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

OURS = ("imnet_prep", "mbv2", "cli")
MISSING_MODULES = ("fcntl", "resource", "grp", "pwd", "termios")
MISSING = {
    "os": """
        pread preadv pwrite pwritev readv writev fchmod fchown O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK posix_fadvise
        posix_fallocate sendfile fork forkpty register_at_fork sched_getaffinity sched_setaffinity memfd_create getppid
        geteuid getuid getpgid killpg setsid statvfs sync sysconf mkfifo""",
    "signal": "SIGKILL SIGHUP SIGALRM SIGCHLD SIGUSR1 alarm pthread_sigmask sigwait",
}
DECIDES = ("open", "unlink", "remove", "rmdir")  # whether a file is in use
TAKES_A_PATH = (
    *DECIDES,
    "stat",
    "lstat",
    "mkdir",
    "listdir",
    "scandir",
    "access",
    "utime",
    "chmod",
    "readlink",
    "statvfs",
)
FOLDER = os.environ["IMNET_TEST_FOLDER"]


# --- what our modules import ------------------------------------------------------------------------------------------


class Partial(ModuleType):
    """A module without some of its names, and with others."""

    def __init__(self, name: str, missing: str = "", **others: object) -> None:
        super().__init__(name)
        self._module, self._missing = __import__(name), missing.split()
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._module, name)


class Kernel32:
    """The functions of Windows that are called: a machine of 2 cores and 8 GB."""

    def GetProcessAffinityMask(self, process: object, mine: Any, all_cores: Any) -> int:
        mine._obj.value = all_cores._obj.value = 0b11
        return 1

    def GetPhysicallyInstalledSystemMemory(self, kilobytes: Any) -> int:
        kilobytes._obj.value = 8 << 20
        return 1


really_import = builtins.__import__


def import_as_there(
    name: str, globals: Mapping[str, object] | None = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> ModuleType:
    """Import as Windows would, where one of our modules asks."""
    asking = {str((globals or {}).get(key)).split(".")[0] for key in ("__name__", "__package__")}
    if asking.intersection(OURS) and level == 0:
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} on this system", name=name)
        if name in PARTIAL:
            return PARTIAL[name]
    return really_import(name, globals, locals, fromlist, level)


# --- the rules for files ----------------------------------------------------------------------------------------------


@contextmanager
def alone() -> Iterator[None]:
    """Let no other process open a file between the look whether it is open and its deletion."""
    if getattr(held, "is_held", False):
        yield
        return
    descriptor = really_open(__file__, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # type: ignore[attr-defined, unused-ignore]
        held.is_held = True
        yield
    finally:
        held.is_held = False
        os.close(descriptor)


def spelled(path: Any) -> Any:
    """Return a path as it is spelled on the disk, if it is there in other letters."""
    if not isinstance(path, str | os.PathLike):
        return path
    whole = os.path.abspath(os.fsdecode(path))
    if not whole.startswith(f"{FOLDER}/") or is_there(whole):
        return path
    here = FOLDER
    for name in whole.removeprefix(f"{FOLDER}/").split("/"):
        names = {}
        if not is_there(f"{here}/{name}"):
            with suppress(OSError):
                names = {one.casefold(): one for one in really_list(here)}
        here = f"{here}/{names.get(name.casefold(), name)}"
    return here


def is_there(path: str) -> bool:
    """Return whether there is something of exactly this name."""
    try:
        return bool(really_stat(path))
    except OSError:
        return False


def respelling(function: Callable[..., Any], *, decides: bool = False) -> Callable[..., Any]:
    """Let a function find its first argument in other letters too."""

    @wraps(function)
    def respelled(*arguments: Any, **options: Any) -> Any:
        with alone() if decides else nullcontext():
            return function(*map(spelled, arguments[:1]), *arguments[1:], **options)

    return respelled


class Connection(sqlite3.Connection):
    """A database that is found in other letters too."""

    def __init__(self, address: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(address, str) and address.startswith("file:"):
            path, mark, query = address.removeprefix("file:").partition("?")
            super().__init__(f"file:{quote(spelled(unquote(path)))}{mark}{query}", *arguments, **options)
        else:
            super().__init__(spelled(address), *arguments, **options)

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql.startswith("ATTACH"):
            parameters = [spelled(os.fsdecode(path)) for path in parameters]
        return super().execute(sql, parameters)


def renaming(function: Callable[..., Any], replaces: bool) -> Callable[..., Any]:
    """Let a rename refuse a name that is taken."""

    @wraps(function)
    def rename(source: Any, target: Any, **options: Any) -> None:
        source, target = spelled(source), os.path.abspath(os.fsdecode(spelled(target)))
        if target.startswith(f"{FOLDER}/") and is_there(target) and not os.path.samefile(source, target):
            if not replaces:
                raise FileExistsError(17, "the name is taken", str(source), None, target)
            if os.path.isdir(target):
                raise PermissionError(13, "a folder has the name", str(source), None, target)
        stall_before(Path(target))
        with alone():
            function(source, target, **options)

    return rename


def in_use() -> set[str]:
    """Return the paths that the processes of this session have open, and their current folders."""
    found = set[str]()
    if sys.platform != "linux":
        return found
    for process in filter(str.isdigit, really_list("/proc")):
        with suppress(OSError):  # it has ended
            if os.getsid(int(process)) == os.getsid(0):
                found.add(os.readlink(f"/proc/{process}/cwd"))
                for descriptor in really_list(f"/proc/{process}/fd"):
                    with suppress(OSError):  # it is closed by now
                        found.add(os.readlink(f"/proc/{process}/fd/{descriptor}"))
    return found


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to rename or delete what is in use."""
    if event not in ("os.rename", "os.remove", "os.rmdir"):
        return
    paths = [os.path.realpath(os.fsdecode(path)) for path in arguments[: 2 if event == "os.rename" else 1]]
    if not all(path.startswith(f"{FOLDER}/") for path in paths):
        return
    if busy := [file for file in in_use() for path in paths if file == path or file.startswith(f"{path}/")]:
        raise PermissionError(13, f"{event} while it is in use", busy[0])


def stall_before(target: Path) -> None:
    """Wait for ever before the third note of a finished shard."""
    done = target.parent
    if "IMNET_TEST_STALL" in os.environ and done.name == "done" and len(list(done.glob("*.json"))) >= 2:
        time.sleep(600)


held = threading.local()
really_open, really_list, really_stat = os.open, os.listdir, os.lstat
for name in TAKES_A_PATH:
    setattr(os, name, respelling(getattr(os, name), decides=name in DECIDES))
os.rename, os.replace = renaming(os.rename, replaces=False), renaming(os.replace, replaces=True)
builtins.open = io.open = respelling(io.open)
shutil._use_fd_functions = False  # type: ignore[attr-defined]  # delete by path, as there
PARTIAL = {
    **{name: Partial(name, missing) for name, missing in MISSING.items()},
    "sys": Partial("sys", platform="win32"),
    "ctypes": Partial("ctypes", windll=SimpleNamespace(kernel32=Kernel32())),
    "sqlite3": Partial("sqlite3", connect=Connection),
}
builtins.__import__ = import_as_there
sys.addaudithook(watch)
