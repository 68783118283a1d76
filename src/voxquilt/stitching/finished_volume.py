"""Defines a finished volume of one product, as it is handed over to be written."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped


@dataclass(frozen=True)
class FinishedVolume:
    """A finished volume in native space, with what its file says of it.

    Args:
        array: (C, I, J, K), or (C, T, I, J, K) of a series.
        kind: 'labels', 'map' or 'image'.
        classes: Of labels: the number of classes that the network has for them; 0 if it is not known.
        slope: What the array's integers are multiplied by to give the product's numbers; None for numbers themselves.
    """

    array: Shaped[np.ndarray, "c *volume"]
    kind: str
    classes: int = 0
    slope: float | None = None
