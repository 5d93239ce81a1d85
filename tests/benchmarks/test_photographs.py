from __future__ import annotations

import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import photographs
from tests.synthetic import jpeg

shipped = pytest.mark.skipif(not (find_spec("skimage") and find_spec("sklearn")), reason="the extra bench is not there")


@shipped
def test_made_photographs_are_the_same_every_time_and_others_for_another_seed() -> None:
    made = list(photographs.make(8, 0))
    assert made == list(photographs.make(8, 0))
    assert made != list(photographs.make(8, 1))
    assert len({data for _, data in made}) == 8


@pytest.mark.slow
@shipped
def test_made_photographs_have_the_sizes_and_bytes_of_imagenet() -> None:
    made = [data for _, data in photographs.make(50, 0)]
    sizes = [Image.open(io.BytesIO(data)).size for data in made]
    assert set(sizes) <= set(photographs.SIZES)
    assert 100_000 < sum(len(data) for data in made) / len(made) < 120_000


@shipped
def test_made_photographs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "CACHE", tmp_path)
    first = photographs.load(None, count=3)
    assert "scikit-learn" in first.source
    monkeypatch.setattr(photographs, "make", None)  # is not called again
    assert photographs.load(None, count=3).files == first.files
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "SHIPPED", (("no_such_package", "picture.png"),))
    with pytest.raises(SystemExit, match=r"expected no_such_package.*pip install '\.\[bench\]'"):
        list(photographs.make(1, 0))


def test_ones_own_photographs_come_from_a_folder_or_a_tar(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name in ("dogs/a.jpg", "cats/b.JPEG", "c.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(0, len(name), 64, 48))
    (folder / "notes.jpg").write_text("no picture", encoding="utf-8")
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        tar.add(folder, "top")
    expected = {"photographs/c.jpg", "dogs/a.jpg", "cats/b.JPEG"}
    of_folder, of_tar = photographs.load(folder), photographs.load(tmp_path / "mine.tar")
    assert {name for name, _ in of_folder.files} == expected
    assert {name.replace("top/", "photographs/") for name, _ in of_tar.files} == expected
    assert of_folder.source == "3 photographs of mine"


@pytest.mark.parametrize("name", ["absent", "empty", "text.tar"])
def test_a_source_without_photographs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar", encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"expected.*{name}.*--images"):
        photographs.load(tmp_path / name)


def test_photographs_are_written_again_under_other_names(tmp_path: Path) -> None:
    photos = photographs.Photographs("two", (("a/x.jpg", b"1"), ("b/x.jpg", b"2")))
    photos.write(tmp_path, 5)
    written = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert written == {
        "a/000000_x.JPEG": b"1", "b/000001_x.JPEG": b"2", "a/000002_x.JPEG": b"1", "b/000003_x.JPEG": b"2",
        "a/000004_x.JPEG": b"1",
    }  # fmt: skip
