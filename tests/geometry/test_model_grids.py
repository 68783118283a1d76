"""Tests model grids, orders of interpolation and slices of their own beside the packages whose rules they follow."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Spacing
from scipy import ndimage
from skimage.transform import resize
from test_space import ORIENTATIONS, SEEDS, affines, mapped, voxels_of, world
from torch.nn import functional

from voxquilt.errors import ConfigError
from voxquilt.geometry.axis_map import AxisMap, AxisMaps
from voxquilt.geometry.frame import Frame
from voxquilt.geometry.label_resampling import resample_labels
from voxquilt.geometry.model_grids import GRIDS
from voxquilt.geometry.resample import resample, resample_image
from voxquilt.geometry.space import Box, Space, inverse, make_space
from voxquilt.geometry.streamed_resample import Restorer

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
MM = st.floats(0.3, 4).map(lambda mm: round(mm, 2))
ORDERS = st.sampled_from([0, 1, 3])
TRANSPOSES = st.sampled_from([None, (0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
THRESHOLDS = st.sampled_from([None, False, True, 1, 1.5, 3])


def volume(shape: Sequence[int], seed: int, channels: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(channels, *shape))).float()


def straight(shape: tuple[int, int, int], mm: Sequence[float], wanted: Sequence[float], grid: str) -> Space:
    """A space whose axes are the file's."""
    return make_space(Frame(shape, np.diag([*mm, 1.0])), None, wanted, grid=grid)


# The grids against those whose rules they follow.


