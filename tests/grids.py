"""Provides grids and samplers for several test files."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from voxquilt.data.grid_sampler import Padding
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.geometry.padding import NO_PADDING


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without run-time checks of its annotations, as users call it, to test its own errors."""
    return inspect.unwrap(function)


def axis_sizes(largest: int = 12) -> st.SearchStrategy[tuple[int, int, int]]:
    """Valid (voxels, patch, overlap) of one axis, all with equal probability, so that many overlap."""
    return st.sampled_from([(n, p, o) for n in range(1, largest + 1) for p in range(1, n + 1) for o in range(0, p, 2)])


@dataclass(frozen=True)
class Placed:
    """A grid without a sampler."""

    grid: Grid
    padding: Padding = NO_PADDING


def to_grid(axes: tuple[tuple[int, int, int], ...]) -> Grid:
    """A small grid with any overlap."""
    patch = [p for p, _, _ in axes]
    overlap = [2 * min(half, (p - 1) // 2) for p, half, _ in axes]
    return make_grid([p + more for p, _, more in axes], patch, overlap)


def in_starts(grid: Grid, axis: int, rng: np.random.Generator) -> list[int]:
    """Patch numbers in order of their starts along the axis, shuffled within each start."""
    numbers = np.moveaxis(np.arange(len(grid)).reshape(grid.counts), axis, 0).reshape(grid.counts[axis], -1)
    return [int(n) for row in numbers for n in rng.permutation(row)]
