"""``imnet-prep``: download, convert and check."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from imnet_prep.download.options import Columns, ContentOptions, DownloadOptions, FetchOptions, PoliteOptions
from imnet_prep.errors import DownloadError, ImnetError
from imnet_prep.show import summary

from .options import EXECUTOR, GROUP, JSON, KEEP_CLASSES, PATH, PLACE, SCHEDULER, SPLIT, WORKERS
from .records import adopt, bench, browse, export, info, repair_index, report, reshard, verify
from .render import guard, progress_bar, show, stop_requested

FETCH, POLITE, CONTENT = FetchOptions(), PoliteOptions(), ContentOptions()


@click.group(context_settings=GROUP)
@click.version_option(package_name="imnet-prep")
def main() -> None:
    """Turn any copy of ImageNet into verified, reproducible MindRecord shards.

    \b
    imnet-prep demo                                         run every step on a small generated data set
    imnet-prep to-mindrecord my-photos --out records        convert one folder per class
    imnet-prep verify records --level hash
    mbv2 train --records records --out run                  then train on the records
    """


for _command in (verify, info, report, browse, bench, repair_index, adopt, reshard, export):
    main.add_command(_command)


@main.command()
@click.option(
    "--urls", multiple=True, required=True, type=PATH,
    help="URL lists: text, CSV, TSV, JSON lines or Parquet, also compressed; - is standard input. Several may follow.",
)  # fmt: skip
@click.argument("more_urls", nargs=-1, type=PATH, metavar="[FILE]...")
@click.option("--out", required=True, type=PATH, help="The download folder. An interrupted download resumes here.")
@click.option("--wnid", help="The class of lines that hold only a URL.")
@click.option("--url-column", metavar="NAME", help="Column of the URLs in a table.  [default: url]")
@click.option("--class-column", metavar="NAME", help="Column of the classes.  [default: wnid, label or class]")
@click.option("--id-column", metavar="NAME", help="Column of the ids, which name the files.  [default: id]")
@click.option("--wnids", type=PATH, help="Keep only the classes in this file, one per line.")
@click.option("--concurrency", default=POLITE.concurrency, help="Maximum number of fetches at a time.")
@click.option("--per-host", default=POLITE.per_host, help="Maximum number of connections to one host.")
@click.option("--rate-per-host", default=POLITE.rate_per_host, help="Requests per second to one host; 0: no limit.")
@click.option("--timeout-s", default=FETCH.timeout_s, help="Total time of one attempt, including redirects.")
@click.option("--max-bytes", default=FETCH.max_bytes, help="Largest response, also after decompression.")
@click.option("--retries", default=POLITE.retries, help="Retries of failures that may be temporary.")
@click.option("--max-failed", default="100%", metavar="P%", help="Fail (exit 3) above this share of failed URLs.")
@click.option(
    "--retry-failed", is_flag=True, help="Try again what failed temporarily, or by a limit that is lifted now."
)
@click.option("--part", metavar="I/N", help="Take the hosts of part I of N: one machine of several.  [default: all]")
@click.option("--contact", default="", help="A mail address or URL in the User-Agent, for the owners of hosts.")
@click.option("--min-side", default=CONTENT.min_side, help="Smallest side of an image, in pixels.")
@click.option("--max-area", type=int, help="Largest image, in pixels.")
@click.option("--max-aspect", type=float, help="Largest ratio of the sides.")
@click.option("--short-side", type=int, help="Resize to this short side, in pixels, and store as JPEG.")
@click.option("--quality", default=CONTENT.quality, help="JPEG quality with --short-side.")
@click.option("--allow-private", is_flag=True, help="Allow private and loopback addresses, for your own servers.")
@click.option("--ignore-opt-out", is_flag=True, help="Ignore X-Robots-Tag: noai and noimageai.")
@click.option("--dry-run", is_flag=True, help="Read the lists, say what they hold, and write nothing.")
@EXECUTOR
@SCHEDULER
@JSON
@guard
def download(
    urls: tuple[Path, ...], more_urls: tuple[Path, ...], out: Path, wnid: str | None, url_column: str | None,
    class_column: str | None, id_column: str | None, wnids: Path | None,
    concurrency: int, per_host: int, rate_per_host: float, timeout_s: float, max_bytes: int, retries: int,
    max_failed: str, retry_failed: bool, part: str | None, contact: str, min_side: int, max_area: int | None,
    max_aspect: float | None, short_side: int | None, quality: int, allow_private: bool, ignore_opt_out: bool,
    dry_run: bool, executor: str, scheduler: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Download the images of URL lists to OUT/<class>/<id>.<ext> and account for every URL.

    A line is "id<TAB>url", "id url", "wnid url", or just a URL with --wnid. A table has a column "url"; columns that
    are not used are kept and reach the records. To resume, run the same command again. With --executor dask, each
    worker takes some of the hosts, in OUT/part-I-of-N. Exit codes: 0 done, 1 error, 3 more failures than --max-failed,
    130 interrupted.

    Example: imnet-prep download --urls fall11_urls.txt --out images --wnids keep.txt --short-side 256
    """
    from imnet_prep.download.run import download as run
    from imnet_prep.download.run import dry_run as plan

    fetch = FetchOptions(
        timeout_s=timeout_s, max_bytes=max_bytes, allow_private=allow_private, honour_opt_out=not ignore_opt_out,
        contact=contact,
    )  # fmt: skip
    polite = PoliteOptions(concurrency=concurrency, per_host=per_host, rate_per_host=rate_per_host, retries=retries)
    content = ContentOptions(
        min_side=min_side, max_area=max_area, max_aspect=max_aspect, short_side=short_side, quality=quality
    )
    options = DownloadOptions(
        urls=(*urls, *more_urls), out=out, columns=Columns(url_column, class_column, id_column), wnid=wnid,
        wnids=wnids, max_failed_frac=_fraction(max_failed), retry_failed=retry_failed, part=_part(part),
        executor=executor, scheduler=scheduler, fetch=fetch, polite=polite, content=content,
    )  # fmt: skip
    if dry_run:
        with progress_bar("read lists") as progress:
            found = plan(options, progress)
        show(found, as_json, summary.lists_rows(found))
        return
    with stop_requested() as stop, progress_bar("download") as progress:
        result = run(options, progress, stop)
    totals = asdict(result.totals)
    elsewhere = totals.pop("elsewhere")
    if part is not None:
        totals["elsewhere"] = elsewhere
    shown = totals | {"seconds": round(result.seconds, 3)}
    show(shown, as_json, summary.download_rows(shown, out, result.top_hosts))
    if result.verdict is not None:
        raise result.verdict


