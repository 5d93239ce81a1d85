"""The report of a records folder, section by section."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.errors import RecordsError
from imnet_prep.records.manifest import Manifest
from imnet_prep.show.gather import CONVERTED, MAX_COLOURS, MAX_PAIRS, MAX_PRINTS, Gathered, Shown, decode, gather
from imnet_prep.show.html import (
    Bar,
    Html,
    bars,
    check_target,
    details,
    facts,
    histogram,
    join,
    page,
    picture,
    table,
    tag,
    thumbnail,
    tiles,
    write_page,
)
from imnet_prep.types import ProgressCallback

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision's references have them
PICTURE_BYTES = 3_300_000  # of all pictures, in base64: the file stays under 5 MB
MAX_REJECTED_LISTED = 100
MAX_BARS = 100
_CHANGES = {
    "format": "was not a JPEG: converted",
    "cmyk": "was CMYK: converted to RGB",
    "sixteen_bit": "had more than 8 bits a channel: converted",
    "alpha": "had transparency: composed over white",
    "oriented": "EXIF orientation applied",
    "progressive": "progressive JPEG",
    "greyscale": "greyscale",
    "exif_damaged": "damaged EXIF",
    "trailing_bytes": "bytes after its end marker",
    "resized": "shrunk",
}


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """How a report is made.

    Attributes:
        images: With pictures.
        workers: Processes; one a core where None.
        force: Replace a file that no report wrote.
    """

    images: bool = True
    workers: int | None = None
    force: bool = False


class _Pictures:
    """Makes thumbnails until their bytes are spent."""

    def __init__(self, gathered: Gathered, options: ReportOptions) -> None:
        self._folder = gathered.folder
        self._left = PICTURE_BYTES if options.images else 0
        classes = max(1, len(gathered.samples))
        # About 2 kB a picture of 96 pixels as base64; of many classes each gets one or two, smaller.
        self.per_class = max(1, min(6, PICTURE_BYTES // (classes * 4000)))
        self._side = 96 if classes * self.per_class <= 1200 else 72
        self.spent = False

    def of(self, shown: Shown, caption: object = "") -> Html:
        """Show a record."""
        line = shown.line
        return self.at(shown.position, f"{shown.split}/{line.file_name}, {line.width} by {line.height} pixels", caption)

    def at(self, position: int, alt: str, caption: object = "") -> Html:
        """Show the record at a position; a text in its place where there is no picture."""
        if self._left <= 0:
            self.spent = True
            return tag("figure", tag("figcaption", caption or alt), class_="thumb")
        try:
            pixels = decode(self._folder.row(position).image)
        except RecordsError:
            pixels = None
        if pixels is None:
            return tag("figure", tag("figcaption", f"{alt}: does not decode"), class_="thumb")
        data = thumbnail(pixels, self._side)
        self._left -= len(data) * 4 // 3 + 200
        return picture(data, alt, caption)

    def kept(self, thumbnail: str, alt: str) -> Html:
        """Show a picture that was kept in base64."""
        if self._left <= 0:
            self.spent = True
            return Html("")
        self._left -= len(thumbnail)
        return picture(base64.b64decode(thumbnail), alt)

    def name(self, position: int) -> str:
        """Name the record at a position."""
        row = self._folder.row(position)
        return f"{row.split}/{row.name}"


def write_report(records: Path, out: Path, options: ReportOptions, progress: ProgressCallback) -> dict[str, Any]:
    """Write the report of a records folder.

    Args:
        records: The folder.
        out: The HTML file.
        options: How.
        progress: Told of images looked at.

    Returns:
        What the command prints: ``report`` (the file), ``bytes``, ``images`` and ``duplicates``.

    Raises:
        RecordsError: The folder cannot be read, or the file must not or cannot be written.
        IntegrityError: The manifest, or the list of rejected images, is damaged.
    """
    check_target(out, force=options.force)
    gathered = gather(records, options.workers, progress)
    pictures = _Pictures(gathered, options)
    images, manifest = gathered.folder.records, gathered.folder.manifest
    sections = [
        ("numbers", "In numbers", _numbers(gathered)),
        ("balance", "Class balance", _balance(manifest)),
        ("sizes", "Sizes", _sizes(gathered)),
        ("colours", "Colours", _colours(gathered)),
        ("changes", "Converted and rejected", _changes(gathered, pictures)),
        ("duplicates", "Duplicates", _duplicates(gathered, pictures)),
        ("classes", "Classes", _classes(gathered, pictures)),
        ("provenance", "Provenance and digests", _provenance(gathered)),
    ]
    said = f"{images:,} images in {len(manifest.classes):,} classes. Manifest SHA-256 "
    name = records.resolve().name
    made = f"Made by imnet-prep report from {name}; no data leaves this file."
    html = page(f"Records: {name}", sections, tag("p", said, tag("code", manifest.digest)), footer=made)
    near = None if gathered.near is None else len(gathered.near)
    return {
        "report": str(out),
        "bytes": write_page(out, html),
        "images": images,
        "duplicates": {"exact": len(gathered.exact), "near": near},
    }


def _numbers(gathered: Gathered) -> Html:
    folder, stored = gathered.folder, int(gathered.sizes.sum())
    manifest, records = folder.manifest, folder.records
    on_disk = sum(shard.size_bytes + shard.index_size_bytes for _, _, shard in folder.shards)
    rows = [
        (
            name,
            split.images,
            sum(count > 0 for count in split.class_counts),
            _range(split.class_counts),
            len(split.shards),
            _bytes(int(gathered.sizes[folder.span(name)].sum())),
            sum(split.rejected.values()),
            split.duplicates,
        )
        for name, split in manifest.splits.items()
    ]
    head = ("split", "images", "classes", "images a class", "shards", "image bytes", "rejected", "repeated bytes")
    large = [
        ("images", f"{records:,}"),
        ("classes", f"{len(manifest.classes):,}"),
        ("shards", f"{len(folder.shards):,}"),
        ("on disk", _bytes(on_disk)),
        ("an image", _bytes(stored // max(1, records))),
        ("not images", f"{1 - stored / max(1, on_disk):.1%}"),
    ]
    return join([tiles(large), table("Splits", head, rows)])


def _range(counts: tuple[int, ...]) -> str:
    there = [count for count in counts if count]
    return f"{min(there, default=0):,} to {max(there, default=0):,}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _balance(manifest: Manifest) -> Html:
    charts = []
    for split, info in manifest.splits.items():
        counted = zip(info.class_counts, manifest.classes, strict=True)
        counts = sorted(((count, name) for count, name in counted if count), reverse=True)
        if not counts:
            charts.append(tag("p", f"{split}: no labels."))
            continue
        step = -(-len(counts) // MAX_BARS)
        shown = [
            Bar(
                group[0][1] if len(group) == 1 else f"{group[0][1]} and {len(group) - 1} more, mean",
                float(np.mean([count for count, _ in group])),
            )
            for group in (counts[start : start + step] for start in range(0, len(counts), step))
        ]
        ends = (f"{counts[0][0]:,}", f"{len(counts):,} classes, the largest first", f"{counts[-1][0]:,}")
        charts.append(bars(f"{split}: images a class", shown, ends))
    return tag("div", *charts, class_="charts")


def _sizes(gathered: Gathered) -> Html:
    sides = np.stack([gathered.widths, gathered.heights]).astype(np.float64)
    widths, heights = sides[:, (sides > 0).all(axis=0)]
    charts = [
        histogram("Width", widths, unit=" px"),
        histogram("Height", heights, unit=" px"),
        histogram("Short side", np.minimum(widths, heights), unit=" px"),
        histogram("Aspect (width / height)", widths / heights, log=True),
        histogram("Stored bytes an image", gathered.sizes.astype(np.float64), unit=" B", log=True),
    ]
    return tag("div", *charts, class_="charts")


def _colours(gathered: Gathered) -> Html:
    mean, deviation, own = gathered.channels()
    rows = [
        (name, *(round(float(value[k]), 4) for value in (mean, IMAGENET_MEAN, own, IMAGENET_STD, deviation)))
        for k, name in enumerate(("red", "green", "blue"))
    ]
    head = ("channel", "mean here", "mean of ImageNet", "std here", "std of ImageNet", "std of all pixels")
    few, bad = gathered.folder.records <= MAX_COLOURS, gathered.undecodable
    which = "every image" if few else f"{len(gathered.colours):,} images, evenly spaced"
    said = (
        f"Computed from {which}; 0 is black, 1 is full; each image counts alike. "
        "The std is the mean of the images' own deviations, as ImageNet's published one is."
    )
    warning = f"{bad:,} images did not decode: run imnet-prep verify --level decode."
    failed = tag("p", warning, class_="warn") if bad else ""
    return join([table("Channel mean and standard deviation", head, rows), tag("p", said, class_="faint"), failed])


def _changes(gathered: Gathered, pictures: _Pictures) -> Html:
    splits = gathered.folder.manifest.splits
    rows = [
        (words, count, "converted" if change in CONVERTED else "noticed, stored as it was")
        for change, words in _CHANGES.items()
        if (count := sum(split.changes.get(change, 0) for split in splits.values()))
    ]
    parts: list[object] = [
        tag("h3", "Kept, and converted or noticed"),
        table("What was done or noticed", ("what", "images", "then"), rows) if rows else tag("p", "Nothing."),
    ]
    for change, shown in gathered.converted.items():
        thumbs = [tag("li", pictures.of(item, item.line.file_name)) for item in shown]
        parts += [tag("h3", f"{_CHANGES[change]}: as stored now"), tag("ul", *thumbs, class_="thumbs")]
    parts.append(tag("h3", "Rejected"))
    reasons = sorted({reason for split in splits.values() for reason in split.rejected})
    if not reasons:
        return join([*parts, tag("p", "Nothing was rejected.")])
    counts = [(reason, *(split.rejected.get(reason, 0) for split in splits.values())) for reason in reasons]
    parts += [
        table("Rejected by reason", ("reason", *splits), counts),
        tag("p", "Shown as far as they decode; duplicates by the one that was kept.", class_="faint"),
    ]
    twins = {f"{item.split}/{item.line.file_name}": item for shown in gathered.samples.values() for item in shown}
    listed = list(gathered.folder.rejected())
    body = []
    for item in listed[:MAX_REJECTED_LISTED]:
        name, twin = f"{item.split}/{item.file_name}", twins.get(item.detail.partition(" as ")[2])
        seen = pictures.kept(item.thumbnail, name) if item.thumbnail else pictures.of(twin) if twin else ""
        body.append((name, item.reason.value, join([item.detail, seen])))
    more = f", the first {MAX_REJECTED_LISTED} of {len(listed):,}" if len(listed) > MAX_REJECTED_LISTED else ""
    named = details(f"By name{more}", table("Rejected images", ("name", "reason", "detail"), body))
    return join([*parts, named])


def _duplicates(gathered: Gathered, pictures: _Pictures) -> Html:
    near, pairs = gathered.near, [(*pair, "same bytes") for pair in gathered.exact[: MAX_PAIRS // 2]]
    if near is None:
        said = f"With more than {MAX_PRINTS:,} records the same picture is looked for by verify --level decode only."
    else:
        said = f"{len(near):,} show the same picture as an earlier one: encoded again, scaled or mirrored."
        pairs += [
            (pair.first, pair.second, "same picture, mirrored" if pair.mirrored else "same picture")
            for pair in near[:MAX_PAIRS]
        ]
    parts = [tag("p", f"{len(gathered.exact):,} records have the same bytes as an earlier one."), tag("p", said)]
    for first, second, why in pairs:
        names = pictures.name(first), pictures.name(second)
        shown = [pictures.at(place, name, name) for place, name in zip((first, second), names, strict=True)]
        label = f"{why}: {' and '.join(names)}"
        parts.append(tag("div", tag("p", why), *shown, class_="pair", role="group", aria_label=label))
    return join(parts)


def _classes(gathered: Gathered, pictures: _Pictures) -> Html:
    manifest = gathered.folder.manifest
    items = []
    for label, (name, words) in enumerate(zip(manifest.classes, manifest.class_words, strict=True)):
        counts = ", ".join(f"{split.class_counts[label]:,} {key}" for key, split in manifest.splits.items())
        shown = gathered.samples.get(label, [])[: pictures.per_class]
        thumbs = tag("ul", *(tag("li", pictures.of(item)) for item in shown), class_="thumbs") if shown else ""
        heading = tag("h3", f"{label} ", tag("code", name), f" {words}")
        known = f"{label} {name} {words}".lower()
        items.append(tag("article", heading, tag("p", counts), thumbs, class_="class", data_text=known))
    search = tag(
        "div",
        tag("label", "Search the classes by name, word or label", for_="class-search"),
        Html('<input type="search" id="class-search" autocomplete="off">'),
        tag("p", "", aria_live="polite", class_="faint"),
        data_filter=".class",
        hidden="",
    )
    note = tag("p", "Some pictures were left out to keep this file small.", class_="faint") if pictures.spent else ""
    return join([search, note, *items])


def _provenance(gathered: Gathered) -> Html:
    manifest, shards = gathered.folder.manifest, gathered.folder.shards
    sources = [
        (source["kind"], source["name"] or "a folder", _bytes(source["size_bytes"]), source["images"] or "",
         "the official one" if source["official"] else "", tag("code", source["sha256"] or source["md5"]))
        for source in manifest.sources
    ]  # fmt: skip
    digests = [
        (shard.file, shard.rows, shard.size_bytes, tag("code", shard.sha256), tag("code", shard.index_sha256))
        for _, _, shard in shards
    ]
    known = [
        ("label convention", manifest.label_convention),
        ("seed", manifest.seed),
        ("plan", tag("code", manifest.plan or "none: adopted files")),
        ("manifest", tag("code", manifest.digest)),
        *((f"option {key}", json.dumps(value)[:300]) for key, value in manifest.options.items() if value is not None),
        *((f"made with {key}", value) for key, value in manifest.made_with.items()),
    ]
    parts = [facts(known), table("Sources", ("kind", "name", "size", "images", "official", "digest"), sources)]
    if gathered.hosts:
        said = f"Downloaded: {gathered.hosts.total():,} records from {len(gathered.hosts):,} hosts"
        parts.append(details(said, table("Hosts", ("host", "records"), gathered.hosts.most_common(20))))
    head = ("file", "rows", "bytes", "SHA-256", "SHA-256 of the index")
    return join([*parts, details(f"Digests of {len(shards):,} shards", table("Shards", head, digests))])
