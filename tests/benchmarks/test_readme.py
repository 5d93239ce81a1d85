from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.readme import LANGUAGES, ROOT, Language


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.page)
def test_the_section_on_speed_is_that_of_the_result_that_it_names(language: Language) -> None:
    page = (ROOT / language.page).read_text(encoding="utf-8")
    assert readme.written(page, language) == page, "run: python -m benchmarks.readme"


def test_both_pages_show_the_same_result() -> None:
    named = [readme.NAMED.findall((ROOT / language.page).read_text(encoding="utf-8")) for language in LANGUAGES]
    assert named[0] == named[1]
    assert len(named[0]) == 1


def test_both_pages_have_the_same_rows() -> None:
    assert list(LANGUAGES[0].rows) == list(LANGUAGES[1].rows)


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two pages, in which the script works."""
    for language in LANGUAGES:
        page = f"before\n\n## {language.heading}\n\nby hand\n\n## After\n\nafter\n"
        (tmp_path / language.page).write_text(page, encoding="utf-8")
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return tmp_path


def result(*, trial: bool = False) -> str:
    lines = [{"name": "ours", "rounds": [100, 101, 102]}, {"name": "PyTorch, float32", "rounds": [10, 20, 30]}]
    machine = {"cores": 2, "cpu": "a processor"}
    results = [{"case": "train-64", "title": "", "lines": lines}]
    head = {"machine": machine, "photographs": {"source": "3 photographs of mine"}, "rounds": 3, "trial": trial}
    return json.dumps({**head, "results": results})


def test_a_result_is_kept_and_its_table_written(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pages / "r.json").write_text(result(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme", str(pages / "r.json"), "--name", "mine"])
    readme.main()
    assert (pages / "benchmarks/results/mine.json").read_text(encoding="utf-8") == result()
    text = (pages / "README.md").read_text(encoding="utf-8")
    assert "| the same at 64 px, batch 64 | 101 | PyTorch float32 20 (!) |" in text
    assert "2 cores of a processor" in text
    assert text.startswith("before\n\n## How fast\n\n<!-- speed: benchmarks/results/mine.json -->\n")
    assert text.endswith("|\n\n## After\n\nafter\n")
    assert "by hand" not in text
    assert readme.written(text, LANGUAGES[0]) == text
    assert "PyTorch float32 20 (!)" in (pages / "README_CN.md").read_text(encoding="utf-8")


def test_no_table_is_made_of_a_trial(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pages / "r.json").write_text(result(trial=True), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme", str(pages / "r.json"), "--name", "mine"])
    before = (pages / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="a trial"):
        readme.main()
    assert (pages / "README.md").read_text(encoding="utf-8") == before
    assert not (pages / "benchmarks/results").exists()
