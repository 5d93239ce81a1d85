"""A training run, from a records folder to ``RUN/``: last.ckpt, best.ckpt, config.json, logs and curves.

Everything a run computes follows from (recipe, seed, records) and the position, so a run that was stopped and resumed
is the run that was not.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.files import exclusive_lock, write_atomically
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import ProgressCallback
from mbv2.data import AnyBatch, RunData, open_run_data
from mbv2.runtime import runtime, start_mindspore, versions
from mbv2.scoring.score import Scores, score_batches, sum_over_ranks
from mbv2.show.curves import draw_curves
from mbv2.training.features import feature_data
from mbv2.training.logs import EpochRow, RunLog, read_metrics
from mbv2.training.options import BEST, CONFIG, CURVES, LAST, LOCK, RunOptions, RunResult
from mbv2.training.progress import Pace, StepResults
from mbv2.training.ranks import wait_for_all
from mbv2.training.schedule import learning_rate
from mbv2.training.state import RunState, find_last, not_finite, run_identity
from mbv2.weights.checkpoint import Checkpoint, read_checkpoint

_logger = logging.getLogger(__name__)


def train(
    options: RunOptions,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
    data: RunData | None = None,
) -> RunResult:
    """Carry out a run, or go on with one.

    Args:
        options: What and how.
        stop: Says whether to save and leave; asked once a step.
        progress: Called after each step and each evaluated batch.
        data: Batches to use instead of the records folder's.

    Raises:
        TrainError: The folder holds another run, there is none to resume, or the loss is not finite.
        RecordsError: The records folder cannot be trained on, or the run would lie in one.
        CheckpointError: ``last.ckpt`` is damaged or of another run.
        Interrupted: ``stop`` said so; ``last.ckpt`` holds the state.
    """
    refuse_inside_records(options.out / LAST, options.features)
    if options.resume and not (options.out / LAST).exists():
        raise TrainError(f"nothing to resume in {options.out}", expected=LAST, remedy="start without --resume")
    with ExitStack() as stack:
        if data is None:
            RecordsFolder.open(options.records)  # a folder that is none is said before MindSpore is started
            here = start_mindspore(options.device_target)
            data = open_run_data(options.records, options.recipe, options.seed, stack, here)
        here = start_mindspore(options.device_target)
        if here.rank == 0:
            stack.enter_context(_locked(options.out))
        last = find_last(options, data, here.ranks)
        wait_for_all()  # no rank writes before all have looked
        if last is not None and last.meta.epoch >= options.recipe.epochs:
            return _finished(options, last)
        gc.collect()  # a graph compiled while an earlier run's cells are collected is compiled a second time
        return _Run(options, data, last, stop, progress).carry_out()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the run's folder, and keep other runs out of it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out / LOCK):
            yield
    except BlockingIOError as error:
        remedy = "wait for it to end, or choose another --out"
        raise TrainError(f"another process is training in {out}", remedy=remedy) from error
    except OSError as error:
        remedy = f"mend that, then go on with --resume where {out / LAST} is there"
        raise TrainError(f"cannot write in the run's folder {out}", got=str(error), remedy=remedy) from error


def _finished(options: RunOptions, last: Checkpoint) -> RunResult:
    rows, position = read_metrics(options.out), last.meta.training["position"]
    pace = (rows[-1].images_per_s, rows[-1].data_wait_frac) if rows else (0.0, 0.0)
    best = (position["best_top1"], position["best_top5"])
    return RunResult(*best, last.meta.epoch, *pace, options.out / BEST, already_done=True)


class _Run:
    """A run in this process: the loop over epochs and steps."""

    def __init__(
        self,
        options: RunOptions,
        data: RunData,
        last: Checkpoint | None,
        stop: Callable[[], bool],
        progress: ProgressCallback | None,
    ) -> None:
        from mbv2.training.learner import Learner

        recipe, here = options.recipe, runtime()
        if recipe.freeze == "backbone" and here.ranks > 1:
            remedy = "start without msrun"
            raise TrainError("freeze=backbone trains on one process", got=f"{here.ranks}", remedy=remedy)
        self.options, self.recipe, self.last = options, recipe, last
        self.stop, self.progress = stop, progress
        self.ranks, self.writes = here.ranks, here.rank == 0
        start = read_checkpoint(options.pretrained) if options.pretrained else None
        if last is not None:
            start = last.without_state()
        identity = last.meta.training["identity"] if last is not None else run_identity(options, data, here.ranks)
        self.learner = Learner(options, data.classes, data.class_counts, start)
        if self.learner.head_only:
            data = feature_data(options, data, self.learner, stop=stop, progress=progress)
        self.data = data
        self.steps_per_epoch = data.train.steps_per_epoch
        self.state = RunState(options, self.learner, identity, data.classes, writes=self.writes, where=self.where)
        self.results = StepResults(recipe, self.steps_per_epoch, here.ranks, self._not_finite)
        self.log: RunLog | None = None

    # --- the loop ------------------------------------------------------------------------------------------------

    def carry_out(self) -> RunResult:
        """Train to the run's end."""
        state, out = self.state, self.options.out
        if self.last is not None:
            state.restore(self.last)
        if self.writes:
            self.log = RunLog(out, state.position.epoch, state.position.step, events=self.options.tensorboard)
            self._write_config()
        try:
            if self.last is None:
                state.save_last()
            while state.position.epoch < self.recipe.epochs:
                self._epoch()
        finally:
            if self.log is not None:
                self.log.close()
        position, pace = state.position, self.results.run_pace
        best = (position.best_top1, position.best_top5)
        return RunResult(*best, position.epoch, pace.images_per_s, pace.data_wait_frac, out / BEST)

    def _epoch(self) -> None:
        position = self.state.position
        self._train_epoch()
        scores = self._evaluate() if self._due(position.epoch + 1) else None
        position.epoch, position.epoch_step = position.epoch + 1, 0
        self.state.keep_best(scores, scored=self.data.val is not None)
        self._log_epoch(scores)
        self.state.save_last()

    def _train_epoch(self) -> None:
        """Train the rest of the current epoch: nothing, where it was interrupted in its evaluation."""
        position, every = self.state.position, self.options.save_every
        started = time.perf_counter()
        for batch in self._batches():
            waited = time.perf_counter()
            lr = self.rate(position.step)
            result = self.learner.train(batch, position.step, lr, stop=self.stop())
            finished = time.perf_counter()
            position.step, position.epoch_step = position.step + 1, position.epoch_step + 1
            self.results.add(position.step, result, waited - started, finished - waited)
            if position.step % self.options.log_every == 0:
                row = self.results.row(position, lr)  # on every rank: all must see a loss that is not finite
                if self.log is not None:
                    self.log.add_step(row)
            if self._stopping(result[0]):
                self._save_last()
                total = self.steps_per_epoch * self.recipe.epochs
                remedy = "go on with --resume"
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

    def _batches(self) -> Iterator[AnyBatch]:
        position = self.state.position
        if position.epoch_step == self.steps_per_epoch:
            return iter(())
        return self.data.train.epoch(position.epoch, position.epoch_step)

    def _stopping(self, result: Any) -> bool:
        """Say whether to leave after this step: with several ranks, as soon as one of them asked, and all together."""
        return self.stop() if self.ranks == 1 else bool(result.asnumpy()[2] > 0)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0)."""
        global_batch = self.recipe.batch_size * self.ranks * self.recipe.accumulate_steps
        return learning_rate(self.recipe, step, self.steps_per_epoch, global_batch)

    # --- what is scored, logged and kept -------------------------------------------------------------------------

    def _due(self, epoch: int) -> bool:
        return self.data.val is not None and (epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs)

    def _evaluate(self) -> Scores:
        assert self.data.val is not None
        try:
            return score_batches(
                self.learner.predict(),
                self.data.val.epoch(0),
                classes=self.learner.config.classes,
                batch_size=self.recipe.batch_size,
                total=self.data.val_images,
                reduce=sum_over_ranks,
                stop=self.stop if self.ranks == 1 else lambda: False,
            )
        except Interrupted as interrupted:
            self._save_last()
            what = f"stopped in the evaluation after step {self.state.position.step}, saved"
            raise Interrupted(what, remedy="go on with --resume") from interrupted
        finally:
            self.learner.resume_training()

    def _save_last(self) -> None:
        self.results.read_back(self.state.position)
        self.state.save_last()

    def where(self, step: int) -> str:
        """Name a finished step (from 1) and its learning rate, for errors."""
        total = self.steps_per_epoch * self.recipe.epochs
        return f"step {step} of {total} (learning rate {self.rate(max(0, step - 1)):.6g})"

    def _not_finite(self, step: int, got: str) -> TrainError:
        return not_finite(self.options.out, self.where(step), got)

    def _log_epoch(self, scores: Scores | None) -> None:
        position, pace = self.state.position, self.results.epoch_pace
        row = EpochRow(
            position.epoch,
            position.step,
            self.rate(position.step - 1),
            position.loss_sum / self.steps_per_epoch,
            scores.loss if scores else None,
            scores.top1 if scores else None,
            scores.top5 if scores else None,
            pace.images_per_s,
            pace.data_wait_frac,
        )
        position.loss_sum, self.results.epoch_pace = 0.0, Pace()
        if self.log is not None:
            self.log.add_epoch(row)
            shape = f"width {self.recipe.width:g}, {self.recipe.image_size} px, seed {self.options.seed}"
            draw_curves(self.options.out / CURVES, read_metrics(self.options.out), f"{self.recipe.name}: {shape}")

    def _write_config(self) -> None:
        document = {
            "recipe": asdict(self.recipe),
            "seed": self.options.seed,
            "device_target": self.options.device_target,
            "kernels": self.learner.net.kernels,
            "model": asdict(self.learner.config),
            "classes": len(self.data.classes),
            "pretrained_weights_sha256": self.state.identity["pretrained"],
            "records_manifest_sha256": self.data.digest,
            "steps_per_epoch": self.steps_per_epoch,
            "versions": versions(),
        }
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        write_atomically(self.options.out / CONFIG, text.encode())
