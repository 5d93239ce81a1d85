"""Sources to a whole folder: what is in it, what is refused, and what is left behind."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imnet_prep.build import job as build
from imnet_prep.build import shard_task
from imnet_prep.build.convert import convert, dry_run
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.check.verify import verify
from imnet_prep.errors import BudgetError, ImnetError, IntegrityError, Interrupted, PlanError, SourceError
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.types import Progress
from tests import synthetic
from tests.records import digests, names, quiet, read_records, run
from tests.synthetic import jpeg, make_image_folder, make_imagenet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("source"), 3, 8)


@pytest.fixture(scope="module")
def records(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished records of ``source``: to be copied, never changed."""
    out = tmp_path_factory.mktemp("records") / "records"
    run(source, out, shards=2)
    return out


def whole(folder: Path) -> bool:
    return verify(folder, "hash", 1, quiet).ok


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_every_record_is_its_source_image(source: Path, records: Path) -> None:
    manifest = load_manifest(records)
    for split, info in manifest.splits.items():
        shards = [Shard(records / shard.file) for shard in info.shards]
        lines = list(read_records(records, info))
        assert len(lines) == info.images == 24
        for line in lines:
            fields = shards[line.shard].fields(line.row)
            assert shards[line.shard].image(line.row) == (source / split / line.file_name).read_bytes()
            assert fields == {"file_name": line.file_name, "label": line.label}
            assert manifest.classes[line.label] == line.file_name.split("/")[0]


def test_same_input_elsewhere_gives_the_same_bytes(source: Path, records: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "another place" / "photos")
    run(copy, tmp_path / "out", shards=2, workers=2)
    assert digests(tmp_path / "out") == digests(records)


def test_folder_holds_nothing_else_and_no_path(source: Path, records: Path) -> None:
    assert names(records) == {"manifest.json", "rejected.jsonl", "train", "val"}
    assert names(records.parent) == {"records"}
    assert str(source) not in (records / "manifest.json").read_text()
    assert whole(records)


def test_awkward_names_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "ü 空 100%#?'\" x"
    source = make_image_folder(folder / "in # put", ["a b", "c'd", "é%20", "#?&"], 3, ())
    os.rename(source / "a b" / "a b_all_0.jpg", source / "a b" / "ü 空 %#?'\".jpg")
    result = run(source, folder / "out ?#")
    assert result.manifest.splits["train"].images == 12
    assert result.manifest.classes == ("#?&", "a b", "c'd", "é%20")
    assert whole(folder / "out ?#")


def test_relative_paths(source: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path(os.path.relpath(source)), Path("made/by/../records"), shards=2)
    assert digests(tmp_path / "made" / "records") == digests(records)


def test_source_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    before = digests(copy)
    for folder, _, _ in os.walk(copy):
        os.chmod(folder, 0o555)
    run(copy, tmp_path / "out")
    assert digests(copy) == before


def test_odd_images_are_converted_or_rejected_and_all_accounted_for(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "archives", classes=4, per_class=3)
    result = run([made.train, made.val, made.devkit], tmp_path / "out")
    for info in result.manifest.splits.values():
        assert info.found == info.images + sum(info.rejected.values())
    train = result.manifest.splits["train"]
    assert train.found == len(made.train_names)
    lines = {line.file_name: line for line in read_records(tmp_path / "out", train)}
    rejected = {
        item["file_name"]: item["reason"]
        for item in map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    }
    for name, odd in made.odd.items():
        if odd.reason is None:
            assert set(odd.changes) <= set(lines[name].changes)
        else:
            assert rejected[name] == odd.reason
    assert {item["name"] for item in result.manifest.sources} == {made.train.name, made.val.name, made.devkit.name}
    assert all(item["sha256"] and item["md5"] for item in result.manifest.sources)
    assert whole(tmp_path / "out")


