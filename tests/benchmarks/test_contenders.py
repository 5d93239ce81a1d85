from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.contenders import Contender
from benchmarks.download import img2dataset
from tests.records import write_folder
from tests.synthetic import jpeg

LOADER = ("--mode", "train", "--threads", "1", "--seconds", "0.05")


@pytest.mark.slow
def test_a_contender_measures_whenever_it_is_asked(tmp_path: Path) -> None:
    rows = [(f"class{k % 2}/{k}.jpg", k % 2, jpeg(k % 2, k, 64, 48)) for k in range(64)]
    write_folder(tmp_path / "records", {"train": rows}, shards=1, classes=2)
    with Contender(sys.executable, "loaders", "ours", "--root", tmp_path, *LOADER) as contender:
        for _ in range(2):
            assert contender()["images_per_s"] > 0
            wait_for_state(contender.pid, "T")  # stopped
    wait_for_state(contender.pid, "gone")


def wait_for_state(pid: int, *wanted: str) -> None:
    """Wait until a process is in a state: a letter as /proc has them, or gone."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            state = "gone"
        if state in wanted:
            return
        time.sleep(0.02)


def test_contenders_end_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    program = """
import sys, time
from benchmarks.contenders import Contender
with Contender(sys.executable, "loaders", "limit", *sys.argv[1:]) as contender:
    contender()
    print(contender.pid, flush=True)
    time.sleep(60)
"""
    (tmp_path / "files").mkdir()
    for k in range(64):
        (tmp_path / "files" / f"{k}.JPEG").write_bytes(jpeg(k % 2, k, 64, 48))
    command = [sys.executable, "-c", program, "--root", str(tmp_path), *LOADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for_state(pid, "T")
        process.kill()
    wait_for_state(pid, "Z", "gone")


def test_what_a_contender_that_fails_said_is_shown(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"benchmarks\.loaders ours .* failed:\n(.|\n)*records: no such folder"),
        Contender(sys.executable, "loaders", "ours", "--root", tmp_path, *LOADER) as contender,
    ):
        contender()


def test_images_that_img2dataset_loses_are_counted(tmp_path: Path) -> None:
    program = f"""#!{sys.executable}
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output_folder") + 1])
out.mkdir()
for shard, (start, end, successes) in enumerate([(10, 12, 7), (11, 13, 9)]):
    stats = {{"start_time": start, "end_time": end, "successes": successes}}
    (out / f"{{shard:05d}}_stats.json").write_text(json.dumps(stats))
"""
    (tmp_path / "img2dataset").write_text(program, encoding="utf-8")
    (tmp_path / "img2dataset").chmod(0o755)
    measured = img2dataset([f"http://127.0.0.1/{k}.jpg" for k in range(20)], tmp_path, tmp_path / "python")
    assert measured["lost"] == 4
    assert measured["images_per_s"] == pytest.approx(16 / 3)


@pytest.mark.long
def test_the_whole_runs_without_peers(tmp_path: Path) -> None:
    photos = tmp_path / "mine"
    photos.mkdir()
    for k in range(40):
        (photos / f"{k}.jpg").write_bytes(jpeg(k % 2, k, 320, 240))
    command = [sys.executable, "-m", "benchmarks", "--short", "--rounds", "1", "--images", str(photos)]
    command += ["--peers", str(tmp_path / "no"), "--img2dataset", str(tmp_path / "no"), "--json", str(tmp_path / "r")]
    subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    result = json.loads((tmp_path / "r").read_text(encoding="utf-8"))
    assert result["trial"]
    assert {one["case"] for one in result["results"]} > {"convert", "download", "load-short256-train", "train-224"}
    assert not list(tmp_path.glob("imnet-bench-*"))


@pytest.mark.long
def test_the_rehearsal_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--count", "2000", "--work", str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (run,) = json.loads(done.stdout)["runs"]
    assert run["images"] == 2000
    assert set(run) >= {"plan", "convert", "verify_hash", "verify_decode", "loader"}
    assert not list(tmp_path.iterdir())
