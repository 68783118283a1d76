"""Gives every label a colour of its own, the same in pictures, in files for viewers, and in every run."""

import colorsys
from collections.abc import Sequence

import numpy as np

# Okabe and Ito's colours, which colour-blind people can distinguish, ordered by contrast on grey.
_FIRST = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178)]
# Hues this far apart never come close to an earlier one for long.
_GOLDEN = 0.6180339887


def _further(n: int) -> tuple[int, int, int]:
    saturation, value = (0.9, 0.55, 0.7)[n % 3], (1.0, 0.65, 0.82)[n // 3 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(n * _GOLDEN % 1, saturation, value))
    return red, green, blue


PALETTE = np.array([*_FIRST, *(_further(n) for n in range(255 - len(_FIRST)))], dtype=np.uint8)
"""Colours (255, 3) of labels 1, 2, ..., all of them different; they begin again behind the last."""


def colours_of(numbers: Sequence[int], label_values: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
    """The colour of each label above 0.

    >>> colours_of([1002, 7], [0, 7, 1002])
    [(86, 180, 233), (230, 159, 0)]

    Args:
        numbers: Labels.
        label_values: The numbers of classes 0, 1, ... in files: the colour of a class does not depend on its number.
    """
    ranks = {number: n for n, number in enumerate((v for v in label_values or () if v), 1)}
    colours = [PALETTE[(ranks.get(number, number) - 1) % len(PALETTE)].tolist() for number in numbers]
    return [(red, green, blue) for red, green, blue in colours]
