"""``imnet-prep bench``."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import click

from imnet_prep.loader.bench import BenchOptions
from imnet_prep.loader.bench import bench as run_bench

from .render import emit_json, guard, progress_bar, table

_DEFAULTS = {field.name: field.default for field in fields(BenchOptions)}


@click.command(epilog="Example: imnet-prep bench records --mode eval --seconds 20")
@click.argument("records", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--mode", default=_DEFAULTS["mode"], show_default=True, help="train (random crops) or eval (centred).")
@click.option("--batch-size", default=_DEFAULTS["batch_size"], show_default=True, type=int, help="Rows of a batch.")
@click.option("--image-size", default=_DEFAULTS["image_size"], show_default=True, type=int, help="Output side, pixels.")
@click.option("--workers", default=None, type=int, help="Decode threads.  [default: the cores this process may use]")
@click.option("--seconds", default=_DEFAULTS["seconds"], show_default=True, type=float, help="Time to measure.")
@click.option("--native", default=_DEFAULTS["native"], show_default=True, help="The C++ decoder: auto, on or off.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@guard
def bench(
    records: Path,
    mode: str,
    batch_size: int,
    image_size: int,
    workers: int | None,
    seconds: float,
    native: str,
    as_json: bool,
) -> None:
    """Measure how fast records become batches, by stage, and say what limits it."""
    options = BenchOptions(mode, batch_size, image_size, workers, seconds, native)
    with progress_bar("bench") as progress:
        result = run_bench(records, options, progress)
    if as_json:
        emit_json(asdict(result))
        return
    table(
        [
            ("images/s", f"{result.images_per_s:.0f} (five windows: {result.slowest:.0f} to {result.fastest:.0f})"),
            ("what", f"{result.mode} on {result.split}, batch {result.batch_size}, {result.image_size} px"),
            ("decoder", f"{result.decoder}, {result.workers} workers"),
            (
                "ms an image",
                f"read {result.read_ms:.3f}, check {result.check_ms:.3f}, decode {result.decode_ms:.3f}, "
                f"augment {result.augment_ms:.3f}",
            ),
            ("cores used", f"{result.cores_used_frac:.0%} of {result.cores}"),
            ("memory", f"at most {result.memory_bytes / 1e6:.0f} MB of decoded images"),
            ("limit", result.limit),
        ]
    )
