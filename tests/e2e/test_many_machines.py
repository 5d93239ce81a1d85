"""``docs/many-machines.md`` on four hosts: its own commands, with a worker and a host killed on the way.

The hosts are namespaces of this machine, each with an address, a host name and a folder of its own. The scheduler, the
S3 server and the servers of the images are on a fifth, ``head``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.records.manifest import load_manifest
from mbv2.weights.checkpoint import read_checkpoint
from tests.imnet_prep.download.test_parts import HOSTS, many_hosts, write_lines
from tests.machines import HUB, Host, hosts
from tests.needs import needs
from tests.s3 import KEY, SECRET

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "many-machines.md"
SERVERS, EACH = 16, 10  # of each ten URLs of a server, one is gone
IMAGES, GONE = 144, 16
SAVED = 3  # step of the last save before a host dies
SMALL = "--recipe tiny --epochs 2 --image-size 32 --batch-size 8 --width 0.35 --save-every 3 --json"
INSTEAD = {  # small inputs, in folders of the test
    "--nworkers 16": "--no-dashboard",
    "imnet-prep download": "imnet-prep download --allow-private --json",
    "--val-fraction 0.05": "--val-fraction 0.1 --shards 8 --json",
    "--level decode": "--level decode --json",
    "--recipe paper": SMALL,
    "python -m mbv2": "python -m tests.mbv2.small_mbv2",
    "mbv2 eval": "python -m tests.mbv2.small_mbv2 eval --json",
}
UPLOAD = """
import pathlib, sys, fsspec
source, target = pathlib.Path(sys.argv[-2]), sys.argv[-1]
for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
    if path.is_file() and not (source.is_dir() and path.name == "manifest.json"):
        to = f"{target}/{path.relative_to(source)}" if source.is_dir() else target
        fsspec.open(to, "wb").open().write(path.read_bytes())
