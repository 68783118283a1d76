"""How much overlapping patches disagree in each voxel."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from voxquilt.stitching.products.base import Scores, Voxels


@dataclass(frozen=True)
class Disagreement:
    """How much the patches that cover a voxel disagree: the blend-weighted variance of their probabilities.

    With patches n of weights u_n that sum to 1 and probabilities p_nc, it is  sum_c (sum_n u_n p_nc^2 - m_c^2)  where
    m_c = sum_n u_n p_nc: 0 where one patch covers a voxel or all give the same, 1 - 1/C at most. With `each`, every
    channel has the variance of its own. Computed from the averages of
    `voxquilt.stitching.products.spec.Moments`.
    """

    each: bool

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Scores) -> Voxels:
        if self.each:
            mean, squares = scores.chunk(2)
            return (squares - mean.square()).clamp(min=0).float()
        return (scores[-1:] - sum_of_squares(scores[:-1])).clamp(min=0).float()


def sum_of_squares(p: Tensor) -> Tensor:
    """Over the first axis, which is kept with length 1."""
    # One after the other, so that equal values give equal sums whatever their layout in memory: `sum` changes its
    # order, and a voxel that one patch covers would not get exactly 0.
    total = p[:1].square()
    for channel in p[1:]:
        total += channel.square()
    return total
