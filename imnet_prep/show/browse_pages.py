"""The pages of the browser, as HTML: they read and work without their script."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import urlencode

from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.show.browse_data import VIEW_SIDE, Library
from imnet_prep.show.html import Html, facts, join, table, tag

PAGE_IMAGES = 60
VIEWS = 12
TRAIN_FIELDS = (("crop", "smallest crop", 0.08), ("flip", "flip", 0.5), ("jitter", "colour jitter", 0.0),
                ("ops", "RandAugment operations", 0.0), ("erase", "erasing", 0.0))  # fmt: skip


def shell(title: str, records: Path, *content: object) -> str:
    """Return a whole page around its content."""
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="/icon.svg">'
        f'<title>{escape(title)}</title><link rel="stylesheet" href="/style.css">'
        '<link rel="stylesheet" href="/browse.css"><script src="/script.js" defer></script>'
        '<script src="/browse.js" defer></script></head><body>\n'
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header><h1>{escape(title)}</h1></header>\n<nav aria-label="Site"><ul><li><a href="/">All classes of '
        f"{escape(records.resolve().name)}</a></li></ul></nav>\n"
        f'<main id="main" tabindex="-1">{join(content)}</main>\n'
        "<footer><p>Read-only, from this machine. Arrow keys turn pages, / goes to the search.</p></footer>\n"
        "</body></html>\n"
    )
    return html.encode("utf-8", "replace").decode()  # the folder's name need not be UTF-8


def index(library: Library, words: str) -> str:
    """Return the page of every class, or of those that the words fit, with their counts."""
    manifest = library.manifest
    items = []
    for label, (name, said) in enumerate(zip(manifest.classes, manifest.class_words, strict=True)):
        text = f"{label} {name} {said}".lower()
        counts = {key: split.class_counts[label] for key, split in manifest.splits.items()}
        if all(word in text for word in words.lower().split()) and (any(counts.values()) or words.strip()):
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
    size = f"{library.folder.records:,} images in {len(manifest.classes):,} classes; {manifest.label_convention}."
    found = tag("ul", *items, class_="list") if items else tag("p", "No class fits.")
    return shell("Classes", library.folder.path, tag("p", size, class_="faint"), search, *unlabelled, found)


def class_page(library: Library, label: int, split: str, number: int) -> str:
    """Return a page of the images of a class in a split."""
    positions = library.of_class(split, label)
    pages = max(1, -(-len(positions) // PAGE_IMAGES))
    part = positions[number * PAGE_IMAGES : (number + 1) * PAGE_IMAGES].tolist()
    items = [_card(f"{split}/{position}", library.row(split, position).name) for position in part]
    splits = [
        tag("a", f"{key}: {len(library.of_class(key, label)):,}", href=f"/class/{label}?split={key}",
            aria_current="page" if key == split else None)
        for key in library.tables
    ]  # fmt: skip

    def url(page: int) -> str:
        return f"/class/{label}?{urlencode({'split': split, 'page': page})}"

    turns = _turns(url(number - 1) if number else None, url(number + 1) if number + 1 < pages else None,
                   f"page {number + 1:,} of {pages:,}")  # fmt: skip
    found = tag("ul", *items, class_="grid") if items else tag("p", "No image of it in this split.")
    links = tag("p", *(piece for link in splits for piece in (link, " ")))
    last = turns if len(items) > 12 else ""
    return shell(_titled(library, label).strip(), library.folder.path, links, turns, found, last)


def _titled(library: Library, label: int) -> str:
    manifest = library.manifest
    if not 0 <= label < len(manifest.classes):
        return f"{label} no label "
    return f"{label} {manifest.classes[label]} {manifest.class_words[label]}"


def _card(place: str, name: str) -> Html:
    image = Html(f'<img src="/thumb/{place}" alt="{escape(name)}" width="192" height="192" loading="lazy">')
    return tag("li", tag("a", image, tag("span", name.rpartition("/")[2]), href=f"/record/{place}"))


def _turns(before: str | None, after: str | None, where: str) -> Html:
    links = [
        tag("a", text, href=url, rel=rel) if url else tag("span", text, class_="faint", aria_disabled="true")
        for url, rel, text in ((before, "prev", "← before"), (after, "next", "after →"))
    ]
    return tag("div", links[0], tag("span", where), links[1], class_="pages")


def record_page(library: Library, split: str, position: int, values: dict[str, float], seed: int) -> str:
    """Return the page of a record: the image, everything known of it, and what training and evaluation make of it."""
    place, rows, row = f"{split}/{position}", library.tables[split], library.row(split, position)
    fields, line, label = library.fields(split, position), library.line(split, position), int(rows.label[position])
    siblings = library.of_class(split, label)
    here = int(siblings.searchsorted(position))
    before, after = (
        f"/record/{split}/{siblings[at]}" if 0 <= at < len(siblings) else None for at in (here - 1, here + 1)
    )
    turns = _turns(before, after, f"image {here + 1:,} of {len(siblings):,} in its class")
    known: list[tuple[str, object]] = [
        ("class", tag("a", _titled(library, label), href=f"/class/{label}?split={split}")),
        ("file", tag("code", row.file)),
        ("row", row.row),
        ("record id", tag("code", f"{int(rows.ids[position]):016x}")),
        *((name, tag("code", value) if "sha" in name else _shown(value)) for name, value in sorted(line.items())
          if name not in ("shard", "row", "file_name")),
    ]  # fmt: skip
    image = Html(
        f'<img src="/image/{place}" alt="{escape(row.name)}, as stored" width="{line["width"]}" '
        f'height="{line["height"]}">'
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
    return shell(row.name, library.folder.path, *parts)


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
    asked = {name: f"{value:g}" for name, value in values.items()}
    for epoch in range(VIEWS):
        query = escape(urlencode({**asked, "seed": seed, "epoch": epoch}))
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
    """Return the pipeline's options for evaluation, at the size of the views."""
    return EvalOptions(batch_size=1, image_size=VIEW_SIDE)
