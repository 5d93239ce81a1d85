"""The network as an ONNX graph, written operator by operator, with BatchNorm folded into the convolutions.

MindSpore 2.10's own ONNX export does not take this network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbv2.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    from mbv2.network.model import ModelConfig

OPSET = 13  # the oldest with per-channel QuantizeLinear: runtimes of 2021 and later read it
IR_VERSION = 8


class _Graph:
    """Collects the nodes and weights of an ONNX graph; each call adds a node and gives its output's name."""

    def __init__(self, tensors: dict[str, NDArray[Any]], eps: float, same: bool) -> None:
        self.tensors, self.eps, self.same = tensors, eps, same
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def unit(self, x: str, name: str, stride: int = 1, *, relu: bool = True) -> str:
        """Convolution with BatchNorm folded in, and ReLU6."""
        weight = self.tensors[f"{name}.conv.weight"].astype(np.float64)
        gamma, beta, mean, variance = (
            self.tensors[f"{name}.bn.{entry}"].astype(np.float64)
            for entry in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + self.eps)
        folded = (weight * scale[:, None, None, None]).astype(np.float32)
        inputs = [
            x,
            self.weight(f"{name}.weight", folded),
            self.weight(f"{name}.bias", (beta - mean * scale).astype(np.float32)),
        ]
        kernel = weight.shape[2]
        group = weight.shape[0] if weight.shape[1] == 1 else 1
        where: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if self.same else {"pads": [kernel // 2] * 4}
        conv = self.add(
            "Conv", inputs, f"{name}.conv", kernel_shape=[kernel] * 2, strides=[stride] * 2, group=group, **where
        )
        return self.add("Clip", [conv, "zero", "six"], f"{name}.relu6") if relu else conv


def onnx_model(loaded: Checkpoint) -> ModelProto:
    """Write the network as an ONNX model: uint8 (N, H, W, 3) to logits (N, classes)."""
    from onnx import TensorProto, checker, helper

    meta, config = loaded.meta, loaded.meta.model_config()
    graph = _Graph(loaded.weights(), config.bn_eps, config.padding == "same")
    size = meta.image_size
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", size, size, 3])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", config.classes])]
    _add_layers(graph, config)
    made: GraphProto = helper.make_graph(graph.nodes, "mobilenetv2", inputs, outputs, graph.weights)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="imnet-prep",
    )
    helper.set_model_props(model, {"classes": "\n".join(meta.class_names), "origin": meta.origin})
    checker.check_model(model)
    return model


def _add_layers(graph: _Graph, config: ModelConfig) -> None:
    from onnx import TensorProto

    from mbv2.network.model import block_shapes

    graph.weight("zero", np.array(0, np.float32))
    graph.weight("six", np.array(6, np.float32))
    mean = graph.weight("mean", 255 * np.array(config.mean, np.float32))
    scale = graph.weight("scale", 1 / (255 * np.array(config.std, np.float32)))
    x = graph.add("Cast", ["image"], "pixels", to=TensorProto.FLOAT)
    x = graph.add("Mul", [graph.add("Sub", [x, mean], "centred"), scale], "normalised")
    x = graph.add("Transpose", [x], "planes", perm=[0, 3, 1, 2])
    x = graph.unit(x, "stem", 2)
    for index, shape in enumerate(block_shapes(config.width)):
        y = graph.unit(x, f"blocks.{index}.expand") if shape.hidden != shape.inputs else x
        y = graph.unit(y, f"blocks.{index}.depthwise", shape.stride)
        y = graph.unit(y, f"blocks.{index}.project", relu=False)
        x = graph.add("Add", [x, y], f"blocks.{index}.sum") if shape.residual else y
    x = graph.add("GlobalAveragePool", [graph.unit(x, "head")], "pool")
    x = graph.add("Flatten", [x], "pooled", axis=1)
    dense = [graph.weight(f"classifier.{entry}", graph.tensors[f"classifier.{entry}"]) for entry in ("weight", "bias")]
    graph.add("Gemm", [x, *dense], "logits", transB=1)
