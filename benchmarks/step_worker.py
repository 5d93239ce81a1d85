"""Our side of `train_cpu.py`, MindSpore's own operators, and ONNX Runtime on the network as `mbv2 export` writes it.

A contender that serves (`contenders.py`)::

    python -m benchmarks.step_worker native --mode train --image-size 224 --batch-size 32 --steps 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plain_mobilenet
from benchmarks.contenders import serve, step_rate
from imnet_prep.cpu import cpu_count
from mbv2.bench import BenchOptions, prepare
from mbv2.runtime import start_mindspore


def onnx_runtime(image_size: int, batch_size: int) -> Callable[[], Any]:
    """Write a network with random weights as ONNX, and return a function that runs it on a uint8 batch."""
    import onnxruntime

    from mbv2.network.model import MobileNetV2, ModelConfig
    from mbv2.weights.checkpoint import Checkpoint, Meta, parameter_tensors
    from mbv2.weights.onnx_graph import onnx_model

    config = ModelConfig(1000)
    meta = Meta(asdict(config), (), image_size, 0.875)
    tensors = parameter_tensors(MobileNetV2(config, kernels="standard").get_parameters())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    session = onnxruntime.InferenceSession(
        onnx_model(Checkpoint(Path(), meta, tensors)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    size = (batch_size, image_size, image_size, 3)
    image = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return lambda: session.run(None, {"image": image})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=("native", "standard", "plain", "onnx"))
    parser.add_argument("--mode", choices=("train", "eval"), required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()

    def set_up() -> Callable[[], Mapping[str, float]]:
        start_mindspore("CPU")
        if args.contender == "plain":
            run = plain_mobilenet.prepare(args.image_size, args.batch_size)
        elif args.contender == "onnx":
            run = onnx_runtime(args.image_size, args.batch_size)
        else:
            shape = args.mode, args.batch_size, args.image_size
            run, _ = prepare(BenchOptions(*shape, kernels=args.contender, precision=args.precision))
        for _ in range(2):  # compilation, and a warm-up
            run()
        return lambda: step_rate(run, args.steps, args.batch_size)

    serve(set_up)


if __name__ == "__main__":
    main()
