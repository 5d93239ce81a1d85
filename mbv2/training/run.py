"""A training run, from a records folder to ``RUN/``: last.ckpt, best.ckpt, config.json, logs and curves.

Everything a run computes follows from (recipe, seed, records) and the position, so a run that was stopped and resumed
is the run that was not.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.files import exclusive_lock
from imnet_prep.records.elsewhere import open_records
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import ProgressCallback
from mbv2.data import RunData, open_run_data
from mbv2.kernels import explained
from mbv2.runtime import runtime, start_mindspore
from mbv2.scoring.score import Scores
from mbv2.show.curves import draw_curves
from mbv2.training.config import log_what_computes, write_config
from mbv2.training.features import feature_data
from mbv2.training.logs import EpochRow, RunLog, StepRow, read_metrics, read_skipped
from mbv2.training.options import BEST, CURVES, LAST, LOCK, RunOptions, RunResult
from mbv2.training.progress import Pace, StepResults
from mbv2.training.ranks import from_first, refuse_others, sum_floats, wait_for_all
from mbv2.training.schedule import changed_rate, describe_rate, learning_rate
from mbv2.training.state import Position, RunState, find_last, run_identity, saved_position
from mbv2.weights.checkpoint import Checkpoint, read_checkpoint

Callback = Callable[[StepRow | EpochRow], None]
_logger = logging.getLogger(__name__)


class _CallersError(Exception):
    """Keeps an error of the caller's function apart from those of the run: both may be an OSError."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def train(
    options: RunOptions,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
    data: RunData | None = None,
    callback: Callback | None = None,
) -> RunResult:
    """Carry out a run, or go on with one.

    Args:
        options: What and how.
        stop: Says whether to save and leave; asked once a step.
        progress: Called after each step and each evaluated batch.
        data: Batches to use instead of the records folder's.
        callback: Called on the first rank with each row of the logs when it is written. Where it raises, the run is
            saved first. A resumed run calls it again for the rows since its last save.

    Raises:
        TrainError: The folder holds another run, there is none to resume, or the loss is not finite.
        RecordsError: The records folder cannot be trained on, or the run would lie in one.
        CheckpointError: ``last.ckpt`` is damaged or of another run.
        Interrupted: ``stop`` said so; ``last.ckpt`` holds the state.
    """
    refuse_inside_records(options.out / LAST, options.features)
    with ExitStack() as stack:
        if data is None:
            open_records(options.records)  # a folder that is none is said before MindSpore is started
        here = start_mindspore(options.device_target)
        how = "--resume" if options.resume else "no --resume"
        if options.resume:
            from_first(how, lambda: _refuse_nothing(options.out))
        if data is None:
            data = open_run_data(
                options.records, options.recipe, options.seed, stack, here, workers=options.workers,
                on_bad_record=options.on_bad_record, cache=options.cache, cache_bytes=options.cache_bytes,
            )  # fmt: skip
        last, identity = from_first(how, lambda: _begin(options, data, here.ranks, stack))
        if here.ranks > 1:
            origin = identity["pretrained"] if options.resume else ""
            refuse_others(identity, run_identity(options, data, here.ranks, origin))
        if last is not None and saved_position(last).finished(options.recipe):
            rows, skipped = read_metrics(options.out), [name for name, _ in read_skipped(options.out)]
            return _result(
                options, data, saved_position(last), rows[-1] if rows else Pace(), skipped, already_done=True
            )
        _check(options, data, here.ranks)
        if here.rank == 0:
            log_what_computes(options, data)
        gc.collect()  # a graph compiled while an earlier run's cells are collected is compiled a second time
        with explained():
            return _Run(options, data, last, identity, stop, progress, callback).carry_out()


def _refuse_nothing(out: Path) -> None:
    if not (out / LAST).exists():
        raise TrainError(f"nothing to resume in {out}", expected=LAST, remedy="start without --resume")


