"""The identity of a run, its position, and the checkpoints in its folder."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imnet_prep.errors import CheckpointError, TrainError
from mbv2.data import RunData
from mbv2.recipe import MODEL_FIELDS, Recipe, stored_fields
from mbv2.scoring.score import Scores
from mbv2.training.options import BEST, CONFIG, LAST, RunOptions
from mbv2.weights.checkpoint import (
    Checkpoint,
    Meta,
    Tensors,
    load_parameters,
    parameter_tensors,
    read_checkpoint,
    save_checkpoint,
)

if TYPE_CHECKING:
    from mbv2.training.learner import Learner  # it imports MindSpore

DESCRIPTIVE = ("name", "command", "source", "expected_top1")  # fields of a recipe that change nothing
INPUT = ("mean", "std")  # what a network makes of an image before its weights
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Position:
    """Where a run stands, and what it has seen of the current epoch. All of it goes into ``last.ckpt``."""

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_top1: float | None = None
    best_top5: float | None = None
    stale: int = 0  # evaluations since the best

    def finished(self, recipe: Recipe) -> bool:
        """Say whether a run ends here: all epochs are done, or its patience is at an end."""
        return self.epoch >= recipe.epochs or self.stopped_early(recipe)

    def stopped_early(self, recipe: Recipe) -> bool:
        """Say whether the best top-1 has not been beaten for as long as the recipe waits."""
        return 0 < recipe.patience <= self.stale


# --- the identity of a run -------------------------------------------------------------------------------------------


def run_identity(options: RunOptions, data: RunData, ranks: int, origin: str = "") -> dict[str, Any]:
    """Return what must be equal for two runs to compute the same.

    Args:
        options: Of the run.
        data: Of the run, on one rank.
        ranks: Number of processes that train together.
        origin: Digest of the weights that a resumed run once started from, used where they are not given again.
    """
    recipe = {name: value for name, value in asdict(options.recipe).items() if name not in DESCRIPTIVE}
    if options.pretrained is not None:
        origin = read_checkpoint(options.pretrained).digest()
    if options.recipe.distill_from:
        teacher = read_checkpoint(Path(options.recipe.distill_from))
        recipe["distill_from"] = teacher.digest()
        recipe["teacher"] = {name: teacher.meta.model[name] for name in (*INPUT, "padding", "bn_eps")}
    return {
        "seed": options.seed,
        "records": data.digest,
        "pretrained": origin,
        "ranks": ranks,
        "steps_per_epoch": data.train.steps_per_epoch,
        **recipe,
    }


def find_last(options: RunOptions, data: RunData, ranks: int) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Find the checkpoint to go on from.

    Returns:
        The checkpoint, or None where the run's folder holds none, and the run's identity.

    Raises:
        TrainError: The folder holds another run, the same one unfinished without ``resume``, or lacks ``best.ckpt``.
        CheckpointError: ``last.ckpt`` is damaged, or does not say where the run stands.
    """
    path = options.out / LAST
    if not path.exists():
        return None, run_identity(options, data, ranks)
    last = read_checkpoint(path)
    saved = last.meta.training.get("identity", {})
    want = run_identity(options, data, ranks, saved.get("pretrained", "") if options.resume else "")
    have = stored_fields({**_before_they_were_saved(last, options.out, want), **saved})
    if options.resume and want["epochs"] > have["epochs"]:
        have["epochs"] = want["epochs"]  # the run goes on longer than it was meant to
    given: dict[str, Any] = {}
    if options.pretrained is not None:  # its weights are part of the identity
        model = read_checkpoint(options.pretrained).meta.model
        given = {f"pretrained {name}": model[name] for name in INPUT}
    _refuse_another(options.out, {**want, **given}, have)
    position = saved_position(last)
    if not position.finished(options.recipe) and not options.resume:
        raise TrainError(
            f"{options.out} holds this run, unfinished", remedy="continue with --resume, or choose another --out"
        )
    kept_best = data.val is None or position.best_top1 is not None
    if last.meta.epoch and kept_best and not (options.out / BEST).exists():
        remedy = f"put it back, or start again in another --out with --pretrained {path}"
        raise TrainError(f"{options.out} has lost its {BEST}", remedy=remedy)
    return last, want


