"""What every comparison is told: the photographs, the rounds, the peers; and the machine on which it runs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import photographs
from benchmarks.contenders import output_of
from benchmarks.photographs import Photographs
from benchmarks.rounds import ROUNDS, Result
from imnet_prep.cpu import cpu_count, library_versions, memory_bytes

ROOT = Path(__file__).parents[1]
PEER_VERSIONS = """
import importlib.metadata, json
names = {"torch", "torchvision", "nvidia-dali-cuda130", "spdl", "img2dataset"}
found = {one.name: one.version for one in importlib.metadata.distributions()}
print(json.dumps({name: version for name, version in sorted(found.items()) if name in names}))
"""
QUIET_LOAD = 0.5  # processes that wanted a core in the last minute; more is other people's work


@dataclass(frozen=True, slots=True)
class Setting:
    """What a comparison is told.

    Attributes:
        photos: The photographs.
        rounds: Rounds that count.
        seed: Decides the order of the contenders, and the made photographs.
        short: Whether to take fewer images and steps: a trial, which takes a few minutes.
        peers: Python with ``requirements-peers.txt``, or None: leave them out.
        img2dataset: Python with ``requirements-download.txt``, or None: leave it out.
        work: A folder for what is made on the way.
    """

    photos: Photographs
    rounds: int
    seed: int
    short: bool
    peers: Path | None
    img2dataset: Path | None
    work: Path


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every comparison has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--images", type=Path, metavar="DIR|TAR", help="your own JPEGs (default: made, see photographs.py)"
    )
    made.add_argument("--rounds", type=int, help=f"default {ROUNDS}, with --short 2; under {ROUNDS} it is a trial")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--short", action="store_true", help="a trial of a few minutes: less of everything")
    made.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", metavar="VENV", help="left out if absent")
    made.add_argument("--img2dataset", type=Path, default=ROOT / ".venv-img2dataset", metavar="VENV", help="likewise")
    made.add_argument("--json", type=Path, default=Path("build/bench/result.json"), help="where to write the result")
    return made


@contextmanager
def setting(args: argparse.Namespace) -> Iterator[Setting]:
    """Yield the setting of parsed options; its work folder is removed at the end."""
    rounds = (2 if args.short else ROUNDS) if args.rounds is None else args.rounds
    if rounds < 1:
        sys.exit(f"no rounds: expected 1 or more; got {rounds}; change --rounds")
    work = Path(tempfile.mkdtemp(prefix="imnet-bench-"))
    try:
        photos = photographs.load(args.images, seed=args.seed)
        peers, img2dataset = _python(args.peers), _python(args.img2dataset)
        yield Setting(photos, rounds, args.seed, args.short, peers, img2dataset, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _python(venv: Path) -> Path | None:
    if (python := venv / "bin" / "python").exists():
        return python
    print(f"without the peers in {venv}: not there; make bench makes it", file=sys.stderr)
    return None


def run(args: argparse.Namespace, comparisons: Sequence[Callable[[Setting], Iterable[Result]]]) -> None:
    """Run comparisons, print their tables and write the JSON after each."""
    before: dict[str, Any] = machine() | {"peers": {}}
    if before["load_before"] > QUIET_LOAD:
        print(f"this machine is busy (load {before['load_before']}): the figures will be low", file=sys.stderr)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with setting(args) as told:
        for python in filter(None, (told.peers, told.img2dataset)):
            before["peers"] |= json.loads(output_of([python, "-c", PEER_VERSIONS]))
        head = {"machine": before, "photographs": told.photos.describe(), "rounds": told.rounds, "seed": told.seed}
        head |= {"trial": told.short or told.rounds < ROUNDS}
        print(f"{before['cpu']}, {before['cores']} cores\n{told.photos.source}, {told.photos.mean_bytes / 1e3:.0f} kB")
        for comparison in comparisons:
            for result in comparison(told):
                print(f"\n{result.table()}", flush=True)
                results.append(result.to_json())
                args.json.write_text(json.dumps({**head, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.json}" + ("; a trial: no table is to be published from it" if head["trial"] else ""))


def machine() -> dict[str, Any]:
    """Return what runs the benchmarks: processor, system, versions, commit, and how busy it was before."""
    return {
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "memory_gib": round(memory_bytes() / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": library_versions("mindspore", "numpy", "opencv", "pillow", "onnxruntime"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),  # type: ignore[attr-defined, unused-ignore]
    }


def cpu_name() -> str:
    """Return the processor's name and those of its vector instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX bfloat16"}
    flags = [text for flag, text in known.items() if flag in facts.get("flags", "").split()]
    name = facts.get("model name", platform.machine())
    return f"{name} ({', '.join(flags)})" if flags else name


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
