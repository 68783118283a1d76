"""Tests the grid: where patches lie, that they cover every voxel, and which sizes are refused."""

from itertools import pairwise

import numpy as np
import pytest
from grids import axis_sizes, bare
from hypothesis import given, settings
from hypothesis import strategies as st

from voxquilt.errors import GridError, PatchShapeError
from voxquilt.geometry.frame import AXES, to_triple
from voxquilt.geometry.grid import make_grid
from voxquilt.geometry.placement import regular


@st.composite
def long_axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Axes of up to 400 voxels, sized as in `axis_sizes`."""
    patch = draw(st.integers(1, 200))
    overlap = draw(st.integers(0, (patch - 1) // 2)) * 2
    return draw(st.integers(patch, 400)), patch, overlap


def torchio_starts(size: int, patch: int, overlap: int) -> list[int]:
    """Starts by the formula of TorchIO 1.2.1, grid.py lines 198 to 203."""
    indices = list(range(0, size + 1 - patch, patch - overlap))
    if indices[-1] != size - patch:
        indices.append(size - patch)
    return indices


def torchio_locations(sizes: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Locations as TorchIO 1.2.1 orders them, grid.py lines 204 to 209."""
    indices = [torchio_starts(*axis) for axis in sizes]
    first = np.unique(np.array(np.meshgrid(*indices)).reshape(3, -1).T, axis=0)
    return np.array(sorted(np.hstack((first, first + np.array([patch for _, patch, _ in sizes]))).tolist()))


@given(long_axes())
@settings(deadline=None, max_examples=200)
def test_the_starts_of_an_axis_are_those_of_torchio(sizes: tuple[int, int, int]) -> None:
    """One patch every `patch - overlap` voxels, plus one at the end if the last does not end there."""
    assert list(regular(sizes[0], sizes[1], sizes[1] - sizes[2])) == torchio_starts(*sizes)


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((13, 5, 2), (0, 3, 6, 8)),
        ((5, 5, 4), (0,)),
        ((1, 1, 0), (0,)),
        ((6, 5, 0), (0, 1)),
        ((10, 7, 6), (0, 1, 2, 3)),
        ((4, 1, 0), (0, 1, 2, 3)),
    ],
)
def test_axis_starts_equal_examples_counted_by_hand(sizes: tuple[int, int, int], starts: tuple[int, ...]) -> None:
    """A clamped last patch, a single patch, no overlap, and patches of one voxel."""
    size, patch, overlap = sizes
    assert regular(size, patch, patch - overlap) == starts


@given(st.tuples(axis_sizes(), axis_sizes(), axis_sizes()))
@settings(deadline=None, max_examples=100)
def test_locations_are_those_of_torchio_in_their_order(sizes: tuple[tuple[int, int, int], ...]) -> None:
    """All combinations of starts, i outermost, as (i0, j0, k0, i1, j1, k1) int64."""
    grid = make_grid(*zip(*sizes, strict=True))
    assert grid.locations.dtype == np.int64
    np.testing.assert_array_equal(grid.locations, torchio_locations(sizes))
    assert len(grid) == len(grid.locations)


