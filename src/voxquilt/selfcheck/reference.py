"""Computes what a network that gives back its input has to give: slowly, in double precision, from affines alone.

The way to model space and back acts on one native axis at a time, so that it is a matrix for each:

    native voxels -> model voxels -> voxels of the network's output -> native voxels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from voxquilt.geometry.frame import Padding, Triple
from voxquilt.geometry.space import Box

# Positions that are integers up to rounding copy a voxel.
_COPIES = 1e-6
SPLINE = 8
"""Voxels from a border within which cubic splines bend what is linear."""
BENT = (2 - 3**0.5) ** SPLINE
"""What is left there of the bend: it falls by the pole of the filter from voxel to voxel, to 3e-5 of a step."""


@dataclass(frozen=True)
class Way:
    """How a run goes to model space and back.

    Args:
        native, model: The affines.
        shape, model_shape: Voxels.
        box: The native voxels that model space covers; None for all.
        padding: Voxels that the grid adds before and after model space.
        factor: Model voxels per voxel of the network's output.
        orders: Orders of interpolation to model space, and back, along the native axes.
    """

    native: np.ndarray
    shape: Triple
    model: np.ndarray
    model_shape: Triple
    padding: Padding
    box: Box | None = None
    factor: Triple = (1, 1, 1)
    orders: tuple[Sequence[int], Sequence[int]] = ((1, 1, 1), (1, 1, 1))

    @property
    def is_all_linear(self) -> bool:
        """Whether nothing but linear interpolation is used."""
        return {order for along in self.orders for order in along} == {1}


@dataclass(frozen=True)
class AxisWay:
    """The way along one native axis.

    Args:
        axis: The model axis along it.
        seen: (m,) the native position that each model voxel sees.
        at: (n,) the position among model voxels that each native voxel takes its value from.
        to_model: (m, n) weights of native voxels in model voxels.
        outputs: (q, m) weights of model voxels in the voxels of the network's output that lie within the volume.
        to_native: (n, q) weights of the output's voxels in native voxels.
        is_exact: (n,) where a cubic spline, too, brings back a linear function.
        slack: Voxels by which the nearest voxel may lie beside; 0 for other interpolation.
    """

    axis: int
    seen: np.ndarray
    at: np.ndarray
    to_model: np.ndarray
    outputs: np.ndarray
    to_native: np.ndarray
    is_exact: np.ndarray
    slack: float

    @property
    def back(self) -> np.ndarray:
        """(n, n) weights of native voxels in what comes back."""
        return self.to_native @ self.outputs @ self.to_model

    @property
    def copies(self) -> bool:
        """Whether every voxel comes back as it is."""
        return bool((np.abs(self.back - np.eye(len(self.back))) < _COPIES).all())


def axis_ways(way: Way) -> list[AxisWay]:
    """The way along each native axis.

    Raises:
        ValueError: the model space is rotated against the native one, which no setting can make.
    """
    relative = np.linalg.inv(way.native) @ way.model
    ways = []
    for n in range(3):
        axis = int(np.abs(relative[n, :3]).argmax())
        if np.abs(np.delete(relative[n, :3], axis)).max() > 1e-4 * np.abs(relative[n, axis]):
            raise ValueError("the axes of model space are not those of the file")
        scale, offset = relative[n, axis], relative[n, 3]
        first, stop = (0, way.shape[n]) if way.box is None else way.box[n]
        there = _rounded(scale * np.arange(way.model_shape[axis]) + offset)
        seen = there.clip(first, stop - 1)
        to_model = _linear(seen, way.shape[n])
        factor, before = way.factor[axis], way.padding[axis][0]
        outputs, centres = _blocks(way.model_shape[axis], factor, before)
        at = _rounded((np.arange(way.shape[n]) - offset) / scale)
        # Positions among the centres of the output's voxels, which are `factor` apart.
        back = _linear(_rounded((at - centres[0]) / factor).clip(0, len(centres) - 1), len(centres))
        orders = way.orders[0][n], way.orders[1][n]
        resampled = bool((there != there.round()).any() or (at != at.round()).any() or factor > 1)
        # Of native voxels to model space, and of the output's on the way back.
        reach = spline_reach(abs(scale) * factor) if 3 in orders and resampled else 0
        lowest, highest = max(first, min(there[0], there[-1])), min(stop - 1, max(there[0], there[-1]))
        x = np.arange(way.shape[n])
        is_exact = (x >= lowest + reach - _COPIES) & (x <= highest - reach + _COPIES)
        slack = 0.0
        if resampled:
            slack = 0.5 * (orders[0] == 0) + 0.5 * abs(scale) * (orders[1] == 0)
        among = at.clip(0, way.model_shape[axis] - 1)
        ways.append(AxisWay(axis, seen, among, to_model, outputs, back, is_exact, slack))
    return ways


def spline_reach(scale: float) -> float:
    """Native voxels from a border, within which cubic splines there and back bend what is linear.

    Args:
        scale: Native voxels per voxel of the network's output.
    """
    return SPLINE * (1 + scale)


def is_linear(way: Way, ways: Sequence[AxisWay]) -> bool:
    """Whether the matrices are exact: voxels are interpolated linearly, or copied."""
    return way.is_all_linear or all(along.copies for along in ways)


def returned_positions(ways: Sequence[AxisWay]) -> list[np.ndarray]:
    """The native position whose value comes back at each voxel, along each axis."""
    return [along.to_native @ along.outputs @ along.seen for along in ways]


def returned_volume(volume: np.ndarray, ways: Sequence[AxisWay]) -> np.ndarray:
    """What comes back of an (I, J, K) volume."""
    result = volume.astype(np.float64)
    for axis, along in enumerate(ways):
        if not along.copies:
            result = np.moveaxis(np.tensordot(along.back, result, (1, axis)), 0, axis)
    return result


def corners_of(voxels: np.ndarray, ways: Sequence[AxisWay]) -> tuple[np.ndarray, np.ndarray]:
    """The output's voxels from which native voxels are interpolated: the native positions that they see, and weights.

    Args:
        voxels: (p, 3) native voxels.
        ways: The way along each axis.

    Returns:
        (p, 8, 3) positions and (p, 8) weights.
    """
    seen, weights = [], []
    for n, along in enumerate(ways):
        rows = along.to_native[voxels[:, n]]
        pairs = np.argsort(-rows, 1, kind="stable")[:, :2]
        if pairs.shape[1] == 1:
            pairs = np.repeat(pairs, 2, 1)
        share = np.take_along_axis(rows, pairs, 1)
        share[:, 1] = 1 - share[:, 0]
        seen.append((along.outputs @ along.seen)[pairs])
        weights.append(share)
    corners = list(product((0, 1), repeat=3))
    positions = np.stack([np.stack([seen[n][:, c[n]] for n in range(3)], -1) for c in corners], 1)
    shares = np.stack([weights[0][:, i] * weights[1][:, j] * weights[2][:, k] for i, j, k in corners], 1)
    return positions, shares


def _rounded(positions: np.ndarray) -> np.ndarray:
    return np.where(np.abs(positions - positions.round()) < _COPIES, positions.round(), positions)


def _linear(positions: np.ndarray, size: int) -> np.ndarray:
    """(p, size) weights of voxels at positions between them."""
    return np.stack([np.interp(positions, np.arange(size), unit) for unit in np.eye(size)], 1)


def _blocks(size: int, factor: int, before: int) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of an output that lie within the volume: (q, size) weights of model voxels, and (q,) centres."""
    first = -before % factor
    starts = [s for s in range(first, size - factor + 1, factor)]
    if not starts:
        raise ValueError("no voxel of the network's output lies within the volume")
    weights = np.zeros((len(starts), size))
    for row, start in enumerate(starts):
        weights[row, start : start + factor] = 1 / factor
    return weights, np.array(starts) + (factor - 1) / 2
