"""Make the pictures of README and docs: pages in a headless Chromium, and commands in a terminal.

Command::

    python -m docs.pictures.make --weights mobilenetv2_100.safetensors

Everything is made from drawn images: pages from those of ``imnet-prep demo``, the terminal from two of its classes. The
weights are those that README downloads. ``build/pictures`` keeps the demo for the next time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from docs.pictures.terminal import Terminal
from tests.chromium import Chromium
from tests.e2e.pages import OWN_PHOTOGRAPHS, README, ROOT, commands
from tests.e2e.photographs import KINDS, draw_photographs

HERE = Path(__file__).parent
WORK = ROOT / "build" / "pictures"
SHOWN = ("to-mindrecord", "verify", "convert", "train", "predict")  # of the commands in README
SECTIONS = {"run": "#overview, #curves", "records": "#classes"}  # by report: what is shown of it
WIDTH_PX = 1120
COLOURS = 128  # a third of the bytes of all colours


def make_pages() -> None:
    """Take a picture of some sections of each report of the demo."""
    demo = WORK / "demo"
    for command in (
        f"imnet-prep demo --out {demo}",
        f"imnet-prep report {demo}/records --out {WORK}/records.html",
        f"mbv2 report {demo}/run --records {demo}/records --out {WORK}/run.html",
    ):
        subprocess.run(command, shell=True, check=True)
    with Chromium() as browser:
        for name, sections in SECTIONS.items():
            browser.open((WORK / f"{name}.html").as_uri(), WIDTH_PX)
            browser.run(f"document.querySelectorAll('nav, footer, section:not({sections})').forEach((e) => e.remove())")
            browser.broken_images()  # waits for all of them
            path = HERE / f"{name}.png"
            browser.resize(WIDTH_PX, browser.run("document.documentElement.scrollHeight"))
            browser.screenshot(path)
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def make_recording(weights: Path) -> None:
    """Record the commands of README's first section on photographs of two kinds."""
    folder = WORK / "terminal"
    shutil.rmtree(folder, ignore_errors=True)
    draw_photographs(folder)
    shutil.copy(weights, folder / "mobilenetv2_100.safetensors")
    terminal = Terminal()
    for command in commands(README, OWN_PHOTOGRAPHS):
        if command.split()[1] in SHOWN:
            terminal.run(command, folder)
    title = f"A terminal: photographs of {' and '.join(KINDS)} are converted, verified, trained on and predicted"
    (HERE / "terminal.svg").write_text(terminal.svg(title), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of README and docs.")
    parser.add_argument("--weights", type=Path, required=True, help="timm's mobilenetv2_100.safetensors")
    weights = parser.parse_args().weights
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    WORK.mkdir(parents=True, exist_ok=True)
    make_recording(weights)
    make_pages()


if __name__ == "__main__":
    main()