def _begin(
    options: RunOptions, data: RunData, ranks: int, stack: ExitStack
) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Lock the run's folder until ``stack`` ends; return what :func:`find_last` finds there."""
    stack.enter_context(_locked(options.out))
    return find_last(options, data, ranks)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the run's folder, and keep other runs out of it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out / LOCK):
            yield
    except _CallersError as raised:
        raise raised.error from None
    except BlockingIOError as error:
        remedy = "wait for it to end, or choose another --out"
        raise TrainError(f"another process is training in {out}", remedy=remedy) from error
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise  # MindSpore's own
        remedy = f"fix this, then continue with --resume if {out / LAST} exists"
        raise TrainError(f"cannot write in the run's folder {out}", got=str(error), remedy=remedy) from error


def _check(options: RunOptions, data: RunData, ranks: int) -> None:
    """Refuse what a recipe cannot know: the number of ranks, and whether there is a val split."""
    if options.recipe.freeze == "backbone" and ranks > 1:
        raise TrainError("freeze=backbone trains on one process", got=f"{ranks}", remedy="start without msrun")
    if options.recipe.patience and data.val is None:
        raise TrainError("patience counts evaluations", expected="records with a val split", got="none")


def _result(
    options: RunOptions,
    data: RunData,
    position: Position,
    pace: Pace | EpochRow,
    skipped: list[str],
    *,
    already_done: bool = False,
) -> RunResult:
    return RunResult(
        position.best_top1,
        position.best_top5,
        position.epoch,
        pace.images_per_s,
        pace.data_wait_frac,
        options.out / BEST,
        already_done=already_done,
        stopped_early=position.stopped_early(options.recipe),
        skipped=tuple(skipped),
        classes=len(data.classes),
        cached=options.recipe.freeze == "backbone",
        small=data.small,
    )


