"""Products that hold activated scores: probabilities, logits and images."""

from dataclasses import dataclass

import numpy as np

from voxquilt.stitching.products.base import Activation, Scores, Voxels


@dataclass(frozen=True)
class Activated:
    """Activated scores as float32: probabilities; or, activated by nothing, logits and images."""

    activation: Activation

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, np.dtype(np.float32)

    def __call__(self, scores: Scores) -> Voxels:
        return self.activation(scores)
