"""Refuse, before any work, an output file that cannot be written."""

import os
from pathlib import Path

from imnet_prep.errors import TrainError
from imnet_prep.records.publish import refuse_inside_records


def check_outputs(*paths: Path | None) -> None:
    """Check that files can be written where they are asked for; None stands for a file that is not asked for.

    Raises:
        RecordsError: A file would lie in a records folder.
        TrainError: Its folder is missing or not writable, or it is a folder itself.
    """
    refuse_inside_records(*paths)
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise TrainError(f"cannot write {path}", expected="an existing folder", got=f"no {path.parent}")
        if path.is_dir():
            raise TrainError(f"cannot write {path}", expected="the name of a file", got="a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TrainError(f"cannot write {path}", got="no permission")
