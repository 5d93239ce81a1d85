"""Train a stock ``mindspore.train.Model`` on records, with nothing of ours but the dataset.

Command::

    python examples/stock_model.py records --epochs 2 --image-size 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, nn, ops

from imnet_prep import EvalOptions, TrainOptions, open_batches, to_dataset


class SmallNet(nn.Cell):
    """Three strided convolutions, average pooling and a classifier; takes uint8 (N, H, W, 3)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Cell] = []
        channels = 3
        for step in range(3):
            layers += [
                nn.Conv2d(channels, width << step, 3, stride=2, pad_mode="same", has_bias=True),
                nn.ReLU(),
            ]
            channels = width << step
        self.body = nn.SequentialCell(layers)
        self.head = nn.Dense(channels, classes)

    def construct(self, image: Tensor) -> Tensor:
        """Normalise inside the network: the host ships bytes, a quarter of float32."""
        pixels = ops.transpose(ops.cast(image, ms.float32) / 127.5 - 1.0, (0, 3, 1, 2))
        return self.head(ops.mean(self.body(pixels), (2, 3)))


def main(arguments: list[str] | None = None) -> float:
    """Train, evaluate, print and give the accuracy."""
    parser = argparse.ArgumentParser(description="A stock Model on our records.")
    parser.add_argument("records", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args(arguments)
    size = options.image_size
    with (
        open_batches(options.records, "train", TrainOptions(options.batch_size, size), seed=0) as train,
        open_batches(options.records, "val", EvalOptions(options.batch_size, size)) as val,
    ):
        net = SmallNet(len(train.class_names))
        optimizer = nn.Adam(net.trainable_params(), learning_rate=options.lr)
        loss = nn.CrossEntropyLoss()
        model = ms.train.Model(net, loss_fn=loss, optimizer=optimizer, metrics={"accuracy": nn.Accuracy()})
        model.train(options.epochs, to_dataset(train), dataset_sink_mode=False)
        accuracy = float(model.eval(to_dataset(val), dataset_sink_mode=False)["accuracy"])
    print(f"accuracy {accuracy:.3f} on {val.images} images")
    return accuracy


if __name__ == "__main__":
    main()
