"""Provides the product with the entropy of the predicted distribution in each voxel."""

from dataclasses import dataclass
from math import log

import numpy as np
import torch

from voxquilt.stitching.products.base import Activation, Scores, Voxels
from voxquilt.stitching.products.spec import NetworkOutput, ProductSpec
from voxquilt.vocabulary import MAP


def make_entropy(output: NetworkOutput) -> ProductSpec:
    """Entropy over classes; over yes and no where channels are labels of their own."""
    output.check_distribution("entropy")
    each = output.channels == 1 or output.is_multilabel
    most = log(2 if each else output.channels)
    return ProductSpec(Entropy(output.activate_restored, each), interpolated=output.interpolated, most=most)


@dataclass(frozen=True)
class Entropy:
    """Computes Shannon's entropy in nats: 0 where the network is certain, at most ln(classes).

    With `each`, channels are labels of their own, and each has the entropy of its yes or no, at most ln(2).
    """

    activation: Activation
    each: bool
    kind = MAP

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Scores) -> Voxels:
        p = self.activation(scores).clamp(0, 1)  # rounding may lead outside, where there is no logarithm
        return torch.special.entr(p) + torch.special.entr(1 - p) if self.each else torch.special.entr(p).sum(0)[None]
