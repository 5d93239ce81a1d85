"""The results of commands as lines for people."""

from __future__ import annotations

from typing import Any

from imnet_prep.show import summary

CONVERTED: dict[str, Any] = {
    "images": 1240, "rejected": {"empty": 1, "truncated": 2}, "shards": 2, "bytes": 3_500_000, "seconds": 4.0,
    "images_per_s": 310.0, "manifest": "records/manifest.json", "already_done": False, "notes": [],
}  # fmt: skip


def test_a_conversion_names_the_list_of_the_rejected_and_says_what_its_rate_includes() -> None:
    assert summary.conversion_rows(CONVERTED) == [
        ("images", "1,240"),
        ("rejected", "3 (truncated 2, empty 1), listed in records/rejected.jsonl"),
        ("stored", "3.5 MB in 2 shards"),
        ("time", "4.0 s, 310 images/s, start-up included"),
        ("records", "records, described in records/manifest.json"),
    ]


def test_a_long_conversion_has_a_plain_rate() -> None:
    assert ("time", "400.0 s, 310 images/s") in summary.conversion_rows({**CONVERTED, "seconds": 400.0})


def test_what_did_not_happen_is_not_told() -> None:
    rows = dict(summary.conversion_rows({**CONVERTED, "rejected": {}, "already_done": True, "shards": 1}))
    assert "rejected" not in rows
    assert "time" not in rows
    assert rows["already done"] == "nothing was written"
    assert rows["stored"] == "3.5 MB in 1 shard"
    assert summary.report_rows(
        {"report": "r.html", "bytes": 9, "images": 2, "duplicates": {"exact": 0, "near": None}}
    ) == [
        ("report", "r.html, 9 bytes"),
        ("images", "2"),
    ]


def test_info_of_records_behind_a_url_names_their_list() -> None:
    split = {
        "images": 4, "shards": 1, "bytes": 10_000, "classes_with_images": 2, "images_per_class": "2 to 2",
        "rejected": {"empty": 1}, "changes": {}, "duplicates": 0,
    }  # fmt: skip
    found = {
        "records": "s3://bucket/records", "images": 4, "classes": 2, "first_classes": ["cat", "dog"],
        "label_convention": "sorted", "splits": {"train": split}, "seed": 0, "options": {"max_pixels": 100_000_000},
        "sources": [{"kind": "imagefolder", "name": "", "images": 5, "size_bytes": 9}], "made_with": {"pillow": "1"},
        "manifest_sha256": "00",
    }  # fmt: skip
    rows = summary.records_rows(found)
    assert ("train", "4 images in 1 shard, 10.0 kB, 2 per class") in rows
    assert ("  rejected", "empty 1, listed in s3://bucket/records/rejected.jsonl") in rows
    assert ("options", "seed 0, max pixels 100,000,000") in rows
    assert [name for name, _ in rows if "dupl" in name or "change" in name] == []