def saved_position(last: Checkpoint) -> Position:
    """Return where a run stood when its ``last.ckpt`` was written.

    Raises:
        CheckpointError: The file does not say.
    """
    try:
        return Position(**last.meta.training["position"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{last.path} does not say where the run stands", got=str(error)) from error


def _refuse_another(out: Path, want: dict[str, Any], have: dict[str, Any]) -> None:
    differing = [name for name in want if have.get(name) != want[name]]
    if not differing:
        return
    name = next((name for name in differing if name != "steps_per_epoch"), differing[0])  # that follows from others
    remedy = "choose another --out"
    if set(differing) <= {"ranks", "steps_per_epoch"}:
        remedy = f"start as many processes as before (msrun --worker_num), or {remedy}"
    raise TrainError(
        f"{out} holds another run: {', '.join(differing)} differ",
        expected=f"{name} {have.get(name)!r} to continue it",
        got=f"{want[name]!r}",
        remedy=remedy,
    )


def _before_they_were_saved(last: Checkpoint, out: Path, want: dict[str, Any]) -> dict[str, Any]:
    """Return what the identity lacks, in all runs or in those of an earlier version.

    This is: the fields of the run's network, ranks, steps an epoch, and what a teacher's network is beside its weights.

    Its steps an epoch follow from its position or stand in ``config.json``. Another number of ranks shows in them.
    """
    position = last.meta.training.get("position", {})
    steps = want["steps_per_epoch"]
    if position.get("epoch"):
        steps = (position["step"] - position["epoch_step"]) // position["epoch"]
    else:
        with suppress(OSError, ValueError, KeyError):
            steps = json.loads((out / CONFIG).read_text(encoding="utf-8"))["steps_per_epoch"]
    model = {name: last.meta.model[name] for name in MODEL_FIELDS}
    model |= {f"pretrained {name}": last.meta.model[name] for name in INPUT}
    return {**model, "ranks": want["ranks"], "steps_per_epoch": steps, "teacher": want.get("teacher")}


# --- the checkpoints of a run ----------------------------------------------------------------------------------------


class RunState:
    """The position and the weights of a run, saved to its folder and restored from it.

    Args:
        options: Of the run.
        learner: Its networks.
        identity: From :func:`run_identity`.
        data: Its batches; the bad records that they skipped are part of the state.
        writes: Whether this process writes the folder: the first rank does.
        rate: The learning rate of a step (from 0), for errors.
    """

    def __init__(
        self,
        options: RunOptions,
        learner: "Learner",
        identity: dict[str, Any],
        data: RunData,
        *,
        writes: bool,
        rate: Callable[[int], float],
    ) -> None:
        self.options, self.learner, self.identity, self.data = options, learner, identity, data
        self.writes, self.rate = writes, rate
        self.position = Position()
        self.saved_step = 0

    def restore(self, last: Checkpoint | None) -> Position:
        """Set every parameter and the position from a checkpoint, where there is one; return the position.

        Raises:
            CheckpointError: It is of another network or optimiser.
            PipelineError: The run had skipped more bad records than may be skipped now.
        """
        if last is not None:
            load_parameters(self.learner.state(), last.tensors, str(last.path))
            self.position = saved_position(last)
            self.saved_step = self.position.step
            self.data.restore_skipped(last.meta.training.get("skipped", {}))
            _logger.info("resuming after step %d", self.position.step)
        return self.position

    def save_last(self) -> None:
        """Write ``last.ckpt``: everything that going on needs."""
        if self.writes:
            self._write_last()
        self.saved_step = self.position.step

    def _write_last(self) -> None:
        recipe = asdict(self.options.recipe)
        training = {"identity": self.identity, "position": asdict(self.position), "recipe": recipe}
        if self.data.skipped:
            training["skipped"] = self.data.skipped_state()
        self._save(LAST, parameter_tensors(self.learner.state()), self._meta({}, training))

    def keep(self, scores: Scores | None, *, scored: bool) -> None:
        """Write ``best.ckpt`` where this epoch is the best so far, and ``epoch-NNNN.ckpt`` where the recipe keeps it.

        Args:
            scores: Of this epoch, or None where it was not scored.
            scored: Whether the run is scored at all; where it is not, the newest weights are the best.
        """
        position, every = self.position, self.options.recipe.keep_every
        better = not scored
        if scores is not None:
            better = position.best_top1 is None or scores.top1 > position.best_top1
            position.stale = 0 if better else position.stale + 1
            if better:
                position.best_top1, position.best_top5 = scores.top1, scores.top5
        names = [BEST] if better else []
        if every and position.epoch % every == 0:
            names.append(f"epoch-{position.epoch:04d}.ckpt")
        if self.writes:
            metrics = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss} if scores else {}
            for name in names:
                self._save(name, self.learner.weights(), self._meta(metrics, {}))

    def not_finite(self, step: int, got: str) -> TrainError:
        """Return the error of a run whose loss or weights are not finite at a step (from 1)."""
        total = self.data.train.steps_per_epoch * self.options.recipe.epochs
        what = f"training broke down at step {step} of {total} (learning rate {self.rate(max(0, step - 1)):.6g})"
        remedy = f"{LAST} holds the last good state, step {self.saved_step}; lower --lr or set clip_norm"
        return TrainError(what, expected="a finite loss", got=got, remedy=remedy)

    def _save(self, name: str, tensors: Tensors, meta: Meta) -> None:
        for tensor, value in tensors.items():
            if not np.isfinite(value).all():
                raise self.not_finite(self.position.step, f"{tensor} not finite after it")
        save_checkpoint(self.options.out / name, tensors, meta)

    def _meta(self, metrics: dict[str, float], training: dict[str, Any]) -> Meta:
        position, recipe = self.position, self.options.recipe
        return Meta(
            model=asdict(self.learner.config),
            class_names=self.data.classes,
            image_size=recipe.eval_size or recipe.image_size,
            eval_crop=recipe.eval_crop,
            batch_size=recipe.batch_size,
            epoch=position.epoch,
            step=position.step,
            metrics=metrics,
            training=training,
            origin=f"mbv2 train, recipe {recipe.name}",
        )
