"""A training run, from a records folder to ``RUN/``: last.ckpt, best.ckpt, config.json, logs and curves.

Everything a run computes follows from (recipe, seed, records) and the position, so a run that was stopped and resumed
is the run that was not.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import CheckpointError, Interrupted, TrainError
from imnet_prep.files import exclusive_lock, write_atomically
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Batch, Progress, ProgressCallback
from mbv2.data import AnyBatch, RunData, batch_inputs, fill_rows, open_run_data
from mbv2.runtime import runtime, start_mindspore, versions
from mbv2.scoring.score import Scores, network_predict, score_batches, sum_over_ranks
from mbv2.show.curves import draw_curves
from mbv2.training.features import FeatureSet, FeatureSource, cache_key, compute_features, load_features
from mbv2.training.logs import EpochRow, RunLog, StepRow, open_events, read_metrics, verdict
from mbv2.training.ranks import wait_for_all
from mbv2.training.run import BEST, CONFIG, CURVES, LAST, LOCK, Pace, Position, RunOptions, RunResult, stored_run
from mbv2.training.schedule import learning_rate
from mbv2.training.state import find_last, run_identity
from mbv2.weights.checkpoint import (
    AVERAGE_PREFIX,
    Checkpoint,
    Meta,
    load_parameters,
    parameter_tensors,
    read_checkpoint,
    save_checkpoint,
    tensor_digest,
)
from mbv2.weights.pretrained import load_pretrained, load_teacher, network_config, pretrained_fields

# Fields of the recipe that an augmented view's pixels follow from.
AUGMENTATION = (
    "crop_min",
    "crop_max",
    "flip",
    "color_jitter",
    "randaugment_ops",
    "randaugment_magnitude",
    "erasing_prob",
)
__all__ = ["RunOptions", "RunResult", "pretrained_fields", "stored_run", "train"]
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
        return _Run(options, data, last, stop, progress).run()


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
    rows, training = read_metrics(options.out), last.meta.training
    pace = (rows[-1].images_per_s, rows[-1].data_wait_frac) if rows else (0.0, 0.0)
    best = (training["position"]["best_top1"], training["position"]["best_top5"])
    return RunResult(*best, last.meta.epoch, *pace, options.out / BEST, already_done=True)


class _Run:
    """The state of a run in this process."""

    def __init__(
        self,
        options: RunOptions,
        data: RunData,
        last: Checkpoint | None,
        stop: Callable[[], bool],
        progress: ProgressCallback | None,
    ) -> None:
        import mindspore as ms

        from mbv2.network.model import MobileNetV2
        from mbv2.training.step import ApplyAccumulated, TrainStep

        recipe = options.recipe
        self.options, self.recipe, self.data = options, recipe, data
        self.stop, self.progress = stop, progress
        self.head_only = recipe.freeze == "backbone"
        if self.head_only and runtime().ranks > 1:
            raise TrainError(
                "freeze=backbone trains on one process", got=f"{runtime().ranks}", remedy="start without msrun"
            )
        self.last = last
        self.rank, self.ranks = runtime().rank, runtime().ranks
        start = read_checkpoint(options.pretrained) if options.pretrained else None
        if last is not None:
            start = last.without_state()
        self.identity = last.meta.training["identity"] if last is not None else run_identity(options, data, self.ranks)
        self.config = network_config(recipe, len(data.classes), start)
        ms.set_seed(options.seed)
        self.net = MobileNetV2(self.config, kernels=options.kernels)
        if start is not None:
            load_pretrained(self.net, start, data.classes)
        if recipe.freeze == "bn":
            self.net.freeze_batchnorm()
        if self.head_only:
            self.data = self._cache_features(start)
        self.average = None
        if recipe.ema_decay:
            self.average = MobileNetV2(self.config, kernels=options.kernels)
            load_parameters(self.average.get_parameters(), parameter_tensors(self.net.get_parameters()), "average")
            self.average.set_train(False)
            for parameter in self.average.get_parameters():
                parameter.name = f"{AVERAGE_PREFIX}{parameter.name}"
        teacher = None
        if recipe.distill_from:
            teacher = load_teacher(Path(recipe.distill_from), data.classes, kernels=options.kernels)
        self.train_step = TrainStep(
            self.net,
            recipe,
            self.config.classes,
            average=self.average,
            teacher=teacher,
            head_only=self.head_only,
            ranks=self.ranks,
        )
        self.apply_accumulated = ApplyAccumulated(self.train_step) if recipe.accumulate_steps > 1 else None
        self.steps_per_epoch = self.data.train.steps_per_epoch
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.position = Position()
        self.pending: list[tuple[int, float, Any, Any]] = []  # (step, lr, result, norm of an update or None), unread
        self.epoch_pace, self.run_pace, self.row_pace = Pace(), Pace(), Pace()
        self.compiling = recipe.accumulate_steps  # steps until every graph of training has been compiled
        self.log: RunLog | None = None
        self.events: Any = None

    def _cache_features(self, start: Checkpoint | None) -> RunData:
        """Replace the images by their pooled features, from the cache or computed now."""
        from mbv2.training.step import PooledFeatures

        assert start is not None
        recipe, data = self.recipe, self.data
        self.net.set_train(False)
        predict = network_predict(PooledFeatures(self.net))
        backbone = {name: value for name, value in start.weights().items() if not name.startswith("classifier.")}
        common = {
            "weights": tensor_digest(backbone),
            "model": {k: v for k, v in asdict(self.config).items() if k not in ("classes", "dropout")},
            "kernels": self.net.kernels,
            "records": data.digest,
            "image_size": recipe.image_size,
            "eval_crop": recipe.eval_crop,
        }
        augmented = {"seed": self.options.seed, **{name: getattr(recipe, name) for name in AUGMENTATION}}
        folder = self.options.features or self.options.out / "features"

        def open_set(split: str, view: int, batches: Callable[[], Iterator[AnyBatch]], images: int) -> FeatureSet:
            name = (
                f"{split}-{view}-{cache_key({**common, **(augmented if view else {}), 'split': split, 'view': view})}"
            )
            return load_features(folder, name) or compute_features(
                folder,
                name,
                lambda image: predict(fill_rows(image, recipe.batch_size))[: len(image)],
                batches(),
                images=images,
                length=self.net.feature_count,
                stop=self.stop,
                progress=self.progress,
            )

        views = [
            open_set("train", view, lambda view=view: data.train_view(view), data.train_images)  # type: ignore[misc]
            for view in range(1 + recipe.feature_views)
        ]
        train_source = FeatureSource(tuple(views), recipe.batch_size, training=True, seed=self.options.seed)
        source, val_source = data.val, None
        if source is not None:
            val_set = open_set("val", 0, lambda: source.epoch(0), data.val_images)
            val_source = FeatureSource((val_set,), recipe.batch_size, training=False)
        self.net.set_train(True)
        return replace(data, train=train_source, val=val_source)

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        out, last = self.options.out, self.last
        if last is not None:
            self._restore(last)
        if self.rank == 0:
            if self.options.tensorboard:
                self.events = open_events(out, self.position.step)
            self.log = RunLog(out, self.position.epoch, self.position.step, self.events)
            self._write_config()
        try:
            if last is None:
                self._save_last()
            while self.position.epoch < self.recipe.epochs:
                self._epoch()
        finally:
            if self.events is not None:
                self.events.close()
        position = self.position
        top1, top5 = position.best_top1, position.best_top5
        pace = self.run_pace
        return RunResult(top1, top5, position.epoch, pace.images_per_s, pace.data_wait_frac, out / BEST)

    def _epoch(self) -> None:
        position = self.position
        lr = self._train_epoch()
        scores = self._evaluate() if self._due(position.epoch + 1) else None
        position.epoch, position.epoch_step = position.epoch + 1, 0
        self._keep_best(scores)
        row = EpochRow(
            position.epoch,
            position.step,
            lr,
            position.loss_sum / self.steps_per_epoch,
            scores.loss if scores else None,
            scores.top1 if scores else None,
            scores.top5 if scores else None,
            self.epoch_pace.images_per_s,
            self.epoch_pace.data_wait_frac,
        )
        position.loss_sum, self.epoch_pace = 0.0, Pace()
        if self.log is not None:
            self.log.add_epoch(row)
            shape = f"width {self.recipe.width:g}, {self.recipe.image_size} px, seed {self.options.seed}"
            draw_curves(self.options.out / CURVES, read_metrics(self.options.out), f"{self.recipe.name}: {shape}")
        self._save_last()

    def _due(self, epoch: int) -> bool:
        return self.data.val is not None and (epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs)

    def _train_epoch(self) -> float:
        """Train the rest of the current epoch; give its last learning rate."""
        position, every = self.position, self.options.save_every
        lr = self._lr(max(0, position.step - 1))
        if position.epoch_step == self.steps_per_epoch:
            return lr  # interrupted between the last step and the end of its evaluation
        batches = self.data.train.epoch(position.epoch, position.epoch_step)
        started = time.perf_counter()
        for batch in batches:
            waited = time.perf_counter()
            lr = self._lr(position.step)
            result, norm = self._step(batch, lr)
            finished = time.perf_counter()
            position.step, position.epoch_step = position.step + 1, position.epoch_step + 1
            self._count(len(batch) * self.ranks, waited - started, finished - waited)
            self.pending.append((position.step, lr, result, norm))
            if position.step % self.options.log_every == 0:
                self._log_step()
            if self._stopping(result):
                self._save_last()
                remedy = "go on with --resume"
                raise Interrupted(f"stopped after step {position.step} of {self.total_steps}, saved", remedy=remedy)
            if every and position.step % every == 0:
                self._save_last()
            self._report(lr)
            started = time.perf_counter()
        self._read_back()
        if position.epoch_step != self.steps_per_epoch:
            got = f"{position.epoch_step}"
            raise TrainError("the loader ended early", expected=f"{self.steps_per_epoch} batches an epoch", got=got)
        return lr

    def _stopping(self, result: Any) -> bool:
        """Say whether to leave after this step: with several ranks, as soon as one of them asked, and all together."""
        return self.stop() if self.ranks == 1 else bool(result.asnumpy()[2] > 0)

    def _lr(self, step: int) -> float:
        recipe = self.recipe
        global_batch = recipe.batch_size * self.ranks * recipe.accumulate_steps
        return learning_rate(recipe, step, self.steps_per_epoch, global_batch)

    def _step(self, batch: AnyBatch, lr: float) -> tuple[Any, Any]:
        """Return the step's result and, where it ends in the update of several steps, the norm of their gradient."""
        import mindspore as ms

        from mbv2.training.step import dropout_mask, step_controls

        rows = len(batch)
        shape = (
            rows * self.ranks,
            self.net.feature_count,
        )  # of all ranks: two with 16 images drop what one with 32 does
        mask = dropout_mask(self.options.seed, self.position.step, shape, self.recipe.dropout)
        mask = mask[self.rank * rows : (self.rank + 1) * rows]
        mix_label, weight = batch.label, np.ones(len(batch), np.float32)
        if isinstance(batch, Batch) and batch.mix_label is not None and batch.mix_weight is not None:
            mix_label, weight = batch.mix_label, batch.mix_weight
        controls = step_controls(self.recipe, lr, self.position.step, stop=self.stop())
        inputs = (batch_inputs(batch), mask, batch.label, mix_label, weight, controls)
        result = self.train_step(*(ms.Tensor(value) for value in inputs))
        if self.apply_accumulated is None or (self.position.step + 1) % self.recipe.accumulate_steps:
            return result, None
        return result, self.apply_accumulated(ms.Tensor(controls))

    def _count(self, images: int, wait_s: float, busy_s: float) -> None:
        if self.compiling:
            self.compiling -= 1
            _logger.info("step with graph compilation took %.1f s", busy_s)
            return
        for pace in (self.epoch_pace, self.run_pace, self.row_pace):
            pace.add(images, wait_s, busy_s)

    # --- what is read back, logged and shown ---------------------------------------------------------------------

    def _read_back(self) -> tuple[float, float]:
        """Fetch the results of the steps since the last time; give the newest loss and gradient norm.

        Raises:
            TrainError: A loss is not finite.
        """
        loss = norm = math.nan
        for step, lr, result, update_norm in self.pending:
            loss, norm, _ = (float(value) for value in result.asnumpy())
            if update_norm is not None:
                norm = float(update_norm.asnumpy())
            if not math.isfinite(loss):
                raise self._not_finite(step, lr, f"loss {loss}")
            self.position.loss_sum += loss
        self.pending.clear()
        return loss, norm

    def _not_finite(self, step: int, lr: float, got: str) -> TrainError:
        saved = read_checkpoint(self.options.out / LAST).meta.step
        what = f"training broke down at step {step} of {self.total_steps} (learning rate {lr:.6g})"
        remedy = f"{LAST} holds the last good state, step {saved}; lower --lr or set clip_norm"
        return TrainError(what, expected="a finite loss", got=got, remedy=remedy)

    def _log_step(self) -> None:
        lr = self.pending[-1][1]
        loss, norm = self._read_back()
        position, pace = self.position, self.row_pace
        epoch = (position.step - 1) // self.steps_per_epoch
        step_ms = 1000 * (pace.wait_s + pace.busy_s) / max(1, pace.steps)
        wait = pace.data_wait_frac
        clipped = norm if self.recipe.clip_norm else None
        row = StepRow(epoch, position.step, loss, lr, clipped, step_ms, pace.images_per_s, wait, verdict(wait))
        if self.log is not None:
            self.log.add_step(row)
        self.row_pace = Pace()

    def _report(self, lr: float) -> None:
        if self.progress is None:
            return
        position, size = self.position, self.recipe.batch_size * self.ranks
        seen = position.epoch_step - len(self.pending)
        loss = f"loss {position.loss_sum / seen:.3f}, " if seen else ""
        epoch = f"epoch {position.epoch + 1}/{self.recipe.epochs}, "
        note = f"{epoch}{loss}lr {lr:.4g}, waiting for data {self.epoch_pace.data_wait_frac:.1%}"
        self.progress(Progress(position.step * size, self.total_steps * size, note=note))

    def _evaluate(self) -> Scores:
        from mbv2.training.step import Head

        assert self.data.val is not None
        net = self.net if self.average is None else self.average
        net.set_train(False)
        try:
            return score_batches(
                network_predict(Head(net) if self.head_only else net),
                self.data.val.epoch(0),
                classes=self.config.classes,
                batch_size=self.recipe.batch_size,
                total=self.data.val_images,
                reduce=sum_over_ranks,
                stop=self.stop if self.ranks == 1 else lambda: False,
            )
        except Interrupted as interrupted:
            self._save_last()
            remedy = "go on with --resume"
            raise Interrupted(
                f"stopped in the evaluation after step {self.position.step}, saved", remedy=remedy
            ) from interrupted
        finally:
            self.net.set_train(True)

    # --- what is kept --------------------------------------------------------------------------------------------

    def _tensors(self, parameters: list[Any]) -> dict[str, NDArray[Any]]:
        tensors = parameter_tensors(parameters)
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                step = self.position.step
                raise self._not_finite(step, self._lr(max(0, step - 1)), f"{name} not finite after it")
        return tensors

    def _meta(self, metrics: dict[str, float], training: dict[str, Any]) -> Meta:
        position, recipe = self.position, self.recipe
        return Meta(
            model=asdict(self.config),
            class_names=self.data.classes,
            image_size=recipe.image_size,
            eval_crop=recipe.eval_crop,
            batch_size=recipe.batch_size,
            epoch=position.epoch,
            step=position.step,
            metrics=metrics,
            training=training,
            origin=f"mbv2 train, recipe {recipe.name}",
        )

    def _save_last(self) -> None:
        self._read_back()
        if self.rank:
            return
        parameters = [*self.net.get_parameters(), *self.train_step.state().values()]
        training = {"identity": self.identity, "position": asdict(self.position), "recipe": asdict(self.recipe)}
        save_checkpoint(self.options.out / LAST, self._tensors(parameters), self._meta({}, training))

    def _keep_best(self, scores: Scores | None) -> None:
        """Write ``best.ckpt`` where this epoch is the best so far; without a validation split the newest is."""
        position = self.position
        if self.data.val is not None:
            if scores is None or (position.best_top1 is not None and scores.top1 <= position.best_top1):
                return
            position.best_top1, position.best_top5 = scores.top1, scores.top5
        if self.rank:
            return
        metrics = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss} if scores else {}
        net = self.net if self.average is None else self.average
        tensors = {n.removeprefix(AVERAGE_PREFIX): v for n, v in self._tensors(list(net.get_parameters())).items()}
        save_checkpoint(self.options.out / BEST, tensors, self._meta(metrics, {}))

    def _restore(self, last: Checkpoint) -> None:
        parameters = [*self.net.get_parameters(), *self.train_step.state().values()]
        load_parameters(parameters, last.tensors, str(last.path))
        try:
            self.position = Position(**last.meta.training["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{last.path} does not say where the run stands", got=str(error)) from error
        _logger.info("resuming at step %d of %d", self.position.step, self.total_steps)

    def _write_config(self) -> None:
        document = {
            "recipe": asdict(self.recipe),
            "seed": self.options.seed,
            "device_target": self.options.device_target,
            "kernels": self.net.kernels,
            "model": asdict(self.config),
            "classes": len(self.data.classes),
            "pretrained_weights_sha256": self.identity["pretrained"],
            "records_manifest_sha256": self.data.digest,
            "steps_per_epoch": self.steps_per_epoch,
            "versions": versions(),
        }
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        write_atomically(self.options.out / CONFIG, text.encode())