def test_missing_val_image_is_named_and_the_others_keep_their_labels(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "archives", missing_val=[4])
    result = run([made.val, made.devkit], tmp_path / "out")
    labels = {wnid: label for label, wnid in enumerate(result.manifest.classes)}
    lines = list(read_records(tmp_path / "out", result.manifest.splits["val"]))
    assert len(lines) == len(made.val_labels) - 1
    for line in lines:
        number = int(Path(line.file_name).stem.rsplit("_", 1)[1])
        assert line.label == labels[made.val_labels[number]]
    assert any("ILSVRC2012_val_00000004" in note for note in result.notes)


def test_test_split_has_no_labels(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "archives", test=5)
    result = run([made.train, made.test], tmp_path / "out")
    test = result.manifest.splits["test"]
    assert test.images == 5
    assert sum(test.class_counts) == 0
    assert {line.label for line in read_records(tmp_path / "out", test)} == {-1}
    assert whole(tmp_path / "out")


def test_split_of_a_plain_folder(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 2, 3, ())
    assert set(run(source, tmp_path / "out", split="val").manifest.splits) == {"val"}


def test_label_space_file_gives_labels_to_classes_without_images(source: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes"
    listed.write_text("\n".join(["zero", *reversed(synthetic.WNIDS[:3])]))
    manifest = run(source, tmp_path / "out", label_space=str(listed)).manifest
    assert manifest.classes == ("zero", *reversed(synthetic.WNIDS[:3]))
    assert manifest.splits["train"].class_counts == (0, 8, 8, 8)


def test_split_whose_every_image_is_rejected(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 2, 3)
    for path in (source / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    manifest = run(source, tmp_path / "out").manifest
    assert manifest.splits["val"].images == 0
    assert manifest.splits["val"].rejected == {"empty": 6}
    assert manifest.splits["val"].shards == ()
    assert whole(tmp_path / "out")


def test_class_whose_every_image_is_rejected_keeps_its_label(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", ["a", "b", "c"], 3, ())
    for path in (source / "b").iterdir():
        path.write_bytes(b"not an image")
    manifest = run(source, tmp_path / "out").manifest
    assert manifest.classes == ("a", "b", "c")
    assert manifest.splits["train"].class_counts == (3, 0, 3)


def test_nothing_left_is_over_every_budget(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 2, 2, ())
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(BudgetError, match="4 of 4 images rejected"):
        run(source, tmp_path / "out")


def test_duplicates_are_counted_or_rejected(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 2, 5)
    for split, name in (("train", "a.jpg"), ("train", "b.jpg"), ("val", "c.jpg")):
        (source / split / synthetic.WNIDS[0] / name).write_bytes(jpeg(0, 12345))
    kept = run(source, tmp_path / "kept").manifest.splits
    assert (kept["train"].duplicates, kept["val"].duplicates) == (1, 1)
    # They were asked for, so they are no reason to stop.
    only = run(source, tmp_path / "only", duplicates="reject", max_rejected="0").manifest.splits
    assert only["train"].rejected == {"duplicate": 2}
    assert (only["train"].duplicates, only["val"].duplicates) == (0, 0)


@pytest.mark.slow
def test_row_that_outgrows_its_page_is_stored_all_the_same(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 1, 40, (), width=64, height=64)
    flat = synthetic.encode(synthetic.picture(0, 0, 8, 8).repeat(150, 0).repeat(150, 1), "PNG")
    (source / synthetic.WNIDS[0] / "flat.jpg").write_bytes(flat)  # a PNG that is far larger as a JPEG
    results = [run(source, tmp_path / name, shards=5, workers=workers) for name, workers in (("a", 1), ("b", 2))]
    assert results[0].manifest.splits["train"].images == 41
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert whole(tmp_path / "a")
    larger = results[0].manifest.splits["train"].page_size
    assert [Shard(path).header.page_size for path in (tmp_path / "a" / "train").glob("*.mindrecord")] == [larger] * 5
    planned = dry_run([source], tmp_path / "c", None, PlanOptions(shards=5), ConvertOptions(), quiet, lambda: False)
    assert planned["splits"]["train"]["page_size"] < larger


def test_source_that_changes_meanwhile_is_rejected_not_torn(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(source, tmp_path / "in")

    first = copy / "train" / synthetic.WNIDS[0] / f"{synthetic.WNIDS[0]}_train_0.jpg"
    second = copy / "train" / synthetic.WNIDS[1] / f"{synthetic.WNIDS[1]}_train_0.jpg"

    def change(task: Any) -> None:
        first.write_bytes(b"short")
        second.unlink(missing_ok=True)

    monkeypatch.setattr(build, "finished", change)  # asked when the plan is made
    train = run(copy, tmp_path / "out").manifest.splits["train"]
    assert train.rejected == {"unreadable": 2}
    assert train.found == 24


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "fits"), [("2", True), ("1", False), ("10%", True), ("7.9%", False), ("0", False)])
def test_budget(tmp_path: Path, budget: str, fits: bool) -> None:
    source = make_image_folder(tmp_path / "in", 2, 10, ())
    for path in sorted(source.rglob("*.jpg"))[:2]:
        path.write_bytes(path.read_bytes()[:-30])
    if fits:
        assert run(source, tmp_path / "out", max_rejected=budget).manifest.splits["train"].images == 18
    else:
        with pytest.raises(BudgetError, match=rf"2 of 20 .*truncated 2.*{budget}") as caught:
            run(source, tmp_path / "out", max_rejected=budget)
        assert caught.value.exit_code == 3
        listed = (tmp_path / "out.partial" / "rejected.jsonl").read_text().splitlines()
        assert len(listed) == 2
        run(source, tmp_path / "out", max_rejected="50%")  # the same command with a larger budget goes on
        assert names(tmp_path) == {"in", "out"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0}, {"workers": -1}, {"max_rejected": "many"}, {"max_rejected": "-1"}, {"max_rejected": "1 %"},
        {"executor": "ray"}, {"executor": "dask"}, {"scheduler": "tcp://x"},
    ],
)  # fmt: skip
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        ConvertOptions(**wrong)


