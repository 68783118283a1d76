"""Allocates what onnxruntime allocates as it runs a graph, without values, for those who count memory."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from voxquilt.models.weights.onnx_header import Operator
from voxquilt.models.weights.onnx_session import UNKNOWN, Form

# Operators that are computed in the memory of their input, alone or as part of the operator before.
_IN_PLACE = {
    "Add", "BatchNormalization", "Clip", "Div", "Elu", "Identity", "LeakyRelu", "Mul", "PRelu", "Relu", "Reshape",
    "Sigmoid", "Softmax", "Sub", "Tanh",
}  # fmt: skip


def allocate(
    operators: Sequence[Operator], forms: Mapping[str, Form], name: str, batch: Tensor, outputs: Sequence[str]
) -> dict[str, Tensor]:
    """The graph's outputs by name, without values.

    Args:
        operators: The operators, in the order in which they run.
        forms: Forms of the values by name, those of the outputs at least.
        name: Name of the input.
        batch: The input, without values.
        outputs: Names of the outputs.
    """
    live, peak = {name: batch}, 0
    for operator, dead in zip(operators, _last_uses(operators, outputs), strict=True):
        inputs = [live[other] for other in operator.inputs if other in live]
        reusable = [live[other] for other in dead if other in live and other != name]
        for output in operator.outputs:
            form = forms.get(output, UNKNOWN)
            if form.shape is None:  # taken to be as large as what it is made of
                shape = max(inputs, key=Tensor.numel).shape if inputs else torch.Size([])
                live[output] = batch.new_empty(shape)
                continue
            same = [tensor for tensor in reusable if tensor.shape == form.shape and operator.kind in _IN_PLACE]
            live[output] = same[0] if same else batch.new_empty(form.shape, dtype=form.type)
            del same
        peak = max(peak, _bytes(live) + _workspace(operator, inputs, forms))
        del inputs, reusable
        for other in dead:
            live.pop(other, None)
    # Memory comes from the system in pieces that become larger and larger: measured are 1.0 to 1.7 times what is used.
    batch.new_empty(3 * peak // 2, dtype=torch.uint8)
    return {output: live[output] for output in outputs}


def _bytes(live: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in live.values()}.values())


def _workspace(operator: Operator, inputs: Sequence[Tensor], forms: Mapping[str, Form]) -> int:
    """Bytes beside inputs and outputs: a transposed convolution first multiplies each voxel by all of its weights."""
    if operator.kind != "ConvTranspose" or not inputs:
        return 0
    kernel = forms.get(operator.inputs[1], UNKNOWN).shape or (0, 0)
    return prod(kernel[1:]) * prod(inputs[0].shape[2:]) * inputs[0].element_size()


def _last_uses(operators: Sequence[Operator], outputs: Sequence[str]) -> list[list[str]]:
    """For each operator the values that no later one reads."""
    seen, last = set(outputs), []
    for operator in reversed(operators):
        names = [name for name in dict.fromkeys((*operator.inputs, *operator.outputs)) if name not in seen]
        seen.update(names)
        last.append(names)
    return last[::-1]