"""
MAKE_BUCKET = """
import boto3, botocore.config
retries = botocore.config.Config(retries={"max_attempts": 20})
boto3.client("s3", config=retries).create_bucket(Bucket="my-bucket")
"""
COUNT_WORKERS = "from distributed import Client; Client('tcp://head:8786').wait_for_workers({}, 90)"

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
needs("distributed")


@dataclass
class World:
    """The hosts by name, and what is running."""

    folder: Path
    hosts: dict[str, Host]
    stack: ExitStack
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def shared(self) -> Path:
        """The folder that all hosts see."""
        return self.folder / "shared"

    def start(self, host: str, command: str, cores: str = "") -> subprocess.Popen[str]:
        """Start a command of the page on a host, with small inputs, bound to some cores."""
        for old, new in INSTEAD.items():
            command = command.replace(old, new)
        command = command.replace("/shared/", f"{self.shared}/").replace("/scratch", "scratch")
        if shutil.which("aws") is None and command.startswith("aws "):
            command = f"python -c '{UPLOAD}' {command}"
        bound = ["taskset", "--cpu-list", cores] if cores else []
        process = subprocess.Popen(
            [*self.hosts[host].around, *bound, "bash", "-c", command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def run(self, host: str, command: str, cores: str = "") -> str:
        """Run a command to its end and return what it prints."""
        return ended(self.start(host, command, cores))

    def close(self) -> None:
        """End what runs on the hosts."""
        for host in self.hosts.values():
            host.kill()
        for process in self.running:
            process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    said, complained = process.communicate(timeout=600)
    assert process.returncode == 0, f"{said[-3000:]}\n{complained[-3000:]}"
    return said


def result_of(said: str) -> dict[str, Any]:
    """Return the object that a command with ``--json`` prints, alone or in what msrun prints."""
    return dict(json.loads(next(line for line in said.splitlines() if line.startswith("{"))))


def commands() -> dict[str, list[tuple[str, str]]]:
    """Return host and command of each line of the page, by the first word of the heading."""
    found: dict[str, list[tuple[str, str]]] = {}
    for heading, text in re.findall(r"^## (?:\d\. )?(\w+)(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S):
        for line in "".join(re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)).replace("\\\n", "").splitlines():
            command, _, where = line.partition("   #")
            found.setdefault(heading, []).append((where.replace("# ", "").removeprefix(" on "), command.strip()))
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    pytest.importorskip("moto")
    environment: Mapping[str, str] = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL": "http://head:5000",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here = tmp_path / "here"
    here.mkdir()
    with ExitStack() as stack:
        machines = stack.enter_context(hosts(tmp_path, here, HOSTS))
        world = World(tmp_path, {host.name: host for host in machines}, stack)
        world.shared.mkdir()
        stack.callback(world.close)
        world.start("head", f"python -m moto.server -H {HUB} -p 5000")
        world.run("head", f"python -c '{MAKE_BUCKET}'")
        yield world


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def make_records(world: World, page: dict[str, list[tuple[str, str]]]) -> None:
    """Download, convert and verify on the workers; those of host3 are killed with a part of the conversion in hand."""
    (_, scheduler), (_, worker) = page["Start"]
    world.start("head", scheduler)
    for number in range(1, 5):
        world.start(f"host{number}", worker)
    world.run("head", f'python -c "{COUNT_WORKERS.format(4)}"')
    with many_hosts(world.hosts["head"].around) as (_, urls):
        write_lines(world.shared / "urls.txt", urls[:SERVERS], EACH)
        got = result_of(world.run("head", page["Download"][0][1]))
    assert (got["requested"], got["ok"], got["failed"]) == (IMAGES + GONE, IMAGES, {"gone": GONE})
    assert sorted(path.name for path in (world.shared / "images").iterdir()) == [f"part-{n}-of-4" for n in range(1, 5)]

    world.hosts["host3"].stop()  # so that it has a task in hand when it dies
    client = world.start("head", page["Convert"][0][1])
    done = world.shared / "imagenet.partial" / ".work" / "done"
    wait_until(lambda: len(list(done.glob("*.json"))) >= 3, client)
    world.hosts["host3"].kill()
    made = result_of(ended(client))
    assert (made["images"], made["rejected"]) == (IMAGES, {})

    seen = result_of(world.run("head", page["Verify"][0][1]))
    assert (seen["ok"], seen["records"], seen["problems"]) == (True, IMAGES, [])
    assert seen == result_of(world.run("head", page["Verify"][0][1].partition("--executor")[0]))
    for _, command in page["Upload"]:
        world.run("head", command)


def train(world: World, pair: list[tuple[str, str]], cores: list[str], more: str = "") -> list[subprocess.Popen[str]]:
    return [world.start(host, command + more, core) for (host, command), core in zip(pair, cores, strict=True)]


def test_four_hosts_go_from_a_list_to_a_model(world: World) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems have no namespaces")
    page = commands()
    make_records(world, page)
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]] * 2  # where there is one core, both share it
    for host in world.hosts.values():
        if host.name != "head":
            host.kill()
        host.hide(world.shared)

    first, second = page["Train"]
    alone = re.sub(r"--node_rank.*?--master_port=8118", "", first[1]).replace(
        "--local_worker_num=1", "--local_worker_num=2"
    )
    world.run("head", alone, ",".join(cores[:2]))

    run = world.hosts["host1"].folder / "run"
    ranks = train(world, [first, second], cores[:2])
    wait_until(lambda: (run / "last.ckpt").exists() and read_checkpoint(run / "last.ckpt").meta.step >= SAVED, ranks[0])
    world.hosts["host2"].kill()
    for rank in ranks:
        assert rank.wait(timeout=300) != 0
    resumed = train(world, [first, second], cores[:2], " --resume")
    assert "resuming after step" in "".join(ended(rank) for rank in resumed)
    assert not (world.hosts["host2"].folder / "run").exists()

    whole = world.hosts["head"].folder / "run"
    for name in ("last.ckpt", "best.ckpt"):
        one, two = read_checkpoint(whole / name), read_checkpoint(run / name)
        assert one.meta == two.meta
        assert one.tensors.keys() == two.tensors.keys()
        for tensor, value in one.tensors.items():
            assert np.array_equal(value, two.tensors[tensor]), f"{name}: {tensor}"
    scores = result_of(world.run(*page["Evaluate"][0]))
    splits = load_manifest(world.shared / "imagenet").splits
    assert splits["train"].images + splits["val"].images == IMAGES
    assert scores["images"] == splits["val"].images
    assert scores["top1"] == read_checkpoint(run / "best.ckpt").meta.metrics["top1"]
    for number in (1, 2):
        assert list((world.hosts[f"host{number}"].folder / "scratch").rglob("*.mindrecord"))
