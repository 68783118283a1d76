"""Compares the outputs of a network with those of the file that was made of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from voxquilt.errors import ConfigError

LIMIT = 1e-4
"""The largest difference that is not refused, as a share of an output's range."""


@dataclass(frozen=True)
class Difference:
    """How much outputs differ at most: absolute, and as a share of the output's range."""

    largest: float
    share: float


def outputs_of(network: nn.Module, patches: Tensor) -> list[Tensor]:
    """The outputs of a network, in their order.

    Raises:
        ConfigError: an output is not a tensor.
    """
    with torch.inference_mode():
        outputs: Any = network(patches)
    outputs = tree_leaves(dict(outputs) if isinstance(outputs, dict) else outputs)
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        raise ConfigError("the network cannot be exported: not all of its outputs are tensors.")
    return outputs


def compare(path: Path, wanted: list[Tensor], made: list[Tensor]) -> Difference:
    """The largest difference of all outputs.

    Args:
        path: The file, for the message.
        wanted: Outputs of the network.
        made: Outputs of the file.

    Raises:
        ConfigError: outputs differ in their number, their shapes or, by more than LIMIT, in their values.
    """
    if [output.shape for output in wanted] != [output.shape for output in made]:
        shapes = [[tuple(output.shape) for output in outputs] for outputs in (made, wanted)]
        raise ConfigError(f"{path.name} gives outputs of {shapes[0]}, and the network of {shapes[1]}: it was not kept.")
    largest = share = torch.zeros((), dtype=torch.float64)
    for a, b in zip(wanted, made, strict=True):
        difference = (a.double() - b.double()).abs().max()
        spread = a.double().max() - a.double().min()
        largest = torch.maximum(largest, difference)  # which keeps NaN, unlike max()
        share = torch.maximum(share, difference / (spread if spread > 0 else 1))
    if not share <= LIMIT:
        raise ConfigError(
            f"{path.name} gives other outputs than the network, by up to {largest:.3g} ({share:.2g} of their range; "
            f"{LIMIT:g} is allowed) on {len(wanted[0])} random patches: it was not kept."
        )
    return Difference(float(largest), float(share))
