"""The logs of a run: ``metrics.csv`` (a row an epoch), ``log.jsonl`` (a row a logged step), and TensorBoard events.

All carry the run's step, so that a resumed run cuts them back to its checkpoint and writes on: the logs of an
interrupted run then read as if nothing had happened.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imnet_prep.files import write_atomically
from imnet_prep.loader.bad_rows import SkippedRow
from mbv2.training.events import Events

METRICS, LOG = "metrics.csv", "log.jsonl"
DATA_BOUND_FRAC = 0.1  # share of time spent waiting above which the loader, not the network, sets the pace


@dataclass(frozen=True, slots=True)
class EpochRow:
    """A row of ``metrics.csv``. Validation fields are None where the epoch was not scored.

    Attributes:
        epoch: Finished epochs, from 1.
        step: Finished steps of the run.
        lr: Learning rate of the epoch's last step.
        train_loss: Mean over the epoch's steps, label smoothing included.
        val_loss: Mean cross-entropy on the validation split.
        val_top1: Fraction.
        val_top5: Fraction.
        images_per_s: Training images a second, evaluation not counted.
        data_wait_frac: Share of training time spent waiting for data.
        live_loss: As ``val_loss``, of the live weights where the averaged ones are scored too; a run that does not
            score them has no such column, as for the next two.
        live_top1: Fraction.
        live_top5: Fraction.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    images_per_s: float
    data_wait_frac: float
    live_loss: float | None = None
    live_top1: float | None = None
    live_top5: float | None = None


_COLUMNS = tuple(field.name for field in fields(EpochRow))
_LIVE = frozenset(name for name in _COLUMNS if name.startswith("live_"))


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of ``log.jsonl``: the step just finished (``loss``, ``lr``) and the pace since the row before.

    Attributes:
        epoch: The epoch it belongs to, from 0.
        step: Finished steps of the run.
        loss: Of this step.
        lr: Learning rate of this step.
        grad_norm: Global norm of the gradient, or None where it is not clipped and so not computed.
        step_ms: Mean time of a step, waiting for data included.
        images_per_s: Images a second, over all ranks.
        data_wait_frac: Share of that time spent waiting for data.
        verdict: :func:`verdict` of it.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    grad_norm: float | None
    step_ms: float
    images_per_s: float
    data_wait_frac: float
    verdict: str


def verdict(data_wait_frac: float, *, cached: bool = False, small: bool = False) -> str:
    """Say what sets the pace, and for the loader what would speed it up.

    Args:
        data_wait_frac: Share of time spent waiting for data.
        cached: The data are cached features.
        small: The images are stored at a short side already.
    """
    if data_wait_frac < DATA_BOUND_FRAC:
        return "compute-bound"
    if cached:
        return "data-bound: keep the features on a faster disk (--features)"
    smaller = "" if small else "store the images smaller (to-mindrecord --short-side 256) or "
    return f"data-bound: {smaller}give the loader more cores"


class RunLog:
    """Appends to the logs of a run.

    Args:
        folder: The run's folder.
        epoch: Finished epochs; later rows of ``metrics.csv`` are cut off, their work is about to be done again.
        step: Finished steps; later rows of ``log.jsonl`` are cut off.
        events: Write TensorBoard events as well; rows that are in the logs already are added where they lack.
        live: The live weights are scored beside the averaged ones.

    Raises:
        TrainError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, epoch: int, step: int, *, events: bool = False, live: bool = False) -> None:
        self.metrics, self.log = folder / METRICS, folder / LOG
        self.columns = [name for name in _COLUMNS if live or name not in _LIVE]
        self.events = Events(folder, step) if events else None
        rows = [row for row in read_metrics(folder) if row.epoch <= epoch]
        _rewrite(self.metrics, [",".join(self.columns), *(",".join(self._cells(row)) for row in rows)])
        kept = [(line, values) for line in _lines(self.log) if (values := _values(line)).get("step", math.inf) <= step]
        _rewrite(self.log, [line for line, _ in kept])
        for _, values in kept:
            if "skipped" not in values:
                self._add_step_events(values)
        self._skipped = {name for name, _ in read_skipped(folder)}
        for row in rows:
            self._add_epoch_events(row)

    def add_step(self, row: StepRow) -> None:
        """Append a row to ``log.jsonl``."""
        _append(self.log, json.dumps(asdict(row)))
        self._add_step_events(asdict(row))

    def add_epoch(self, row: EpochRow) -> None:
        """Append a row to ``metrics.csv``."""
        _append(self.metrics, ",".join(self._cells(row)))
        self._add_epoch_events(row)

    def add_skipped(self, rows: Sequence[SkippedRow], epoch: int, step: int) -> None:
        """Append a line to ``log.jsonl`` for each bad record that none names yet."""
        for row in rows:
            if row.file_name not in self._skipped:
                self._skipped.add(row.file_name)
                values = {"epoch": epoch, "step": step, "skipped": row.file_name, "reason": row.reason}
                _append(self.log, json.dumps(values))

    def close(self) -> None:
        """Close the events."""
        if self.events is not None:
            self.events.close()

    def _cells(self, row: EpochRow) -> list[str]:
        values = (getattr(row, name) for name in self.columns)
        return ["" if value is None else repr(value) for value in values]

    def _add_step_events(self, values: Mapping[str, Any]) -> None:
        if self.events is not None:
            names = ("loss", "lr", "grad_norm", "step_ms", "images_per_s", "data_wait_frac")
            self.events.add("train", {name: values.get(name) for name in names}, int(values["step"]))

    def _add_epoch_events(self, row: EpochRow) -> None:
        if self.events is not None:
            self.events.add("val", {"loss": row.val_loss, "top1": row.val_top1, "top5": row.val_top5}, row.step)
            self.events.add("live", {"loss": row.live_loss, "top1": row.live_top1, "top5": row.live_top5}, row.step)


def read_metrics(folder: Path) -> list[EpochRow]:
    """Read ``metrics.csv``, with whichever columns it has; a last line cut short by a crash is left out."""
    rows: list[EpochRow] = []
    names: list[str] = []
    for cells in csv.reader(_lines(folder / METRICS)):
        if not names:
            names = cells
        elif len(cells) == len(names):
            with suppress(TypeError, ValueError):  # a line or heading that is none of ours
                values: dict[str, Any] = {
                    name: float(cell) if cell else None for name, cell in zip(names, cells, strict=True)
                }
                rows.append(EpochRow(**values | {"epoch": int(values["epoch"]), "step": int(values["step"])}))
    return rows


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """Return name and reason of each bad record that a run skipped, in the order of its log."""
    found = map(_values, _lines(folder / LOG))
    return [(str(values["skipped"]), str(values.get("reason"))) for values in found if "skipped" in values]


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a file: what follows the last newline was cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _values(line: str) -> dict[str, Any]:
    """Return what a line of ``log.jsonl`` holds; nothing, if it is damaged."""
    with suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    return {}


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as handle:
        handle.write(line + "\n")


def _rewrite(path: Path, lines: list[str]) -> None:
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