@given(SIZES, st.tuples(MM, MM, MM), st.tuples(MM, MM, MM), ORDERS, SEEDS)
@example((1, 2, 1), (1, 1, 1), (0.3, 0.3, 4), 3, 0)
@example((2, 9, 1), (1, 1, 1), (0.7, 2.5, 0.5), 3, 0)
@settings(deadline=None, max_examples=120)
def test_corner_is_the_grid_of_skimage_and_torch(
    shape: tuple[int, int, int], mm: tuple[float, ...], wanted: tuple[float, ...], order: int, seed: int
) -> None:
    """Of the number of voxels that nnU-Net computes; images are those of `resize` with its clip, for every order."""
    space = straight(shape, mm, wanted, "corner")
    expected = [max(1, round(a / b * n)) for a, b, n in zip(mm, wanted, shape, strict=True)]
    assert list(space.model.shape) == expected
    data = volume(shape, seed)
    made = resample_image(data, space.to_model(order))
    for channel, theirs in zip(made, data.double().numpy(), strict=True):
        # At a tie of two voxels, scipy's rounding counts.
        by_skimage = resize(theirs, expected, order, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(channel, by_skimage, rtol=0, atol=3e-6)
    if order == 1:
        by_torch = functional.interpolate(data[None], expected, mode="trilinear", align_corners=False)[0]
        np.testing.assert_allclose(made, by_torch, rtol=0, atol=1e-5)
    back = resample(made, space.in_scores([(0, 0)] * 3, (1, 1, 1)))
    by_torch = functional.interpolate(made[None], shape, mode="trilinear", align_corners=False)[0]
    np.testing.assert_allclose(back, by_torch, rtol=0, atol=1e-5)


@given(st.tuples(*[st.integers(1, 40)] * 3), st.permutations(range(3)), st.permutations(range(3)), st.booleans(), SEEDS)
@example((40, 3, 5), [2, 1, 0], [0, 1, 2], True, 0)
@settings(deadline=None, max_examples=30)
def test_splines_do_not_depend_on_how_voxels_lie_in_memory(
    shape: tuple[int, int, int], memory: list[int], axes: list[int], flips: bool, seed: int
) -> None:
    """Of volumes that are computed in several pieces, to axes in any order, some of them flipped."""
    data, wanted = volume(shape, seed, 1), (0.9, 1.1, 0.4)
    stored = data[0].permute(memory).contiguous().permute(np.argsort(memory).tolist())[None]
    i, j, k = straight(shape, (1, 1, 1), wanted, "corner").to_model(3)
    if flips:
        j, k = (replace(m, scale=-m.scale, offset=shape[m.axis] - 1 - m.offset) for m in (j, k))
    first, second, third = ((i, j, k)[axis] for axis in axes)
    made = resample_image(stored, (first, second, third))[0]
    sizes = [max(1, round(n / mm)) for n, mm in zip(shape, wanted, strict=True)]
    theirs = resize(data[0].double().numpy(), sizes, 3, mode="edge", anti_aliasing=False)
    theirs = theirs[:, ::-1, ::-1] if flips else theirs
    np.testing.assert_allclose(made, theirs.transpose(axes), rtol=0, atol=3e-6)


@given(SIZES, st.tuples(MM, MM, MM), st.tuples(MM, MM, MM), st.sampled_from([0, 1]), SEEDS)
@settings(deadline=None, max_examples=120)
def test_ends_is_the_grid_of_scipy(
    shape: tuple[int, int, int], mm: tuple[float, ...], wanted: tuple[float, ...], order: int, seed: int
) -> None:
    """`zoom` as it is called by default, of as many voxels; order 0 may differ at exact ties."""
    factors = [a / b for a, b in zip(mm, wanted, strict=True)]
    sizes = [round(n * f) for n, f in zip(shape, factors, strict=True)]
    assume(min(sizes) > 0)  # of which scipy makes nothing, and a model one voxel
    space = straight(shape, mm, wanted, "ends")
    data = volume(shape, seed, 1)
    theirs = ndimage.zoom(data[0].double().numpy(), factors, order=order, mode="nearest")
    assert space.model.shape == theirs.shape
    made = resample_image(data, space.to_model(order))[0].double().numpy()
    places = [np.arange(m) * (n - 1) / max(m - 1, 1) for n, m in zip(shape, theirs.shape, strict=True)]
    ties = [np.abs(x % 1 - 0.5) < 1e-9 for x in places]
    sure = ~(ties[0][:, None, None] | ties[1][:, None] | ties[2]) if order == 0 else np.ones(theirs.shape, bool)
    np.testing.assert_allclose(made[sure], theirs[sure], rtol=0, atol=3e-6)


@given(SIZES, st.tuples(MM, MM, MM), affines(oblique=0, shear=0), SEEDS)
@example((1, 1, 1), (0.37, 2.0, 1.0), np.eye(4), 0)
@settings(deadline=None, max_examples=60)
def test_first_voxel_is_the_grid_of_monais_spacing(
    shape: tuple[int, int, int], wanted: tuple[float, ...], affine: np.ndarray, seed: int
) -> None:
    """Shape, affine and voxels, for flipped and permuted axes and sizes of one voxel."""
    data = volume(shape, seed)
    theirs = Spacing(wanted, mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float64)(
        MetaTensor(data, affine=torch.from_numpy(affine))
    )
    space = make_space(Frame(shape, affine), None, wanted, grid="first_voxel")
    assert space.model.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(space.model.affine, theirs.affine, rtol=0, atol=1e-6)
    made = resample_image(data, space.to_model())
    np.testing.assert_allclose(made, theirs.numpy(), rtol=0, atol=1e-4)


# Law 5.


def boxes(shape: tuple[int, int, int], seed: int) -> Box:
    random = np.random.default_rng(seed)
    ends = [sorted(random.choice(n + 1, 2, replace=False).tolist()) for n in shape]
    return (ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]), (ends[2][0], ends[2][1])


