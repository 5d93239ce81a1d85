"""Render images: from stored bytes to the pixels that training, evaluation and the browser page show."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.batch_decoder import SOI, Faults, NativeDecoder, PortableDecoder
from imnet_prep.images.formats import MAX_PIXELS
from imnet_prep.images.native import decoder_status
from imnet_prep.loader.augment import MEAN_COLOUR, erase_boxes, eval_geometry, train_geometry
from imnet_prep.loader.colour import augment_colours
from imnet_prep.loader.options import Options, TrainOptions


def choose_decoder(native: str) -> PortableDecoder:
    """Return the C++ decoder (``on``), the portable one (``off``), or the faster one that is built (``auto``).

    Raises:
        PipelineError: ``on`` where the C++ decoder is not built or does not load.
    """
    if native == "on" or (native == "auto" and decoder_status()[0]):
        return NativeDecoder()
    return PortableDecoder()


def render(
    images: Sequence[bytes],
    sizes: NDArray[np.int32],
    ids: NDArray[np.uint64],
    options: Options,
    seed: int,
    epoch: int,
    out: NDArray[np.uint8],
    decoder: PortableDecoder,
    decoded: Callable[[], object] = lambda: None,
) -> Faults:
    """Decode, crop, resize and augment images. The result depends on the arguments alone.

    Args:
        images: N images as stored.
        sizes: int32 (N, 2), listed widths and heights, pixels; 0 where none is listed.
        ids: uint64 (N,), record ids.
        options: Of training or evaluation; MixUp and CutMix work on a whole batch and are not applied here.
        seed: Of the run.
        epoch: From 0.
        out: uint8 (N, S, S, 3) with S = ``options.image_size``, written.
        decoder: From :func:`choose_decoder`.
        decoded: Called between decoding and augmentation.

    Returns:
        The bad rows. Their pixels in ``out`` are undefined.
    """
    sizes, faults = _true_sizes(images, sizes, decoder)
    if isinstance(options, TrainOptions):
        geometry = train_geometry(options, sizes, seed, epoch, ids)
    else:
        geometry = eval_geometry(options, sizes)
    faults = decoder.decode(images, geometry, options.interpolation, out) | faults
    decoded()
    if isinstance(options, TrainOptions):
        if options.randaugment_ops or options.trivialaugment or any(options.color_jitter):
            augment_colours(options, out, seed, epoch, ids)
        if options.erasing_prob:
            for row, (left, top, right, bottom) in enumerate(erase_boxes(options, seed, epoch, ids).tolist()):
                out[row, top:bottom, left:right] = MEAN_COLOUR
    return faults


def _true_sizes(
    images: Sequence[bytes], listed: NDArray[np.int32], decoder: PortableDecoder
) -> tuple[NDArray[np.int32], Faults]:
    """Return the listed sizes, completed from the headers, and the rows that have none; theirs is set to 1 x 1.

    The sizes of formats other than JPEG are always read: `adopt` lists them upright, and they may have an orientation.
    """
    sizes = listed.copy()
    pixels = listed.prod(axis=1, dtype=np.int64).tolist()
    faults = {
        row: f"{count} pixels by the record list, more than the {MAX_PIXELS} allowed"
        for row, count in enumerate(pixels)
        if count > MAX_PIXELS
    }
    unlisted = [row for row, image in enumerate(images) if not (pixels[row] and image.startswith(SOI))]
    if unlisted:
        sizes[unlisted], found = decoder.sizes([images[row] for row in unlisted])
        faults = {unlisted[place]: why for place, why in found.items()} | faults
    sizes[list(faults)] = 1
    return sizes, faults
