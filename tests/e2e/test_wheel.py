"""The wheel of ``make wheel`` in a bare Debian, without a compiler and without libjpeg: ``make test-wheel``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
DIST = Path(__file__).parents[2] / "dist"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# What the processes of the root see: mounts of their own, which end with them.
ENTER = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
LOADED = """
from imnet_prep.images.native import decoder_status
from mbv2.kernels import describe
print(*decoder_status(), describe(), sep="\\n")
print({line.split()[-1] for line in open("/proc/self/maps") if "libjpeg" in line})
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = list(DIST.glob("imnet_prep-*-manylinux_*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist: make wheel")
    return wheels[0]


@pytest.fixture(scope="module")
def bare(wheel: Path) -> Iterator[Run]:
    """Install the wheel with pip in a new Debian, and run commands there as ``bare(*words)``. Needs the network."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is needed, and root")
    with tempfile.TemporaryDirectory(prefix="bare-debian-") as folder:  # 3 GB, which pytest would keep
        made = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3-venv", "bookworm", folder]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        for path in (Path("/etc/resolv.conf"), CERTIFICATES):
            shutil.copyfile(path, folder + str(path))
        shutil.copy(wheel, folder)

        def run(*words: object) -> subprocess.CompletedProcess[str]:
            command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, folder]
            environment = {"PATH": "/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
            done = subprocess.run(
                [*command, *map(str, words)],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            return done

        run("python3", "-m", "venv", "/venv")
        run("pip", "install", "--quiet", "--no-cache-dir", f"/{wheel.name}")
        yield run


def test_the_wheel_holds_libjpeg_turbo_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith("/licenses/LICENSE-libjpeg-turbo"))
        assert (
            "this software is based in part on the work of\nthe Independent JPEG Group"
            in archive.read(licence).decode()
        )
    for start in ("imnet_prep.libs/libjpeg-", "imnet_prep/images/native/imnet_native.", "mbv2/kernels/mbv2_kernels."):
        assert len([name for name in names if name.startswith(start)]) == 1, start


def test_the_root_has_no_compiler_and_no_libjpeg(bare: Run) -> None:
    listed = bare("sh", "-c", "ls /usr/bin /usr/lib/*-linux-gnu").stdout.split()
    assert "python3.11" in listed
    assert not [name for name in listed if name.startswith(("libjpeg", "gcc", "g++", "cc", "c++", "clang", "libgomp"))]
    assert "jpeg" not in bare("ldconfig", "-p").stdout


def test_decoder_and_operators_load_there_with_the_wheels_own_libjpeg(bare: Run) -> None:
    built, decoder, operators, libraries = bare("python", "-c", LOADED).stdout.splitlines()
    assert (built, decoder.split()[0], operators.split("(")[0]) == ("True", "libjpeg-turbo", "C++ operators ")
    assert "own Huffman decoder" in decoder
    assert re.fullmatch(r"\{'/venv/.*/imnet_prep\.libs/libjpeg-[^']*'\}", libraries)


def test_the_doctor_names_the_one_library_that_is_missing_there(bare: Run) -> None:
    found = json.loads(bare("imnet-prep", "doctor", "--json").stdout)
    assert found["ok"]
    (problem,) = found["problems"]
    assert "MindSpore cannot load libgomp.so.1" in problem["what"]
    bare(*problem["remedy"].split())
    assert json.loads(bare("imnet-prep", "doctor", "--json").stdout)["problems"] == []


def test_then_the_demo_ends_there(bare: Run) -> None:
    done = bare("imnet-prep", "demo", "--out", "/demo")
    assert json.loads(done.stdout.splitlines()[-1])["top1"] > 0.9