# --- where it may go -------------------------------------------------------------------------------------------------


def put_file(out: Path) -> None:
    out.write_text("mine", encoding="utf-8")


def put_folder(out: Path) -> None:
    (out / "mine").mkdir(parents=True)


def put_foreign_manifest(out: Path) -> None:
    put_folder(out)
    (out / "manifest.json").write_text('{"name": "extension"}')


@pytest.mark.parametrize("put", [put_file, put_folder, put_foreign_manifest])
@pytest.mark.parametrize("force", [False, True])
def test_what_no_conversion_made_is_never_touched(
    source: Path, tmp_path: Path, put: Callable[[Path], None], force: bool
) -> None:
    put(tmp_path / "out")
    before = digests(tmp_path)
    with pytest.raises(ImnetError):
        run(source, tmp_path / "out", force=force)
    assert digests(tmp_path) == before
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("inside", [".", ".."])
def test_source_is_never_replaced(source: Path, tmp_path: Path, inside: str) -> None:
    copy = shutil.copytree(source, tmp_path / "a" / "photos")
    before = digests(copy)
    with pytest.raises(PlanError, match="the source"):
        run(copy, copy / inside, force=True)
    assert digests(copy) == before
    assert names(tmp_path / "a") == {"photos"}


def test_existing_empty_folder_is_used(source: Path, records: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out", shards=2)
    assert digests(tmp_path / "out") == digests(records)
    assert names(tmp_path) == {"out"}


def test_link_to_a_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/records")
    run(source, tmp_path / "link")
    assert whole(tmp_path / "disk" / "records")
    assert (tmp_path / "link").is_symlink()


def test_link_to_itself_and_the_root_are_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", Path("/")):
        with pytest.raises(PlanError, match=r"cannot be the records folder|the source"):
            run(source, out)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which root cannot write either")
def test_place_that_cannot_be_written(source: Path) -> None:
    with pytest.raises(PlanError, match="cannot be"):
        run(source, Path("/proc/nowhere/records"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"label_space": "imagenet2k"}, PlanError), ({"keep_classes": Path("none")}, PlanError),
        ({"split": "dev"}, SourceError),
    ],
)  # fmt: skip
def test_failure_before_the_work_leaves_nothing(
    source: Path, tmp_path: Path, options: dict[str, Any], error: type[ImnetError]
) -> None:
    with pytest.raises(error):
        run(source, tmp_path / "deep" / "er" / "out", **options)
    assert names(tmp_path) == set()


