"""The facts in manifests/ are whole, and agree with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from imnet_prep import catalog

FOLDER = Path(__file__).parents[2] / "manifests"


def test_the_thousand_classes_are_in_label_order() -> None:
    wnids = [synset.wnid for synset in catalog.synsets()]
    assert len(wnids) == catalog.counts().classes == 1000
    assert wnids == sorted(set(wnids))
    assert catalog.labels()["n01440764"] == 0
    assert catalog.labels()[wnids[999]] == 999


def test_words_are_given_by_wnid_and_empty_for_a_stranger() -> None:
    assert catalog.class_words("n01440764") == "tench, Tinca tinca"
    assert catalog.class_words("n99999999") == ""


@pytest.mark.real_data
def test_the_synsets_are_the_shared_ones(shared_data: Path) -> None:
    name = "ilsvrc2012_synsets.tsv"
    assert (FOLDER / name).read_bytes() == (shared_data / name).read_bytes()


def test_every_archive_has_digests_of_the_right_form() -> None:
    assert len(catalog.archives()) == 6
    for name, archive in catalog.archives().items():
        assert name == archive.file_name
        assert re.fullmatch(r"[0-9a-f]{32}", archive.md5)
        assert re.fullmatch(r"([0-9a-f]{64})?", archive.sha256)
        assert catalog.archive_with_digest(archive.md5) is archive


def test_the_swapped_archives_are_told_apart() -> None:
    names, note = catalog.mix_up()
    assert names == {"ILSVRC2012_img_train.tar", "ILSVRC2012_img_train_t3.tar"}
    assert all(name in note for name in names)


def test_counts_are_ilsvrc2012s() -> None:
    counts = catalog.counts()
    assert (counts.train, counts.val, counts.test) == (1_281_167, 50_000, 100_000)
    assert (counts.train_per_class_min, counts.train_per_class_max, counts.val_per_class) == (732, 1300, 50)


def test_every_manifest_file_is_readable_json_or_tsv() -> None:
    for path in FOLDER.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    assert {"archives.json", "counts.json", "ilsvrc2012_synsets.tsv"} <= {path.name for path in FOLDER.iterdir()}
