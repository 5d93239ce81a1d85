"""The results of commands as lines for people: name and value, what is empty left out.

Each function takes the object that ``--json`` prints.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imnet_prep.records.record_list import REJECTED

Rows = list[tuple[str, str]]
SHORT_S = 60  # a run of less is mostly start-up
ALREADY_DONE = ("already done", "nothing was written")


def lists_rows(found: Mapping[str, Any]) -> Rows:
    """Return the lines of a dry run of ``imnet-prep download``."""
    hosts = ", ".join(f"{one['host']} {one['urls']:,}" for one in found["largest_hosts"])
    rows = [(name.replace("_", " "), value) for name, value in {**found, "largest_hosts": hosts}.items() if value]
    return [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in rows]


def download_rows(result: Mapping[str, Any], out: Path, hosts: Sequence[tuple[str, int]]) -> Rows:
    """Return the lines of a download into a folder, with the hosts that failed most."""
    failed, listing = sum(result["failed"].values()), out / "failures.jsonl"
    listed = f", listed in {listing}" if failed and listing.exists() else ""
    others = ("pending", "malformed", "repeated", "elsewhere")
    return [
        ("requested", f"{result['requested']:,}"),
        ("ok", f"{result['ok']:,}, {_size(result['bytes'])}"),
        *([("failed", f"{failed:,}{listed}")] if failed else []),
        *((f"  {reason}", f"{count:,}") for reason, count in result["failed"].items()),
        *((f"  at {host}", f"{count:,}") for host, count in hosts),
        *((name, f"{result[name]:,}") for name in others if result.get(name)),
        ("time", f"{result['seconds']:,.1f} s"),
        ("folder", str(out)),
    ]


def conversion_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of a conversion."""
    manifest = Path(result["manifest"])
    skipped = result.get("skipped_bytes", 0)
    return [
        ("images", f"{result['images']:,}"),
        *_rejected(result["rejected"], str(manifest.parent)),
        *([("skipped", f"{skipped:,} damaged bytes of archives")] if skipped else []),
        ("stored", f"{_size(result['bytes'])} in {_counted(result['shards'], 'shard')}"),
        _time(result, f", {result['images_per_s']:,.0f} images/s"),
        ("records", f"{manifest.parent}, described in {manifest}"),
    ]


def plan_rows(plan: Mapping[str, Any]) -> Rows:
    """Return the lines of a dry run."""
    rows = []
    for source in plan["sources"]:
        rows.append(("source", f"{source['name']} ({source['kind']})"))
        rows += [("  note", note) for note in source["notes"]]
    return [
        *rows,
        ("images", f"{plan['images']:,} in {_counted(plan['classes'], 'class')}, {_size(plan['bytes'])}"),
        *((name, _contents(split)) for name, split in plan["splits"].items()),
        *([("rejected", _counts(plan["rejected"]))] if plan["rejected"] else []),
        ("labels", plan["label_convention"]),
        ("time", f"about {max(1, plan['seconds_estimated']):,.0f} s"),
        ("disk", f"{_size(plan['disk_needed'])} needed, {_size(plan['disk_free'])} free"),
    ]


def records_rows(found: Mapping[str, Any]) -> Rows:
    """Return the lines of ``imnet-prep info``."""
    more = ", ..." if found["classes"] > len(found["first_classes"]) else ""
    rows = [
        ("records", found["records"]),
        ("images", f"{found['images']:,}"),
        ("classes", f"{found['classes']:,}: {', '.join(found['first_classes'])}{more}"),
        ("labels", found["label_convention"]),
    ]
    for name, split in found["splits"].items():
        rows.append((name, f"{_contents(split)}, {_per_class(split)} per class"))
        rows += [(f"  {row}", value) for row, value in _rejected(split["rejected"], found["records"])]
        rows += [("  changed", _counts(split["changes"]))] if split["changes"] else []
        rows += [("  duplicates", f"{split['duplicates']:,}")] if split["duplicates"] else []
    options = {"seed": found["seed"], **found["options"]}
    return [
        *rows,
        ("options", ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in options.items())),
        *(("source", _source(source)) for source in found["sources"]),
        ("made with", ", ".join(f"{name} {version}" for name, version in found["made_with"].items())),
        ("manifest", f"SHA-256 {found['manifest_sha256']}"),
    ]