def test_interruption_before_the_work_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert([source], tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=1), quiet, lambda: True)
    assert names(tmp_path) == set()


def test_two_runs_at_once(source: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(state: Progress) -> None:
        if not refused:
            with pytest.raises(PlanError, match="another conversion is at work") as caught:
                run(source, tmp_path / "out")
            refused.append(str(caught.value))

    convert([source], tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=1), meanwhile, lambda: False)
    assert refused
    assert names(tmp_path) == {"out"}


# --- again -----------------------------------------------------------------------------------------------------------


def test_finished_folder_asked_for_again_is_done(source: Path, records: Path, tmp_path: Path) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    result = run(source, out, shards=2)
    assert result.already_done
    assert result.to_json()["images"] == 48
    assert names(tmp_path) == {"out"}


def test_finished_folder_with_a_shard_missing_is_not_done(source: Path, records: Path, tmp_path: Path) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    shard = min((out / "train").glob("*.mindrecord"))
    shard.unlink()
    with pytest.raises(IntegrityError, match=shard.name):
        run(source, out, shards=2)
    assert run(source, out, shards=2, force=True).already_done is False
    assert digests(out) == digests(records)


def test_another_plan_needs_force_and_replaces_at_the_end(source: Path, records: Path, tmp_path: Path) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    before = digests(out)
    with pytest.raises(PlanError, match="another plan: --shards was 2, now 3; choose"):
        run(source, out, shards=3)
    assert digests(out) == before

    def still_there(state: Progress) -> None:
        assert digests(out) == before

    options = ConvertOptions(workers=1, force=True)
    convert([source], out, None, PlanOptions(shards=3), options, still_there, lambda: False)
    assert len(load_manifest(out).splits["train"].shards) == 3
    assert names(tmp_path) == {"out"}


def test_forced_run_that_fails_keeps_the_old_folder(source: Path, records: Path, tmp_path: Path) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    before = digests(out)
    bad = shutil.copytree(source, tmp_path / "bad")
    for path in (bad / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(BudgetError):
        run(bad, out, force=True, max_rejected="1%")
    assert digests(out) == before


@pytest.mark.parametrize("die_at", ["out", "out.partial", "out.partial.replaced"])
def test_killed_while_it_takes_its_place(
    source: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: str
) -> None:
    """Between the renames there is an old or a new folder somewhere, and any next command finishes."""
    from imnet_prep.records import publish

    class Killed(BaseException):
        pass

    out = shutil.copytree(records, tmp_path / "out")

    def dying(there: Callable[..., None], path: Path, *others: Path) -> None:
        if path == tmp_path / die_at and path.exists():
            raise Killed
        there(path, *others)

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (publish, "remove")):
            patch.setattr(module, name, partial(dying, getattr(module, name)))
        with pytest.raises(Killed):
            run(source, out, shards=3, force=True)
    assert whole(out if out.exists() else tmp_path / "out.partial")
    result = run(source, out, shards=3)
    assert result.images_now == 0
    assert len(load_manifest(out).splits["train"].shards) == 3
    assert names(tmp_path) == {"out"}


# --- what is someone else's is not deleted ---------------------------------------------------------------------------


def pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("manifest", ["", "{}", '{"format": "another"}'])
@pytest.mark.parametrize("place", ["out.partial", "out.partial.replaced", "out"])
def test_folders_that_look_like_ours_are_not_taken(source: Path, tmp_path: Path, place: str, manifest: str) -> None:
    theirs = shutil.copytree(source, tmp_path / place)
    if manifest:
        (theirs / "manifest.json").write_text(manifest)
    before = pictures(theirs)
    with pytest.raises(PlanError, match=r"no conversion made|in the way|holds no records"):
        run(source, tmp_path / "out", force=place == "out")
    assert pictures(theirs) == before
    assert names(tmp_path) == {place}


