"""The arguments and options that several commands share."""

from pathlib import Path

import click

from imnet_prep.remote import is_url


def place(text: str) -> Path | str:
    """Return a URL as it is, as a path would lose one of its slashes, and anything else as a path."""
    return text if is_url(text) else Path(text)


GROUP = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
DIR = click.argument("records", type=Path, metavar="DIR")
DIR_OR_URL = click.argument("records", type=place, metavar="DIR|URL")
RECORDS = click.option(
    "--records", required=True, type=place, metavar="DIR|URL", help="A folder with a manifest.json, or its URL."
)
CACHE = click.option("--cache", type=Path, metavar="DIR", help="Where to keep shards of records behind a URL.")
CACHE_BYTES = click.option(
    "--cache-bytes", type=int, metavar="N", show_default="9/10 of the free space", help="Most bytes to keep there."
)
CHECKPOINT = click.option("--checkpoint", required=True, type=Path, help="A checkpoint of mbv2 (.ckpt).")
DEVICE = click.option("--device-target", default="CPU", help="CPU, GPU or Ascend.")
WORKERS = click.option(
    "--workers", type=int, metavar="N", show_default="one per core", help="Worker processes; the output is identical."
)
THREADS = click.option(
    "--workers", type=int, metavar="N", show_default="the cores, shared among ranks", help="Decode threads."
)
EXECUTOR = click.option("--executor", default="local", metavar="local|dask", help="Where the work is done.")
SCHEDULER = click.option("--scheduler", metavar="ADDR", help="Address of the Dask scheduler.")
KEEP_CLASSES = click.option("--keep-classes", type=Path, metavar="FILE", help="Keep only these classes, one per line.")
REPLACE = click.option("--force", is_flag=True, help="Replace OUT even if it is not a report.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
