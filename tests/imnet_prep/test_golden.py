"""The bytes that f361d40 wrote: conversions, reshards and adoptions of today write the same.

``golden.json`` has SHA-256 by file. Of a manifest it is that of the canonical JSON without the keys in :data:`PASSING`:
they name the release and its plan, not the contents.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imnet_prep.cli.prep import main
from tests.records import digests
from tests.synthetic import tar_bytes

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADOPTED = FIXTURES / "f361d40" / "adopted"
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_bytes())
PASSING = ("plan", "self_sha256", "made_with")

# Arguments by result; {name} is a source or another result.
SYNTHETIC = {
    "images": "to-mindrecord {images/} --shards 2 --max-rejected 100%",
    "images-tar": "to-mindrecord {images.tar} --max-rejected 100%",
    "images-options": "to-mindrecord {images/} --seed 7 --short-side 32 --quality 80 --duplicates reject "
    "--label-space imagenet1k --max-per-class 5 --max-rejected 100%",
    "images-3": "reshard {images} --shards 3",
    "named-3": "reshard {named} --shards 3",
    "named": "adopt {mindrecord/named}",
    "plain": "adopt {mindrecord/plain}",
}
REAL = {
    "tiny": "to-mindrecord {tiny-imagenet-10/}",
    "tiny-tar": "to-mindrecord {tiny-imagenet-10.tar}",
    "tiny-3": "reshard {tiny} --shards 3",
    "photographs": "to-mindrecord {photographs/}",
    "photographs-tar": "to-mindrecord {imagenet-samples-250.tar}",
    "photographs-128": "to-mindrecord {photographs/} --short-side 128",
    "photographs-3": "reshard {photographs} --shards 3",
}
CASES = SYNTHETIC | REAL


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources that are committed, as their bytes would depend on the libraries that draw and encode them."""
    folder, images = tmp_path_factory.mktemp("synthetic"), FIXTURES / "images"
    files = sorted(path for path in images.rglob("*") if path.is_file())
    tar = folder / "images.tar"
    tar.write_bytes(tar_bytes({path.relative_to(images).as_posix(): path.read_bytes() for path in files}))
    return {"images/": images, "images.tar": tar, "results": folder} | {
        f"mindrecord/{name}": mindrecord_files(ADOPTED / name, folder / "results" / name) for name in ("named", "plain")
    }


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The archives of real images, packed and unpacked."""
    folder = tmp_path_factory.mktemp("real")
    tars = {name: shared_data / name for name in ("tiny-imagenet-10.tar", "imagenet-samples-250.tar")}
    for name, path in tars.items():
        with tarfile.open(path) as archive:
            archive.extractall(folder / name, filter="data")
    tiny = folder / "tiny-imagenet-10.tar" / "tiny-imagenet-10"
    return {"tiny-imagenet-10/": tiny, "photographs/": folder / "imagenet-samples-250.tar", "results": folder, **tars}


def mindrecord_files(adopted: Path, folder: Path) -> Path:
    """Copy the MindRecord files of an adopted folder: what it was before."""
    keep = [path for path in adopted.rglob("*.mindrecord*") if path.is_file()]
    for path in keep:
        copy = folder / path.relative_to(adopted)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert len(keep) >= 4
    return folder


def run(*arguments: object) -> None:
    """Run ``imnet-prep`` in this process."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def make(case: str, places: dict[str, Path]) -> Path:
    """Run a case's command, and first those whose results it reads; each once."""
    if case in places:
        return places[case]
    command, source, *options = CASES[case].split()
    folder = make(source.strip("{}"), places)
    out = folder if command == "adopt" else places["results"] / "results" / case
    run(command, folder, *options, "--workers", 1, *(() if out == folder else ("--out", out)))
    places[case] = out
    return out


def recorded(folder: Path) -> dict[str, str]:
    """SHA-256 by file, as ``golden.json`` has it."""
    document = json.loads((folder / "manifest.json").read_bytes())
    lasting = {key: value for key, value in document.items() if key not in PASSING}
    text = json.dumps(lasting, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digests(folder) | {"manifest.json": hashlib.sha256(text.encode()).hexdigest()}


def check(case: str, places: dict[str, Path]) -> None:
    """Compare a result with ``golden.json``; name the first file that differs."""
    folder = make(case, places)
    want, got = GOLDEN["files"][case], recorded(folder)
    made_with = json.loads((folder / "manifest.json").read_bytes())["made_with"]
    for name in sorted(want.keys() | got.keys()):
        assert got.get(name, "no such file") == want.get(name, "no such file"), (
            f"{case}: {name} is the first file that differs; made with {made_with}, golden with {GOLDEN['made_with']}"
        )


def test_every_golden_is_compared() -> None:
    assert GOLDEN["files"].keys() == CASES.keys()


@pytest.mark.parametrize("case", SYNTHETIC)
def test_synthetic_images_become_the_same_bytes(case: str, synthetic: dict[str, Path]) -> None:
    check(case, synthetic)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("case", REAL)
def test_real_images_become_the_same_bytes(case: str, real: dict[str, Path]) -> None:
    check(case, real)


@pytest.mark.parametrize(
    ("case", "folder"), [("images", "records"), ("named", "adopted/named"), ("plain", "adopted/plain")]
)
def test_fixtures_are_what_the_goldens_say(case: str, folder: str) -> None:
    assert recorded(FIXTURES / "f361d40" / folder) == GOLDEN["files"][case]