@given(
    affines(), SIZES, st.sampled_from([None, *ORIENTATIONS]), st.one_of(st.none(), st.tuples(MM, MM, MM)),
    st.sampled_from([*GRIDS]), TRANSPOSES, st.booleans(), SEEDS,
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_every_voxel_of_a_box_keeps_its_world_position(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: str | None, spacing: object, grid: str,
    transpose: tuple[int, int, int] | None, has_box: bool, seed: int,
) -> None:  # fmt: skip
    """For every grid, orientation, order of axes and box, there and back."""
    box = boxes(shape, seed) if has_box else None
    space = make_space(Frame(shape, affine), orientation, spacing, grid=grid, transpose=transpose, box=box)  # type: ignore[arg-type]
    first = np.array([[along.start] for along in space.where])
    sizes = tuple(along.stop - along.start for along in space.where)
    assert tuple(m.size for m in space.maps) == sizes
    assert space.covers_all == (sizes == shape)
    inside = voxels_of(sizes)
    model = mapped(space.maps, inside)
    np.testing.assert_allclose(world(space.model.affine, model), world(affine, inside + first), rtol=0, atol=1e-4)
    back = space.to_model()
    np.testing.assert_allclose(mapped(back, model), inside, rtol=0, atol=1e-6)
    assert tuple(m.size for m in back) == space.model.shape
    if orientation is not None and transpose is None:
        assert space.model.axcodes == orientation


@given(affines(), SIZES, st.sampled_from(ORIENTATIONS), TRANSPOSES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_transpose_orders_the_axes_of_the_oriented_volume(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: str, transpose: tuple[int, int, int] | None, seed: int
) -> None:
    """As numpy transposes, to the bit."""
    data = volume(shape, seed)
    oriented = make_space(Frame(shape, affine), orientation, None)
    turned = make_space(Frame(shape, affine), orientation, None, transpose=transpose)
    wanted = resample(data, oriented.to_model()).permute(0, *(n + 1 for n in transpose or (0, 1, 2)))
    assert torch.equal(resample(data, turned.to_model()), wanted)


# Slices by themselves.


def slow_slices(x: np.ndarray, shape: Sequence[int], order: int, axis: int) -> np.ndarray:
    """nnU-Net's: each slice by `resize`, then the nearest slices by scipy."""
    flat = [n for a, n in enumerate(shape) if a != axis]
    slices = [resize(x.take(n, axis), flat, order, mode="edge", anti_aliasing=False) for n in range(x.shape[axis])]
    places = x.shape[axis] / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5
    nearest = ndimage.map_coordinates(np.arange(x.shape[axis]), [places], order=0, mode="nearest")
    return np.stack([slices[n] for n in nearest], axis)


@given(SIZES, st.integers(0, 2), st.tuples(MM, MM, MM), ORDERS, st.booleans(), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=120)
def test_slices_are_interpolated_each_by_itself(
    shape: tuple[int, int, int], axis: int, wanted: tuple[float, ...], order: int, forced: bool, back: bool, seed: int
) -> None:
    """Images are clipped to each slice's range; scores go back in the same way, by the model's spacing."""
    mm = [1.0, 1.1, 0.9]
    mm[axis] = 8.0
    space = straight(shape, mm, wanted, "corner")
    if not back:
        data = volume(shape, seed, 1)
        made = resample_image(data, space.to_model(order, True if forced else 3))[0]
        expected = slow_slices(data[0].double().numpy(), space.model.shape, order, axis)
        np.testing.assert_allclose(made, expected, rtol=0, atol=3e-6)
        return
    threshold = True if forced else 3.0
    order = min(order, 1)
    chosen = space.slice_axis(threshold, back=True)
    ratio = max(wanted) / min(wanted)
    source = wanted if forced or ratio > 3 else mm
    largest = [a for a in range(3) if source[a] == max(source)]
    assert chosen == (largest[0] if len(largest) == 1 else None)
    scores = volume(space.model.shape, seed, 1)
    made = resample(scores, space.in_scores([(0, 0)] * 3, (1, 1, 1), order, threshold))[0]
    theirs = scores[0].double().numpy()
    if chosen is None:
        expected = resize(theirs, shape, order, mode="edge", anti_aliasing=False)
    else:
        expected = slow_slices(theirs, shape, order, chosen)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mm", "wanted", "threshold", "forth", "back"),
    [
        ((1, 1, 4), (1, 1, 1), 3, 2, 2),  # back: the model is isotropic, so that the file decides
        ((1, 1, 3), (1, 1, 1), 3, None, None),  # strictly above
        ((1, 4, 4), (1, 1, 1), 3, None, None),  # two that share the largest
        ((1, 1, 1), (1, 5, 1), 3, 1, 1),
        ((4, 1, 1), (1, 1, 4), 3, 0, 2),
        ((1, 1, 2), (2, 1, 1), True, 2, 0),
        ((1, 1, 1), (2, 1, 1), True, None, 0),
        ((1, 1, 4), (1, 1, 1), False, None, None),
        ((1, 1, 4), (1, 1, 1), None, None, None),
        ((1, 1, 4), (1, 1, 4), 3.999, 2, 2),
    ],
)
def test_the_axis_of_slices_is_chosen_as_nnunet_chooses_it(
    mm: tuple[float, ...], wanted: tuple[float, ...], threshold: float | None, forth: int | None, back: int | None
) -> None:
    """The spacing of what is resampled counts first, then that of the result."""
    space = straight((8, 8, 8), mm, wanted, "corner")
    assert space.slice_axis(threshold) == forth
    assert space.slice_axis(threshold, back=True) == back


def test_the_axis_of_slices_is_the_files_also_where_axes_are_permuted() -> None:
    """The model's second axis is the file's third, of 5 mm."""
    affine = np.array([[1, 0, 0, 0], [0, 0, 5, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    space = make_space(Frame((6, 7, 3), affine), "RAS", (None, 2.5, None), grid="corner")
    assert space.model.shape == (6, 6, 7)
    assert space.slice_axis(3) == 2
    data = volume((6, 7, 3), 0)
    made = resample_image(data, space.to_model(3, 3))
    assert torch.equal(made, data.permute(0, 1, 3, 2).repeat_interleave(2, 2))


# Scores plane by plane.


@given(
    st.tuples(*[st.integers(1, 24)] * 3), affines(oblique=0, shear=0), st.tuples(MM, MM, MM), st.sampled_from([*GRIDS]),
    ORDERS, THRESHOLDS, st.integers(0, 2), st.tuples(*[st.integers(0, 3)] * 6), st.integers(0, 2),
    st.lists(st.integers(0, 60), max_size=12), SEEDS,
)  # fmt: skip
@example(
    (24, 2, 2), np.diag([-1.0, 1, 1, 1]), (0.31, 1, 1), "corner", 3, None, 0, (1, 0, 0, 2, 0, 0), 0, [*range(60)], 0
)
@settings(deadline=None, max_examples=200)
def test_scores_restored_plane_by_plane_are_those_of_the_whole_volume(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, ...], grid: str, order: int,
    per_slice: float | bool | None, axis: int, pads: tuple[int, ...], pieces: int, cuts: list[int], seed: int,
) -> None:  # fmt: skip
    """However planes are handed over, for every order, flip, and padding, which is never read."""
    space = make_space(Frame(shape, affine), "RAS", spacing, grid=grid)
    padding = list(zip(pads[:3], pads[3:], strict=True))
    padded = tuple(n + a + b for n, (a, b) in zip(space.model.shape, padding, strict=True))
    scores = torch.full((2, *padded), float("nan"))
    inside = tuple(slice(a, a + n) for n, (a, _) in zip(space.model.shape, padding, strict=True))
    scores[:, *inside] = own = volume(space.model.shape, seed)
    if order == 3:  # whose weights are 0 outside, which NaN would survive
        scores = torch.where(scores.isnan(), 1e3, scores)
    maps = space.in_scores(padding, (1, 1, 1), order, per_slice)
    whole = resample(own, space.in_scores([(0, 0)] * 3, (1, 1, 1), order, per_slice))
    extent = padded[axis]
    edges = sorted({0, extent, *(cut % extent for cut in cuts)})
    restorer = Restorer(maps, axis, padded, voxels=7 if pieces == 1 else 2**22, tile=3 if pieces == 2 else None)
    made, seen = torch.full_like(whole, float("nan")), torch.zeros(shape, dtype=torch.int32)
    for first, stop in pairwise(edges):
        for piece in restorer.feed(first, scores.narrow(axis + 1, first, stop - first).clone()):
            made[:, *piece.where] = piece.restored()
            seen[piece.where] += 1
    assert (seen == 1).all()
    np.testing.assert_allclose(made, whole, rtol=0, atol=2e-5)


@given(SIZES, st.tuples(MM, MM, MM), SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_spline_of_scores_is_that_of_scipy(shape: tuple[int, int, int], wanted: tuple[float, ...], seed: int) -> None:
    """Without a clip, since scores have no range."""
    space = straight(shape, (1, 1, 1), wanted, "corner")
    scores = volume(space.model.shape, seed, 1)
    made = resample(scores, space.in_scores([(0, 0)] * 3, (1, 1, 1), 3))[0]
    factors = [n / m for n, m in zip(shape, space.model.shape, strict=True)]
    theirs = ndimage.zoom(scores[0].double().numpy(), factors, order=3, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(made, theirs, rtol=0, atol=1e-5)


# Labels.


@pytest.mark.parametrize(("angle", "sizes"), [(0, (7, 7, 7)), (14, (8, 8, 7)), (35, (8, 8, 7))])
def test_an_image_that_nibabel_reorients_is_measured_as_nibabel_does(angle: int, sizes: tuple[int, int, int]) -> None:
    """Fifteen voxels of 0.7 mm are seven or eight of 1.4: the last bit decides."""
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    turned = np.diag([-0.7, -0.7, 0.7]) @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turned.astype(np.float32)  # as files have it
    image = nib.Nifti1Image(np.zeros((15, 15, 15), np.uint8), affine)
    measured = image.as_reoriented(nib.io_orientation(affine)).header.get_zooms()
    assert tuple(round(float(mm) / 1.4 * 15) for mm in measured) == sizes
    frame = Frame((15, 15, 15), affine, (float(np.float32(0.7)),) * 3)
    assert make_space(frame, "RAS", 1.4, grid="corner_measured").model.shape == sizes
    for orientation, grid in (("RAS", "corner"), (None, "corner_measured")):
        assert make_space(frame, orientation, 1.4, grid=grid).model.shape == (7, 7, 7)


def slow_labels(labels: np.ndarray, maps: AxisMaps) -> np.ndarray:
    """The label of the largest share at each voxel; of several, the nearest voxel's, else the smallest."""
    shape = tuple(m.size for m in maps)
    places = mapped(maps, voxels_of(shape))
    limits = np.array(labels.shape)[:, None] - 1
    near = [np.floor(x + 0.5) if m.scale > 0 else np.ceil(x - 0.5) for x, m in zip(places, maps, strict=True)]
    nearest = labels[tuple(np.stack(near).clip(0, limits).astype(int))].reshape(shape)
    result = np.zeros(shape, labels.dtype)
    best = np.full(shape, -1.0)
    for value in np.unique(labels):
        share = ndimage.map_coordinates((labels == value).astype(float), places.clip(0, limits), order=1)
        share = share.reshape(shape)
        ahead = (share > best + 1e-9) | ((np.abs(share - best) <= 1e-9) & (nearest == value))
        result[ahead] = value
        best = np.maximum(best, share)
    return result


@given(SIZES, st.tuples(MM, MM, MM), st.integers(1, 5), SEEDS)
@settings(deadline=None, max_examples=100)
def test_labels_take_the_largest_share(
    shape: tuple[int, int, int], wanted: tuple[float, ...], count: int, seed: int
) -> None:
    """Any numbers, also below 0; where shares are equal but for rounding, any of the largest is right."""
    labels = np.random.default_rng(seed).integers(-1, count, shape)
    space = straight(shape, (1, 1, 1), wanted, "corner")
    maps = space.to_model()
    made = resample_labels(torch.from_numpy(labels)[None], maps)[0].numpy()
    assert made.dtype == labels.dtype
    expected = slow_labels(labels, maps)
    places = mapped(maps, voxels_of(space.model.shape)).clip(0, np.array(shape)[:, None] - 1)
    shares = np.stack([ndimage.map_coordinates((labels == v).astype(float), places, order=1) for v in range(-1, count)])
    tied = np.sort(np.vstack([shares, np.full((1, shares.shape[1]), -1.0)]), 0)
    sure = (tied[-1] - tied[-2] > 1e-6).reshape(space.model.shape)
    np.testing.assert_array_equal(made[sure], expected[sure])
    chosen = np.take_along_axis(shares, made.ravel()[None] + 1, 0)
    np.testing.assert_allclose(chosen[0], tied[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
@pytest.mark.parametrize("shapes", [((9, 10, 13), (6, 11, 9)), ((30, 30, 31), (45, 45, 25)), ((8, 10, 6), (8, 7, 9))])
def test_labels_are_those_of_scipys_zoom_also_where_rounding_breaks_ties(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], signs: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nnU-Net has them: shares that are level but for the last bit of float64 are not level."""
    monkeypatch.setattr("voxquilt.geometry.label_resampling._VOXELS", 100)
    shape, wanted = shapes
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 1)
    labels = np.digitize(values, np.quantile(values, [0.3, 0.6, 0.8]))
    maps = tuple(
        AxisMap(axis, m, sign * n / m, 0.5 * n / m - 0.5 if sign > 0 else n - 0.5 - 0.5 * n / m, reverses_source=True)
        for axis, (n, m, sign) in enumerate(zip(shape, wanted, signs, strict=True))
    )
    made = resample_labels(torch.from_numpy(labels)[None], maps)[0].numpy()
    seen = labels[tuple(slice(None, None, sign) for sign in signs)]

    def zoomed(volume: np.ndarray, order: int) -> np.ndarray:
        factors = [1 / (n / m) for n, m in zip(shape, wanted, strict=True)]
        return ndimage.zoom(volume.astype(float), factors, order=order, mode="nearest", grid_mode=True)

    shares = np.stack([zoomed(seen == value, 1) for value in range(4)])
    nearest, expected = zoomed(seen, 0), shares.argmax(0)
    for value, share in enumerate(shares):
        expected[(nearest == value) & (share == shares.max(0))] = value
    assert (np.diff(np.sort(shares, 0)[-2:], axis=0) < 1e-9).any(), "a test of nothing"
    np.testing.assert_array_equal(made, expected)


def test_shares_in_half_precision_leave_ties_to_the_smallest_label() -> None:
    """As nnU-Net's resampling by torch has it: halfway, the nearest voxel does not matter."""
    labels = torch.tensor([3, 7, 5, 3]).reshape(1, 4, 1, 1)
    maps = straight((4, 1, 1), (1, 1, 1), (2, 1, 1), "corner").to_model()
    assert resample_labels(labels, maps).flatten().tolist() == [7, 3]
    assert resample_labels(labels, maps, half=True).flatten().tolist() == [3, 3]


def test_a_tie_of_labels_goes_to_the_nearest_and_then_to_the_smallest() -> None:
    """Counted by hand: four voxels as two, halfway between the first two and the last two."""
    labels = torch.tensor([7, 3, 3, 5]).reshape(1, 4, 1, 1)
    space = straight((4, 1, 1), (1, 1, 1), (2, 1, 1), "corner")
    # scipy takes the voxel further along where two are equally near: 3 and 5.
    assert resample_labels(labels, space.to_model()).flatten().tolist() == [3, 5]
    # The nearest of four corners that have a quarter each, in the plane.
    square = torch.tensor([[4, 6], [9, 2]]).reshape(1, 2, 2, 1)
    space = straight((2, 2, 1), (1, 1, 1), (2, 2, 1), "corner")
    assert resample_labels(square, space.to_model()).item() == 2


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": "center"},
            "model grid must be one of centre, corner, corner_measured, first_voxel, ends, monai; it is 'center'.",
        ),
        ({"transpose": (0, 1)}, "transpose must be null or the axes 0, 1, 2, each once"),
        ({"transpose": (0, 1, 1)}, "transpose must be null or the axes 0, 1, 2, each once"),
    ],
)
def test_an_unknown_grid_or_order_of_axes_is_a_config_error(options: dict, message: str) -> None:
    """The message says what is allowed."""
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        make_space(Frame((2, 2, 2), np.eye(4)), None, None, **options)


def test_a_flip_reverses_the_source_also_at_ties() -> None:
    """To model space, of two nearest voxels the one further along the unflipped axis is taken, as of a flipped copy."""
    line = torch.arange(6.0).reshape(1, 6, 1, 1)
    forth = make_space(Frame((6, 1, 1), np.eye(4)), "RAS", (2, 1, 1), grid="corner")
    flipped = make_space(Frame((6, 1, 1), np.diag([-1.0, 1, 1, 1])), "RAS", (2, 1, 1), grid="corner")
    assert torch.equal(resample(line.flip(1), flipped.to_model(0)), resample(line, forth.to_model(0)))
    assert isinstance(inverse(flipped.maps, (3, 1, 1))[0], AxisMap)
