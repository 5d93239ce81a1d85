"""What commands print besides their result: log, colour, progress."""

from __future__ import annotations

import io
import logging
import re
import sys

import click
import pytest
from click.testing import CliRunner

from imnet_prep.cli import render
from imnet_prep.cli.render import guard, painted, progress_bar, show
from imnet_prep.errors import IntegrityError
from imnet_prep.types import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@click.command()
@click.option("--fail", is_flag=True)
@guard
def command(fail: bool) -> None:
    """Log at every level, show progress, and print a result or fail."""
    log = logging.getLogger("imnet_prep.test")
    log.debug("a detail")
    log.info("a notice")
    log.info("a notice")
    log.warning("a doubt")
    with progress_bar("work") as progress:
        progress(Progress(2, 20_000, per_s=2.0))
    if fail:
        raise IntegrityError("it is broken", got="a hole")
    show({"images": 2, "rejected": {}, "notes": [], "name": "", "ok": False}, as_json=False)


@pytest.fixture(autouse=True)
def _each_progress_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LOG_EVERY_S", 0.0)


def test_notices_and_progress_go_to_stderr_and_nothing_empty_is_shown() -> None:
    done = CliRunner().invoke(command)
    assert done.stdout == "images  2\nok      no\n"
    notice, doubt, progress = done.stderr.splitlines()
    assert (notice, doubt) == ("a notice", "warning: a doubt")
    assert progress == "work: 2/20000 images, 2.0/s, 2:46:39 left"


def test_quiet_leaves_warnings_and_errors() -> None:
    assert CliRunner().invoke(command, ["--quiet"]).stderr == "warning: a doubt\n"
    failed = CliRunner().invoke(command, ["-q", "--fail"])
    assert failed.stderr == "warning: a doubt\nerror: it is broken; got a hole\n"
    assert failed.exit_code == 3


def test_verbose_tells_details_with_the_time_and_where_an_error_arose() -> None:
    failed = CliRunner().invoke(command, ["--verbose", "--fail"])
    assert re.search(r"^\d\d:\d\d:\d\d a detail$", failed.stderr, re.MULTILINE)
    assert "in command" in failed.stderr
    assert failed.stderr.splitlines()[-1] == "error: it is broken; got a hole"
    assert "Traceback" not in CliRunner().invoke(command, ["--fail"]).stderr


def test_a_command_leaves_the_log_as_it_was() -> None:
    before = logging.getLogger("imnet_prep").level, list(logging.getLogger().handlers)
    CliRunner().invoke(command, ["--verbose", "--fail"])
    assert (logging.getLogger("imnet_prep").level, list(logging.getLogger().handlers)) == before


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert painted("error:", _Terminal(), fg="red") == click.style("error:", fg="red")
    assert painted("error:", io.StringIO(), fg="red") == "error:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted("error:", _Terminal(), fg="red") == "error:"


def test_the_bar_shows_the_rate_that_the_job_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(render.LOG, "level", logging.INFO)
    with progress_bar("train") as progress:
        progress(Progress(1, 1000, unit="features", per_s=250.0))
        progress(Progress(500, 1000, unit="features", per_s=250.0))
    assert "00:02, 250.00 features/s" in screen.getvalue()


def test_bytes_are_counted_in_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("hash") as progress:
        progress(Progress(500_000_000, 2_000_000_000, "bytes", 500_000_000, per_s=1e7))
        progress(Progress(500_000_000, None, "bytes", 500_000_000, per_s=1e7))
    assert capsys.readouterr().err.splitlines() == [
        "hash: 500/2000 MB, 10.0 MB/s, 02:30 left",
        "hash: 500/? MB, 10.0 MB/s",
    ]


def test_a_bar_counts_images_again_after_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(render.LOG, "isEnabledFor", lambda level: True)
    with progress_bar("convert") as progress:
        progress(Progress(5_000_000, 10_000_000, "bytes", per_s=1e6))
        progress(Progress(1500, 3000, "images", per_s=10.0))
    last = terminal.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert "1500/3000" in last


@pytest.mark.parametrize(
    ("rate", "unit", "shown"), [(0.1, " images", "10.00s/images]"), (25.0, " images", "25.00 images/s]")]
)
def test_the_rate_of_a_bar_is_readable_when_it_is_slow(rate: float, unit: str, shown: str) -> None:
    with render._Bar(total=100, unit=unit, file=io.StringIO()) as bar:
        bar.measured = rate
        bar.update(50)
        assert str(bar).endswith(shown)
