"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Any

import click

from imnet_prep.cluster import EXECUTORS
from imnet_prep.remote import is_url
from imnet_prep.types import SPLITS
from mbv2.runtime import DEVICE_TARGETS


class _Place(click.Path):
    """A URL as it is, as a path would lose one of its slashes, and anything else as a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_url(value) else super().convert(value, param, ctx)


PATH, PLACE = click.Path(path_type=Path), _Place(path_type=Path)  # a shell completes their values
SPLIT = click.Choice(SPLITS)
GROUP = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
DIR = click.argument("records", type=PATH, metavar="DIR")
DIR_OR_URL = click.argument("records", type=PLACE, metavar="DIR|URL")
RECORDS = click.option(
    "--records", required=True, type=PLACE, metavar="DIR|URL", help="A folder with a manifest.json, or its URL."
)
CACHE = click.option("--cache", type=PATH, metavar="DIR", help="Where to keep shards of records behind a URL.")
CACHE_BYTES = click.option(
    "--cache-bytes", type=int, metavar="N", show_default="9/10 of the free space", help="Most bytes to keep there."
)
CHECKPOINT = click.option("--checkpoint", required=True, type=PATH, help="A checkpoint of mbv2 (.ckpt).")
DEVICE = click.option(
    "--device-target", default="CPU", type=click.Choice(DEVICE_TARGETS), help="GPU and Ascend are not tested."
)
WORKERS = click.option(
    "--workers", type=int, metavar="N", show_default="one per core", help="Worker processes; the output is identical."
)
THREADS = click.option(
    "--workers", type=int, metavar="N", show_default="the cores, shared among ranks", help="Decode threads."
)
EXECUTOR = click.option("--executor", default="local", type=click.Choice(EXECUTORS), help="Where the work is done.")
SCHEDULER = click.option("--scheduler", metavar="ADDR", help="Address of the Dask scheduler.")
KEEP_CLASSES = click.option("--keep-classes", type=PATH, metavar="FILE", help="Keep only these classes, one per line.")
REPLACE = click.option("--force", is_flag=True, help="Replace OUT even if it is not a report.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
