"""Record commands in a terminal, and draw what it showed as an animated SVG.

Each line of the terminal is kept with the times at which it changed. Only pauses are shortened. The picture plays once
and stays at its end; without animation it shows the end.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

COLUMNS, ROWS = 112, 30
LONGEST_PAUSE_S = 0.6
TYPING_S = 0.03  # per character of a command
READING_S = 1.5  # after each command
CHANGE_S = 0.3  # between two pictures of a line that keeps changing
CHARACTER_PX, LINE_PX, EDGE_PX = 7.83, 18, 14
_STYLES = {"": "", "1": "bold", "31": "red", "33": "yellow"}  # those that the commands use; 0 ends them
_TOKENS = re.compile(r"\x1b\[([\d;]*)m|\r|\n|\x1b.|.", re.DOTALL)
_STYLE = """
text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#d5dae0;white-space:pre}
.bold{font-weight:bold;fill:#fff}.red{fill:#ff8a80}.yellow{fill:#ffd866}.typed{fill:#8bd5a0}
.end{animation:hide 1ms backwards}.passing{visibility:hidden;animation:show 1s}
@keyframes hide{from,to{visibility:hidden}}
@keyframes show{from,to{visibility:visible}}
@media (prefers-reduced-motion:reduce){*{animation:none!important}}
"""


@dataclass
class Line:
    """A line of the terminal: its characters with their styles, and what it looked like from when on."""

    cells: list[tuple[str, str]] = field(default_factory=list)
    looks: list[tuple[float, str]] = field(default_factory=list)

    def note(self, now: float) -> None:
        """Keep what the line looks like now, in place of what it looked like for a moment only."""
        runs: list[list[str]] = []
        for character, style in self.cells:
            if not runs or runs[-1][1] != style:
                runs.append(["", style])
            runs[-1][0] += character
        spans = [f'<tspan class="{style}">{escape(text)}</tspan>' if style else escape(text) for text, style in runs]
        look = "".join(spans).rstrip()
        if self.looks and now - self.looks[-1][0] < CHANGE_S:
            now = self.looks.pop()[0]
        if not self.looks or self.looks[-1][1] != look:
            self.looks.append((now, look))


class Terminal:
    """What a terminal shows over time, in seconds of the recording."""

    def __init__(self) -> None:
        self.lines = [Line()]
        self.now = 0.0
        self._column = 0
        self._style = ""

    def run(self, command: str, folder: Path) -> None:
        """Type a command, run it in a folder, and show what it prints.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        self._style = "typed"
        for character in f"$ {command}":
            self._put(character)
        self.lines[-1].note(self.now)
        self.now += TYPING_S * len(command)
        self._style = ""
        self._feed("\n")
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        with subprocess.Popen(command, shell=True, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            self._watch(ours)
        os.close(ours)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        self.now += READING_S

    def _watch(self, terminal: int) -> None:
        last, rest = time.monotonic(), b""
        while True:
            try:
                rest += os.read(terminal, 1 << 16)
            except OSError:  # EIO: nobody writes to it any more
                return
            self.now += min(LONGEST_PAUSE_S, time.monotonic() - last)
            last = time.monotonic()
            whole = rest.decode("utf-8", "ignore")  # a character may come in two parts
            rest = rest[len(whole.encode()) :]
            self._feed(whole)

    def _feed(self, text: str) -> None:
        for token in _TOKENS.finditer(text):
            if token[0] == "\r":
                self._column = 0
            elif token[0] == "\n":
                self.lines[-1].note(self.now)
                self.lines.append(Line())
                self._column = 0
            elif token[1] is not None:
                self._style = _STYLES[token[1].removeprefix("0")]
            else:
                assert token[0][0] != "\x1b", f"expected colours alone; got {token[0]!r}"
                self._put(token[0])
        self.lines[-1].note(self.now)

    def _put(self, character: str) -> None:
        self.lines[-1].cells[self._column : self._column + 1] = [(character, self._style)]
        self._column += 1

    def svg(self, title: str) -> str:
        """Return the recording as an SVG."""
        lines = self.lines if self.lines[-1].cells else self.lines[:-1]
        shown = min(ROWS, len(lines))
        width, height = round(COLUMNS * CHARACTER_PX + 2 * EDGE_PX), shown * LINE_PX + 2 * EDGE_PX
        texts = "".join(_texts(line, number) for number, line in enumerate(lines))
        steps = "".join(
            f"{100 * line.looks[0][0] / self.now:.2f}%{{transform:translateY({(shown - number) * LINE_PX}px)}}"
            for number, line in enumerate(lines, 1)
            if number > shown
        )
        end = (shown - len(lines)) * LINE_PX
        scroll = f".all{{transform:translateY({end}px);animation:scroll {self.now:.1f}s step-end}}"
        scroll += f"@keyframes scroll{{0%{{transform:none}}{steps}}}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f"<title>{escape(title)}</title><style>{_STYLE}{scroll}</style>"
            f'<rect width="{width}" height="{height}" rx="8" fill="#1b1f24"/>'
            f'<svg y="{EDGE_PX}" height="{shown * LINE_PX}"><g class="all">{texts}</g></svg></svg>\n'
        )


def _texts(line: Line, number: int) -> str:
    """Return each look of a line as a text of its own, with the time for which it is shown."""
    place = f'x="{EDGE_PX}" y="{number * LINE_PX + 13}"'
    texts = []
    for (since, look), (until, _) in zip(line.looks, line.looks[1:], strict=False):
        if look:
            timing = f"animation-delay:{since:.2f}s;animation-duration:{until - since:.2f}s"
            texts.append(f'<text {place} class="passing" style="{timing}">{look}</text>')
    since, look = line.looks[-1]
    return "".join(texts) + (
        f'<text {place} class="end" style="animation-delay:{since:.2f}s">{look}</text>' * bool(look)
    )
