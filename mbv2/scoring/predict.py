"""Classes of single images: any format that Pillow reads, with the preprocessing that the checkpoint names."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from imnet_prep import catalog
from imnet_prep.errors import Interrupted, SourceError, TrainError
from imnet_prep.loader.augment import eval_geometry
from imnet_prep.types import Progress, ProgressCallback
from mbv2.data import eval_options
from mbv2.runtime import start_mindspore
from mbv2.scoring.score import Predict, network_predict
from mbv2.weights.checkpoint import Meta, build_network, read_checkpoint

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_TILE, _CAPTION, _COLUMNS = 200, 44, 5  # of the contact sheet: picture and text height in pixels, pictures a row


@dataclass(frozen=True, slots=True)
class Guess:
    """One class for one image: its label, name, words and probability."""

    label: int
    name: str
    words: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best guesses for one image, best first; none for an image that cannot be read, but why."""

    file: Path
    guesses: tuple[Guess, ...]
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return one entry of what ``mbv2 predict --json`` prints."""
        if self.error:
            return {"file": str(self.file), "error": self.error}
        guesses = [
            {"label": g.label, "class": g.name, "words": g.words, "probability": g.probability} for g in self.guesses
        ]
        return {"file": str(self.file), "guesses": guesses}

    def row(self) -> tuple[str, str]:
        """Return the same as a line for a person."""
        return str(self.file), self.error or ", ".join(f"{g.words or g.name} {g.probability:.1%}" for g in self.guesses)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """List images: files as given, and in folders every file with an image's ending, sorted.

    Raises:
        SourceError: A path is missing, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in SUFFIXES and entry.is_file())
            if not inside:
                raise SourceError(f"{path} holds no images", expected=f"files ending in {', '.join(sorted(SUFFIXES))}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise SourceError(f"{path}: no such file or folder")
    return found


def predict_images(
    checkpoint: Path,
    images: Iterable[Path],
    *,
    top: int = 5,
    device_target: str = "CPU",
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
) -> list[Prediction]:
    """Guess the classes of images.

    Args:
        checkpoint: One of ours.
        images: Files and folders.
        top: Guesses an image; fewer where there are fewer classes.
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        stop: Says whether to leave.
        progress: Called after each batch.

    Raises:
        SourceError: A file or folder is missing, or a folder holds no images.
        CheckpointError: The checkpoint is not usable.
        Interrupted: ``stop`` said so.
    """
    if top < 1:
        raise TrainError("--top", expected="1 or more", got=f"{top}")
    files = find_images(images)
    start_mindspore(device_target)
    loaded = read_checkpoint(checkpoint)
    meta = loaded.meta
    size = min(meta.batch_size, len(files))
    predict = network_predict(build_network(loaded))
    made: list[Prediction] = []
    for start in range(0, len(files), size):
        if stop():
            raise Interrupted("prediction stopped", got=f"{start} of {len(files)} images")
        some = files[start : start + size]
        made += _predict_batch(predict, meta, some, size, top)
        if progress:
            progress(Progress(len(made), len(files)))
    return made


def _predict_batch(predict: Predict, meta: Meta, files: list[Path], size: int, top: int) -> Iterator[Prediction]:
    pixels = np.zeros((size, meta.image_size, meta.image_size, 3), np.uint8)
    errors = [""] * len(files)
    for place, file in enumerate(files):
        try:
            pixels[place] = load_image(file, meta)
        except SourceError as error:
            errors[place] = str(error)
    logits = predict(pixels)[: len(files)].astype(np.float64)
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    for file, row, why in zip(files, chances, errors, strict=True):
        best = () if why else np.argsort(-row, kind="stable")[:top].tolist()
        yield Prediction(file, tuple(_guess(meta, label, float(row[label])) for label in best), why)


def refuse_unread(predictions: list[Prediction]) -> None:
    """Raise a :class:`SourceError` that counts the images that could not be read, where there are any."""
    errors = [prediction.error for prediction in predictions if prediction.error]
    if errors:
        raise SourceError(f"{len(errors)} of {len(predictions)} images could not be read", got=errors[0])


def _guess(meta: Meta, label: int, probability: float) -> Guess:
    name = meta.class_names[label] if meta.class_names else str(label)
    return Guess(label, name, catalog.class_words(name), probability)


def load_image(path: Path, meta: Meta) -> NDArray[np.uint8]:
    """Read an image as evaluation sees it: upright, RGB over white, short side resized, centre crop.

    Returns:
        uint8 (image_size, image_size, 3).

    Raises:
        SourceError: It cannot be read.
    """
    options = eval_options(1, meta.image_size, meta.eval_crop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like: the pixels are what counts
            with Image.open(path) as opened:
                picture = _rgb(ImageOps.exif_transpose(opened))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"cannot read image {path}", got=str(error)) from error
    box = eval_geometry(options, np.array([picture.size], np.int32)).box[0].tolist()
    return np.asarray(picture.resize((meta.image_size,) * 2, Image.Resampling.BILINEAR, box=tuple(box)))


def _rgb(picture: Image.Image) -> Image.Image:
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def contact_sheet(path: Path, predictions: list[Prediction]) -> None:
    """Draw the images that could be read with their best guess beneath, five a row.

    Raises:
        TrainError: The file cannot be written.
    """
    predictions = [prediction for prediction in predictions if not prediction.error]
    rows = -(-len(predictions) // _COLUMNS)
    columns = max(1, min(_COLUMNS, len(predictions)))
    sheet = Image.new("RGB", (columns * _TILE, max(1, rows) * (_TILE + _CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, prediction in enumerate(predictions):
        x, y = place % _COLUMNS * _TILE, place // _COLUMNS * (_TILE + _CAPTION)
        with Image.open(prediction.file) as opened:
            tile = ImageOps.contain(_rgb(ImageOps.exif_transpose(opened)), (_TILE - 8, _TILE - 8))
        sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        best = prediction.guesses[0]
        draw.text((x + 6, y + _TILE), _shorten(best.words or best.name), fill="black", font=font)
        draw.text((x + 6, y + _TILE + 18), f"{best.probability:.1%}", fill="black", font=font)
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise TrainError(f"cannot write {path}", got=error.strerror or str(error)) from error


def _shorten(text: str, length: int = 26) -> str:
    first = text.partition(",")[0]
    return first if len(first) <= length else f"{first[: length - 1]}…"
