"""The learning rate at every step: a pure function of the recipe and the position, so that resuming needs no state."""

import math

from mbv2.recipe import Recipe


def peak_lr(recipe: Recipe, global_batch: int) -> float:
    """Scale the recipe's rate to the batch that all devices take together.

    Source:
        Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 2.1: the linear scaling rule.
    """
    return recipe.lr * global_batch / recipe.lr_batch_size if recipe.lr_batch_size else recipe.lr


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Return in how many steps the rate rises: ``warmup_epochs`` does not change with the length of the run."""
    if recipe.warmup_epochs:
        return round(recipe.warmup_epochs * steps_per_epoch)
    return int(recipe.warmup_frac * recipe.epochs * steps_per_epoch)


def describe_rate(recipe: Recipe, steps_per_epoch: int, global_batch: int) -> str:
    """Return a line on the rate in use: its peak, how it was scaled, and how it changes."""
    peak, warmup = peak_lr(recipe, global_batch), warmup_steps(recipe, steps_per_epoch)
    line = f"learning rate {peak:.6g}"
    if recipe.lr_batch_size not in (0, global_batch):
        line += f" ({recipe.lr:g} for a batch of {recipe.lr_batch_size}, scaled to {global_batch})"
    if recipe.backbone_lr_factor != 1:
        line += f", {peak * recipe.backbone_lr_factor:.6g} before the classifier"
    return f"{line}; {f'{warmup} steps of warm-up, then ' if warmup else ''}{recipe.schedule}"


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, global_batch: int) -> float:
    """Return the rate of a step.

    Args:
        recipe: Its ``schedule`` and what belongs to it.
        step: Number of the step in the whole run, from 0.
        steps_per_epoch: Steps in an epoch.
        global_batch: Images that all devices take together in a step.

    Returns:
        The learning rate: rises linearly over the warm-up (the first step already learns), then follows the schedule.
    """
    peak = peak_lr(recipe, global_batch)
    total = recipe.epochs * steps_per_epoch
    warmup = warmup_steps(recipe, steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "step":
        return float(peak * recipe.step_gamma ** math.floor(step / (recipe.step_epochs * steps_per_epoch)))
    done = (step - warmup) / max(1, total - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
    return peak * (recipe.final_lr_frac + (1 - recipe.final_lr_frac) * share)


def changed_rate(old: Recipe, new: Recipe, step: int, steps_per_epoch: int, global_batch: int) -> str:
    """Say what other epochs do to the rate of a step (from 0), or of the last one that the old recipe has."""
    step = min(step, old.epochs * steps_per_epoch - 1)
    before, after = (learning_rate(recipe, step, steps_per_epoch, global_batch) for recipe in (old, new))
    change = f"stays {after:.6g}" if before == after else f"changes from {before:.6g} to {after:.6g}"
    return f"the learning rate at step {step + 1} {change}"