@pytest.mark.parametrize("place", ["out.partial", "out.partial.replaced", "out"])
def test_a_source_is_not_taken_for_a_place_to_work(source: Path, tmp_path: Path, place: str) -> None:
    mine = shutil.copytree(source, tmp_path / place)
    before = pictures(mine)
    for given in (mine, mine / "train"):
        with pytest.raises(PlanError, match=r"the source .* lies in"):
            run(given, tmp_path / "out", force=True, split="train")
    assert pictures(mine) == before


def test_a_link_in_the_place_of_the_work_is_not_followed(source: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(source, tmp_path / "theirs")
    (tmp_path / "out.partial").symlink_to(theirs)
    before = pictures(theirs)
    with pytest.raises(PlanError, match="no conversion made"):
        run(source, tmp_path / "out")
    assert pictures(theirs) == before


@pytest.mark.parametrize("added", ["notes.txt", "notes/a.txt", "train/mine.jpg"])
def test_force_keeps_a_folder_that_holds_other_files(source: Path, records: Path, tmp_path: Path, added: str) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).write_text("mine")
    with pytest.raises(PlanError, match="no conversion made"):
        run(source, out, shards=3, force=True)
    assert (out / added).read_text() == "mine"


def test_what_an_earlier_version_left_beside_its_lists_is_ours(source: Path, records: Path, tmp_path: Path) -> None:
    out = shutil.copytree(records, tmp_path / "out")
    (out / "rejected.jsonl.0123456789abcdef.tmp").write_bytes(b"")
    run(source, out, shards=3, force=True)
    assert "rejected.jsonl.0123456789abcdef.tmp" not in names(out)


def test_unfinished_work_of_another_plan_is_not_thrown_away(source: Path, tmp_path: Path) -> None:
    def leave(state: Progress) -> None:
        if state.unit == "images" and state.done:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        convert([source], tmp_path / "out", None, PlanOptions(shards=4), ConvertOptions(workers=1), leave,
                lambda: False)  # fmt: skip
    before = digests(tmp_path / "out.partial")
    with pytest.raises(PlanError, match="unfinished conversion with another plan: --seed was 0, now 1; repeat"):
        run(source, tmp_path / "out", shards=4, seed=1)
    assert digests(tmp_path / "out.partial") == before
    run(source, tmp_path / "out", shards=4, seed=1, force=True)
    assert load_manifest(tmp_path / "out").seed == 1
    assert names(tmp_path) == {"out"}


# --- a full disk, at each place that writes --------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["begin", "write_atomically", "assemble", "publish_folder"])
def test_full_disk_is_one_error_and_the_same_command_goes_on(
    source: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, place, full)
        with pytest.raises(PlanError, match=r"the disk is full; expected about [\d,]+ more bytes free"):
            run(source, tmp_path / "out", shards=2)
    run(source, tmp_path / "out", shards=2)
    assert digests(tmp_path / "out") == digests(records)
    assert names(tmp_path) == {"out"}


def test_disk_that_is_too_small_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PlanError, match="more bytes free"):
        run(source, tmp_path / "out")
    assert names(tmp_path) == set()


# --- the preview -----------------------------------------------------------------------------------------------------


def test_dry_run_tells_the_plan_and_leaves_nothing(source: Path, records: Path, tmp_path: Path) -> None:
    preview = dry_run([source], tmp_path / "deep" / "out", None, PlanOptions(shards=2), ConvertOptions(), quiet,
                      lambda: False)  # fmt: skip
    manifest = load_manifest(records)
    assert preview["images"] == 48
    assert preview["shards"] == 4
    assert preview["classes"] == len(manifest.classes)
    assert preview["splits"]["train"]["page_size"] == manifest.splits["train"].page_size
    assert preview["disk_needed"] >= sum(path.stat().st_size for path in records.rglob("*") if path.is_file()) * 0.8
    assert names(tmp_path) == set()


def test_the_time_of_a_sample_is_scaled_to_all_images_and_workers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imnet_prep.build import convert as conversion

    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a second per split, whatever is sampled
    monkeypatch.setattr(conversion, "time", clock)
    monkeypatch.setattr(conversion, "SAMPLE_IMAGES", 6)  # of 24 per split
    preview = dry_run([source], tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=2), quiet, lambda: False)
    assert preview["seconds_estimated"] * 2 == pytest.approx(2 * 24 / 6, rel=0.2)


