"""Print results to stdout, errors and progress to stderr, and handle signals."""

import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from tqdm import tqdm

from imnet_prep.errors import ImnetError, Interrupted
from imnet_prep.types import Progress, ProgressCallback

P = ParamSpec("P")
T = TypeVar("T")
OWN_PACKAGES = ("imnet_prep", "mbv2")
INSTALL_MINDSPORE = "pip install imnet-prep, in an environment of its own (docs/install.md)"
LOG_EVERY_S = 10.0  # between progress lines where stderr is not a terminal


def guard(command: Callable[P, T]) -> Callable[P, T]:
    """Turn a library error into one line on stderr and its exit code; the only place that does so."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # the name of a file need not be UTF-8
        logging.basicConfig(format="%(message)s", stream=sys.stderr)  # warnings of libraries, and what we say ourselves
        for package in OWN_PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)
        try:
            with _safe_path():
                return command(*args, **kwargs)
        except ImnetError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except ImportError as error:
            click.echo(f"error: {_missing(error)}", err=True)
            sys.exit(ImnetError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(Interrupted.exit_code)
        except BrokenPipeError:
            sys.exit(1)

    return wrapped


def _missing(error: ImportError) -> str:
    """Say which library is missing or broken, in one line."""
    name = (error.name or "").split(".")[0]
    if name in OWN_PACKAGES:
        raise error  # our own mistake
    got = " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError):
        return f"a library cannot be imported; got {got}; `imnet-prep doctor` says which one, and what mends it"
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
        click.echo(f"{name:<{width}}  {value}")


def _rows(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, dict) and value:
            yield from _rows(value, name + " / ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value, 1):
                yield from _rows(item, f"{name} {number} / ")
        elif isinstance(value, float):
            yield name, f"{value:,.4g}" if abs(value) < 1 else f"{value:,.1f}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, f"{value:,}"
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback]:
    """Yield a callback that draws a bar on a terminal, and elsewhere prints a line every 10 seconds."""
    live = sys.stderr.isatty()
    started = last = time.monotonic()

    def update(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        pace = f"{progress.bytes_done / max(1e-9, now - started) / 1e6:.1f} MB/s" if progress.bytes_done else ""
        counts = (f"{name} {count}" for name, count in progress.counts)
        extras = ", ".join(filter(None, (*counts, pace, progress.note)))
        if live:
            bar.total, bar.unit = progress.total, f" {progress.unit}"
            bar.set_postfix_str(extras, refresh=False)
            bar.update(progress.done - bar.n)
        elif now - last >= LOG_EVERY_S or (progress.done == progress.total and now - started >= LOG_EVERY_S):
            last = now
            rate = progress.done / (now - started)
            line = f"{label}: {progress.done}/{progress.total or '?'} {progress.unit}, {rate:.1f}/s"
            if progress.total and rate:
                line += f", {(progress.total - progress.done) / rate:.0f} s left"
            click.echo(", ".join(filter(None, (line, extras))), err=True)

    with tqdm(desc=label, unit="img", smoothing=0.05, dynamic_ncols=True, file=sys.stderr, disable=not live) as bar:
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
            click.echo("stopping: finishing the work in hand (press again to stop at once)", err=True)

    previous = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            # The process is ending: another signal must not change its exit code.
            signal.signal(number, signal.SIG_IGN if received else handler)
