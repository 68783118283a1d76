"""Tests where patches are placed: `even` is nnU-Net's formula, every placement covers, and quilts give volumes back."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from grids import Placed, axis_sizes, in_starts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import GridError
from voxquilt.geometry.grid import Grid, make_grid, overlap_of_step
from voxquilt.geometry.placement import PLACEMENTS, even, regular
from voxquilt.geometry.slab_split import split_rows
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend import to_blend
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.streaming import FinishedPlanes

SHAPES = st.tuples(axis_sizes(), axis_sizes(5), axis_sizes(4))
STEPS = st.sampled_from([0.25, 1 / 3, 0.5, 0.7, 0.8, 1])


def of_nnunet(size: int, patch: int, step: float) -> list[int]:
    """nnU-Net's compute_steps_for_sliding_window, along one axis."""
    target = patch * step
    count = int(np.ceil((size - patch) / target)) + 1
    distance = (size - patch) / (count - 1) if count > 1 else 99999999999
    return [int(np.round(distance * i)) for i in range(count)]


def test_even_patches_are_placed_as_nnunet_places_them() -> None:
    """Thousands of sizes, patches and steps, with halves that are rounded to even."""
    for patch in (1, 2, 3, 5, 8, 12, 28, 96, 127, 160):
        for step in (0.25, 1 / 3, 0.5, 0.7, 0.8, 1.0):
            if patch * step < 1:
                continue
            for size in range(patch, 5 * patch + 60):
                assert list(even(size, patch, patch * step)) == of_nnunet(size, patch, step), (size, patch, step)


@pytest.mark.parametrize("step", [0.5, 0.3, 0.8])
def test_even_grids_take_the_exact_share_of_a_patch(step: float) -> None:
    """Half of a patch of 25 voxels is 12.5, not 12: with 12 there would be a patch more."""
    for patch, size in ((25, 75), (25, 76), (7, 100), (33, 260)):
        grid = make_grid((size, patch, patch), patch, placement="even", step=step)
        assert list(grid.starts[0]) == of_nnunet(size, patch, step)
        assert grid.starts[1] == grid.starts[2] == (0,)


@given(st.sampled_from([*PLACEMENTS]), st.integers(1, 80), st.integers(0, 300), st.floats(0.01, 1))
@example("even", 1, 300, 0.01)
@example("regular", 1, 300, 0.01)
@settings(deadline=None, max_examples=400)
def test_every_placement_covers_the_axis(placement: str, patch: int, more: int, step: float) -> None:
    """From 0 to the last place that fits, without gaps, and never further apart than was asked."""
    grid = make_grid((patch + more, patch, patch), patch, placement=placement, step=step)
    starts = grid.starts[0]
    assert (starts[0], starts[-1]) == (0, more)
    # An overlap is even, and steps of even patches are rounded.
    limit = patch - overlap_of_step((patch,) * 3, step)[0] if placement == "regular" else max(1, patch * step) + 1
    assert all(0 < b - a <= min(patch, limit) for a, b in pairwise(starts))


def test_a_step_of_regular_patches_is_an_even_overlap() -> None:
    """The same grid as by the overlap itself."""
    for patch, step, overlap in ((8, 0.5, 4), (9, 0.5, 4), (10, 0.25, 6), (7, 1.0, 0), (96, 0.8, 18)):
        given_step = make_grid((patch * 3 + 1,) * 3, patch, step=step)
        assert given_step == make_grid((patch * 3 + 1,) * 3, patch, overlap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "step is a share of the patch size above 0 and at most 1; it is 0."),
        ({"step": 1.01}, "step is a share of the patch size above 0 and at most 1; it is 1.01."),
        ({"step": -0.5}, "step is a share of the patch size above 0 and at most 1; it is -0.5."),
        ({"step": float("nan")}, "step is a share of the patch size above 0 and at most 1; it is nan."),
        ({"step": True}, "step is a share of the patch size above 0 and at most 1; it is True."),
        ({"step": 0.5, "patch_overlap": 2}, r"give patch_overlap \(\(2, 2, 2\)\) or step \(0.5\), and not both."),
    ],
)
def test_an_invalid_step_is_a_grid_error(options: dict, message: str) -> None:
    """The message says what it may be."""
    with pytest.raises(GridError, match=message):
        make_grid((16, 16, 16), 8, **options)


def test_an_unknown_placement_names_those_there_are() -> None:
    """And the nearest one."""
    with pytest.raises(ValueError, match=r"must be one of regular, even, monai; it is 'evne'. Did you mean even\?"):
        make_grid((16, 16, 16), 8, placement="evne")


