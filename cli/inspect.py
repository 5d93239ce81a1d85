"""The commands that look at records folders, mend them, and make others of them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from imnet_prep.errors import IntegrityError

from .render import guard, progress_bar, show, stop_requested

FOLDER = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
WORKERS = click.option("--workers", type=int, metavar="N", help="Worker processes; one a core if not given.")
FORCE = click.option("--force", is_flag=True, help="Replace a file that no report wrote.")


@click.command("repair-index")
@click.argument("records", type=FOLDER, metavar="DIR")
@JSON
@guard
def repair_index(records: Path, as_json: bool) -> None:
    """Make lost or damaged indexes (.db) again, and what else of a shard can be made again.

    Every byte is read. A shard comes back bit for bit where all its images are whole, whatever else was damaged. Of one
    that was cut, the whole rows go into a new file, and the damaged one is kept in DIR/.damaged. Damage inside images
    is named and left alone. The exit code is 3 where something is lost or damaged.

    Example: imnet-prep repair-index records
    """
    from imnet_prep.check import repair

    with progress_bar("repair-index") as progress:
        result = repair.repair_index(records, progress)
    show(result.to_json(), as_json)
    if not result.ok:
        sys.exit(IntegrityError.exit_code)


@click.command()
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--split", metavar="train|val|test", help="Where neither a file's folder nor its name says it.")
@click.option(
    "--label-space", metavar="imagenet1k|FILE", help="Class names in label order, where the records have none."
)
@click.option("--keep-undecodable", is_flag=True, help="Adopt records that do not decode, too.")
@click.option("--force", is_flag=True, help="Replace a manifest that is there.")
@WORKERS
@JSON
@guard
def adopt(
    folder: Path, split: str | None, label_space: str | None, keep_undecodable: bool, force: bool, workers: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a manifest for MindRecord files that others made, so that everything here works on them.

    DIR holds files of ImageNetToMR or of a script with an image (or data) and a label column, in it or in its train/
    and val/. Every record is decoded once; nothing in the files changes.

    Example: imnet-prep adopt old-records
    """
    from imnet_prep.check import adopt as adoption

    options = adoption.AdoptOptions(split, label_space, keep_undecodable, workers, force)
    with progress_bar("adopt") as progress:
        result = adoption.adopt(folder, options, progress)
    show(result.to_json(), as_json)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="DIR...")
@click.option("--out", required=True, type=FOLDER, help="The records folder to make.")
@click.option("--shards", type=int, metavar="N", help="Shards of each split; the usual number if not given.")
@click.option("--seed", type=int, metavar="N", help="Of the order; the first folder's if not given.")
@click.option("--keep-classes", type=FOLDER, metavar="FILE", help="Keep only the classes in this list, one a line.")
@click.option("--rename-classes", type=FOLDER, metavar="FILE", help="Lines of old<TAB>new class names.")
@click.option("--force", is_flag=True, help="Replace a finished folder once the new one is whole.")
@WORKERS
@JSON
@guard
def reshard(
    folders: tuple[Path, ...], out: Path, shards: int | None, seed: int | None, keep_classes: Path | None,
    rename_classes: Path | None, force: bool, workers: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write records to another number of shards; merge folders, keep some classes, rename them.

    No image is encoded again, and a digest over all records before and after proves that nothing changed.

    Example: imnet-prep reshard records --shards 16 --out records-16
    """
    from imnet_prep.build import reshard as resharding

    options = resharding.ReshardOptions(shards, seed, keep_classes, rename_classes, workers, force)
    with progress_bar("reshard") as progress, stop_requested() as stop:
        result = resharding.reshard(folders, out, options, progress, stop)
    show(result.to_json(), as_json)


@click.command()
@click.argument("records", type=FOLDER, metavar="DIR")
@click.option("--out", default=Path("report.html"), show_default=True, type=FOLDER, help="The HTML file to write.")
@click.option("--no-images", is_flag=True, help="Leave the pictures out (they may be private).")
@FORCE
@WORKERS
@JSON
@guard
def report(records: Path, out: Path, no_images: bool, force: bool, workers: int | None, as_json: bool) -> None:
    """Write one HTML file about a records folder: it opens offline, on a phone, and needs nothing else.

    Example: imnet-prep report records --out report.html
    """
    from imnet_prep.show.report import ReportOptions, write_report

    with progress_bar("report") as progress:
        result = write_report(records, out, ReportOptions(not no_images, workers, force), progress)
    show(result, as_json)


@click.command()
@click.argument("records", type=FOLDER, metavar="DIR")
@click.option("--port", default=8642, show_default=True, type=int, metavar="N", help="0 takes any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address shows the images to others.")
@guard
def browse(records: Path, port: int, host: str) -> None:
    """Show a records folder on a local page: search classes, page through images, see what training makes of one.

    Reads only, and answers this machine alone unless --host says otherwise. Stop it with Ctrl-C.

    Example: imnet-prep browse records
    """
    from imnet_prep.show.browse import serve

    serve(records, host, port, announce=lambda url: click.echo(f"{url} (stop with Ctrl-C)"))


@click.command("report")
@click.argument("run", type=FOLDER, metavar="RUN")
@click.option("--out", default=Path("run.html"), show_default=True, type=FOLDER, help="The HTML file to write.")
@click.option("--records", type=FOLDER, help="Score the best checkpoint on these, for classes, confusion and mistakes.")
@click.option("--split", default="val", show_default=True, help="Which split of the records.")
@click.option("--device-target", default="CPU", show_default=True, help="CPU, GPU or Ascend.")
@FORCE
@JSON
@guard
def run_report(
    run: Path, out: Path, records: Path | None, split: str, device_target: str, force: bool, as_json: bool
) -> None:
    """Write one HTML file about a training run: curves, recipe, pace and, with --records, where it is right and wrong.

    Example: mbv2 report run --records records --out run.html
    """
    from mbv2.report import RunReportOptions, write_run_report

    with progress_bar("report") as progress:
        result = write_run_report(run, out, RunReportOptions(records, split, device_target, force), progress)
    show(result, as_json)
