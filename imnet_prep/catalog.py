"""What is known of ImageNet: the only reader of ``manifests/``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Archive:
    """An official archive.

    Attributes:
        file_name: Base name as published.
        size_bytes: Its size, or None where not confirmed.
        md5: Hex digest.
        sha256: Hex digest, or empty where not confirmed.
        split: ``train``, ``val``, ``test``, or empty for the devkit.
        what: What is in it, for a person.
    """

    file_name: str
    size_bytes: int | None
    md5: str
    sha256: str
    split: str
    what: str


class Synset(NamedTuple):
    """A class of ILSVRC2012: its wnid and the words of the synset, comma separated."""

    wnid: str
    words: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How many images ILSVRC2012 has, in all and a class."""

    classes: int
    train: int
    val: int
    test: int
    train_per_class_min: int
    train_per_class_max: int
    val_per_class: int


def _read(name: str) -> str:
    return (resources.files("imnet_prep.manifests") / name).read_text(encoding="utf-8")


def _load(name: str) -> Any:
    return json.loads(_read(name))


@cache
def archives() -> Mapping[str, Archive]:
    """Return the official archives by base name."""
    return MappingProxyType({entry["file_name"]: Archive(**entry) for entry in _load("archives.json")["archives"]})


def archive_with_digest(md5: str) -> Archive | None:
    """Return the official archive with this MD5, whatever the file at hand is called."""
    return next((archive for archive in archives().values() if archive.md5 == md5), None)


@cache
def mix_up() -> tuple[frozenset[str], str]:
    """Return the archives whose MD5s are often published swapped, and the sentence that says so."""
    entry = _load("archives.json")["mix_up"]
    return frozenset(entry["archives"]), entry["note"]


@cache
def counts() -> Counts:
    """Return how many images there are."""
    return Counts(*itemgetter(*Counts.__slots__)(_load("counts.json")))


@cache
def synsets() -> tuple[Synset, ...]:
    """Return the 1,000 classes in label order: sorted by wnid, label 0 is n01440764 (tench)."""
    return tuple(Synset(*line.split("\t", 1)) for line in _read("ilsvrc2012_synsets.tsv").splitlines() if line)


@cache
def labels() -> Mapping[str, int]:
    """Return the label by wnid, 0 to 999."""
    return MappingProxyType({synset.wnid: label for label, synset in enumerate(synsets())})


def class_words(wnid: str) -> str:
    """Return the words of a class, or an empty string for a class that ILSVRC2012 does not have."""
    label = labels().get(wnid)
    return "" if label is None else synsets()[label].words


@cache
def manifest_schema() -> Mapping[str, Any]:
    """Return the JSON Schema (2020-12) of ``manifest.json``."""
    return MappingProxyType(_load("records.schema.json"))
