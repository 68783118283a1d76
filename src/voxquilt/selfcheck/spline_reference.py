"""Computes what comes back of a volume by way of cubic splines: by dense matrices, which hold far from borders."""

from collections.abc import Sequence

import numpy as np

from voxquilt.selfcheck.reference import BENT, AxisWay, Way

NORM = (1 + 3 * 3**0.5) / 4
"""By how much interpolation by a cubic spline enlarges an error along an axis, at most."""


def is_known(way: Way) -> bool:
    """Whether there is a reference: nothing but linear interpolation and cubic splines is used."""
    return {order for along in way.orders for order in along} <= {1, 3} and way.factor == (1, 1, 1)


def splined_volume(volume: np.ndarray, way: Way, ways: Sequence[AxisWay]) -> np.ndarray:
    """What comes back of an (I, J, K) volume; near borders splines may end otherwise.

    Images that a spline takes to model space are kept within their own values, as scores on the way back are not.
    """
    ends = [(0, n) for n in way.shape] if way.box is None else list(way.box)
    inside = volume[tuple(slice(*pair) for pair in ends)].astype(np.float64)
    model = inside
    for n, along in enumerate(ways):
        first, stop = ends[n]
        there = _spline(along.seen - first, stop - first) if way.orders[0][n] == 3 else along.to_model[:, first:stop]
        model = _along(there, model, n)
    if 3 in way.orders[0]:
        model = model.clip(inside.min(), inside.max())
    for n, along in enumerate(ways):
        back = _spline(along.at, len(along.seen)) if way.orders[1][n] == 3 else along.to_native
        model = _along(back, model, n)
    return model


def bent(largest: float, splines: int) -> float:
    """How much of a value the end of a spline may change where `AxisWay.is_exact`, along three axes."""
    return 2 * 3 * splines * BENT * NORM ** (3 * splines) * largest


def _along(weights: np.ndarray, volume: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(weights, volume, (1, axis)), 0, axis)


def _spline(positions: np.ndarray, size: int) -> np.ndarray:
    """(p, size) weights of voxels in the cubic spline through them, which is mirrored at its ends."""
    if size == 1:
        return np.ones((len(positions), 1))
    return _pieces(positions, size) @ np.linalg.inv(_pieces(np.arange(size, dtype=float), size))


def _pieces(positions: np.ndarray, size: int) -> np.ndarray:
    weights = np.zeros((len(positions), size))
    below = np.floor(positions).astype(int)
    for step in range(-1, 3):
        voxels = np.abs(below + step) % (2 * (size - 1))
        voxels = np.where(voxels >= size, 2 * (size - 1) - voxels, voxels)
        distance = np.abs(positions - (below + step))
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
        np.add.at(weights, (np.arange(len(positions)), voxels), np.where(distance < 1, near, far))
    return weights
