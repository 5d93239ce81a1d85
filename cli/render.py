"""How results, errors and progress reach a person: stdout is the result, stderr is everything else."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from tqdm import tqdm

from imnet_prep.errors import ImnetError, Interrupted
from imnet_prep.types import Progress, ProgressCallback

P = ParamSpec("P")
T = TypeVar("T")
LOG_EVERY_S = 10.0  # between progress lines where stderr is not a terminal


def guard(command: Callable[P, T]) -> Callable[P, T]:
    """Turn a library error into one line on stderr and its exit code; the only place that does so."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        try:
            return command(*args, **kwargs)
        except ImnetError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(Interrupted.exit_code)
        except BrokenPipeError:
            sys.exit(1)

    return wrapped


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or a line a value for a person."""
    if as_json:
        emit_json(result)
    else:
        table(list(_rows(result)))


def emit_json(result: dict[str, Any]) -> None:
    """Print the one JSON object that ``--json`` promises."""
    click.echo(json.dumps(result, sort_keys=True))


def table(rows: list[tuple[str, str]]) -> None:
    """Print ``name  value`` lines, aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
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
    """Yield a callback that draws a bar on a terminal, or prints a line now and then elsewhere."""
    live = sys.stderr.isatty()
    bar = tqdm(desc=label, unit="img", smoothing=0.05, dynamic_ncols=True, file=sys.stderr, disable=not live)
    started = last = time.monotonic()

    def update(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        pace = f"{progress.bytes_done / max(1e-9, now - started) / 1e6:.1f} MB/s" if progress.bytes_done else ""
        counts = (f"{name} {count}" for name, count in progress.counts)
        extras = [*filter(None, (*counts, pace, progress.note))]
        if live:
            bar.total, bar.unit = progress.total, f" {progress.unit}"
            bar.set_postfix_str(", ".join(extras), refresh=False)
            bar.update(progress.done - bar.n)
            return
        if now - last >= LOG_EVERY_S or (progress.done == progress.total and now - started >= LOG_EVERY_S):
            last = now
            rate = progress.done / (now - started)
            total = f"/{progress.total}" if progress.total is not None else ""
            left = f", {(progress.total - progress.done) / rate:.0f} s left" if progress.total and rate else ""
            line = f"{label}: {progress.done}{total} {progress.unit}, {rate:.1f}/s{left}"
            click.echo(", ".join([line, *extras]), err=True)

    try:
        yield update
    finally:
        bar.close()


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM has come; a second signal stops at once."""
    hits: list[int] = []

    def note(signum: int, _frame: object) -> None:
        hits.append(signum)
        if len(hits) > 1:
            raise KeyboardInterrupt
        click.echo("stopping: finishing what is in hand (again to stop at once)", err=True)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(hits)
    finally:
        for number, handler in previous.items():
            # Asked to stop, the process is on its way out: another signal now must not spoil its exit code.
            signal.signal(number, signal.SIG_IGN if hits else handler)