def reshard_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of resharding."""
    return [
        ("images", f"{result['images']:,}"),
        ("stored", f"{_size(result['bytes'])} in {_counted(result['shards'], 'shard')}"),
        ("labels", "unchanged" if result["labels_unchanged"] else "changed: see the classes in the manifest"),
        ("proof", f"{result['proof']}, of the records before and after"),
        _time(result),
        ("records", f"{Path(result['manifest']).parent}, described in {result['manifest']}"),
    ]


def export_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of ``imnet-prep export``."""
    splits = ", ".join(f"{name} {count:,}" for name, count in result["splits"].items())
    return [
        ("images", f"{result['images']:,} ({splits}), {_size(result['bytes'])}"),
        *([("renamed", f"{result['renamed']:,} to names that every file system holds")] if result["renamed"] else []),
        ("proof", result["proof"]),
        _time(result),
        ("folder", f"{result['out']} ({result['format']})"),
    ]


def repair_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of ``imnet-prep repair-index``."""
    states = {
        name: count for name, count in result.items() if name not in ("ok", "shards", "rows", "rows_lost", "details")
    }
    return [
        ("result", "everything is as the manifest says" if result["ok"] else "lost or damaged: see below"),
        ("shards", f"{result['shards']:,} ({_counts({name: count for name, count in states.items() if count})})"),
        ("records", f"{result['rows']:,}" + (f", {result['rows_lost']:,} lost" if result["rows_lost"] else "")),
        *(
            (f"  {shard['file']}", f"{shard['state']}, {shard['rows']:,} of {shard['expected']:,} records")
            for shard in result["details"]
        ),
        *(("  detail", f"{shard['file']}: {shard['detail']}") for shard in result["details"] if shard["detail"]),
    ]


def adoption_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of ``imnet-prep adopt``."""
    splits, undecodable = result["images"], result["undecodable"]
    return [
        ("images", f"{_counts(splits)} in {_counted(result['shards'], 'shard')}"),
        ("classes", f"{result['classes']:,}"),
        ("columns", ", ".join(f"{name} ({kind})" for name, kind in result["columns"].items())),
        *([("undecodable", f"{undecodable:,}, adopted as they are")] if undecodable else []),
        ("labels", result["label_convention"]),
        *(("note", note) for note in result["notes"]),
        ("manifest", result["manifest"]),
    ]


def report_rows(result: Mapping[str, Any]) -> Rows:
    """Return the lines of ``imnet-prep report``."""
    duplicates = {name: count for name, count in result["duplicates"].items() if count}
    return [
        ("report", f"{result['report']}, {_size(result['bytes'])}"),
        ("images", f"{result['images']:,}"),
        *([("duplicates", _counts(duplicates))] if duplicates else []),
    ]


def _rejected(rejected: Mapping[str, int], records: str) -> Rows:
    return [("rejected", f"{_counts(rejected)}, listed in {records}/{REJECTED}")] if rejected else []


def _time(result: Mapping[str, Any], rate: str = "") -> tuple[str, str]:
    if result["already_done"]:
        return ALREADY_DONE
    start = ", start-up included" if rate and result["seconds"] < SHORT_S else ""
    return "time", f"{result['seconds']:,.1f} s{rate}{start}"


def _contents(split: Mapping[str, Any]) -> str:
    return f"{split['images']:,} images in {_counted(split['shards'], 'shard')}, {_size(split['bytes'])}"


def _per_class(split: Mapping[str, Any]) -> str:
    least, _, most = split["images_per_class"].partition(" to ")
    return least if least == most else f"{least} to {most}"


def _source(source: Mapping[str, Any]) -> str:
    name = source.get("name") or source["kind"]
    official = ", the official archive" if source.get("official") else ""
    digest = f", SHA-256 {source['sha256']}" if source.get("sha256") else ""
    return f"{name}: {source.get('images', 0):,} images, {_size(source.get('size_bytes', 0))}{official}{digest}"


def _counts(counts: Mapping[str, int]) -> str:
    """Return ``3 (truncated 2, empty 1)``, or ``truncated 3`` for one kind."""
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return parts if len(counts) == 1 else f"{sum(counts.values()):,} ({parts})"


def _value(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"of {len(value)} names"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _size(count: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return _counted(count, "byte")
