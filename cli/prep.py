"""``imnet-prep``: URL lists, archives and folders to verified MindRecord shards."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from imnet_prep.errors import IntegrityError

from .bench import bench
from .download import download
from .inspect import adopt, browse, repair_index, report, reshard
from .render import emit_json, guard, progress_bar, show, stop_requested, table

FOLDER = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="imnet-prep")
def main() -> None:
    """ImageNet as you have it, to verified and reproducible MindRecord shards.

    \b
    imnet-prep demo                                         see all of it work, in a few minutes
    imnet-prep to-mindrecord my-photos --out records        a folder a class
    imnet-prep verify records --level hash
    mbv2 train --records records --out run                  then train on them
    """


for _command in (download, bench, report, browse, repair_index, adopt, reshard):
    main.add_command(_command)


@main.command("to-mindrecord")
@click.argument("sources", nargs=-1, required=True, type=FOLDER, metavar="SOURCE...")
@click.option("--out", required=True, type=FOLDER, help="The records folder to make.")
@click.option("--split", metavar="train|val|test", help="Where a source does not say which split it is.")
@click.option(
    "--shards",
    type=int,
    metavar="N",
    help="Shards of each split; if not given one a 64 MiB or 8,192 images, at most 128.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes order and shard membership.")
@click.option("--workers", type=int, metavar="N", help="Worker processes; one a core if not given. Changes no byte.")
@click.option(
    "--label-space", default="found", show_default=True, metavar="found|imagenet1k|FILE",
    help="Number the classes that are there; or as ImageNet's 1,000; or as a file lists them.",
)  # fmt: skip
@click.option("--keep-classes", type=FOLDER, metavar="FILE", help="Keep only the classes in this list, one a line.")
@click.option("--max-per-class", type=int, metavar="N", help="Keep at most N images of a class, chosen by the seed.")
@click.option("--short-side", type=int, metavar="PIXELS", help="Store shrunk to this short side (256 is usual).")
@click.option("--quality", type=int, default=90, show_default=True, help="JPEG quality with --short-side.")
@click.option("--duplicates", default="keep", show_default=True, metavar="keep|reject", help="Images with equal bytes.")
@click.option("--max-rejected", default="1%", show_default=True, metavar="N|P%", help="More rejected: exit 3.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option(
    "--force", is_flag=True, help="Replace another plan's work; a finished folder only once the new one is whole."
)
@click.option("--executor", default="local", show_default=True, metavar="local|dask", help="Who does the work.")
@click.option("--scheduler", metavar="ADDR", help="Address of the Dask scheduler.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@guard
def to_mindrecord(
    sources: tuple[Path, ...], out: Path, split: str | None, shards: int | None, seed: int, workers: int | None,
    label_space: str, keep_classes: Path | None, max_per_class: int | None, short_side: int | None, quality: int,
    duplicates: str, max_rejected: str, dry_run: bool, force: bool, executor: str, scheduler: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Convert archives and folders to MindRecord shards with a manifest.

    SOURCE is an official ILSVRC2012 archive (train, val and devkit together, in any order), the trees extracted from
    them, Kaggle's layout, Tiny-ImageNet, a folder of class folders (with or without train/ and val/), or a folder made
    by `imnet-prep download`. Archives are read in place, never unpacked. Every image is decoded once. Interrupted, the
    same command goes on.

    Example: imnet-prep to-mindrecord ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz
    --out records
    """
    from imnet_prep.build.convert import convert
    from imnet_prep.build.job import ConvertOptions
    from imnet_prep.build.plan import PlanOptions
    from imnet_prep.build.preview import dry_run as preview
    from imnet_prep.images.check import ValidateOptions

    plan_options = PlanOptions(
        seed=seed, shards=shards, label_space=label_space, keep_classes=keep_classes, max_per_class=max_per_class,
        store=ValidateOptions(short_side=short_side, quality=quality), duplicates=duplicates,
    )  # fmt: skip
    options = ConvertOptions(workers, max_rejected, executor, scheduler, force)
    arguments = (sources, out, split, plan_options, options)
    with progress_bar("to-mindrecord") as progress, stop_requested() as stop:
        result = preview(*arguments, progress, stop) if dry_run else convert(*arguments, progress, stop)
    show(result.to_json(), as_json)


@main.command()
@click.argument("records", type=FOLDER, metavar="DIR")
@click.option("--level", default="hash", show_default=True, metavar="quick|hash|decode", help="How deep to look.")
@click.option("--expect", metavar="ilsvrc2012", help="Compare the counts with those of the published data set.")
@click.option("--workers", type=int, metavar="N", help="Files read or decoded at a time; one a core if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@guard
def verify(records: Path, level: str, expect: str | None, workers: int | None, as_json: bool) -> None:
    """Compare a records folder with its manifest; exit 3 where they differ.

    quick looks at sizes, headers and indexes; hash reads every byte as well; decode also looks at every record: that it
    decodes, is what was stored, has the label that its name says, and is not there twice (a warning).

    Example: imnet-prep verify records --level decode
    """
    from imnet_prep.check import verify as verification

    with progress_bar("verify") as progress:
        result = verification.verify(records, level, workers, progress, expect)
    if as_json:
        show(result.to_json(), as_json)
    else:
        for problem in (*result.warnings, *result.problems):
            click.echo(problem.to_line("warning: " if problem in result.warnings else ""))
        state = "ok" if result.ok else f"{len(result.problems)} problem(s)"
        click.echo(f"{records}: {state} at level {level}: {result.shards} shards, {result.records} records")
    if not result.ok:
        sys.exit(IntegrityError.exit_code)


@main.command()
@click.argument("records", type=FOLDER, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's summary as one JSON object.")
@guard
def info(records: Path, as_json: bool) -> None:
    """Say what a records folder holds, from its manifest alone.

    Example: imnet-prep info records
    """
    from imnet_prep.show.info import describe

    show(describe(records), as_json)


@main.command()
@click.option("--out", default=Path("imnet-demo"), show_default=True, type=FOLDER, help="Where everything goes.")
@click.option("--epochs", type=int, metavar="N", help="Training epochs; enough to learn the set if not given.")
@guard
def demo(out: Path, epochs: int | None) -> None:
    """Draw a small image set, serve and download it, convert, verify, train and evaluate: the whole way in minutes.

    Example: imnet-prep demo --out /tmp/imnet-demo
    """
    from mbv2.demo import run_demo

    with stop_requested() as stop:
        result = run_demo(out, epochs, progress_bar, stop)
    table(result.rows)
    emit_json(result.to_json())
