"""The logs of a run: ``metrics.csv`` (a row an epoch), ``log.jsonl`` (a row a logged step), and TensorBoard events.

All carry the run's step, so that a resumed run cuts them back to its checkpoint and writes on: the logs of an
interrupted run then read as if nothing had happened.
"""

import csv
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imnet_prep.errors import TrainError

EVENTS = "events"
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


def verdict(data_wait_frac: float) -> str:
    """Say what sets the pace, and what to change."""
    if data_wait_frac < DATA_BOUND_FRAC:
        return "compute-bound: a smaller width or image size, or more cores or devices, would speed it up"
    return "data-bound: store the images smaller (to-mindrecord --short-side 256) or give the loader more cores"


class RunLog:
    """Appends to the logs of a run.

    Args:
        folder: The run's folder.
        epoch: Finished epochs; later rows of ``metrics.csv`` are cut off, their work is about to be done again.
        step: Finished steps; later rows of ``log.jsonl`` are cut off.
        events: Write TensorBoard events as well.

    Raises:
        TrainError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, epoch: int, step: int, *, events: bool = False) -> None:
        self.events = _open_events(folder, step) if events else None
        self.metrics, self.log = folder / METRICS, folder / LOG
        rows = [row for row in read_metrics(folder) if row.epoch <= epoch]
        _rewrite(self.metrics, lambda: _csv_text(rows))
        kept = [line for line in _lines(self.log) if _step_of(line) <= step]
        _rewrite(self.log, lambda: "".join(f"{line}\n" for line in kept))

    def add_step(self, row: StepRow) -> None:
        """Append a row to ``log.jsonl``."""
        with self.log.open("a", encoding="utf-8", newline="\n") as handle:
            handle.write(json.dumps(asdict(row)) + "\n")
        names = ("loss", "lr", "grad_norm", "step_ms", "images_per_s", "data_wait_frac")
        self._add_events("train", {name: getattr(row, name) for name in names}, row.step)

    def add_epoch(self, row: EpochRow) -> None:
        """Append a row to ``metrics.csv``."""
        with self.metrics.open("a", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerow(_cells(row))
        self._add_events("val", {"loss": row.val_loss, "top1": row.val_top1, "top5": row.val_top5}, row.step)

    def close(self) -> None:
        """Close the events."""
        if self.events is not None:
            self.events.close()

    def _add_events(self, group: str, values: dict[str, float | None], step: int) -> None:
        if self.events is None:
            return
        for name, value in values.items():
            if value is not None:
                self.events.add_scalar(f"{group}/{name}", value, step)
        self.events.flush()


def _open_events(folder: Path, step: int) -> Any:
    """Open the TensorBoard events of a run; TensorBoard then hides what an interrupted run wrote after ``step``."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        remedy = "install it: pip install 'imnet-prep[tensorboard]'"
        raise TrainError("--tensorboard needs tensorboardX", got=str(error), remedy=remedy) from error
    return SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if step else None)


def read_metrics(folder: Path) -> list[EpochRow]:
    """Read ``metrics.csv``; a last line cut short by a crash is left out."""
    names = [field.name for field in fields(EpochRow)]
    rows: list[EpochRow] = []
    for cells in csv.reader(_lines(folder / METRICS)):
        if len(cells) != len(names) or cells == names:
            continue
        numbers = [float(cell) if cell else None for cell in cells]
        epoch, step, lr, loss, val_loss, top1, top5, pace, wait = numbers
        if epoch is None or step is None or lr is None or loss is None or pace is None or wait is None:
            continue
        rows.append(EpochRow(int(epoch), int(step), lr, loss, val_loss, top1, top5, pace, wait))
    return rows


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a file: what follows the last newline was cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _cells(row: EpochRow) -> list[str]:
    return ["" if value is None else repr(value) for value in asdict(row).values()]


def _csv_text(rows: list[EpochRow]) -> str:
    lines = [[field.name for field in fields(EpochRow)], *(_cells(row) for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def _rewrite(path: Path, text: Callable[[], str]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text(), encoding="utf-8", newline="\n")
    os.replace(partial, path)
