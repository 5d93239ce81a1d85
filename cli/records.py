"""The commands that check, describe, repair, rewrite and measure a records folder."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from imnet_prep.errors import IntegrityError
from imnet_prep.loader.bench import MODES, BenchOptions
from imnet_prep.remote import shown
from imnet_prep.show import summary

from .options import (
    CACHE,
    CACHE_BYTES,
    DIR,
    DIR_OR_URL,
    EXECUTOR,
    JSON,
    KEEP_CLASSES,
    PATH,
    REPLACE,
    SCHEDULER,
    SPLIT,
    WORKERS,
)
from .render import guard, progress_bar, show, stop_requested

BENCH = BenchOptions()


@click.command()
@DIR_OR_URL
@click.option(
    "--level", default="hash", type=click.Choice(["quick", "hash", "decode"]), help="How thoroughly to check."
)
@click.option(
    "--expect", type=click.Choice(["ilsvrc2012"]), help="Compare the counts with those of the published data set."
)
@WORKERS
@EXECUTOR
@SCHEDULER
@JSON
@guard
def verify(records: Path | str, as_json: bool, **options: Any) -> None:
    """Compare a records folder with its manifest; exit 3 if they differ.

    quick checks sizes, headers and indexes. hash also reads every byte. decode also checks that every image decodes, is
    the image that was stored, has the label of its class name, and is stored once (otherwise a warning).

    Example: imnet-prep verify records --level decode
    """
    from imnet_prep.check import verify as verification

    with progress_bar("verify") as progress:
        result = verification.verify(records, progress=progress, **options)
    if as_json:
        show(result.to_json(), as_json)
    else:
        for problem in (*result.warnings, *result.problems):
            click.echo(problem.to_line("warning: " if problem in result.warnings else ""))
        state = "ok" if result.ok else f"{len(result.problems)} problem(s)"
        click.echo(
            f"{shown(str(records))}: {state} at level {result.level}: {result.shards} shards, {result.records} records"
        )
    if not result.ok:
        sys.exit(IntegrityError.exit_code)


@click.command()
@DIR_OR_URL
@JSON
@guard
def info(records: Path | str, as_json: bool) -> None:
    """Print what a records folder holds, from its manifest alone.

    Example: imnet-prep info records
    """
    from imnet_prep.show.info import describe

    found = describe(records)
    show(found, as_json, summary.records_rows(found))


@click.command("repair-index")
@DIR
@JSON
@guard
def repair_index(records: Path, as_json: bool) -> None:
    """Rebuild lost or damaged indexes (.db), and restore damaged shards where possible.

    Every byte is read. A shard whose images are all whole is restored bit for bit. If a shard was cut off, its whole
    rows are written to a new file, and the damaged file is kept in DIR/.damaged. Damaged images are reported and left
    as they are. Exit 3 if anything is lost or damaged.

    Example: imnet-prep repair-index records
    """
    from imnet_prep.check import repair

    with progress_bar("repair-index") as progress:
        result = repair.repair_index(records, progress).to_json()
    show(result, as_json, summary.repair_rows(result))
    if not result["ok"]:
        sys.exit(IntegrityError.exit_code)


@click.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--split", type=SPLIT, help="The split of files whose folder and name do not tell it.")
@click.option("--label-space", metavar="imagenet1k|FILE", help="Class names in label order, if the records hold none.")
@click.option("--keep-undecodable", is_flag=True, help="Also adopt records whose image does not decode.")
@click.option("--force", is_flag=True, help="Replace an existing manifest.")
@WORKERS
@JSON
@guard
def adopt(folder: Path, as_json: bool, **options: Any) -> None:
    """Write a manifest for MindRecord files made by other tools, so that every command works on them.

    DIR, or its train/ and val/, holds files made by ImageNetToMR or by a script, with an image (or data) and a label
    column. Every record is decoded once; the files are not changed.

    Example: imnet-prep adopt old-records
    """
    from imnet_prep.check import adopt as adoption

    with progress_bar("adopt") as progress:
        result = adoption.adopt(folder, adoption.AdoptOptions(**options), progress).to_json()
    show(result, as_json, summary.adoption_rows(result))


@click.command()
@click.argument("folders", nargs=-1, required=True, type=PATH, metavar="DIR...")
@click.option("--out", required=True, type=PATH, help="The records folder to write.")
@click.option("--shards", type=int, metavar="N", show_default="by size", help="Shards per split.")
@click.option("--seed", type=int, metavar="N", show_default="of the first DIR", help="Determines the order.")
@KEEP_CLASSES
@click.option("--rename-classes", type=PATH, metavar="FILE", help="Lines of old<TAB>new class names.")
@click.option("--force", is_flag=True, help="Replace a finished folder once the new one is complete.")
@WORKERS
@JSON
@guard
def reshard(folders: tuple[Path, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Rewrite records with another number of shards; merge folders, select or rename classes.

    No image is encoded again. A digest over all records before and after proves that nothing changed.

    Example: imnet-prep reshard records --shards 16 --out records-16
    """
    from imnet_prep.build import reshard as resharding

    with progress_bar("reshard") as progress, stop_requested() as stop:
        result = resharding.reshard(folders, out, resharding.ReshardOptions(**options), progress, stop).to_json()
    show(result, as_json, summary.reshard_rows(result))


