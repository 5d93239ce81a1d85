"""Names for the classes of sources that number them: from ``--classes``, or from a list beside the images."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import open_plain
from imnet_prep.types import name_fault

IMAGENET = "imagenet1k"
CLASS_LISTS = ("classnames.txt", "classes.txt", "classes.json")  # found beside the images
_MAX_LIST_BYTES = 64 << 20
_SYNSET = re.compile(r"(n\d{8})[ \t,]")  # "n01440764 tench, Tinca tinca", as in ImageNet's own lists


def read_classes(given: str) -> tuple[str, ...]:
    """Read class names in label order.

    Args:
        given: ``imagenet1k`` for ImageNet's 1,000 classes, or a file: one name per line, a JSON list of names, or a
            JSON object of names by number or numbers by name. In a list of lines that all begin with a WordNet id, the
            id is the name; otherwise, all before a tab.

    Raises:
        SourceError: The file cannot be read, names a class twice, or leaves a number out.
    """
    if given == IMAGENET:
        return tuple(wnid for wnid, _ in catalog.synsets())
    path = Path(given)
    try:
        with open_plain(path) as file:
            text = file.read(_MAX_LIST_BYTES).decode("utf-8-sig")
        is_json = path.suffix.lower() == ".json" or _looks_like_json(text)
        names = _from_json(json.loads(text)) if is_json else _from_lines(text)
    except (OSError, ValueError, RecursionError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise SourceError(
            f"{path}: cannot be read as a list of class names",
            expected=f"{IMAGENET}, or a file with one name per line or a JSON list",
            got=got,
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    faulty = [f"{fault} ({number})" for number, name in enumerate(names) if (fault := _fault(name))]
    if not names or twice or faulty:
        got = ", ".join([*faulty, *twice][:5]) or "no name"
        raise SourceError(f"{path}: is not a list of class names", expected="each name once, in label order", got=got)
    return tuple(names)


def _fault(name: str) -> str:
    """Return why a name cannot be that of a class, or an empty string."""
    return f"{name} is no name" if name in (".", "..") else name_fault(name)


def _looks_like_json(text: str) -> bool:
    """Return whether a text without the suffix is a JSON list or object all the same, and not lines of names."""
    try:
        return text.lstrip()[:1] in ("[", "{") and isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _from_lines(text: str) -> list[str]:
    lines = [line.strip("\r") for line in text.rstrip().split("\n")]
    if all(map(_SYNSET.match, lines)):
        return [line[:9] for line in lines]
    return [line.split("\t")[0].strip() for line in lines]


def _from_json(values: Any) -> list[str]:
    """Return the names of a list or an object of names by number or numbers by name."""
    if isinstance(values, dict):
        by_name = all(type(value) is int for value in values.values())
        pairs = [(value, key) if by_name else (int(key), value) for key, value in values.items()]
        if sorted(number for number, _ in pairs) != list(range(len(pairs))):
            raise ValueError(f"the numbers are not 0 to {len(pairs) - 1}")
        values = [name for _, name in sorted(pairs)]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("neither a list of names nor an object of names by number")
    return values


def find_classes(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return the name and content of the list of classes in a folder; empty if there is none.

    Raises:
        SourceError: It is no such list.
    """
    found = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
    return (found.name, read_classes(str(found))) if found else ("", ())


def names_of(numbers: Iterable[int], names: Sequence[str], where: str) -> Mapping[int, str]:
    """Return the name of each class that a source only numbers.

    Args:
        numbers: The numbers in use.
        names: The names in label order; without any, each number is its name, padded so that names sort as numbers do.
        where: The source, for messages.

    Raises:
        SourceError: A number is negative, or has no name.
    """
    used = sorted(set(numbers))
    width = len(str(used[-1])) if used else 0
    if used and (used[0] < 0 or (names and used[-1] >= len(names))):
        wrong = used[0] if used[0] < 0 else used[-1]
        raise SourceError(
            f"{where}: class {wrong} has no name",
            expected=f"numbers from 0 to {len(names) - 1}" if names else "numbers from 0",
            got=f"{used[0]} to {used[-1]}",
            remedy="give the list of all class names in label order (--classes FILE)",
        )
    return {number: names[number] if names else f"{number:0{width}d}" for number in used}


def numbered_note(name: str) -> str:
    """Return the note on a source whose numbered classes have no names."""
    return (
        f"{name}: its classes are numbers without names; the numbers are used as names "
        f"(--classes FILE names them, --classes {IMAGENET} with ImageNet's WordNet ids)"
    )
