"""States what labels kernels make of scores, and for which products."""

from dataclasses import dataclass

from voxquilt.stitching.products.base import ACTIVATIONS, Product
from voxquilt.stitching.products.labels import ArgMax, Threshold

ARG_MAX, ABOVE, SIGMOID_ABOVE = 0, 1, 2


@dataclass(frozen=True)
class LabelRule:
    """What labels are made of the scores of a voxel.

    Args:
        mode: ARG_MAX is the first class with the highest score; ABOVE, for each channel, whether its score is above the
            threshold; SIGMOID_ABOVE whether the score's sigmoid is.
        threshold: The threshold.
    """

    mode: int
    threshold: float = 0.0


def label_rule(product: Product) -> LabelRule | None:
    """The rule of a product that kernels make; None for other products, which torch computes."""
    if type(product) is ArgMax:
        return LabelRule(ARG_MAX)
    if type(product) is Threshold and product.activation in (ACTIVATIONS["none"], ACTIVATIONS["sigmoid"]):
        mode = SIGMOID_ABOVE if product.activation is ACTIVATIONS["sigmoid"] else ABOVE
        return LabelRule(mode, product.threshold)
    return None
