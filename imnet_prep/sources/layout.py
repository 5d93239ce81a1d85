"""Decide from all images of an archive what its folders mean: splits, classes, or only the way to them.

Images in no class folder are rejected by name. Where the folders can mean two things, nothing is guessed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from imnet_prep.errors import SourceError
from imnet_prep.sources.base import Found, make_ref, printable
from imnet_prep.sources.labels import Labels
from imnet_prep.types import SPLITS, Reason, Rejected

SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
_LISTED = 5  # folders listed in a message
_FIELDS = 5  # of an image: name, offset, size, compressed size, CRC-32
_Folder = tuple[str, ...]
_Row = tuple[str, int, int, int, int]
_REMEDY = "pack the images of one layout alone, or unpack the archive and give the folder that holds the classes"


class Index:
    """The images of an archive by folder. They are packed, for there may be millions.

    Args:
        archive: The archive, for messages.
    """

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._rows = defaultdict[_Folder, bytearray](bytearray)

    def add(
        self, folders: Sequence[str], name: str, offset: int, size_bytes: int, deflated_bytes: int = 0, crc32: int = -1
    ) -> None:
        """Add an image.

        Args:
            folders: The folders above it, none empty or ``.``.
            name: Its base name, undecodable bytes as surrogates.
            offset: Its first byte, as in :class:`~imnet_prep.types.ImageRef`.
            size_bytes: Its length.
            deflated_bytes: The length of its raw DEFLATE stream, or 0.
            crc32: Of its bytes, or -1.
        """
        base = name.encode("utf-8", "surrogateescape")
        row = b"%b\x00%d\x00%d\x00%d\x00%d\x00" % (base, offset, size_bytes, deflated_bytes, crc32)
        self._rows[tuple(folders)] += row

    def found(self, path: str, split: str = "", val_labels: Labels | None = None) -> Iterator[Found]:
        """Yield the images by split, class and name; before them, the rejections of those in no class folder.

        Args:
            path: The file that holds their bytes.
            split: Selects one split of an archive that has several; names that of an archive without, else train.
            val_labels: The classes of validation images without class folders.

        Raises:
            SourceError: The folders can mean two things.
        """
        root, has_splits = self._decide(has_labels=val_labels is not None)
        classes = defaultdict[tuple[int, str], list[tuple[_Folder, str]]](
            list
        )  # their folders, and what names begin with
        labelled = defaultdict[tuple[int, str], list[_Row]](list)
        for folder in sorted(self._rows):
            below, part = folder[len(root) :], split or "train"
            in_split = has_splits and bool(below)
            if in_split:
                part, below = SPLIT_FOLDERS[below[0].lower()], below[1:]
                if split not in ("", part):
                    continue
            # Tiny-ImageNet has a folder ``images`` in each class, and one in val, whose labels are by file name.
            if val_labels is not None and not val_labels.numbered and below[-1:] == ("images",):
                below = below[:-1]
            place = SPLITS.index(part)
            if below or (part == "test" and in_split == has_splits):
                classes[place, "".join(below[:1])].append((folder, "".join(f"{name}/" for name in below[1:])))
                continue
            labels = val_labels if part == "val" else None
            detail = f"not in {labels.origin}" if labels else "not in a class folder"
            for row in self._in(folder):
                if labels and (class_name := labels.of(row[0])):
                    labelled[place, class_name].append(row)
                else:
                    yield Rejected(part, printable("/".join((*folder, row[0]))), Reason.UNLABELLED, detail)
        for place, class_name in sorted(classes.keys() | labelled.keys()):
            rows = list(labelled[place, class_name])
            for folder, above in classes[place, class_name]:
                rows += [(above + row[0], *row[1:]) for row in self._in(folder)]
            for name, *where in sorted(rows):
                yield make_ref(SPLITS[place], class_name, name, path, *where)

    def _in(self, folder: _Folder) -> list[_Row]:
        """Return the images directly in a folder."""
        fields = self._rows[folder].decode("utf-8", "surrogateescape").split("\x00")  # the last is empty
        numbers = (map(int, fields[start::_FIELDS]) for start in range(1, _FIELDS))
        return sorted(zip(fields[0:-1:_FIELDS], *numbers, strict=True))

    def _decide(self, *, has_labels: bool) -> tuple[_Folder, bool]:
        """Return the folder that holds the splits or classes, and whether it holds splits."""
        below = _tree(self._rows)
        root = _descend(below, has_labels=has_labels)
        inside = below.get(root, set())
        splits = {name for name in inside if name.lower() in SPLIT_FOLDERS}
        has_splits = any(_is_split(below, root, name, has_labels=has_labels) for name in splits)
        where = "/".join(root) or "it"
        if has_splits:
            if rest := inside - splits:
                raise self._two(
                    f"{_listed(splits)} in {where} can be splits or, with {_listed(rest)}, classes",
                    "split folders alone, or class folders alone",
                )
            for split in SPLITS:
                same = sorted(name for name in splits if SPLIT_FOLDERS[name.lower()] == split)
                if len(same) > 1:
                    raise self._two(f"{where} has two folders for {split}: {' and '.join(same)}", "one of them")
        elif len(splits) > 1 and splits == inside:
            raise self._two(f"{_listed(splits)} in {where} hold images and no class folders", "train/<class>/<image>")
        else:
            self._check_depths(below, root)
        loose = sum(self._count(root[:depth]) for depth in range(1, len(root) + 1))
        if loose and not has_splits and loose >= sum(map(self._count, self._rows)) - loose:
            raise self._two(
                f"{loose} images are directly in {where}, and fewer in the folders below it: it can be one class, or "
                "hold classes",
                "all images in class folders",
            )
        return root, has_splits

    def _check_depths(self, below: Mapping[_Folder, set[str]], root: _Folder) -> None:
        """Check that no class folder can be a folder of classes or splits with others beside it."""
        deep = []
        for name in sorted(below.get(root, ())):
            inner = _descend(below, (*root, name))
            inside = below.get(inner, set())
            if any(_is_split(below, inner, sub) for sub in inside):
                raise self._two(
                    f"{'/'.join((*root, name))} can be a class, or hold the splits {_listed(inside)}",
                    "nothing beside the folder of the splits",
                )
            if len(inside) > 1 and not self._count(inner):
                deep.append((name, len(inside)))
        if len(deep) == 1 and 1 < len(below[root]) <= deep[0][1] + 1:
            name = deep[0][0]
            raise self._two(
                f"{'/'.join((*root, name))} can be a class, or hold {deep[0][1]} classes; beside it are "
                f"{_listed(below[root] - {name})}",
                "all classes in one folder",
            )

    def _count(self, folder: _Folder) -> int:
        """Count the images directly in a folder."""
        return self._rows[folder].count(0) // _FIELDS if folder in self._rows else 0

    def _two(self, saw: str, expected: str) -> SourceError:
        return SourceError(f"{self._archive}: {printable(saw)}", expected=expected, remedy=_REMEDY)


def _tree(folders: Iterable[_Folder]) -> Mapping[_Folder, set[str]]:
    """Return the names of the folders in each folder."""
    below = defaultdict[_Folder, set[str]](set)
    for folder in folders:
        for depth in range(len(folder) - 1, -1, -1):
            if folder[depth] in below[folder[:depth]]:
                break  # and so are those above
            below[folder[:depth]].add(folder[depth])
    return dict(below)


def _descend(below: Mapping[_Folder, set[str]], at: _Folder = (), *, has_labels: bool = False) -> _Folder:
    """Return the first folder with several in it, with splits, or with one that has none: that one is the class."""
    while len(inside := below.get(at, set())) == 1:
        (only,) = inside
        if (*at, only) not in below or _is_split(below, at, only, has_labels=has_labels):
            break
        at = (*at, only)
    return at


def _is_split(below: Mapping[_Folder, set[str]], at: _Folder, name: str, *, has_labels: bool = False) -> bool:
    """Return whether a folder is one of a split: by its name, and with class folders or labels by file."""
    split = SPLIT_FOLDERS.get(name.lower())
    return split is not None and ((*at, name) in below or (has_labels and split == "val"))


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_LISTED]) + (f", ... ({len(listed)} folders)" if len(listed) > _LISTED else "")
