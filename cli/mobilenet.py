"""``mbv2``: train, evaluate and convert MobileNetV2."""

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from imnet_prep.remote import shown
from imnet_prep.types import Progress
from mbv2.bench import MODES, BenchOptions
from mbv2.recipe import PADDINGS, PRECISIONS
from mbv2.runtime import DEVICE_TARGETS
from mbv2.weights.names import SOURCES

from .options import CACHE, CACHE_BYTES, CHECKPOINT, DEVICE, GROUP, JSON, PATH, PLACE, RECORDS, REPLACE, SPLIT, THREADS
from .render import guard, progress_bar, show, stop_requested

BENCH = BenchOptions()
TOLD = "inferred from the weights"


@click.group(context_settings=GROUP)
@click.version_option(package_name="imnet-prep")
def main() -> None:
    """Train MobileNetV2 on verified records, and evaluate, run or export it.

    Example: mbv2 train --records records --recipe finetune --pretrained pretrained.ckpt --out run
    """


@main.command()
@click.option("--records", type=PLACE, metavar="DIR|URL", help="A folder with a manifest.json, or its URL.")
@CACHE
@CACHE_BYTES
@click.option("--out", required=True, type=PATH, help="The folder of the run.")
@click.option(
    "--recipe", metavar="NAME|FILE.yaml", show_default="tiny", help="tiny, finetune, paper, ... (docs/recipes.md)."
)
@click.option("--config", type=PATH, help="A YAML file with the keys of the official MindSpore trainer.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--batch-size", type=int, help="Images per step.")
@click.option("--image-size", type=int, help="Side of the input, in pixels, 32 to 288.")
@click.option("--width", type=float, help="Width multiplier, 0.35 to 1.4.")
@click.option("--lr", type=float, help="Peak learning rate; not scaled by the batch size.")
@click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Set any other field of the recipe.")
@click.option("--pretrained", type=PATH, help="The checkpoint to start from; see mbv2 convert.")
@click.option(
    "--freeze",
    type=click.Choice(["none", "bn", "backbone"]),
    help="bn keeps BatchNorm's statistics; backbone trains only the head.",
)
@click.option("--features", type=PATH, show_default="RUN/features", help="The folder for cached features.")
@click.option(
    "--device-target", type=click.Choice(DEVICE_TARGETS), show_default="CPU", help="GPU and Ascend are not tested."
)
@click.option("--seed", type=int, show_default="0", help="Determines initial weights, order, augmentation and dropout.")
@click.option("--save-every", default=0, help="Save every N steps within an epoch; 0: at its end only.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to RUN/events (needs tensorboardX).")
@THREADS
@click.option(
    "--on-bad-record",
    default="skip",
    metavar="fail|skip|N",
    help="skip: at most 0.1 % of a split, at least 3; N: at most N.",
)
@click.option("--resume", is_flag=True, help="Continue from RUN/last.ckpt with the recipe and seed of that run.")
@JSON
@guard
def train(
    records: Path | str | None, out: Path, recipe: str | None, config: Path | None, assignments: tuple[str, ...],
    pretrained: Path | None, features: Path | None, device_target: str | None, seed: int | None, save_every: int,
    tensorboard: bool, resume: bool, workers: int | None, on_bad_record: str, cache: Path | None,
    cache_bytes: int | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train on the train split, evaluate after every epoch on the val split, and keep the best checkpoint.

    Writes config.json, metrics.csv, log.jsonl, last.ckpt, best.ckpt and curves.png to the folder of the run. Class
    names and counts come from the records. Ctrl-C saves the run; continue it with --resume.

    Example: mbv2 train --records records --recipe tiny --epochs 20 --width 0.5 --out run
    """
    from mbv2.data import sampling_of
    from mbv2.official_config import BASE_RECIPE, OfficialConfig, read_official
    from mbv2.recipe import parse_assignments, resolve_recipe
    from mbv2.runtime import runtime, start_mindspore
    from mbv2.training.options import RunOptions, stored_run
    from mbv2.training.ranks import from_first
    from mbv2.training.run import train as run
    from mbv2.weights.pretrained import pretrained_fields

    official = read_official(config) if config else OfficialConfig({})
    for key, became in official.shown:
        click.echo(f"{config}: {key} -> {became}", err=True)
    records, pretrained = records or official.records, pretrained or official.pretrained
    if records is None:
        raise click.UsageError("Missing option '--records'.")
    device_target, stored = device_target or official.device_target or "CPU", None
    if resume:
        start_mindspore(device_target)
        stored = from_first("--resume", lambda: stored_run(out))
    given = parse_assignments(assignments)
    resolved = resolve_recipe(
        recipe or (BASE_RECIPE if config else None),
        flags,  # epochs, batch_size, image_size, width, lr and freeze
        given,
        base=stored[0] if stored else None,
        defaults={**official.fields, **pretrained_fields(pretrained)},
    )
    if "sampling" not in given:
        resolved = replace(resolved, sampling=stored[0].sampling if stored else sampling_of(resolved, records))
    if seed is None:
        seed = stored[1] if stored else 0
    options = RunOptions(
        records, out, resolved, seed, device_target, save_every=save_every, resume=resume, pretrained=pretrained,
        features=features, tensorboard=tensorboard, workers=workers, on_bad_record=on_bad_record,
        cache=cache, cache_bytes=cache_bytes, command=shown(shlex.join(["mbv2", *sys.argv[1:]])),
    )  # fmt: skip
    with stop_requested() as stop, progress_bar("train") as progress:
        result = run(options, stop=stop, progress=progress)
    if runtime().rank == 0:
        show(result.to_json(), as_json, result.rows())


@main.command("eval")
@RECORDS
@CACHE
@CACHE_BYTES
@CHECKPOINT
@click.option("--split", default="val", type=SPLIT, help="The split to evaluate on.")
@click.option("--per-class", type=PATH, metavar="FILE.csv", help="Write one row per class.")
@click.option("--real-labels", type=PATH, metavar="FILE.json", help="Several correct labels per image (ReaL).")
@click.option("--confusion", type=PATH, metavar="FILE.png", help="Draw the confusion matrix.")
@click.option("--precision", default="float32", type=click.Choice(PRECISIONS), help="Number format of products.")
@THREADS
@DEVICE
@JSON
@guard
def evaluate(
    records: Path | str, checkpoint: Path, per_class: Path | None, confusion: Path | None, as_json: bool, **options: Any
) -> None:
    """Compute top-1 and top-5 accuracy over every image of a split, each exactly once.

    Preprocessing comes from the checkpoint; class names and counts come from the records.

    Example: mbv2 eval --records records --checkpoint run/best.ckpt --json
    """
    from mbv2.outputs import check_outputs
    from mbv2.runtime import runtime
    from mbv2.scoring.evaluate import evaluate_checkpoint
    from mbv2.scoring.score import write_per_class
    from mbv2.show.curves import draw_confusion

    check_outputs(per_class, confusion)
    with stop_requested() as stop, progress_bar("eval") as progress:
        scores, classes = evaluate_checkpoint(records, checkpoint, stop=stop, progress=progress, **options)
    if runtime().rank:
        return  # under msrun the first process writes for all
    if per_class:
        write_per_class(per_class, scores, classes)
    if confusion:
        draw_confusion(confusion, scores.confusion, classes)
    show(scores.to_json(), as_json, scores.rows())


@main.command()
@click.argument("weights", type=PATH)
@click.option("--from", "source", type=click.Choice(SOURCES), help="Whose weights they are.")
@click.option(
    "--to", "target", type=click.Choice(["timm"]), help="Write a checkpoint's weights for it, as .safetensors."
)
@click.option("--out", required=True, type=PATH, help="The checkpoint, or with --to the .safetensors, to write.")
@click.option("--padding", type=click.Choice(PADDINGS), show_default=TOLD, help="same is TensorFlow's.")
@click.option("--mean", type=float, nargs=3, metavar="R G B", show_default=TOLD, help="Mean of RGB in 0..1.")
@click.option(
    "--std", type=float, nargs=3, metavar="R G B", show_default=TOLD, help="Standard deviation of RGB in 0..1."
)
@click.option("--bn-eps", type=float, show_default="1e-3 with same padding, else 1e-5", help="BatchNorm's epsilon.")
@click.option("--image-size", default=224, help="Side of the input, in pixels.")
@JSON
@guard
def convert(weights: Path, source: str | None, target: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Convert the weights of another project to a checkpoint, or a checkpoint for another project.

    Reads .safetensors, .ckpt and, if PyTorch is installed, .pth; every tensor must be used. Padding and normalisation
    are told from the weights unless given, printed, saved in the checkpoint, and used by eval, predict, fine-tuning and
    export. With --to, the call that makes the other project's model is printed.

    Example: mbv2 convert mobilenetv2_100.safetensors --from timm --out mobilenetv2.ckpt
    """
    from mbv2.weights.convert import ConvertOptions, ConvertResult, ReturnResult, convert_weights, return_weights

    if (source is None) == (target is None):
        raise click.UsageError("Give either '--from' or '--to'.")
    if target and ConvertOptions(**options) != ConvertOptions():
        raise click.UsageError("'--to' takes padding and preprocessing from the checkpoint.")
    result: ConvertResult | ReturnResult
    if target:
        result = return_weights(weights, target, out)
    else:
        result = convert_weights(weights, str(source), out, ConvertOptions(**options))
    show(result.to_json(), as_json, result.rows())


@main.command()
@CHECKPOINT
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGE...")
@click.option("--top", default=5, help="Number of predictions per image.")
@click.option("--sheet", type=PATH, metavar="FILE.png", help="Draw a contact sheet.")
@DEVICE
@JSON
@guard
def predict(
    checkpoint: Path, images: tuple[Path, ...], top: int, sheet: Path | None, device_target: str, as_json: bool
) -> None:
    """Predict the classes of images, or of all images in folders.

    Preprocessing and class names come from the checkpoint. Images that cannot be read are listed with their error; the
    exit code is then 1.

    Example: mbv2 predict --checkpoint run/best.ckpt photo.jpg folder --sheet predictions.png
    """
    from mbv2.outputs import check_outputs
    from mbv2.scoring.predict import contact_sheet, predict_images, refuse_unread

    check_outputs(sheet)
    with stop_requested() as stop, progress_bar("predict") as progress:
        found = predict_images(checkpoint, images, top=top, device_target=device_target, stop=stop, progress=progress)
    if sheet:
        contact_sheet(sheet, found)
    predictions = [prediction.to_json() for prediction in found]
    show({"predictions": predictions}, as_json, [prediction.row() for prediction in found])
    refuse_unread(found)


@main.command()
@CHECKPOINT
@click.option(
    "--format", "kind", required=True, type=click.Choice(["mindir", "onnx", "onnx-int8"]), help="The format to write."
)
@click.option("--out", required=True, type=PATH, help="The file to write.")
@click.option("--calibrate", type=PATH, metavar="RECORDS", help="Records for choosing 8-bit ranges and for scoring.")
@click.option("--split", default="val", type=SPLIT, help="The split of --calibrate.")
@click.option("--check-images", default=256, help="Most images of --calibrate that both are scored on.")
@JSON
@guard
def export(checkpoint: Path, kind: str, out: Path, as_json: bool, **options: Any) -> None:
    """Export a checkpoint for other runtimes, run both, and print the largest difference.

    The exported network takes uint8 images (N, H, W, 3) in RGB, for any N, normalises them and returns logits.

    Example: mbv2 export --checkpoint run/best.ckpt --format onnx --out mobilenetv2.onnx
    """
    from mbv2.weights.export import export_checkpoint

    with stop_requested() as stop, progress_bar("export") as progress:
        result = export_checkpoint(checkpoint, kind, out, stop=stop, progress=progress, **options)
    show(result.to_json(), as_json, result.rows())


@main.command()
@click.option("--mode", default=BENCH.mode, type=click.Choice(MODES), help="train: whole steps; eval: inference.")
@click.option("--batch-size", default=BENCH.batch_size, help="Images per step.")
@click.option("--image-size", default=BENCH.image_size, help="Side of the input, in pixels.")
@click.option("--width", default=BENCH.width, help="Width multiplier, 0.35 to 1.4.")
@click.option(
    "--precision",
    default=BENCH.precision,
    type=click.Choice(PRECISIONS),
    help="Number format: of stored activations, or of products with --mode eval.",
)
@click.option("--steps", default=BENCH.steps, help="Measured steps, after warm-up.")
@click.option("--standard-ops", is_flag=True, help="Use MindSpore's operators in place of the C++ ones.")
@JSON
@guard
def bench(standard_ops: bool, as_json: bool, **options: Any) -> None:
    """Measure the median time of a training or inference step on this machine.

    A training step goes from a uint8 batch to the updated weights. Compilation and warm-up are left out.

    Example: mbv2 bench --batch-size 32 --image-size 224 --json
    """
    from mbv2.bench import bench as run

    settings = BenchOptions(**options, kernels="standard" if standard_ops else BENCH.kernels)
    with progress_bar("bench") as progress:
        result = run(settings, lambda done, total: progress(Progress(done, total, unit="steps")))
    show(asdict(result), as_json)


@main.command("report")
@click.argument("run", type=PATH, metavar="RUN")
@click.option("--out", default=Path("run.html"), type=PATH, help="The HTML file to write.")
@click.option("--records", type=PATH, help="Evaluate the best checkpoint on these records, by class.")
@click.option("--split", default="val", type=SPLIT, help="The split of --records.")
@DEVICE
@REPLACE
@JSON
@guard
def report(run: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a self-contained HTML report about a training run: curves, recipe, speed and, with --records, accuracy.

    Example: mbv2 report run --records records --out run.html
    """
    from mbv2.show.report import RunReportOptions, write_run_report

    with progress_bar("report") as progress:
        result = write_run_report(run, out, RunReportOptions(**options), progress)
    show(result, as_json)
