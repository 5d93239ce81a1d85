"""Download the images of URL lists, and account for every URL.

``run`` is the whole of a download. ``ingest`` reads the lists (``urllist``, ``urls``) into the ``journal``. The
``scheduler`` decides which URL is fetched next. The ``pool`` runs ``worker`` processes, which ``fetch`` over the safe
connections of ``net`` and ``addresses``, and judge the ``content``. ``folder`` commits what they report and repairs
what a crash left. ``parts`` divides a download among Dask workers, each of which runs it in a ``part_process``; a
``result`` says how it ended. Names are loaded when used: ``--help`` and readers of a journal need no HTTP client.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imnet_prep.download.journal import JOURNAL_NAME, Finished, Totals, read_finished
from imnet_prep.download.options import ContentOptions, DownloadOptions, FailReason, FetchOptions, PoliteOptions
from imnet_prep.download.result import DownloadResult

if TYPE_CHECKING:
    from imnet_prep.download.run import download

__all__ = [
    "JOURNAL_NAME",
    "ContentOptions",
    "DownloadOptions",
    "DownloadResult",
    "FailReason",
    "FetchOptions",
    "Finished",
    "PoliteOptions",
    "Totals",
    "download",
    "read_finished",
]


def __getattr__(name: str) -> Any:
    if name == "download":
        return importlib.import_module("imnet_prep.download.run").download
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
