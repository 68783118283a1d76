"""Provides the product that shows how much overlapping patches disagree in each voxel."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from voxquilt.stitching.products.base import ACTIVATIONS, Activation, Scores, Voxels
from voxquilt.stitching.products.spec import NetworkOutput, ProductSpec
from voxquilt.vocabulary import MAP


def make_disagreement(output: NetworkOutput) -> ProductSpec:
    """The variance over patches, summed over classes; per channel where channels are labels of their own."""
    output.check_distribution("disagreement")
    each = output.channels == 1 or output.is_multilabel
    most = 0.25 if each else 1 - 1 / output.channels
    return ProductSpec(Disagreement(each), Moments(output.activate, each), in_model=True, most=most)


@dataclass(frozen=True)
class Moments:
    """Turns patches of scores into the moments from which the variance of probabilities over patches is computed.

    (B, C, ...) becomes (B, C + 1, ...): the C activated scores and the sum of their squares; or with `each`, where
    channels are labels of their own, (B, 2C, ...): the activated scores and their squares.
    """

    activation: Activation
    each: bool

    @property
    def is_double(self) -> bool:
        """Whether sums are double: images have values of any size, and the difference of squares cancels."""
        return self.activation is ACTIVATIONS["none"]

    def channels(self, channels: int) -> int:
        """The number of channels that this many channels become."""
        return 2 * channels if self.each else channels + 1

    def __call__(self, patches: Tensor) -> Tensor:
        p = self.activation(patches.movedim(1, 0))
        p = p.double() if self.is_double else p
        return torch.cat([p, p.square() if self.each else sum_of_squares(p)]).movedim(0, 1)


@dataclass(frozen=True)
class Disagreement:
    """Computes the blend-weighted variance of the probabilities of the patches that cover a voxel.

    With patches n of weights u_n that sum to 1 and probabilities p_nc, it is  sum_c (sum_n u_n p_nc^2 - m_c^2)  where
    m_c = sum_n u_n p_nc: 0 where one patch covers a voxel or all give the same, 1 - 1/C at most. With `each`, every
    channel has its own variance. It is computed from the averages of Moments.
    """

    each: bool
    kind = MAP

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Scores) -> Voxels:
        if self.each:
            mean, squares = scores.chunk(2)
            return (squares - mean.square()).clamp(min=0).float()
        return (scores[-1:] - sum_of_squares(scores[:-1])).clamp(min=0).float()


def sum_of_squares(p: Tensor) -> Tensor:
    """Sum over the first axis, which is kept with length 1."""
    # Channel by channel, so that equal values give equal sums in any memory layout. The order of `sum` depends on the
    # layout, so that a voxel that one patch covers would not get exactly 0.
    total = p[:1].square()
    for channel in p[1:]:
        total += channel.square()
    return total
