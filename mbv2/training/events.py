"""TensorBoard events of a run: written at once, and cut back on resume as the other logs are."""

import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imnet_prep.errors import TrainError
from imnet_prep.files import write_atomically

EVENTS = "events"
_HEAD, _TAIL = 12, 4  # of a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum


class Events:
    """The events of a run in ``<folder>/events``; those after ``step`` are cut off.

    tensorboardX's SummaryWriter queues events for a thread, and a killed process loses those in the queue. Here each
    has been written when :meth:`add` returns.

    Raises:
        TrainError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboardX import event_file_writer
        except ImportError as error:
            remedy = "install it: pip install 'imnet-prep[tensorboard]'"
            raise TrainError("--tensorboard needs tensorboardX", got=str(error), remedy=remedy) from error
        place = folder / EVENTS
        place.mkdir(exist_ok=True)
        self._there: set[tuple[str, int]] = set()  # what the earlier files hold
        for path in sorted(place.glob("events.out.tfevents.*")):
            self._cut_back(path, step)
        self._writer = event_file_writer.EventsWriter(str(place / "events"), f".{uuid.uuid4().hex}")

    def _cut_back(self, path: Path, step: int) -> None:
        data, kept = path.read_bytes(), []
        for record, event in _records(data):
            if event.step <= step:
                kept.append(record)
                self._there |= {(value.tag, event.step) for value in event.summary.value}
        if sum(map(len, kept)) < len(data):
            write_atomically(path, b"".join(kept))

    def add(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Write the values that are not None, and not there from before the run was interrupted."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if value is not None and (f"{group}/{name}", step) not in self._there:
                event = Event(wall_time=time.time(), step=step, summary=scalar(f"{group}/{name}", value))
                self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _records(data: bytes) -> Iterator[tuple[bytes, Any]]:
    """Yield each whole record and its event, up to one that is damaged or was cut short by a crash."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboardX.proto.event_pb2 import Event

    start = 0
    while start + _HEAD <= len(data):
        end = start + _HEAD + int.from_bytes(data[start : start + 8], "little") + _TAIL
        if end > len(data):
            return
        try:
            event = Event.FromString(data[start + _HEAD : end - _TAIL])
        except DecodeError:
            return
        yield data[start:end], event
        start = end
