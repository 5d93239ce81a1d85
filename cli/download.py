"""``imnet-prep download``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from imnet_prep.download.options import ContentOptions, DownloadOptions, FetchOptions, PoliteOptions
from imnet_prep.errors import DownloadError

from .render import emit_json, guard, progress_bar, stop_requested, table

_FETCH, _POLITE, _CONTENT = FetchOptions(), PoliteOptions(), ContentOptions()


def _share(text: str) -> float:
    """Read ``95%`` or ``0.95`` as a share."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise DownloadError("--max-failed is not a share", expected="for example 95%", got=repr(text)) from error


@click.command(context_settings={"show_default": True})
@click.option(
    "--urls", "urls", multiple=True, required=True, type=Path, help="URL lists, plain or gzip; several may follow."
)
@click.argument("more_urls", nargs=-1, type=Path, metavar="[FILE]...")
@click.option("--out", required=True, type=Path, help="The download folder; the same one again goes on with it.")
@click.option("--wnid", help="Class of lines that are a URL alone.")
@click.option("--wnids", type=Path, help="Keep only the classes of this file, one a line.")
@click.option("--concurrency", default=_POLITE.concurrency, help="Fetches at a time, all hosts together.")
@click.option("--per-host", default=_POLITE.per_host, help="Connections to one host at a time.")
@click.option("--rate-per-host", default=_POLITE.rate_per_host, help="Requests to one host a second; 0: no limit.")
@click.option("--timeout-s", default=_FETCH.timeout_s, help="Total time of one attempt, redirects included.")
@click.option("--max-bytes", default=_FETCH.max_bytes, help="Largest answer, also after decompression.")
@click.option("--retries", default=_POLITE.retries, help="Further attempts where the failure may pass.")
@click.option(
    "--max-failed", default="100%", metavar="P%", help="More failures than this share end the run with exit code 3."
)
@click.option("--retry-failed", is_flag=True, help="First put the transient failures back in line.")
@click.option("--short-side", type=int, help="Store JPEGs with this short side in pixels.  [default: as they came]")
@click.option("--quality", default=_CONTENT.quality, help="JPEG quality with --short-side.")
@click.option("--allow-private", is_flag=True, help="Also connect to private and loopback addresses: your own servers.")
@click.option("--ignore-opt-out", is_flag=True, help="Fetch what X-Robots-Tag: noai or noimageai keeps from AI use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@guard
def download(
    urls: tuple[Path, ...],
    more_urls: tuple[Path, ...],
    out: Path,
    wnid: str | None,
    wnids: Path | None,
    concurrency: int,
    per_host: int,
    rate_per_host: float,
    timeout_s: float,
    max_bytes: int,
    retries: int,
    max_failed: str,
    retry_failed: bool,
    short_side: int | None,
    quality: int,
    allow_private: bool,
    ignore_opt_out: bool,
    as_json: bool,
) -> None:
    """Fetch the images of URL lists into OUT/<class>/<id>.<ext>, every URL accounted for.

    Lines are "id<TAB>url", "id url", "wnid url", or a URL alone with --wnid. Interrupted or killed, the same command
    goes on where it was. Exit codes: 0 done, 1 error, 3 more failures than --max-failed, 130 interrupted.

    \b
    Example:
      imnet-prep download --urls fall11_urls.txt --out images --wnids keep.txt --short-side 256
    """
    from imnet_prep.download.run import download as run

    options = DownloadOptions(
        urls=(*urls, *more_urls),
        out=out,
        wnid=wnid,
        wnids=wnids,
        max_failed_frac=_share(max_failed),
        retry_failed=retry_failed,
        fetch=FetchOptions(
            timeout_s=timeout_s, max_bytes=max_bytes, allow_private=allow_private, honour_opt_out=not ignore_opt_out
        ),
        polite=PoliteOptions(concurrency=concurrency, per_host=per_host, rate_per_host=rate_per_host, retries=retries),
        content=ContentOptions(short_side=short_side, quality=quality),
    )
    with stop_requested() as stop, progress_bar("download") as progress:
        result = run(options, progress, stop)
    totals = asdict(result.totals)
    if as_json:
        emit_json(totals | {"seconds": round(result.seconds, 3)})
    else:
        rows = [(name, str(totals[name])) for name in ("requested", "ok")]
        rows += [(f"  {reason}", str(count)) for reason, count in totals["failed"].items()]
        rows += [(name, str(totals[name])) for name in ("pending", "malformed", "repeated", "bytes")]
        rows += [("seconds", f"{result.seconds:.1f}"), ("folder", str(out))]
        rows += [(f"  failed at {host}", str(count)) for host, count in result.top_hosts]
        table(rows)
    if result.verdict is not None:
        raise result.verdict