def test_dry_run_names_the_missing_val_image(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "archives", missing_val=[2])
    preview = dry_run([made.val, made.devkit], tmp_path / "out", None, PlanOptions(), ConvertOptions(), quiet,
                      lambda: False)  # fmt: skip
    assert "ILSVRC2012_val_00000002" in json.dumps(preview)


# --- archives are read once ------------------------------------------------------------------------------------------


def test_resuming_reads_no_archive_again_but_notices_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imnet_prep.build import convert as conversion
    from imnet_prep.sources import base

    made = make_imagenet(tmp_path / "archives", odd=False)
    read: list[str] = []
    digest = getattr(conversion, "digests")  # noqa: B009

    def counted(path: Path, progress: Any = None) -> Any:
        read.append(path.name)
        return digest(path, progress)

    for module in (conversion, base):
        monkeypatch.setattr(module, "digests", counted)

    def stop_at_work(task: Any) -> None:
        raise Interrupted("enough")

    arguments = [made.train, made.val, made.devkit]
    with monkeypatch.context() as patch:
        patch.setattr(build, "finished", stop_at_work)
        with pytest.raises(Interrupted):
            run(arguments, tmp_path / "out")
        assert len(read) == 3
        patch.setattr(conversion, "make_plan", full)
        with pytest.raises(Interrupted):
            run(arguments, tmp_path / "out")
        assert len(read) == 3
    data = bytearray(made.val.read_bytes())
    at = data.index(b"\xff\xd8") + 20
    data[at] ^= 1
    made.val.write_bytes(data)
    with pytest.raises(PlanError, match="other archives"):
        run(arguments, tmp_path / "out")
    assert len(read) == 4
    run(arguments, tmp_path / "out", force=True)
    assert whole(tmp_path / "out")


def test_worker_left_behind_touches_no_other_plan(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "plan.json").write_text('{"plan": "aaaa"}')
    with pytest.raises(PlanError, match="taken over"):
        shard_task.check_plan(tmp_path, "bbbb")


# --- hostile input ---------------------------------------------------------------------------------------------------


def test_two_hundred_malformed_images_are_all_accounted_for(tmp_path: Path) -> None:
    rng = random.Random(1)
    folder = tmp_path / "in" / "class"
    folder.mkdir(parents=True)
    whole_images = [jpeg(k, k, 64, 48) for k in range(10)]
    (folder / "whole.jpg").write_bytes(whole_images[0])
    for number in range(200):
        data = bytearray(rng.choice(whole_images))
        kind = number % 5
        if kind == 0:
            del data[rng.randrange(1, len(data)) :]
        elif kind == 1:
            for _ in range(3):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            other = rng.choice(whole_images)
            data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
        elif kind == 3:
            data = bytearray(rng.randbytes(rng.randrange(3000)))
        else:
            data = bytearray(synthetic.with_size(bytes(data), rng.randrange(1, 65_536), rng.randrange(1, 65_536)))
        (folder / f"{number}.jpg").write_bytes(data)
    train = run(tmp_path / "in", tmp_path / "out", workers=2).manifest.splits["train"]
    assert train.found == 201
    assert train.images + sum(train.rejected.values()) == 201
    assert train.images >= 1
    assert names(tmp_path) == {"in", "out"}
    assert whole(tmp_path / "out")


def test_hostile_tar_does_nothing_outside_and_is_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    good = jpeg(1, 2)
    with tarfile.open(path, "w") as archive:
        for name in ("a/1.jpg", "b/2.jpg", "/etc/a/3.jpg", "../a/4.jpg", "a/1.jpg", "a/\udcff.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(good)
            archive.addfile(member, io.BytesIO(good))
        for kind, name in ((tarfile.SYMTYPE, "a/5.jpg"), (tarfile.CHRTYPE, "a/6.jpg"), (tarfile.FIFOTYPE, "a/7.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    train = run(path, tmp_path / "out").manifest.splits["train"]
    assert train.images == 2
    assert train.found == train.images + sum(train.rejected.values()) == 9
    assert names(tmp_path) == {"in.tar", "out"}
