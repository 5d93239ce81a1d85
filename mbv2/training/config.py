"""``config.json``: what a run computes, and with what. A run that goes on with something else is warned of."""

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imnet_prep.files import write_atomically
from imnet_prep.images.in_use import SLOWER_BATCHES, describe_decoder
from imnet_prep.images.native import decoder_status
from mbv2 import kernels
from mbv2.data import RunData
from mbv2.runtime import runtime, versions
from mbv2.training.options import CONFIG, RunOptions

if TYPE_CHECKING:
    from mbv2.training.learner import Learner  # it imports MindSpore

SLOWER_STEPS = "4 to 30 times"  # without the C++ operators, by processor: docs/kernels.md
_logger = logging.getLogger(__name__)


def write_config(options: RunOptions, data: RunData, learner: "Learner", identity: dict[str, Any]) -> None:
    """Write ``config.json``; where it is there from before, warn of what the last bits of the results depend on."""
    path = options.out / CONFIG
    built, decoder = decoder_status()
    computed_with = {
        "operators": learner.net.kernels,
        "operator_threads": runtime().threads,
        "instruction_set": kernels.instruction_set(),
        "decoder": decoder if built else "OpenCV",
    }
    before = _read(path) if options.resume else {}
    commands = before["commands"] if isinstance(before.get("commands"), list) else []
    _warn_of_others(before, {**computed_with, **versions()})
    document = {
        "commands": [*commands, *([options.command] if options.command else [])],
        "recipe": asdict(options.recipe),
        "seed": options.seed,
        "device_target": options.device_target,
        "kernels": learner.net.kernels,
        "model": asdict(learner.config),
        "classes": len(data.classes),
        "pretrained_weights_sha256": identity["pretrained"],
        "records_manifest_sha256": data.digest,
        "steps_per_epoch": data.train.steps_per_epoch,
        "decode_threads": data.loaders["train"].workers if data.loaders else None,  # changes nothing
        "computed_with": computed_with,
        "versions": versions(),
    }
    write_atomically(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def log_what_computes(options: RunOptions, data: RunData) -> None:
    """Log which operators and which decoder are in use, on how many threads; without the C++ ones also why."""
    here = runtime()
    threads = "1 thread" if here.threads == 1 else f"{here.threads} threads"
    if here.ranks > 1:
        threads += f" in each of {here.ranks} ranks"
    if here.device_target != "CPU":
        operators = f"MindSpore's operators on {here.device_target}"
    elif options.kernels == "standard":
        operators = f"standard operators, as asked ({threads})"
    elif kernels.available():
        operators = f"C++ operators ({kernels.instruction_set()}, {threads})"
    else:
        operators = f"{kernels.describe()}, {SLOWER_STEPS} slower ({threads})"
    _logger.info(operators)
    if data.loaders:
        _logger.info("%s; threads: %d", describe_decoder(SLOWER_BATCHES), data.loaders["train"].workers)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict):
            return document
    return {}


def _warn_of_others(document: dict[str, Any], now: dict[str, Any]) -> None:
    before: dict[str, Any] = {}
    with suppress(TypeError):  # of a damaged document
        before = {**document.get("computed_with", {}), **document.get("versions", {})}
    other = [f"{name} {before[name]}, now {now[name]}" for name in now if name in before and before[name] != now[name]]
    if other:
        _logger.warning("the run began with %s: its numbers may differ from there on", "; ".join(other))
