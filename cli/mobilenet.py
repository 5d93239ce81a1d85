"""``mbv2``: train, score and move a MobileNetV2."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from imnet_prep.types import Progress
from mbv2.bench import BenchOptions

from .inspect import run_report
from .render import emit_json, guard, progress_bar, show, stop_requested, table

RECORDS = click.option("--records", required=True, type=click.Path(path_type=Path), help="Folder with a manifest.json.")
DEVICE = click.option("--device-target", default="CPU", show_default=True, help="CPU, GPU or Ascend.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
BENCH = {field.name: field.default for field in fields(BenchOptions)}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imnet-prep")
def main() -> None:
    """MobileNetV2 on MindSpore: train and score it on verified records.

    Example: mbv2 train --records records --image-size 64 --epochs 2 --out run
    """


def _print(result: Any, as_json: bool) -> None:
    """Print a result's JSON object, or its rows for a person."""
    if as_json:
        emit_json(result.to_json())
    else:
        table(result.rows())


@main.command()
@click.option("--records", type=click.Path(path_type=Path), help="Folder with a manifest.json.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--recipe", help="A recipe's name, or a YAML file of its fields. [default: tiny]")
@click.option("--config", type=click.Path(path_type=Path), help="YAML with the official MindSpore trainer's keys.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--batch-size", type=int, help="Images a step.")
@click.option("--image-size", type=int, help="Side of the input, in pixels, 32 to 288.")
@click.option("--width", type=float, help="Width multiplier, 0.35 to 1.4.")
@click.option("--lr", type=float, help="Peak learning rate, used as it is (not scaled by the batch).")
@click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Set any other field of the recipe.")
@click.option("--pretrained", type=click.Path(path_type=Path), help="Checkpoint to start from; see mbv2 convert.")
@click.option(
    "--freeze", help="none, bn (keep BatchNorm's statistics) or backbone (train the head on cached features)."
)
@click.option("--features", type=click.Path(path_type=Path), help="Folder of cached features. [default: RUN/features]")
@click.option("--device-target", help="CPU, GPU or Ascend. [default: CPU]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, order, augmentation and dropout.")
@click.option("--save-every", type=int, default=0, show_default=True, help="Steps between saves within an epoch.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to RUN/events (needs tensorboardX).")
@click.option("--resume", is_flag=True, help="Go on from RUN/last.ckpt, with the run's own recipe.")
@JSON
@guard
def train(
    records: Path | None,
    out: Path,
    recipe: str | None,
    config: Path | None,
    epochs: int | None,
    batch_size: int | None,
    image_size: int | None,
    width: float | None,
    lr: float | None,
    assignments: tuple[str, ...],
    pretrained: Path | None,
    freeze: str | None,
    features: Path | None,
    device_target: str | None,
    seed: int,
    save_every: int,
    tensorboard: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Train on the records' train split, score every epoch on its val split, keep the best.

    Writes config.json, metrics.csv, log.jsonl, last.ckpt, best.ckpt and curves.png to the run's folder. Class count and
    names come from the records. Stopped by Ctrl-C, a run is saved and goes on with --resume.

    Example: mbv2 train --records records --recipe tiny --epochs 20 --width 0.5 --out run
    """
    from mbv2.official import BASE_RECIPE, OfficialConfig, read_official
    from mbv2.recipe import parse_assignments, resolve_recipe
    from mbv2.train import RunOptions, pretrained_fields, stored_recipe
    from mbv2.train import train as run

    official = read_official(config) if config else OfficialConfig({})
    for key, became in official.shown:
        click.echo(f"{config}: {key} -> {became}", err=True)
    records, pretrained = records or official.records, pretrained or official.pretrained
    if records is None:
        raise click.UsageError("Missing option '--records'.")

    flags = {
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
        "width": width,
        "lr": lr,
        "freeze": freeze,
    }
    base = stored_recipe(out) if resume else None
    defaults = {**official.fields, **pretrained_fields(pretrained)}
    name = recipe or (BASE_RECIPE if config else None)
    resolved = resolve_recipe(name, flags, parse_assignments(assignments), base=base, defaults=defaults)
    options = RunOptions(
        records,
        out,
        resolved,
        seed,
        device_target or official.device_target or "CPU",
        save_every=save_every,
        resume=resume,
        pretrained=pretrained,
        features=features,
        tensorboard=tensorboard,
    )
    with stop_requested() as stop, progress_bar("train") as progress:
        result = run(options, stop=stop, progress=progress)
    if result.already_done and not as_json:
        click.echo("already done", err=True)
    _print(result, as_json)


@main.command("eval")
@RECORDS
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A .ckpt of mbv2.")
@click.option("--split", default="val", show_default=True, help="The split to score.")
@click.option("--per-class", type=click.Path(path_type=Path), help="Write a CSV row a class.")
@click.option("--real-labels", type=click.Path(path_type=Path), help="JSON of several right labels an image (ReaL).")
@click.option("--confusion", type=click.Path(path_type=Path), help="Draw the confusion matrix, a PNG.")
@DEVICE
@JSON
@guard
def evaluate(
    records: Path,
    checkpoint: Path,
    split: str,
    per_class: Path | None,
    real_labels: Path | None,
    confusion: Path | None,
    device_target: str,
    as_json: bool,
) -> None:
    """Score a checkpoint: top-1 and top-5 over every image of a split, each exactly once.

    Preprocessing comes from the checkpoint, class names and counts from the records.

    Example: mbv2 eval --records records --checkpoint run/best.ckpt --json
    """
    from imnet_prep.records.publish import refuse_inside_records
    from mbv2.curves import draw_confusion
    from mbv2.evaluate import evaluate_checkpoint, write_per_class

    refuse_inside_records(per_class, confusion)
    with stop_requested() as stop, progress_bar("eval") as progress:
        scores, classes = evaluate_checkpoint(
            records,
            checkpoint,
            split=split,
            real_labels=real_labels,
            device_target=device_target,
            stop=stop,
            progress=progress,
        )
    if per_class:
        write_per_class(per_class, scores, classes)
    if confusion:
        draw_confusion(confusion, scores.confusion, classes)
    _print(scores, as_json)


@main.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("--from", "source", required=True, help="timm, torchvision, mindcv or mindspore-models.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The checkpoint to write.")
@click.option("--padding", default="symmetric", show_default=True, help="same for weights that come from TensorFlow.")
@click.option("--mean", type=float, nargs=3, help="Of RGB in 0..1. [default: ImageNet's]")
@click.option("--std", type=float, nargs=3, help="Of RGB in 0..1. [default: ImageNet's]")
@click.option("--bn-eps", type=float, help="BatchNorm's epsilon. [default: 1e-3 with same padding, else 1e-5]")
@click.option("--image-size", type=int, default=224, show_default=True, help="Side of the input, in pixels.")
@JSON
@guard
def convert(
    weights: Path,
    source: str,
    out: Path,
    padding: str,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    bn_eps: float | None,
    image_size: int,
    as_json: bool,
) -> None:
    """Bring weights of another project into a checkpoint of ours; every tensor is accounted for.

    Reads .safetensors, .ckpt and, where PyTorch is installed, .pth. Padding and preprocessing are kept in the
    checkpoint and used by eval, predict, fine-tuning and export.

    Example: mbv2 convert mobilenetv2_100.safetensors --from timm --out mobilenetv2.ckpt
    """
    from mbv2.convert import ConvertOptions, convert_weights

    options = ConvertOptions(padding, mean, std, bn_eps, image_size)
    _print(convert_weights(weights, source, out, options), as_json)


@main.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A .ckpt of mbv2.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--top", type=int, default=5, show_default=True, help="Guesses an image.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw a contact sheet, a PNG.")
@DEVICE
@JSON
@guard
def predict(
    checkpoint: Path, images: tuple[Path, ...], top: int, sheet: Path | None, device_target: str, as_json: bool
) -> None:
    """Guess the classes of images, or of all images in folders.

    Preprocessing and class names come from the checkpoint.

    Example: mbv2 predict --checkpoint run/best.ckpt photo.jpg folder --sheet guesses.png
    """
    from imnet_prep.records.publish import refuse_inside_records
    from mbv2.predict import contact_sheet, predict_images

    refuse_inside_records(sheet)
    with stop_requested() as stop, progress_bar("predict") as progress:
        found = predict_images(checkpoint, images, top=top, device_target=device_target, stop=stop, progress=progress)
    if sheet:
        contact_sheet(sheet, found)
    if as_json:
        emit_json({"predictions": [prediction.to_json() for prediction in found]})
    else:
        table([prediction.row() for prediction in found])


@main.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A .ckpt of mbv2.")
@click.option("--format", "kind", required=True, help="mindir, onnx or onnx-int8.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="Records to choose 8-bit ranges and score by.")
@click.option("--split", default="val", show_default=True, help="The split of --calibrate.")
@JSON
@guard
def export(checkpoint: Path, kind: str, out: Path, calibrate: Path | None, split: str, as_json: bool) -> None:
    """Write a checkpoint for other runtimes, run both, and print the largest difference.

    The file takes uint8 images (N, H, W, 3) in RGB, any N, normalises inside and gives logits.

    Example: mbv2 export --checkpoint run/best.ckpt --format onnx --out mobilenetv2.onnx
    """
    from mbv2.export import export_checkpoint

    with stop_requested() as stop, progress_bar("export") as progress:
        result = export_checkpoint(
            checkpoint, kind, out, calibrate=calibrate, split=split, stop=stop, progress=progress
        )
    _print(result, as_json)


@main.command()
@click.option("--mode", default=BENCH["mode"], show_default=True, help="train (whole steps) or eval (inference).")
@click.option("--batch-size", type=int, default=BENCH["batch_size"], show_default=True, help="Images a step.")
@click.option("--image-size", type=int, default=BENCH["image_size"], show_default=True, help="Side, in pixels.")
@click.option("--width", type=float, default=BENCH["width"], show_default=True, help="Width multiplier, 0.35 to 1.4.")
@click.option("--steps", type=int, default=BENCH["steps"], show_default=True, help="Measured steps, after warm-up.")
@click.option("--standard-ops", is_flag=True, help="MindSpore's own operators, not the C++ ones.")
@JSON
@guard
def bench(
    mode: str, batch_size: int, image_size: int, width: float, steps: int, standard_ops: bool, as_json: bool
) -> None:
    """Measure how fast the network trains, or guesses, on this machine: the median step, and the operators in use.

    A train step is whole: uint8 batch in, forward, backward, update. Compilation and warm-up are left out.

    Example: mbv2 bench --batch-size 32 --image-size 224 --json
    """
    from mbv2.bench import bench as run

    kernels = "standard" if standard_ops else "auto"
    options = BenchOptions(mode, batch_size, image_size, width, steps=steps, kernels=kernels)
    with progress_bar("bench") as progress:
        result = run(options, lambda done, total: progress(Progress(done, total, unit="steps")))
    show(asdict(result), as_json)


main.add_command(run_report)

if __name__ == "__main__":
    main()
