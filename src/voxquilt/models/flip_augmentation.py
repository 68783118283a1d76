"""Test-time augmentation: patches are also predicted flipped, and the outputs flipped back."""

from collections.abc import Sequence
from itertools import chain, combinations

from torch import Tensor

from voxquilt.errors import ConfigError

Axes = tuple[int, ...]


def flip_combinations(axes: Sequence[int]) -> list[Axes]:
    """Every combination of axes, the empty one first.

    >>> flip_combinations([0, 2])
    [(), (0,), (2,), (0, 2)]

    Args:
        axes: Different axes out of 0, 1, 2, which are i, j, k.

    Raises:
        ConfigError: other axes, or one twice.
    """
    if any(axis not in (0, 1, 2) for axis in axes) or len(set(axes)) != len(axes):
        raise ConfigError(f"flips must be different axes out of 0, 1, 2; they are {list(axes)}.")
    return list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


def flip_copy(batch: Tensor, axes: Axes) -> Tensor:
    """A copy of a (B, C, I, J, K) batch, flipped along axes."""
    return batch.flip([axis + 2 for axis in axes])


def flip_back(batch: Tensor, axes: Axes) -> Tensor:
    """A (B, C, I, J, K) batch flipped along axes; the batch itself if there are none, since flipping would copy."""
    return flip_copy(batch, axes) if axes else batch
