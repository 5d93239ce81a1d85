"""The pages of the browser, as HTML: they read and work without their script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from imnet_prep.augment import EvalOptions, TrainOptions
from imnet_prep.browse_data import VIEW_SIDE, Library, Record
from imnet_prep.report.html import Html, facts, join, table, tag

PAGE_IMAGES = 60
VIEWS = 12
TRAIN_FIELDS = (("crop", "smallest crop", 0.08), ("flip", "flip", 0.5), ("jitter", "colour jitter", 0.0),
                ("ops", "RandAugment operations", 0.0), ("erase", "erasing", 0.0))  # fmt: skip


def shell(title: str, records: Path, *content: object) -> str:
    """Make a whole page around its content."""
    assets = "".join(f'<link rel="stylesheet" href="/{name}">' for name in ("style.css", "browse.css"))
    scripts = "".join(f'<script src="/{name}" defer></script>' for name in ("script.js", "browse.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="/icon.svg">'
        f"<title>{escape(title)}</title>{assets}{scripts}</head><body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header><h1>{escape(title)}</h1></header>\n<nav aria-label="Site"><ul><li><a href="/">All classes of '
        f"{escape(records.resolve().name)}</a></li></ul></nav>\n"
        f'<main id="main" tabindex="-1">{join(content)}</main>\n'
        "<footer><p>Read-only, from this machine. Arrow keys turn pages, / goes to the search.</p></footer>\n"
        "</body></html>\n"
    )


def index(library: Library, words: str) -> str:
    """Every class, or those that the words fit, with their counts."""
    manifest = library.manifest
    wanted = words.lower().split()
    items = []
    for label, (name, said) in enumerate(zip(manifest.classes, manifest.class_words, strict=True)):
        text = f"{label} {name} {said}".lower()
        counts = {
            key: split.class_counts[label] for key, split in manifest.splits.items() if label < len(split.class_counts)
        }
        if not all(word in text for word in wanted) or not (sum(counts.values()) or wanted):
            continue
        shown = ", ".join(f"{count:,} {key}" for key, count in counts.items())
        link = tag("a", f"{label} ", tag("code", name), f" {said}", href=f"/class/{label}")
        items.append(tag("li", link, tag("div", shown, class_="faint"), data_text=text))
    unlabelled = [
        tag("p", tag("a", f"{name}: {len(table):,} images without labels", href=f"/class/-1?split={name}"))
        for name, table in library.tables.items()
        if len(library.of_class(name, -1))
    ]
    search = tag(
        "form",
        tag("label", "Search by wnid, word or label", for_="q"),
        Html(
            f'<input type="search" id="q" name="q" value="{escape(words)}" autocomplete="off"> <button>Search</button>'
        ),
        tag("p", f"{len(items):,} classes", aria_live="polite", class_="faint"),
        action="/",
        role="search",
        data_filter=".list li",
    )
    images = sum(split.images for split in manifest.splits.values())
    lead = tag(
        "p", f"{images:,} images in {len(manifest.classes):,} classes; {manifest.label_convention}.", class_="faint"
    )
    found = tag("ul", *items, class_="list") if items else tag("p", "No class fits.")
    return shell("Classes", library.folder, lead, search, *unlabelled, found)


def class_page(library: Library, label: int, split: str, number: int) -> str:
    """The images of a class in a split, a page of them."""
    manifest = library.manifest
    name, words = (manifest.classes[label], manifest.class_words[label]) if label >= 0 else ("no label", "")
    positions = library.of_class(split, label)
    pages = max(1, -(-len(positions) // PAGE_IMAGES))
    part = positions[number * PAGE_IMAGES : (number + 1) * PAGE_IMAGES].tolist()
    items = [_card(library.record(split, position)) for position in part]
    splits = [
        tag("a", f"{key}: {len(library.of_class(key, label)):,}", href=f"/class/{label}?split={key}",
            aria_current="page" if key == split else None)
        for key in library.tables
    ]  # fmt: skip

    def url(page: int) -> str:
        return f"/class/{label}?{urlencode({'split': split, 'page': page})}"

    turns = _turns(url(number - 1) if number else None, url(number + 1) if number + 1 < pages else None,
                   f"page {number + 1:,} of {pages:,}")  # fmt: skip
    title = f"{label} {name} {words}".strip()
    found = tag("ul", *items, class_="grid") if items else tag("p", "No image of it in this split.")
    return shell(title, library.folder, tag("p", *_spaced(splits)), turns, found, turns if len(items) > 12 else "")


def _spaced(parts: Sequence[Html]) -> list[object]:
    return [piece for part in parts for piece in (part, " ")]


def _card(record: Record) -> Html:
    place = f"{record.split}/{record.position}"
    image = Html(f'<img src="/thumb/{place}" alt="{escape(record.name)}" width="192" height="192" loading="lazy">')
    return tag("li", tag("a", image, tag("span", record.name.rpartition("/")[2]), href=f"/record/{place}"))


def _turns(before: str | None, after: str | None, where: str) -> Html:
    links = [
        tag("a", text, href=url, rel=rel) if url else tag("span", text, class_="faint", aria_disabled="true")
        for url, rel, text in ((before, "prev", "← before"), (after, "next", "after →"))
    ]
    return tag("div", links[0], tag("span", where), links[1], class_="pages")


def record_page(library: Library, record: Record, line: dict[str, object], values: dict[str, float], seed: int) -> str:
    """A record: the image as stored, everything known of it, and what training and evaluation make of it."""
    place = f"{record.split}/{record.position}"
    manifest = library.manifest
    siblings = library.of_class(record.split, record.label)
    here = int(siblings.searchsorted(record.position))
    urls = [
        f"/record/{record.split}/{siblings[at]}" if 0 <= at < len(siblings) else None for at in (here - 1, here + 1)
    ]
    turns = _turns(urls[0], urls[1], f"image {here + 1:,} of {len(siblings):,} in its class")
    class_name = manifest.classes[record.label] if record.label >= 0 else "no label"
    words = manifest.class_words[record.label] if record.label >= 0 else ""
    known: list[tuple[str, object]] = [
        ("class", tag("a", f"{record.label} {class_name} {words}", href=f"/class/{record.label}?split={record.split}")),
        ("file", tag("code", record.file)),
        ("row", record.row),
        ("record id", tag("code", f"{int(library.tables[record.split].ids[record.position]):016x}")),
        *((name, tag("code", value) if "sha" in name else _shown(value)) for name, value in sorted(line.items())
          if name not in ("shard", "row", "file_name")),
    ]  # fmt: skip
    fields = library.fields(record.split, record.position)
    image = Html(
        f'<img src="/image/{place}" alt="{escape(record.name)}, as stored" width="{line.get("width")}" '
        f'height="{line.get("height")}">'
    )
    parts = [
        turns,
        tag("div", image, tag("div", facts(known), tag("details", tag("summary", "Stored fields"),
            table("Stored fields", ("field", "value"), [(key, _shown(value)) for key, value in fields.items()]))),
            class_="record"),
        tag("h2", "What training makes of it"),
        _options(place, values, seed),
        _views(place, values, seed),
        tag("h2", "What evaluation makes of it"),
        tag("ul", tag("li", Html(f'<img src="/view/{place}?eval=1" alt="The centre crop" width="{VIEW_SIDE}" '
            f'height="{VIEW_SIDE}">')), class_="grid"),
    ]  # fmt: skip
    return shell(record.name, library.folder, *parts)


def _shown(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _options(place: str, values: dict[str, float], seed: int) -> Html:
    fields = [
        tag(
            "label", text, " ", Html(f'<input type="number" name="{name}" value="{values[name]:g}" step="any" min="0">')
        )
        for name, text, _ in TRAIN_FIELDS
    ]
    fields.append(tag("label", "seed ", Html(f'<input type="number" name="seed" value="{seed}" step="1" min="0">')))
    return tag("form", *fields, tag("button", "Show"), action=f"/record/{place}", class_="options")


def _views(place: str, values: dict[str, float], seed: int) -> Html:
    items = []
    for epoch in range(VIEWS):
        query = escape(
            urlencode({**{name: f"{value:g}" for name, value in values.items()}, "seed": seed, "epoch": epoch})
        )
        image = Html(
            f'<img src="/view/{place}?{query}" alt="Its view in epoch {epoch}" width="{VIEW_SIDE}" '
            f'height="{VIEW_SIDE}" loading="lazy">'
        )
        items.append(tag("li", image, tag("span", f"epoch {epoch}")))
    return tag("ul", *items, class_="grid")


def train_options(values: dict[str, float]) -> TrainOptions:
    """Turn the form's values into the pipeline's options.

    Raises:
        PipelineError: One is out of range.
    """
    jitter = values["jitter"]
    return TrainOptions(
        batch_size=1,
        image_size=VIEW_SIDE,
        scale=(values["crop"], 1.0),
        flip_prob=values["flip"],
        color_jitter=(jitter, jitter, jitter, 0.0),
        randaugment_ops=int(values["ops"]),
        erasing_prob=values["erase"],
    )


def eval_options() -> EvalOptions:
    """The pipeline's options for evaluation, at the size of the views."""
    return EvalOptions(batch_size=1, image_size=VIEW_SIDE)