@click.command()
@DIR
@click.option("--to", required=True, type=click.Choice(["imagefolder", "webdataset"]), help="The format to write.")
@click.option("--out", required=True, type=PATH, help="The folder to write; it must not exist yet.")
@click.option("--split", type=SPLIT, show_default="all", help="Export this split alone.")
@JSON
@guard
def export(records: Path, to: str, out: Path, split: str | None, as_json: bool) -> None:
    """Write the images of a records folder as class folders or WebDataset tars, byte for byte as stored.

    imagefolder is <split>/<class>/<name>. webdataset is tars of image, .cls and .json, with classnames.txt beside them.
    Both can be converted again. An interrupted export leaves nothing.

    Example: imnet-prep export records --to webdataset --out shards
    """
    from imnet_prep.build.export import export as run

    with progress_bar("export") as progress, stop_requested() as stop:
        result = run(records, out, to, split, progress, stop).to_json()
    show(result, as_json, summary.export_rows(result))


@click.command()
@DIR
@click.option("--out", default=Path("report.html"), type=PATH, help="The HTML file to write.")
@click.option("--no-images", is_flag=True, help="Leave out the images, for example if they are private.")
@REPLACE
@WORKERS
@JSON
@guard
def report(records: Path, out: Path, no_images: bool, force: bool, workers: int | None, as_json: bool) -> None:
    """Write a self-contained HTML report about a records folder.

    Example: imnet-prep report records --out report.html
    """
    from imnet_prep.show.report import ReportOptions, write_report

    with progress_bar("report") as progress:
        result = write_report(records, out, ReportOptions(not no_images, workers, force), progress)
    show(result, as_json, summary.report_rows(result))


@click.command()
@DIR
@click.option("--port", default=8642, metavar="N", help="0 picks a free port.")
@click.option("--host", default="127.0.0.1", help="Another address lets other machines see the images.")
@guard
def browse(records: Path, port: int, host: str) -> None:
    """Browse a records folder on a local web page: search classes, view images and their augmentations.

    The page is read-only, and only this machine can open it unless --host is given. Stop it with Ctrl-C.

    Example: imnet-prep browse records
    """
    from imnet_prep.show.browse import serve

    serve(records, host, port, announce=lambda url: click.echo(f"{url} (stop with Ctrl-C)"))


@click.command()
@DIR_OR_URL
@CACHE
@CACHE_BYTES
@click.option("--mode", default=BENCH.mode, type=click.Choice(MODES), help="train: random crops; eval: centre crops.")
@click.option("--batch-size", default=BENCH.batch_size, help="Images per batch.")
@click.option("--image-size", default=BENCH.image_size, help="Side of the output, in pixels.")
@click.option("--workers", type=int, metavar="N", show_default="one per core", help="Decode threads.")
@click.option("--seconds", default=BENCH.seconds, help="How long to measure.")
@click.option("--native", default=BENCH.native, type=click.Choice(["auto", "on", "off"]), help="The C++ decoder.")
@JSON
@guard
def bench(records: Path | str, as_json: bool, **options: Any) -> None:
    """Measure how fast the loader makes batches, stage by stage, and name the bottleneck.

    Example: imnet-prep bench records --mode eval --seconds 20
    """
    from imnet_prep.loader.bench import bench as run

    with progress_bar("bench") as progress:
        result = run(records, BenchOptions(**options), progress)
    stages = ", ".join(f"{name} {getattr(result, name + '_ms'):.3f}" for name in ("read", "check", "decode", "augment"))
    rows = [
        ("images/s", f"{result.images_per_s:.0f} (five windows: {result.slowest:.0f} to {result.fastest:.0f})"),
        ("measured", f"{result.mode} on {result.split}, batch {result.batch_size}, {result.image_size} px"),
        ("decoder", f"{result.decoder}, {result.workers} workers"),
        ("ms per image", stages),
        ("cores used", f"{result.cores_used_frac:.0%} of {result.cores}"),
        ("memory", f"at most {result.memory_bytes / 1e6:.0f} MB of decoded images"),
        ("limit", result.limit),
    ]
    show(asdict(result), as_json, rows)
