"""Every command line of README and docs runs, on small inputs of the names they use.

README comes first; each other page starts from a copy of what that left. Some options are added: ``--allow-private``
for the test's own server, one small epoch for training, a moment for a benchmark. ``mbv2`` runs in this process, which
imports MindSpore once; tests/e2e/test_first_hour.py runs README's commands as they stand. What is no command of ours
(``pip``, ``make``, ``msrun``) is tested elsewhere.
"""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import fields
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import imnet_prep
from imnet_prep import catalog, download, sources
from imnet_prep.cli import mobilenet
from imnet_prep.cli.prep import main
from imnet_prep.sources.tar import BLOCK
from mbv2.recipe import Recipe
from tests.e2e.pages import PAGES, README, README_CN, ROOT, blocks, commands, run
from tests.imnet_prep.sources.parquets import Row, write_parquet
from tests.imnet_prep.sources.test_parquet import hub_words
from tests.imnet_prep.sources.test_webdataset import img2dataset
from tests.imnet_prep.sources.test_zip import kaggle_zip
from tests.mbv2.weights.test_convert import foreign, random_weights, write
from tests.s3 import put, s3_server
from tests.synthetic import WNIDS, jpeg, make_image_folder, make_imagenet, tar_bytes

PROGRAMS = {"imnet-prep": main, "mbv2": mobilenet.main}
FIELDS = {field.name for field in fields(Recipe)}
ON_MANY = "many-machines.md"  # needs several hosts; tests/e2e/test_many_machines.py runs it
ELSEWHERE = (
    "imnet-prep browse",  # does not end by itself; tests/imnet_prep/show/test_browse.py runs it
    "imnet-prep doctor",  # takes long; tests/test_doctor.py runs it
)
_SHAPE = (r"^#+ ", r"\]\(([^)]+)\)")  # headings and links
ADDED = {
    "imnet-prep download": ["--allow-private"],
    "imnet-prep bench": ["--seconds", "0.2"],
    "mbv2 train": ["--epochs", "1", "--image-size", "32", "--batch-size", "16"],
}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of eight photographs, ``/0.jpg`` to ``/7.jpg``."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(jpeg(number % 2, number, 96, 80))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def make_webdatasets(root: Path) -> None:
    """Make the tars that the guide to WebDataset names."""
    names = [wnid for wnid, _ in catalog.synsets()][:2]
    tars = {"imagenet-1k-wds/t-train-0000": 6, "imagenet-1k-wds/t-validation-00": 2, "my-tars/00000": 6}
    for number, (tar, count) in enumerate(tars.items()):
        samples: dict[str, bytes] = {}
        for k in range(count):
            key = f"{names[k % 2]}_{number}{k}"
            samples |= {f"{key}.jpg": jpeg(k % 2, 10 * number + k), f"{key}.cls": str(k % 2).encode()}
        (root / tar).parent.mkdir(exist_ok=True)
        (root / f"{tar}.tar").write_bytes(tar_bytes(samples))
    (root / "names.txt").write_text("cat\ndog\n", encoding="utf-8")
    (root / "img2dataset-output").mkdir()
    img2dataset(root / "img2dataset-output", 0, 1)


def make_hub(root: Path) -> dict[str, bytes]:
    """Make the Parquet files that the guide to Hugging Face names, and return them by path."""
    train: list[Row] = [("", f"{WNIDS[k % 2]}_{k}_{WNIDS[k % 2]}.JPEG", jpeg(k % 2, k)) for k in range(24)]
    val: list[Row] = [("", f"ILSVRC2012_val_0000000{k}_{WNIDS[k % 2]}.JPEG", jpeg(k % 2, 90 + k)) for k in range(4)]
    for split, rows in (("train", train), ("validation", val)):
        path = root / "imagenet-1k" / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, rows, hub_words(), labels=[k % 2 for k in range(len(rows))])
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "imagenet-1k").rglob("*.parquet")}


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[str]:
    """The address of an S3 server, which all commands use."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, address: str, bucket: str) -> Path:
    """A folder with every input that the pages name, and what README's commands make of them."""
    root = tmp_path_factory.mktemp("world")
    make_image_folder(root / "my-photos", 3, 28, [])
    make_imagenet(root, per_class=12, odd=False)
    make_webdatasets(root)
    photos = {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "my-photos").rglob("*.jpg")}
    damaged = tar_bytes(photos)
    header = damaged.index(b"ustar", BLOCK) - 257  # the second
    (root / "damaged.tar").write_bytes(damaged[:header] + bytes(BLOCK) + damaged[header + BLOCK :])
    put(bucket, "my-bucket", {"photos.tar.gz": gzip.compress(tar_bytes(photos)), **make_hub(root)})
    (root / "imagenet-object-localization-challenge.zip").write_bytes(kaggle_zip(make_imagenet(root / "k", odd=False)))
    for number in (0, 2, 6):  # the weights below have seven classes
        folder = root / "imagenetv2-matched-frequency-format-val" / str(number)
        folder.mkdir(parents=True)
        (folder / "0.jpeg").write_bytes(jpeg(number, number))
    (root / "folder").mkdir()
    for name in ("photo.jpg", "folder/a.jpg"):
        (root / name).write_bytes(jpeg(1, 1))
    lines = [f"{WNIDS[number % 2]}_{number}\t{address}/{number}.jpg" for number in range(8)]
    for name in ("urls.txt", "fall11_urls.txt"):
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = [f"{address}/{number}.jpg,species_{number % 2},a caption" for number in range(8)]
    (root / "photos.csv").write_text("\n".join(["link,species,caption", *table]), "utf-8")
    (root / "keep.txt").write_text("\n".join(WNIDS[:2]) + "\n", encoding="utf-8")
    write(root / "mobilenetv2_100.safetensors", foreign(random_weights(0.35), "timm"))
    for command in commands(README):
        run_shortened(command, root)
    records = (path for path in (root / "records").rglob("*") if path.is_file())
    put(bucket, "my-bucket", {f"imagenet/{path.relative_to(root / 'records')}": path.read_bytes() for path in records})
    (root / "old-records").mkdir()
    for file in (root / "records" / "train").glob("*.mindrecord*"):  # what others have: shards and no manifest
        shutil.copy(file, root / "old-records")
    return root


