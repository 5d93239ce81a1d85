"""Print results to stdout, errors and progress to stderr, and handle signals."""

import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TextIO, TypeVar

import click
from tqdm import tqdm

from imnet_prep.errors import ImnetError, Interrupted
from imnet_prep.types import Progress, ProgressCallback

P = ParamSpec("P")
T = TypeVar("T")
LOG = logging.getLogger(__name__)
OWN_PACKAGES = ("imnet_prep", "mbv2")
INSTALL_MINDSPORE = "pip install imnet-prep, in an environment of its own (docs/install.md)"
LOG_EVERY_S = 10.0  # between progress lines where stderr is not a terminal


def guard(command: Callable[P, T]) -> Callable[P, T]:
    """Turn a library error into one line on stderr and its exit code; the only place that does so.

    It adds ``--quiet`` and ``--verbose``, which decide what of the log is printed.
    """

    @click.option("-q", "--quiet", is_flag=True, help="Print only the result, warnings and errors.")
    @click.option("-v", "--verbose", is_flag=True, help="Print details too, with the time, and where an error arose.")
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # the name of a file need not be UTF-8
        try:
            with _safe_path(), _log(quiet=bool(kwargs.pop("quiet", False)), verbose=bool(kwargs.pop("verbose", False))):
                return _named(command, *args, **kwargs)
        except BrokenPipeError:
            sys.exit(1)

    return wrapped


def _named(command: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return command(*args, **kwargs)
    except ImnetError as error:
        LOG.debug("raised here:", exc_info=True)
        _say_error(str(error))
        sys.exit(error.exit_code)
    except ImportError as error:
        LOG.debug("raised here:", exc_info=True)
        _say_error(_missing(error))
        sys.exit(ImnetError.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(Interrupted.exit_code)


def _say_error(text: str) -> None:
    """Print an error to stderr."""
    click.echo(f"{painted('error:', sys.stderr, fg='red')} {text}", err=True)


def painted(text: str, stream: TextIO, **style: Any) -> str:
    """Return a text in colour where a stream is a terminal and NO_COLOR (https://no-color.org) is not set."""
    return click.style(text, **style) if stream.isatty() and not os.environ.get("NO_COLOR") else text


class _Lines(logging.Handler):
    """Prints the log to stderr, above a progress bar where there is one; a notice once."""

    def __init__(self) -> None:
        super().__init__()
        self._notices: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno == logging.INFO:
            if text in self._notices:
                return
            self._notices.add(text)
        if record.levelno >= logging.WARNING:
            text = f"{painted('warning:', sys.stderr, fg='yellow')} {text}"
        with suppress(OSError, ValueError):  # the terminal may be gone
            tqdm.write(text, file=sys.stderr)


@contextmanager
def _log(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Print what our packages log, from a level on, and the warnings of other libraries."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    root, packages, handler = logging.getLogger(), [logging.getLogger(name) for name in OWN_PACKAGES], _Lines()
    if verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = [package.level for package in packages]
    root.addHandler(handler)
    for package in packages:
        package.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for package, was in zip(packages, before, strict=True):
            package.setLevel(was)


def _missing(error: ImportError) -> str:
    """Say which library is missing or broken, in one line."""
    name = (error.name or "").split(".")[0]
    if name in OWN_PACKAGES:
        raise error  # our own mistake
    got = " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError):
        return f"a library cannot be imported; got {got}; `imnet-prep doctor` says which one, and how to fix it"
    if name == "mindspore":
        return f"this command needs MindSpore, which is not installed; {INSTALL_MINDSPORE}"
    return f"this command needs {name}, which is not installed; `imnet-prep doctor` says what installs it"


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep worker processes from importing a module, such as types.py, from the current folder."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]


def show(result: dict[str, Any], as_json: bool, rows: Iterable[tuple[str, str]] | None = None) -> None:
    """Print a result: as one JSON object, or as aligned rows (by default one per value)."""
    if as_json:
        click.echo(json.dumps(result, sort_keys=True))
        return
    lines = list(_rows(result) if rows is None else rows)
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        click.echo(f"{painted(name.ljust(width), sys.stdout, bold=True)}  {value}")


def _rows(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        name = prefix + key.replace("_", " ")
        if value in (None, "", [], {}):
            continue
        if isinstance(value, dict):
            yield from _rows(value, name + " / ")
        elif isinstance(value, list) and isinstance(value[0], dict):
            for number, item in enumerate(value, 1):
                yield from _rows(item, f"{name} {number} / ")
        elif isinstance(value, float):
            yield name, f"{value:,.4g}" if abs(value) < 1 else f"{value:,.1f}"
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, int):
            yield name, f"{value:,}"
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that shows the rate that the job measures, where it does: start-up is then left out."""

    measured: float | None = None

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        values: MutableMapping[str, Any] = super().format_dict
        if self.measured is not None:
            values["rate"] = self.measured
        if (values["rate"] or 1) < 1:
            values["unit"] = values["unit"].strip()  # tqdm then prints "2.50s/images"
        return values


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback]:
    """Yield a callback that draws a bar on a terminal, and elsewhere prints a line every 10 seconds.

    A job may have several parts that count from 0. With ``--quiet``, nothing is shown.
    """
    shown, live = LOG.isEnabledFor(logging.INFO), sys.stderr.isatty()
    started = last = time.monotonic()
    before = 0

    def update(progress: Progress) -> None:
        nonlocal started, last, before
        now = time.monotonic()
        if progress.done < before:
            started = now
            bar.reset()
        before = progress.done
        in_bytes = progress.unit == "bytes"  # then the rate says it
        pace = ""
        if progress.bytes_done and not in_bytes:
            pace = f"{progress.bytes_done / max(1e-9, now - started) / 1e6:.1f} MB/s"
        counts = (f"{name} {count}" for name, count in progress.counts)
        extras = ", ".join(filter(None, (*counts, pace, progress.note)))
        if live:
            bar.total, bar.measured = progress.total, progress.per_s
            bar.unit, bar.unit_scale = "B" if in_bytes else f" {progress.unit}", in_bytes
            bar.set_postfix_str(extras, refresh=False)
            bar.update(progress.done - bar.n)
        elif shown and (
            now - last >= LOG_EVERY_S or (progress.done == progress.total and now - started >= LOG_EVERY_S)
        ):
            last = now
            rate = progress.done / max(1e-9, now - started) if progress.per_s is None else progress.per_s
            if in_bytes:
                total = f"{progress.total / 1e6:.0f}" if progress.total else "?"
                line = f"{label}: {progress.done / 1e6:.0f}/{total} MB, {rate / 1e6:.1f} MB/s"
            else:
                line = f"{label}: {progress.done}/{progress.total or '?'} {progress.unit}"
                line += f", {rate:.1f}/s" if rate else ""
            if progress.total and rate:
                line += f", {tqdm.format_interval((progress.total - progress.done) / rate)} left"
            click.echo(", ".join(filter(None, (line, extras))), err=True)

    hidden = not (shown and live)
    with _Bar(desc=label, unit="img", smoothing=0.05, dynamic_ncols=True, file=sys.stderr, disable=hidden) as bar:
        yield update


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a signal to stop was received; a second one stops at once."""
    from imnet_prep.process_pool import stop_signals

    received: list[int] = []

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        if len(received) > 1:
            raise KeyboardInterrupt
        with suppress(OSError):  # the terminal may be gone
            click.echo("stopping: finishing what is in progress (press again to stop at once)", err=True)

    previous = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            # The process is ending: another signal must not change its exit code.
            signal.signal(number, signal.SIG_IGN if received else handler)
