"""Keeps a product of numbers between 0 and a known largest one in a type of 8 or 16 bits."""

from dataclasses import dataclass

import numpy as np
import torch

from voxquilt.errors import OutputError
from voxquilt.stitching.products.base import Product, Scores, Voxels

# Numbers that leave their range by more than rounding are another quantity than the product says.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Encoded:
    """A product whose volume has a small type. It gives the numbers themselves, which may still be interpolated.

    uint8 holds number / `slope`, rounded: the error is half of it at most, which is 1/510 of the largest number. Where
    float16 holds numbers up to 1, the error is 1/4096 at most.

    Args:
        product: Gives the numbers.
        dtype: Type of the volume: uint8 or float16.
        most: The largest number.
        checked: Whether numbers may be out of range, since the network itself has computed them. The check waits for a
            device.
    """

    product: Product
    dtype: np.dtype
    most: float
    checked: bool = False

    @property
    def kind(self) -> str:
        """The product's."""
        return self.product.kind

    @property
    def slope(self) -> float | None:
        """What the volume's integers are multiplied by; None for float16."""
        return self.most / 255 if self.dtype == np.uint8 else None

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return self.product.form(channels)[0], self.dtype

    def __call__(self, scores: Scores) -> Voxels:
        return self.product(scores)

    def encode(self, voxels: Voxels) -> Voxels:
        """Numbers as the volume holds them.

        Raises:
            OutputError: they are out of range.
        """
        if self.checked and voxels.numel():
            least, greatest = (float(value) for value in voxels.aminmax())
            if least < -_ROUNDING * self.most or greatest > (1 + _ROUNDING) * self.most:
                raise OutputError(
                    f"stitch.dtype={self.dtype.name} goes with numbers from 0 to {self.most:.4g}; these are "
                    f"{least:.4g} to {greatest:.4g}: with model.activation=none a network must give probabilities."
                )
        if self.slope is None:
            return voxels.to(torch.float16)
        return (voxels * (1 / self.slope)).round().clamp(0, 255).to(torch.uint8)


def encoded(product: Product, voxels: Voxels) -> Voxels:
    """A product's numbers as its volume holds them."""
    return product.encode(voxels) if isinstance(product, Encoded) else voxels


def slope_of(product: Product) -> float | None:
    """What a product's volume is multiplied by; None if its voxels are the numbers themselves."""
    return product.slope if isinstance(product, Encoded) else None