def run_shortened(command: str, folder: Path) -> None:
    """Run a command with the options that make it short."""
    added = next((added for start, added in ADDED.items() if command.startswith(start)), [])
    if not command.startswith("mbv2 "):
        run(command, folder, *added)
        return
    with chdir(folder):
        done = CliRunner().invoke(mobilenet.main, [*shlex.split(command)[1:], *added])
    assert done.exit_code == 0, f"{command}\n{done.output[-4000:]}"


@pytest.mark.slow
def test_the_commands_of_the_readme_run(world: Path) -> None:
    assert (world / "run" / "best.ckpt").is_file()
    assert (world / "web-records" / "manifest.json").is_file()


def own_commands(page: Path) -> list[str]:
    """Return the commands of a page that README does not have."""
    known = set(commands(README))
    return [command for command in commands(page) if command not in known and not command.startswith(ELSEWHERE)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        # Each command of mbv2 compiles a whole network: README's are run by make test.
        pytest.param(page, marks=[pytest.mark.long] * any(line.startswith("mbv2 ") for line in own_commands(page)))
        for page in PAGES[1:]
        if page.name != ON_MANY and own_commands(page)
    ],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_run(world: Path, tmp_path: Path, page: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    for command in own_commands(page):
        run_shortened(command, tmp_path / "world")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_options_of_a_page_are_known(page: Path) -> None:
    """Parse every command of a page, those too that only make test-long runs."""
    for command in commands(page):
        program, name, *words = shlex.split(command)
        given = PROGRAMS[program].commands[name].make_context(name, words).params
        for assignment in given.get("assignments", ()):
            assert assignment.partition("=")[0] in FIELDS, command


def test_the_chinese_readme_is_in_step() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in (README, README_CN))
    assert blocks(english) == blocks(chinese)
    levels, links = ([re.findall(pattern, page, re.MULTILINE) for page in (english, chinese)] for pattern in _SHAPE)
    assert levels[0] == levels[1]
    assert set(links[0]) - {README_CN.name} == set(links[1]) - {README.name}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@cache
def modules() -> dict[Path, str]:
    """Return the text of each module of the packages."""
    folders = (ROOT / name for name in ("imnet_prep", "mbv2", "cli"))
    return {file: file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py")}


def test_every_message_that_is_explained_is_printed() -> None:
    """Compare the words between what varies: numbers (N, M), lists, and the parts of an error."""
    page = (ROOT / "docs" / "what-can-go-wrong.md").read_text(encoding="utf-8")
    messages = re.findall(r"`([^`]{10,})`", "".join(re.findall(r"^\|([^|]+)\|", page, re.MULTILINE)))
    parts = {part.strip() for one in messages for part in re.split(r"\bN\b|\bM\b|\(\.\.\.\)|; expected", one)}
    parts.remove("numpy.core.multiarray")  # NumPy's own
    assert len(parts) > 12
    assert {part for part in parts if not any(part in text for text in modules().values())} == set()


def test_docstrings_begin_with_what_a_function_does() -> None:
    assert [file for file, text in modules().items() if re.search(r'"""Gives?\b', text)] == []


@pytest.mark.parametrize("command", main.commands)
def test_every_option_is_documented(command: str) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for option in (item for item in main.commands[command].params if isinstance(item, click.Option)):
        flag = max(option.opts, key=len)
        assert option.help, f"{command} {flag}"
        assert re.search(rf"{flag}(?![\w-])", text), f"no page names {flag} of {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    pattern = r"(?<![\w/.-])((?:imnet_prep|mbv2|cli|tests|benchmarks|manifests)/[\w/]+\.(?:py|cc|h|json|tsv|yaml))\b"
    for name in re.findall(pattern, page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_site_has_every_page_and_every_public_name() -> None:
    """``make docs`` fails for a link that leads nowhere; this needs no MkDocs."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert [page for page in pages if not re.search(rf"[ \[]{re.escape(page)}\b", site)] == []
    shown = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = [f"{module.__name__}.{name}" for module in (imnet_prep, download, sources) for name in module.__all__]
    assert [name for name in public if name not in shown and not name.endswith(".JOURNAL_NAME")] == []