def _part(text: str | None) -> tuple[int, int] | None:
    """Read ``2/8``."""
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise DownloadError("--part is no part", expected="for example 2/8", got=repr(text))
    return int(number), int(count)


def _fraction(text: str) -> float:
    """Read ``95%`` or ``0.95`` as a fraction."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise DownloadError("--max-failed is not a share", expected="for example 95%", got=repr(text)) from error


@main.command("to-mindrecord")
@click.argument("sources", nargs=-1, required=True, type=PLACE, metavar="SOURCE...")
@click.option("--out", required=True, type=PATH, help="The records folder to write.")
@click.option("--split", type=SPLIT, help="The split of sources that do not tell it.")
@click.option(
    "--shards", type=int, metavar="N", show_default="one per 64 MiB or 8,192 images, at most 128",
    help="Shards per split.",
)  # fmt: skip
@click.option("--seed", default=0, help="Determines the order and which shard an image is in.")
@WORKERS
@click.option(
    "--label-space", default="found", metavar="found|imagenet1k|FILE",
    help="Number the classes that are found, or use ImageNet's 1,000 labels, or those of a file.",
)  # fmt: skip
@KEEP_CLASSES
@click.option(
    "--classes", metavar="FILE|imagenet1k", help="Names in label order for classes that a source only numbers."
)  # fmt: skip
@click.option("--max-per-class", type=int, metavar="N", help="Keep at most N images per class, chosen by the seed.")
@click.option("--val-fraction", type=float, metavar="F", help="Without a val split, take this fraction of each class.")
@click.option("--short-side", type=int, metavar="PIXELS", help="Shrink to this short side (256 is usual).")
@click.option("--quality", default=90, help="JPEG quality with --short-side.")
@click.option(
    "--duplicates", default="keep", type=click.Choice(["keep", "reject"]), help="What to do with identical files."
)
@click.option("--max-rejected", default="1%", metavar="N|P%", help="Fail (exit 3) above this many rejections.")
@click.option("--salvage", is_flag=True, help="Convert the rest of a damaged tar, and say what is skipped.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--force", is_flag=True, help="Start over if the plan differs; replace a finished folder at the end.")
@EXECUTOR
@SCHEDULER
@JSON
@guard
def to_mindrecord(
    sources: tuple[Path | str, ...], out: Path, split: str | None, shards: int | None, seed: int, workers: int | None,
    label_space: str, keep_classes: Path | None, classes: str | None, max_per_class: int | None,
    val_fraction: float | None, short_side: int | None, quality: int, duplicates: str, max_rejected: str, salvage: bool,
    dry_run: bool, force: bool, executor: str, scheduler: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Convert archives and folders to MindRecord shards with a manifest.

    SOURCE is an official ILSVRC2012 archive (train, val and devkit in any order), an extracted tree, Kaggle's layout,
    Tiny-ImageNet, a folder or archive with one folder per class (with or without train/ and val/ above), WebDataset
    tars, Parquet files, a folder made by `imnet-prep download`, or the URL (s3://, https://) of an archive or of
    Parquet files. Every image is decoded once. To resume, run the same command again.

    Example: imnet-prep to-mindrecord ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz
    --out records
    """
    from imnet_prep.build.convert import convert
    from imnet_prep.build.convert import dry_run as preview
    from imnet_prep.build.options import ConvertOptions, PlanOptions
    from imnet_prep.images.check import ValidateOptions

    plan_options = PlanOptions(
        seed=seed, shards=shards, label_space=label_space, keep_classes=keep_classes, max_per_class=max_per_class,
        store=ValidateOptions(short_side=short_side, quality=quality), duplicates=duplicates, val_fraction=val_fraction,
        classes=classes, salvage=salvage,
    )  # fmt: skip
    options = ConvertOptions(workers, max_rejected, executor, scheduler, force)
    with progress_bar("to-mindrecord") as progress, stop_requested() as stop:
        arguments = (sources, out, split, plan_options, options, progress, stop)
        result = preview(*arguments) if dry_run else convert(*arguments).to_json()
    show(result, as_json, summary.plan_rows(result) if dry_run else summary.conversion_rows(result))


@main.command()
@click.option("--out", default=Path("imnet-demo"), type=PATH, help="The folder for all results.")
@click.option("--epochs", type=int, metavar="N", show_default="enough to learn the set", help="Training epochs.")
@guard
def demo(out: Path, epochs: int | None) -> None:
    """Generate a small data set, then download, convert, verify, train and evaluate it, in a few minutes.

    Example: imnet-prep demo --out /tmp/imnet-demo
    """
    from imnet_prep.cli.demo import run_demo

    with stop_requested() as stop:
        result = run_demo(out, epochs, progress_bar, stop)
    show({}, False, result.rows)
    show(result.to_json(), True)


@main.command()
@JSON
@guard
def doctor(as_json: bool) -> None:
    """Examine this machine: libraries, C++ parts, cores, memory, disk; say what is missing and what mends it.

    A few images are downloaded from a server on this machine, converted and verified in the current folder; nothing is
    left there. Exit 1 if downloads, conversion or verification do not work.

    Example: imnet-prep doctor
    """
    from imnet_prep.cli.doctor import examine

    report = examine(Path.cwd())
    show(report.to_json(), as_json, report.rows())
    if not report.ok:
        sys.exit(ImnetError.exit_code)
