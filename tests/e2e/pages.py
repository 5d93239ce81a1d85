"""The pages that users read, and the commands in them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
README_CN = ROOT / "README_CN.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("imnet-prep ", "mbv2 ")
OWN_PHOTOGRAPHS = "Your own photographs"  # the section with which a new user of README begins


def blocks(text: str) -> list[str]:
    """Return what is between the fences of Markdown, in order."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@cache
def commands(page: Path, section: str = "") -> list[str]:
    """Return our command lines of a page, continued lines joined, comments left out.

    Args:
        page: A Markdown file.
        section: The heading of the only section to read; every section where empty.
    """
    text = page.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines: list[str] = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ")
            if command.startswith(OURS) and not re.search(r"[<\[|]|\.\.\.", command):
                lines.append(re.sub(r"\s+#.*$", "", command))
    return lines


def run(command: str, folder: Path, *added: str) -> str:
    """Run a command line in a folder, with arguments added, and return its stdout."""
    words = [*shlex.split(command), *added]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout
