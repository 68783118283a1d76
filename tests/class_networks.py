"""Provides networks of several classes with known results, for runs that tests start."""

from synthetic import Over50
from torch import Tensor, arange, cat, nn, tensor


class Bands(nn.Module):
    """Three classes by intensity: below 40, from 40 below 60, from 60 on; and a fourth that no voxel has."""

    def forward(self, x: Tensor) -> Tensor:
        return cat([30 - (x - 20).abs(), 30 - (x - 60).abs(), 30 - (x - 100).abs(), x - 1000], 1)


class Masks(nn.Module):
    """Two labels of their own: above 50, and above 1000, which no voxel has."""

    def forward(self, x: Tensor) -> Tensor:
        return cat([x - 50.5, x - 1000], 1)


class Two(nn.Module):
    """Two named outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"bands": Bands()(x), "bright": Over50()(x)}


class FirstOfThree(Bands):
    """Labels of the first channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :1])


class Soft(Bands):
    """Bands with probabilities of all sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 20


class Uneven(Soft):
    """Soft, whose scores depend on the place in the patch, so that patches that overlap disagree."""

    def forward(self, x: Tensor) -> Tensor:
        slopes = tensor([1.0, -1, 0.5, 0])[:, None, None, None]
        return super().forward(x) + slopes * arange(x.shape[2])[:, None, None]
