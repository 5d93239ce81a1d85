"""The C++ twins of the network's parts: on the same parameters, on activations (N, H, W, C).

Their parameters are `mbv2.network.model`'s own; `numbers` are the operators' options that are real numbers, and
`precision` and `inference` are those of :class:`mbv2.network.model.MobileNetV2`.
"""

import functools

import mindspore as ms
from mindspore import nn, ops

from mbv2.kernels import operators


def _unit_parameters(unit: nn.Cell) -> tuple[ms.Parameter, ...]:
    return unit.conv.weight, unit.bn.gamma, unit.bn.beta, unit.bn.moving_mean, unit.bn.moving_variance


def _keep_statistics(unit: nn.Cell, mean: ms.Tensor, variance: ms.Tensor) -> None:
    ops.assign(unit.bn.moving_mean, mean)
    ops.assign(unit.bn.moving_variance, variance)


class NativeBlock(nn.Cell):
    """The C++ twin of an inverted residual, on its parameters and on (N, H, W, C); the first begins at the image."""

    def __init__(
        self,
        block: nn.Cell,
        numbers: ms.Tensor,
        precision: str,
        inference: str,
        *,
        same: bool,
        stem: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.expand = block.expand if stem is None else stem
        self.depthwise = block.depthwise
        self.project = block.project
        self.frozen = False
        kind = {"stem": stem is not None, "stride": block.shape.stride}
        residual = block.shape.residual and stem is None
        switches = functools.partial(operators.switches, **kind, same=same, residual=residual)
        self.switches = switches()
        self.frozen_switches = switches(frozen=True)
        self.numbers = numbers
        self.train_operator = operators.block_train(**kind, precision=precision)
        self.infer_operator = operators.block_infer(**kind, precision=inference)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        parameters = _unit_parameters(self.expand) + _unit_parameters(self.depthwise) + _unit_parameters(self.project)
        if not self.training:
            return self.infer_operator(x, *parameters, self.switches, self.numbers)
        if self.frozen:
            return self.train_operator(x, *parameters, self.frozen_switches, self.numbers)[0]
        out = self.train_operator(x, *parameters, self.switches, self.numbers)
        _keep_statistics(self.expand, out[7], out[8])
        _keep_statistics(self.depthwise, out[9], out[10])
        _keep_statistics(self.project, out[11], out[12])
        return out[0]


class NativeHead(nn.Cell):
    """The C++ twin of the head and the pooling behind it."""

    def __init__(self, head: nn.Cell, numbers: ms.Tensor, precision: str, inference: str) -> None:
        super().__init__()
        self.head = head
        self.frozen = False
        self.switches = operators.switches()
        self.frozen_switches = operators.switches(frozen=True)
        self.numbers = numbers
        self.train_operator = operators.head_train(precision)
        self.infer_operator = operators.head_infer(inference)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        parameters = _unit_parameters(self.head)
        if not self.training:
            return self.infer_operator(x, *parameters, self.switches, self.numbers)
        if self.frozen:
            return self.train_operator(x, *parameters, self.frozen_switches, self.numbers)[0]
        out = self.train_operator(x, *parameters, self.switches, self.numbers)
        _keep_statistics(self.head, out[3], out[4])
        return out[0]
