"""The results of the steps of a run: read back a few steps later, checked, timed, and put into rows.

A step's result is read back only where it is needed, as reading it waits for the step to end.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from imnet_prep.errors import TrainError
from imnet_prep.types import Progress
from mbv2.data import RunData
from mbv2.recipe import Recipe
from mbv2.scoring.score import TOP, Scores
from mbv2.training.logs import EpochRow, StepRow, verdict
from mbv2.training.state import Position

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Pace:
    """Time spent, split into waiting for data and computing; the first step, which compiles, is left out."""

    images: int = 0
    steps: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0

    def add(self, images: int, wait_s: float, busy_s: float) -> None:
        """Count one step."""
        self.images, self.steps = self.images + images, self.steps + 1
        self.wait_s, self.busy_s = self.wait_s + wait_s, self.busy_s + busy_s

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.images / max(1e-9, self.wait_s + self.busy_s)

    @property
    def data_wait_frac(self) -> float:
        """Share of the time spent waiting."""
        return self.wait_s / max(1e-9, self.wait_s + self.busy_s)


class StepResults:
    """The results of a run's steps.

    Args:
        recipe: Of the run.
        data: Of the run.
        ranks: Number of processes that train together; images are counted over all.
        not_finite: Makes the error for a step and what was found.

    Attributes:
        epoch_pace: Since the epoch began.
        run_pace: Since this process began.
    """

    def __init__(self, recipe: Recipe, data: RunData, ranks: int, not_finite: Callable[[int, str], TrainError]) -> None:
        self.recipe, self.data, self.not_finite = recipe, data, not_finite
        self.steps_per_epoch = data.train.steps_per_epoch
        self.unit = "features" if recipe.freeze == "backbone" else "images"
        self.global_batch = recipe.batch_size * ranks
        self.epoch_pace, self.run_pace, self._row_pace = Pace(), Pace(), Pace()
        self._compiling = recipe.accumulate_steps  # steps until every graph of training has been compiled
        self._unread: list[tuple[int, Any, Any]] = []  # (step, result, norm of an update or None)
        self._began, self._compiled_s, self._timed = perf_counter(), 0.0, 0  # this epoch's; its steps but compilation
        self._evaluated = False

    def before_step(self) -> None:
        """Say before the first step what its wait is for."""
        if self._compiling == self.recipe.accumulate_steps:
            wait = "a few seconds" if self.unit == "features" else "about 15 s"
            _logger.info("compiling the training step (%s) ...", wait)

    def add(self, step: int, result: tuple[Any, Any], wait_s: float, busy_s: float) -> None:
        """Take the result of a step (from 1), and how long it took."""
        self._unread.append((step, *result))
        if self._compiling:
            self._compiling, self._compiled_s = self._compiling - 1, self._compiled_s + busy_s
            _logger.debug("step with graph compilation took %.1f s", busy_s)
            return
        for pace in (self.epoch_pace, self.run_pace, self._row_pace):
            pace.add(self.global_batch, wait_s, busy_s)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation: the first one, which compiles, says nothing on those to come."""
        began = perf_counter()
        if not self._evaluated:
            _logger.info("compiling the evaluation (a few seconds) ...")
        yield
        if not self._evaluated:
            self._evaluated, self._compiled_s = True, self._compiled_s + perf_counter() - began

    def read_back(self, position: Position) -> tuple[float, float]:
        """Fetch the results since the last time and add their losses up; return the newest loss and gradient norm.

        Raises:
            TrainError: A loss is not finite.
        """
        loss = norm = math.nan
        for step, result, update_norm in self._unread:
            loss, norm, _ = (float(value) for value in result.asnumpy())
            if update_norm is not None:
                norm = float(update_norm.asnumpy())
            if not math.isfinite(loss):
                raise self.not_finite(step, f"loss {loss}")
            position.loss_sum += loss
        self._unread.clear()
        return loss, norm

    def row(self, position: Position, lr: float) -> StepRow:
        """Return the row of the step just finished, with the pace since the row before."""
        loss, norm = self.read_back(position)
        pace, self._row_pace = self._row_pace, Pace()
        wait = pace.data_wait_frac
        return StepRow(
            epoch=(position.step - 1) // self.steps_per_epoch,
            step=position.step,
            loss=loss,
            lr=lr,
            grad_norm=norm if self.recipe.clip_norm else None,
            step_ms=1000 * (pace.wait_s + pace.busy_s) / max(1, pace.steps),
            images_per_s=pace.images_per_s,
            data_wait_frac=wait,
            verdict=self.verdict(wait),
        )

    def verdict(self, data_wait_frac: float) -> str:
        """Say what sets the pace of this run."""
        return verdict(data_wait_frac, cached=self.unit == "features", small=self.data.small)

    def epoch_row(self, position: Position, lr: float, scores: Scores | None, live: Scores | None) -> EpochRow:
        """Return the row of the epoch just finished, and begin to count the next one.

        Args:
            position: After the epoch.
            lr: Of its last step.
            scores: Of the averaged weights where there are any; None where the epoch was not scored.
            live: Of the live weights, where they are scored too.
        """
        loss, pace = position.loss_sum / self.steps_per_epoch, self.epoch_pace
        self._timed = pace.steps
        position.loss_sum, self.epoch_pace = 0.0, Pace()
        speed = (pace.images_per_s, pace.data_wait_frac)
        return EpochRow(position.epoch, position.step, lr, loss, *_cells(scores), *speed, *_cells(live))

    def progress(self, position: Position, lr: float) -> Progress:
        """Return where the run stands, in images of all ranks."""
        seen = position.epoch_step - len(self._unread)
        loss = f"loss {position.loss_sum / seen:.3f}, " if seen else ""
        epoch = f"epoch {position.epoch + 1}/{self.recipe.epochs}, "
        note = f"{epoch}{loss}lr {lr:.4g}, waiting for data {self.epoch_pace.data_wait_frac:.1%}"
        steps = self.steps_per_epoch * self.recipe.epochs
        done, total = position.step * self.global_batch, steps * self.global_batch
        return Progress(done, total, self.unit, note=note, per_s=self.run_pace.images_per_s)

    def epoch_line(self, row: EpochRow, position: Position) -> str:
        """Return the line of an epoch for people, and begin to time the next one.

        The time left counts, for each epoch to come, what this one took without compilation.
        """
        now, best = perf_counter(), position.best_top1
        parts = [f"epoch {row.epoch}/{self.recipe.epochs}: loss {row.train_loss:.3f}"]
        if row.val_loss is not None and row.val_top1 is not None and row.val_top5 is not None:
            parts += [f"val loss {row.val_loss:.3f}", f"top-1 {row.val_top1:.3f}"]
            parts += [f"top-5 {row.val_top5:.3f}"] if len(self.data.classes) > TOP else []
        parts += [f"best {best:.3f}"] if best is not None else []
        if self._timed:
            parts.append(f"{row.images_per_s:,.0f} {self.unit}/s")
            left = (now - self._began - self._compiled_s) * self.steps_per_epoch / self._timed
            left *= self.recipe.epochs - row.epoch
            parts += [f"{_duration(left)} left"] if left else []
        self._began, self._compiled_s = now, 0.0
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _cells(scores: Scores | None) -> tuple[float | None, float | None, float | None]:
    return (scores.loss, scores.top1, scores.top5) if scores else (None, None, None)
