"""Names for numbered classes, from lists in several forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.sources.classes import find_classes, names_of, read_classes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "cat\ndog\nbird, small\n"),
        ("a.txt", "\ufeffcat\twords\r\ndog\r\nbird, small\r\n\r\n"),
        ("a.json", '["cat", "dog", "bird, small"]'),
        ("a.txt", '[\n "cat",\n "dog",\n "bird, small"\n]\n'),
        ("a.json", '{"2": "bird, small", "0": "cat", "1": "dog"}'),
        ("a.json", '{"bird, small": 2, "cat": 0, "dog": 1}'),
    ],
)
def test_a_list_is_read_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_classes(str(tmp_path / name)) == ("cat", "dog", "bird, small")


def test_imagenet_and_its_own_lists(tmp_path: Path) -> None:
    wnids = tuple(wnid for wnid, _ in catalog.synsets())
    assert read_classes("imagenet1k") == wnids
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in catalog.synsets()))
    assert read_classes(str(tmp_path / "LOC_synset_mapping.txt")) == wnids


@pytest.mark.parametrize(
    ("name", "text", "got"),
    [
        ("a.txt", "", "no name"),
        ("a.txt", "cat\n\ndog\n", "no name"),
        ("a.txt", "cat\ndog\ncat\n", "cat"),
        ("a.txt", "cat\n..\n", "is no name"),
        ("a.json", '{"0": "cat", "2": "dog"}', "0 to 1"),
        ("a.json", '{"cat": 0, "dog": 0}', "0 to 1"),
        ("a.json", '["cat", 5]', "neither"),
        ("a.json", '{"one": "cat"}', "invalid literal"),
        ("a.json", "7", "neither"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.json", "{", "line 1"),
        ("b.txt", None, "No such file"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, text: str | None, got: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=got):
        read_classes(str(tmp_path / name))


def test_a_list_beside_the_images_is_found(tmp_path: Path) -> None:
    assert find_classes(tmp_path) == ("", ())
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert find_classes(tmp_path) == ("classes.txt", ("a", "b"))
    (tmp_path / "classnames.txt").write_text(json.dumps("c") + "\n")
    assert find_classes(tmp_path) == ("classnames.txt", ('"c"',))


def test_numbers_without_names_sort_as_numbers_do() -> None:
    assert names_of([10, 9, 10, 0], (), "x") == {0: "00", 9: "09", 10: "10"}
    assert names_of([1, 0], ("cat", "dog", "owl"), "x") == {0: "cat", 1: "dog"}
    assert names_of([], ("cat",), "x") == {}


@pytest.mark.parametrize(("numbers", "names"), [([-1, 0], ()), ([0, 2], ("cat", "dog"))])
def test_a_number_without_a_name_is_refused(numbers: list[int], names: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match="has no name"):
        names_of(numbers, names, "x")