class _Run:
    """A run in this process: the loop over epochs and steps."""

    def __init__(
        self,
        options: RunOptions,
        data: RunData,
        last: Checkpoint | None,
        identity: dict[str, Any],
        stop: Callable[[], bool],
        progress: ProgressCallback | None,
        callback: Callback | None,
    ) -> None:
        from mbv2.training.learner import Learner

        recipe, here = options.recipe, runtime()
        self.options, self.recipe, self.last = options, recipe, last
        self.stop, self.progress, self.callback = stop, progress, callback
        self.ranks, self.writes = here.ranks, here.rank == 0
        self.global_batch = recipe.batch_size * here.ranks * recipe.accumulate_steps
        start = read_checkpoint(options.pretrained) if options.pretrained else None
        if last is not None:
            start = last.without_state()
        self.learner = Learner(options, data.classes, data.class_counts, start)
        if self.learner.head_only:
            data = feature_data(options, data, self.learner, stop=stop, progress=progress)
        self.data, self.steps_per_epoch = data, data.train.steps_per_epoch
        self.state = RunState(options, self.learner, identity, data, writes=self.writes, rate=self.rate)
        self.results = StepResults(recipe, data, here.ranks, self.state.not_finite)
        self.log: RunLog | None = None

    def carry_out(self) -> RunResult:
        """Train to the run's end."""
        position, out = self.state.restore(self.last), self.options.out
        if self.writes:
            _logger.info(describe_rate(self.recipe, self.steps_per_epoch, self.global_batch))
            write_config(self.options, self.data, self.learner, self.state.identity)
            events, live = self.options.tensorboard, self.recipe.score_live
            self.log = RunLog(out, position.epoch, position.step, events=events, live=live)
        try:
            if self.last is None or self._goes_on_longer(self.last):
                self.state.save_last()
            while not position.finished(self.recipe):
                self._epoch()
        finally:
            if self.log is not None:
                self.log.close()
        skipped = [row.file_name for row in self.data.skipped]
        return _result(self.options, self.data, position, self.results.run_pace, skipped)

    def _epoch(self) -> None:
        position, recipe = self.state.position, self.recipe
        self._train_epoch()
        scores = live = None
        if self._due(position.epoch + 1):
            scores = self._evaluate()
            live = self._evaluate(live=True) if recipe.score_live else None
        self.data.share_skipped(sum_floats)
        position.epoch, position.epoch_step = position.epoch + 1, 0
        self.state.keep(scores, scored=self.data.val is not None)
        row = self.results.epoch_row(position, self.rate(position.step - 1), scores, live)
        if self.log is not None:
            self.log.add_epoch(row)
            self.log.add_skipped(self.data.skipped, row.epoch - 1, row.step)
            title = f"{recipe.name}: width {recipe.width:g}, {recipe.image_size} px, seed {self.options.seed}"
            draw_curves(self.options.out / CURVES, read_metrics(self.options.out), title, len(self.data.classes))
            _logger.info(self.results.epoch_line(row, position))
            self._tell(row)
        self._save_last()

    def _train_epoch(self) -> None:
        """Train the rest of the current epoch: nothing, where it was interrupted in its evaluation."""
        position, every = self.state.position, self.options.save_every
        if position.epoch_step == self.steps_per_epoch:
            return
        started = time.perf_counter()
        for batch in self.data.train.epoch(position.epoch, position.epoch_step):
            waited = time.perf_counter()
            lr = self.rate(position.step)
            self.results.before_step()
            result = self.learner.train(batch, position.step, lr, stop=self.stop())
            finished = time.perf_counter()
            position.step, position.epoch_step = position.step + 1, position.epoch_step + 1
            self.results.add(position.step, result, waited - started, finished - waited)
            if position.step % self.options.log_every == 0:
                row = self.results.row(position, lr)  # on every rank: all must see a loss that is not finite
                if self.log is not None:
                    self.log.add_step(row)
                    self.log.add_skipped(self.data.skipped, row.epoch, row.step)
                    self._tell(row)
            if self._stopping(result[0]):
                self._save_last()
                wait_for_all()  # msrun kills the others when a rank ends, and the first may still be writing
                total = self.steps_per_epoch * self.recipe.epochs
                remedy = "continue with --resume"
                raise Interrupted(f"stopped after step {position.step} of {total}, saved", remedy=remedy)
            if every and position.step % every == 0:
                self._save_last()
            if self.progress is not None:
                self.progress(self.results.progress(position, lr))
            started = time.perf_counter()
        self.results.read_back(position)
        if position.epoch_step != self.steps_per_epoch:
            got = f"{position.epoch_step}"
            raise TrainError("the loader ended early", expected=f"{self.steps_per_epoch} batches an epoch", got=got)

    def _stopping(self, result: Any) -> bool:
        """Say whether to leave after this step: with several ranks, as soon as one of them asked, and all together."""
        return self.stop() if self.ranks == 1 else bool(result.asnumpy()[2] > 0)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0)."""
        return learning_rate(self.recipe, step, self.steps_per_epoch, self.global_batch)

    def _due(self, epoch: int) -> bool:
        return self.data.val is not None and (epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs)

    def _evaluate(self, *, live: bool = False) -> Scores:
        try:
            with self.results.evaluation():
                return self.learner.evaluate(self.data, live=live, stop=self.stop if self.ranks == 1 else lambda: False)
        except Interrupted as interrupted:
            self._save_last()
            what = f"stopped in the evaluation after step {self.state.position.step}, saved"
            raise Interrupted(what, remedy="continue with --resume") from interrupted

    def _save_last(self) -> None:
        self.data.share_skipped(sum_floats)
        self.results.read_back(self.state.position)
        self.state.save_last()

    def _tell(self, row: StepRow | EpochRow) -> None:
        """Call the caller's function, and save the run where it raises."""
        if self.callback is not None:
            try:
                self.callback(row)
            except Exception as error:
                self.results.read_back(self.state.position)
                self.state.save_last()
                raise _CallersError(error) from error

    def _goes_on_longer(self, last: Checkpoint) -> bool:
        """Say whether the run now has more epochs than it had, and log what that changes."""
        before, now = last.meta.training["identity"]["epochs"], self.recipe.epochs
        if before == now:
            return False
        old = replace(self.recipe, epochs=before)
        change = changed_rate(old, self.recipe, self.state.position.step, self.steps_per_epoch, self.global_batch)
        _logger.info("%d epochs in place of %d: %s", now, before, change)
        return True