@given(st.tuples(axis_sizes(), axis_sizes(), axis_sizes()))
@settings(deadline=None, max_examples=100)
def test_patches_cover_every_voxel_and_none_outside(sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Painting every patch paints the whole volume; neighbours share at least the overlap."""
    grid = make_grid(*zip(*sizes, strict=True))
    painted = np.zeros(grid.shape, dtype=int)
    for i0, j0, k0, i1, j1, k1 in grid.locations:
        assert min(i0, j0, k0) >= 0
        assert (i1 <= grid.shape[0], j1 <= grid.shape[1], k1 <= grid.shape[2]) == (True, True, True)
        painted[i0:i1, j0:j1, k0:k1] += 1
    assert painted.min() >= 1
    for starts, (_, patch, overlap) in zip(grid.starts, sizes, strict=True):
        assert all(a + patch - b >= overlap for a, b in pairwise(starts))


@given(st.tuples(axis_sizes(), axis_sizes(), axis_sizes()))
@settings(deadline=None, max_examples=60)
def test_find_is_the_inverse_of_location(sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Given as a tuple of integers and as a row of `locations`."""
    grid = make_grid(*zip(*sizes, strict=True))
    for index, row in enumerate(grid.locations):
        assert grid.location(index) == tuple(row)
        assert grid.find(grid.location(index)) == grid.find(row.tolist()) == index


@given(st.tuples(axis_sizes(), axis_sizes(), axis_sizes()), st.data())
@settings(deadline=None, max_examples=100)
def test_find_refuses_a_location_that_is_not_on_the_grid(
    sizes: tuple[tuple[int, int, int], ...], data: st.DataObject
) -> None:
    """A shifted location or one of another size is a PatchShapeError that names it."""
    grid = make_grid(*zip(*sizes, strict=True))
    location = list(grid.location(data.draw(st.integers(0, len(grid) - 1))))
    location[data.draw(st.integers(0, 5))] += data.draw(st.sampled_from([-1, 1, 2, 1000]))
    with pytest.raises(PatchShapeError) as error:
        grid.find(location)
    assert str(tuple(location)) in str(error.value)
    assert str(grid.patch_size) in str(error.value)


def test_an_axis_may_be_longer_than_16_bits_can_count() -> None:
    """70,000 voxels, where TorchIO's 16-bit locations overflow."""
    grid = make_grid((70_000, 1, 1), (64, 1, 1), (32, 0, 0))
    assert grid.location(len(grid) - 1) == (69_936, 0, 0, 70_000, 1, 1)
    assert grid.locations[-1].tolist() == [69_936, 0, 0, 70_000, 1, 1]
    assert grid.find((69_936, 0, 0, 70_000, 1, 1)) == len(grid) - 1


def test_a_grid_with_more_patches_than_memory_holds_can_be_counted() -> None:
    """`len` and `location` do not build a table of locations."""
    grid = make_grid((1_000_000,) * 3, 1)
    assert grid.counts == (1_000_000, 1_000_000, 1_000_000)
    assert grid.location(10**18 - 1) == (999_999, 999_999, 999_999, 1_000_000, 1_000_000, 1_000_000)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("patch", 21, "axis {} has 20 voxels but the patch needs 21"),
        ("patch", 0, "patch_size must be at least 1 along axis {}; it is 0"),
        ("patch", -3, "patch_size must be at least 1 along axis {}; it is -3"),
        ("overlap", 10, "axis {}: patch_overlap 10 must be smaller than patch size 10"),
        ("overlap", 12, "axis {}: patch_overlap 12 must be smaller than patch size 10"),
        ("overlap", 3, "axis {}: patch_overlap must be even, half for each neighbour; it is 3"),
        ("overlap", -4, "patch_overlap must be at least 0 along axis {}; it is -4"),
        ("shape", 0, "a volume's shape must be at least 1 along axis {}; it is 0"),
    ],
)
def test_an_impossible_size_is_a_grid_error_that_names_the_axis(axis: int, what: str, value: int, message: str) -> None:
    """The GridError, which is a ValueError, also says what came and what was wanted."""
    sizes = {"shape": [20, 20, 20], "patch": [10, 10, 10], "overlap": [4, 4, 4]}
    sizes[what][axis] = value
    with pytest.raises(GridError) as error:
        make_grid(sizes["shape"], sizes["patch"], sizes["overlap"])
    assert isinstance(error.value, ValueError)
    assert message.format(AXES[axis]) in str(error.value)


@pytest.mark.parametrize("value", [10.0, "10", (1, 2), (1, 2, 3, 4), (1, 2, 3.0), True, None, (), [1, "2", 3]])
def test_a_size_is_one_integer_or_three_integers(value: object) -> None:
    """Anything else is a GridError that names the argument and shows its value."""
    with pytest.raises(GridError) as error:
        bare(to_triple)(value, "patch_size", minimum=1)
    assert str(error.value) == (
        f"patch_size must be an integer or three of them, in voxels along i, j, k; it is {value!r}."
    )


@pytest.mark.parametrize("value", [4, (4, 4, 4), [4, 4, 4], np.int32(4), np.array([4, 4, 4]), range(4, 7, 1)])
def test_python_and_numpy_integers_are_sizes_alike(value: object) -> None:
    """In any iterable; they become a tuple of ints."""
    triple = bare(to_triple)(value, "patch_size")
    assert triple == ((4, 5, 6) if isinstance(value, range) else (4, 4, 4))
    assert all(type(size) is int for size in triple)


@given(
    st.tuples(axis_sizes(6), axis_sizes(6), axis_sizes(6)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
@settings(deadline=None, max_examples=100)
def test_a_downsampled_grid_is_the_grid_divided_by_the_factor(
    sizes: tuple[tuple[int, int, int], ...], factor: tuple[int, int, int]
) -> None:
    """Volume, patches and every start shrink by the factor, and the patches still cover the volume."""
    shape, patch, overlap = zip(*sizes, strict=True)
    grid = make_grid(*(np.multiply(size, factor).tolist() for size in (shape, patch, overlap)))
    small = grid.downsampled(factor)
    assert small.shape == shape
    assert small.patch_size == patch
    np.testing.assert_array_equal(small.locations * np.tile(factor, 2), grid.locations)
    np.testing.assert_array_equal(small.locations, make_grid(shape, patch, overlap).locations)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap", "what"),
    [(30, 20, 8, "volume 30"), (40, 18, 2, "patch size 18"), (40, 20, 6, "patch start 14")],
)
def test_a_grid_that_the_factor_does_not_divide_cannot_be_downsampled(
    axis: int, shape: int, patch: int, overlap: int, what: str
) -> None:
    """Volume, patch size and starts must be multiples, so that output patches line up; the error names the axis."""
    sizes = np.array([[40] * 3, [20] * 3, [8] * 3])
    sizes[:, axis] = shape, patch, overlap
    with pytest.raises(GridError) as error:
        make_grid(*sizes.tolist()).downsampled((4, 4, 4))
    assert f"axis {AXES[axis]}: {what} is not a multiple of downsampling_factor 4" in str(error.value)
