"""The bad records of a split that were skipped, and how many may be."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from imnet_prep.errors import PipelineError

NAMED = 20  # records that a message names; all of them are counted
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A bad record that was skipped.

    Attributes:
        position: Its position in stored order.
        file_name: Its stored name.
        where: Its shard, row and name.
        reason: Why it is bad.
    """

    position: int
    file_name: str
    where: str
    reason: str


class BadRows:
    """The different records that were found bad so far, in the order in which the batches came to them.

    Args:
        split: Name of the split, for messages.
        images: Records of the split.
        most: Records that may be bad.
        describe: Returns the file name of a position, and a description for messages.
    """

    def __init__(self, split: str, images: int, most: int, describe: Callable[[int], tuple[str, str]]) -> None:
        self.most = most
        self._split, self._images, self._describe = split, images, describe
        self._rows: dict[int, SkippedRow] = {}
        self._lock = threading.Lock()

    @property
    def rows(self) -> tuple[SkippedRow, ...]:
        """All of them."""
        with self._lock:
            return tuple(self._rows.values())

    def add(self, found: Mapping[int, str]) -> None:
        """Count records, each once, and log those that are new.

        Args:
            found: Position in stored order to the reason.

        Raises:
            PipelineError: There are more than may be skipped; it names them.
        """
        with self._lock:
            for position, reason in found.items():
                if position not in self._rows:
                    name, where = self._describe(position)
                    self._rows[position] = SkippedRow(position, name, where, reason)
                    _logger.warning("skipped %s: the record is bad: %s", where, reason)
            if len(self._rows) > self.most:
                raise self.too_many(self._rows)

    def too_many(self, found: Mapping[int, str | SkippedRow]) -> PipelineError:
        """Return the error for more bad records than may be skipped."""
        names = [self._describe(position)[0] for position, _ in zip(found, range(NAMED), strict=False)]
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return PipelineError(
            f"split {self._split!r} has more bad records than may be skipped",
            expected=f"at most {self.most} of {self._images}",
            got=f"{len(found)}: {', '.join(names)}{more}",
            remedy="restore the shards (`imnet-prep verify --level decode` lists what is damaged), or allow more: "
            "max_skipped=, or mbv2 train --on-bad-record N",
        )
