"""A conversion killed with SIGKILL at random moments and resumed each time, compared byte for byte.

Command::

    python -m benchmarks.kill_resume --images ../shared/data/imagenet-samples-250.tar --count 4000 --kills 25

Then the same plan with one worker, and on Dask with two worker processes of which one is killed half-way. Exits 1 where
a byte differs, or where a shard that was finished before a kill was written again (its inode or mtime changed).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import photographs

COMMAND = [sys.executable, "-m", "imnet_prep", "to-mindrecord"]
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs (default: made, see photographs.py)")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-kill")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    folder = photographs.load(args.images).write(args.work / "photos", args.count)
    call = [*COMMAND, str(folder), "--shards", "40"]
    started = time.monotonic()
    run([*call, "--out", str(args.work / "whole"), "--workers", "2"])
    seconds = time.monotonic() - started
    expected = digests(args.work / "whole")
    result: dict[str, Any] = {"images": args.count, "uninterrupted_s": round(seconds, 1)}
    result |= killed(call, args.work, args.kills, seconds, random.Random(args.seed), expected)
    run([*call, "--out", str(args.work / "one"), "--workers", "1"])
    result["one_worker_same"] = digests(args.work / "one") == expected
    result["dask_same"] = on_dask(call, args.work, seconds) == expected
    shutil.rmtree(args.work)
    print(json.dumps(result, indent=1))
    if not (result["same"] and result["kept"] and result["one_worker_same"] and result["dask_same"]):
        raise SystemExit(1)


def run(call: list[str]) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {done.stderr[-2000:]}")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of each file of a finished shard."""
    found = {}
    for note in (folder / ".work" / "done").glob("*.json"):
        for name in (note.stem, note.stem + ".db"):
            state = (folder / name.split("-")[0] / name).stat()
            found[name] = (state.st_ino, state.st_mtime_ns)
    return found


def killed(
    call: list[str], work: Path, kills: int, seconds: float, rng: random.Random, expected: dict[str, str]
) -> dict[str, Any]:
    """Kill and run again until ``kills`` are done, each after a random time; start anew whenever one got through."""
    done, whole, before, kept, same = 0, 0, dict[str, tuple[int, int]](), True, True
    out, partial = work / "records", work / "records.partial"
    while done < kills:
        process = subprocess.Popen([*call, "--out", str(out), "--workers", "2"], **QUIET)  # type: ignore[call-overload]
        try:
            process.wait(rng.uniform(0.2, 0.6 * seconds))
            whole += 1
            same &= process.returncode == 0 and digests(out) == expected
            shutil.rmtree(out)
            before = {}
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            now = states(out if out.exists() else partial) if partial.exists() else before
            kept &= all(now.get(name) == state for name, state in before.items())
            before = now
            print(f"kill {done}: {len(now) // 2} shards finished", file=sys.stderr, flush=True)
    run([*call, "--out", str(out), "--workers", "2"])
    for name, state in before.items():
        path = out / name.split("-")[0] / name
        kept &= (path.stat().st_ino, path.stat().st_mtime_ns) == state
    return {"kills": done, "completed_between": whole, "same": same and digests(out) == expected, "kept": kept}


def on_dask(call: list[str], work: Path, seconds: float) -> dict[str, str]:
    """Carry out the plan on two Dask worker processes, one of which is killed half-way."""
    file = work / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]

    processes = [subprocess.Popen([*dask, "--host", "127.0.0.1", "--scheduler-file", str(file)], **QUIET)]  # type: ignore[call-overload]
    try:
        while not file.exists():
            time.sleep(0.1)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
        for number in range(2):
            folder = ["--local-directory", str(work / f"dask{number}"), "--no-dashboard", "--no-nanny"]
            processes.append(subprocess.Popen([*worker, *folder], **QUIET))  # type: ignore[call-overload]
        time.sleep(5)
        address = json.loads(file.read_text())["address"]
        out = work / "dask"
        run_it = subprocess.Popen([*call, "--out", str(out), "--executor", "dask", "--scheduler", address], **QUIET)  # type: ignore[call-overload]
        done = work / "dask.partial" / ".work" / "done"
        while run_it.poll() is None and len(list(done.glob("*.json"))) < 20:
            time.sleep(0.02)
        processes[1].kill()
        if run_it.wait(60 + 20 * seconds):
            raise SystemExit("the conversion on Dask failed")
        return digests(out)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