@pytest.mark.parametrize("starts", [(), (0, 9), (1, 8), (0, 4), (0, 8, 8), (0, 5, 3, 8), (0, 8, 9)])
def test_a_placement_that_leaves_voxels_out_is_refused(
    starts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another package, say: a gap, a patch beyond the end, twice the same, or none."""
    monkeypatch.setitem(PLACEMENTS._table, "odd", f"{__name__}:placed")
    monkeypatch.setattr(f"{__name__}.placed", lambda *_: starts)
    with pytest.raises(GridError, match=r"the placement 'odd' does not cover 16 voxels by patches of 8"):
        make_grid((16, 16, 16), 8, placement="odd")


def placed(size: int, patch: int, step: float) -> tuple[int, ...]:
    """A placement for the test above, which replaces it."""
    return regular(size, patch, step)


# Cut, then quilted.


def even_grid(axes: Sequence[tuple[int, int, int]], step: float | None) -> Grid:
    shape, patch, overlap = zip(*axes, strict=True)
    return make_grid(shape, patch, 0 if step is not None else overlap, placement="even", step=step)


def integers(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-99, 99, (2, *shape))).float()


@given(
    SHAPES,
    st.sampled_from([*BLENDS]),
    st.one_of(st.none(), STEPS),
    st.sampled_from([torch.float32, torch.int16]),
    st.integers(0, 999),
)
@example(((12, 5, 4), (12, 7, 6), (9, 9, 0)), "crop", None, torch.float32, 0)
@settings(deadline=None, max_examples=60)
def test_even_patches_quilt_to_the_volume_they_were_cut_from(
    axes: tuple[tuple[int, int, int], ...], mode: str, step: float | None, dtype: torch.dtype, seed: int
) -> None:
    """Law 1: in any order, for every blend, crop included, where neighbours share more than was asked."""
    grid = even_grid(axes, step)
    subject = Subject(t1=ScalarImage(tensor=integers(grid.shape, seed).to(dtype)))
    patch, overlap = grid.patch_size, grid.patch_overlap if step is None else 0
    sampler = GridSampler(subject, patch, overlap, placement="even", step=step)
    assert sampler.grid == grid
    aggregator = GridAggregator(sampler, mode)
    order = np.random.default_rng(seed).permutation(len(grid)).tolist()
    for first in range(0, len(order), 7):
        numbers = order[first : first + 7]
        aggregator.add_batch(torch.stack([sampler.cut("t1", n) for n in numbers]), sampler.locations[numbers])
    made = aggregator.get_output_tensor()
    wanted = subject["t1"].data
    if mode == "crop":
        assert torch.equal(made.to(dtype), wanted)
    else:
        np.testing.assert_allclose(made.float(), wanted.float(), rtol=0, atol=1e-4)


@given(SHAPES, STEPS, st.integers(0, 2), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_every_voxel_of_even_patches_has_one_owner(
    axes: tuple[tuple[int, int, int], ...], step: float, axis: int, seed: int
) -> None:
    """Which covers it; neighbours' parts are as long as each other's up to the uneven steps."""
    grid = even_grid(axes, step)
    weights = to_blend("crop").axis_weights(grid, axis)
    owners = torch.zeros(grid.shape[axis])
    for start, along in zip(grid.starts[axis], weights, strict=True):
        owners[start : start + len(along)] += along
    assert (owners == 1).all()


@given(SHAPES, st.sampled_from([*BLENDS]), STEPS, st.integers(0, 2), st.integers(0, 999))
@settings(deadline=None, max_examples=50)
def test_streaming_even_patches_equals_not_streaming(
    axes: tuple[tuple[int, int, int], ...], mode: str, step: float, axis: int, seed: int
) -> None:
    """Law 3: planes come once, in order, and equal those of whole volumes: to the bit for crop."""
    grid, rng = even_grid(axes, step), np.random.default_rng(seed)
    patches = torch.from_numpy(rng.normal(size=(len(grid), 2, *grid.patch_size))).float()
    whole = GridAggregator(Placed(grid), mode)
    whole.add_batch(patches, grid.locations)
    slabs: list[FinishedPlanes] = []

    def keep(slab: FinishedPlanes) -> None:
        slabs.append(FinishedPlanes(slab.axis, slab.start, slab.stop, slab.scores.clone()))

    streamed = GridAggregator(Placed(grid), mode, consumer=keep, axis=axis)
    order = in_starts(grid, axis, rng)
    for first in range(0, len(order), 5):
        streamed.add_batch(patches[order[first : first + 5]], grid.locations[order[first : first + 5]])
    streamed.close()
    assert [slab.start for slab in slabs] == [0, *(slab.stop for slab in slabs[:-1])]
    made = torch.cat([slab.scores for slab in slabs], axis + 1)
    if mode == "crop":
        assert torch.equal(made, whole.scores())
    else:
        np.testing.assert_allclose(made, whole.scores(), rtol=0, atol=1e-5)


@given(SHAPES, st.sampled_from([*BLENDS]), STEPS, st.integers(2, 4), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_slabs_of_even_patches_equal_the_whole(
    axes: tuple[tuple[int, int, int], ...], mode: str, step: float, ranks: int, seed: int
) -> None:
    """Law 4: each part of the rows finishes its own planes."""
    grid, rng = even_grid(axes, step), np.random.default_rng(seed)
    parts = split_rows(grid, ranks)
    axis = parts[0].axis
    patches = torch.from_numpy(rng.normal(size=(len(grid), 2, *grid.patch_size))).float()
    whole = GridAggregator(Placed(grid), mode)
    whole.add_batch(patches, grid.locations)
    slabs: list[FinishedPlanes] = []

    def keep(slab: FinishedPlanes) -> None:
        slabs.append(FinishedPlanes(slab.axis, slab.start, slab.stop, slab.scores.clone()))

    team = [GridAggregator(Placed(grid), mode, consumer=keep, axis=axis, part=part) for part in parts]
    for part, one in zip(parts, team, strict=True):
        own = part.patches(grid)
        one.add_batch(patches[own], grid.locations[own])
    for one, following in reversed(list(pairwise(team))):
        one.join(following.head() or [])
    made = torch.full_like(whole.scores(), float("nan"))
    for slab in slabs:
        # The plane behind a part's own comes too.
        made.narrow(axis + 1, slab.start, slab.scores.shape[axis + 1]).copy_(slab.scores)
    np.testing.assert_allclose(made, whole.scores(), rtol=0, atol=0 if mode == "crop" else 1e-5)
