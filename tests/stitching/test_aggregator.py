"""Tests the aggregator: patches stitch to the volume for every grid, blend and order, and a hole is an error."""

import gc
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from grids import axis_sizes, bare
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.subject import DATA, LOCATION, LabelMap, ScalarImage, Subject
from voxquilt.errors import BatchError, ConfigError, GridError, LedgerError, PatchShapeError
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend import Windowed, to_blend
from voxquilt.vocabulary import PADDING_MODES

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [torch.bool, *INTEGERS, *FLOATS]
AVERAGING = ["average", "hann", "gaussian"]
MODES = ["crop", *AVERAGING]
WINDOWS = {
    "average": lambda p: np.ones(p),
    "hann": lambda p: np.sin(np.pi * np.arange(1, p + 1) / (p + 1)) ** 2,
    "gaussian": lambda p: np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2),
}


class Placed(NamedTuple):
    """A grid without a subject."""

    grid: Grid
    padding: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0), (0, 0))


def random_volume(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values over the whole range of a type, or of int32 where the type has more."""
    random = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(random.random(shape) > 0.5)
    if dtype.is_floating_point:
        return torch.from_numpy(random.normal(0, 100, shape)).to(dtype)
    low, high = max(torch.iinfo(dtype).min, -(2**31)), min(torch.iinfo(dtype).max, 2**31 - 1)
    return torch.from_numpy(random.integers(low, high, shape, endpoint=True)).to(dtype)


def sampler_of(volume: Tensor, patch: object, overlap: object = 0, padding_mode: object = None) -> GridSampler:
    return GridSampler(Subject(image=ScalarImage(tensor=volume)), patch, overlap, padding_mode)  # type: ignore[arg-type]


def quilt(
    aggregator: GridAggregator, patches: list[Tensor], locations: np.ndarray, order: list[int], size: int
) -> None:
    """Add patches in the given order, several per batch."""
    for start in range(0, len(order), size):
        some = order[start : start + size]
        aggregator.add_batch(torch.stack([patches[n] for n in some]), torch.from_numpy(locations[some]))


def output_of(aggregator: GridAggregator) -> Tensor:
    """The output, without the warning that int64 becomes int32, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the output", RuntimeWarning)
        return aggregator.get_output_tensor()


def cut_and_quilt(sampler: GridSampler, mode: str, *, seed: int = 0, size: int = 3) -> Tensor:
    """Add a sampler's patches in random order."""
    aggregator = GridAggregator(sampler, mode)
    order = np.random.default_rng(seed).permutation(len(sampler)).tolist()
    patches = [sampler[n]["image"][DATA] for n in range(len(sampler))]
    quilt(aggregator, patches, sampler.locations, order, size)
    return output_of(aggregator)


def tolerance(volume: Tensor) -> float:
    """Rounding of a float32 sum of 343 weighted patches, the most in these tests; float64 where the volume is."""
    return float(volume.double().abs().max()) * (1e-13 if volume.dtype == torch.float64 else 5e-6)


GEOMETRIES = st.tuples(axis_sizes(11), axis_sizes(9), axis_sizes(7))
SEEDS = st.integers(0, 2**32 - 1)
PADDINGS = st.sampled_from([None, *PADDING_MODES, 0, 7, -1.5])


@given(GEOMETRIES, st.sampled_from(DTYPES), PADDINGS, st.integers(1, 3), st.integers(1, 9), SEEDS)
@settings(deadline=None, max_examples=120)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy.pad, uninitialised 'empty'
def test_cut_then_crop_gives_the_volume_back_exactly(
    sizes: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype,
    padding: str | float | None,
    channels: int,
    size: int,
    seed: int,
) -> None:
    """Every voxel has one owner, so values and type are copied for any shape, padding and order."""
    shape, patch, overlap = zip(*sizes, strict=True)
    if not dtype.is_floating_point and padding in (7, -1.5):
        padding = 1  # which is of any type; others could make the volume float32
    volume = random_volume((channels, *shape), dtype, seed)
    output = cut_and_quilt(sampler_of(volume, patch, overlap, padding), "crop", seed=seed, size=size)
    assert output.dtype == (torch.int32 if dtype == torch.int64 else dtype)
    assert torch.equal(output, volume.to(output.dtype))


@given(GEOMETRIES, st.sampled_from(AVERAGING), st.sampled_from(DTYPES), PADDINGS, st.integers(1, 9), SEEDS)
@settings(deadline=None, max_examples=160)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy.pad, uninitialised 'empty'
def test_cut_then_average_gives_the_volume_back(
    sizes: tuple[tuple[int, int, int], ...],
    mode: str,
    dtype: torch.dtype,
    padding: str | float | None,
    size: int,
    seed: int,
) -> None:
    """Weights sum to 1, so equal values average to themselves up to rounding, integers included."""
    shape, patch, overlap = zip(*sizes, strict=True)
    if not dtype.is_floating_point and padding in (7, -1.5):
        padding = 1  # which is of any type; others could make the volume float32
    volume = random_volume((2, *shape), dtype, seed)
    output = cut_and_quilt(sampler_of(volume, patch, overlap, padding), mode, seed=seed, size=size)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output.double(), volume.double(), rtol=0, atol=tolerance(volume))


@given(GEOMETRIES, st.sampled_from(MODES))
@settings(deadline=None, max_examples=100)
def test_the_weights_of_an_axis_are_a_partition_of_unity(sizes: tuple[tuple[int, int, int], ...], mode: str) -> None:
    """At every voxel the weights of the patches that cover it are non-negative and sum to 1."""
    grid = make_grid(*zip(*sizes, strict=True))
    for axis, starts in enumerate(grid.starts):
        weights = to_blend(mode).axis_weights(grid, axis)
        assert weights.dtype == torch.float64
        assert tuple(weights.shape) == (len(starts), grid.patch_size[axis])
        total = np.zeros(grid.shape[axis])
        for start, row in zip(starts, weights.numpy(), strict=True):
            total[start : start + len(row)] += row
        assert weights.min() >= 0
        np.testing.assert_allclose(total, 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", AVERAGING)
@given(patch=st.integers(1, 200))
@settings(deadline=None, max_examples=30)
def test_each_window_equals_its_formula(mode: str, patch: int) -> None:
    """Positive and symmetric; the formulas are written out again here."""
    window = to_blend(mode).window(patch)  # type: ignore[attr-defined]
    np.testing.assert_allclose(window, WINDOWS[mode](patch), rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(window, window.flip(0), rtol=1e-9)
    assert window.min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_volume_of_ones_comes_back_as_ones_to_the_border(mode: str) -> None:
    """Also in corners, where TorchIO 2.0.0a2's hann gives 0.0002."""
    sampler = sampler_of(torch.ones(1, 21, 20, 19), (8, 7, 6), (4, 6, 2))
    output = cut_and_quilt(sampler, mode)
    torch.testing.assert_close(output, torch.ones(1, 21, 20, 19), rtol=0, atol=1e-6)


def slow_average(patches: np.ndarray, locations: np.ndarray, shape: tuple[int, ...], mode: str) -> np.ndarray:
    """For each voxel, the sum of weight times value over the patches that cover it, divided by the sum of weights."""
    windows = [WINDOWS[mode](p) for p in patches.shape[2:]]
    output = np.zeros((patches.shape[1], *shape))
    for voxel in np.ndindex(*shape):
        weights = 0.0
        for patch, location in zip(patches, locations, strict=True):
            place = tuple(np.subtract(voxel, location[:3]))
            if all(0 <= x < p for x, p in zip(place, patch.shape[1:], strict=True)):
                weight = np.prod([w[x] for w, x in zip(windows, place, strict=True)])
                output[:, *voxel] += weight * patch[:, *place]
                weights += weight
        output[:, *voxel] /= weights
    return output


def slow_crop(
    patches: np.ndarray, locations: np.ndarray, shape: tuple[int, ...], overlap: tuple[int, ...]
) -> np.ndarray:
    """For each voxel, the last patch in grid order that covers it after half the overlap is cut off at inner faces."""
    output = np.zeros((patches.shape[1], *shape), patches.dtype)
    for voxel in np.ndindex(*shape):
        for patch, location in zip(patches, locations, strict=True):
            inside = True
            for x, n, o, first, end in zip(voxel, shape, overlap, location[:3], location[3:], strict=True):
                low = first + o // 2 if first > 0 else first
                high = end - o // 2 if end < n else end
                inside &= low <= x < high
            if inside:
                output[:, *voxel] = patch[:, *np.subtract(voxel, location[:3])]
    return output


SMALL = st.tuples(axis_sizes(7), axis_sizes(6), axis_sizes(4))


@given(
    SMALL, st.sampled_from(MODES), st.sampled_from([torch.int16, torch.float16, torch.float32, torch.float64]), SEEDS
)
@settings(deadline=None, max_examples=60)
def test_patches_that_disagree_are_blended_as_a_slow_reference_does(
    sizes: tuple[tuple[int, int, int], ...], mode: str, dtype: torch.dtype, seed: int
) -> None:
    """The reference loops over voxels and patches with explicit counts, in float64."""
    shape, patch, overlap = zip(*sizes, strict=True)
    grid = make_grid(shape, patch, overlap)
    patches = random_volume((len(grid), 2, *patch), dtype, seed)
    aggregator = GridAggregator(Placed(grid), mode)
    order = np.random.default_rng(seed).permutation(len(grid)).tolist()
    quilt(aggregator, list(patches), grid.locations, order, 4)
    output = aggregator.get_output_tensor()
    if mode == "crop":
        np.testing.assert_array_equal(output, slow_crop(patches.numpy(), grid.locations, shape, overlap))
    else:
        expected = slow_average(patches.double().numpy(), grid.locations, shape, mode)
        np.testing.assert_allclose(output.double(), expected, rtol=0, atol=2 * tolerance(patches))


@pytest.mark.parametrize("mode", MODES)
@given(sizes=GEOMETRIES, seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_the_order_of_arrival_does_not_matter(mode: str, sizes: tuple[tuple[int, int, int], ...], seed: int) -> None:
    """Patches that disagree give one result in every order: to the bit for crop, up to rounding for sums."""
    grid = make_grid(*zip(*sizes, strict=True))
    patches = list(random_volume((len(grid), 1, *grid.patch_size), torch.float32, seed))
    outputs = []
    for order in (range(len(grid)), reversed(range(len(grid))), np.random.default_rng(seed).permutation(len(grid))):
        aggregator = GridAggregator(Placed(grid), mode)
        quilt(aggregator, patches, grid.locations, [int(n) for n in order], 5)
        outputs.append(aggregator.get_output_tensor())
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=0 if mode == "crop" else tolerance(patches[0]))


@given(
    GEOMETRIES,
    st.sampled_from([*MODES, "parabola"]),
    st.sampled_from([*INTEGERS, torch.bool]),
    st.sampled_from([None, torch.float64]),
    st.sampled_from(["all", "skipped", "streamed"]),
    SEEDS,
)
@settings(deadline=None, max_examples=150)
def test_integers_come_back_exactly_where_all_patches_agree(
    sizes: tuple[tuple[int, int, int], ...],
    mode: str,
    dtype: torch.dtype,
    summed: torch.dtype | None,
    how: str,
    seed: int,
) -> None:
    """For any blend and order, up to 2^20. Where one patch differs the result is an unrounded mean."""
    rng = np.random.default_rng(seed)
    grid = make_grid(*zip(*sizes, strict=True))
    limits = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, min(torch.iinfo(dtype).max, 2**20))
    volume = torch.from_numpy(rng.integers(max(limits[0], -(2**20)), limits[1] + 1, (2, *grid.shape))).to(dtype)
    blend = Windowed(lambda n: 1 + torch.arange(n, dtype=torch.float64) ** 2) if mode == "parabola" else mode
    skipped = [n for n in range(len(grid)) if how == "skipped" and rng.random() < 0.3][:-1]
    slabs: list[Tensor] = []
    consumer = (lambda slab: slabs.append(slab.scores.clone())) if how == "streamed" else None
    aggregator = GridAggregator(Placed(grid), blend, dtype=summed, skipped=skipped, fill=-7.5, consumer=consumer)
    patches = torch.stack([volume[:, a:d, b:e, c:f] for a, b, c, d, e, f in grid.locations.tolist()])
    order = [n for n in range(len(grid)) if n not in skipped]
    if how != "streamed":
        order = rng.permutation(order).tolist()
    for n in order:
        aggregator.add_batch(patches[[n]], grid.locations[[n]])
    output = torch.cat(slabs, 1) if how == "streamed" else aggregator.scores()
    averages = to_blend(blend).averages
    if averages or not skipped:
        assert output.dtype == (summed or (torch.float32 if averages else dtype))
    else:
        assert output.is_floating_point()  # which the fill needs
    covered = torch.zeros(grid.shape, dtype=torch.bool)
    for n in order:
        a, b, c, d, e, f = grid.location(n)
        covered[a:d, b:e, c:f] = True
    if averages:
        assert torch.equal(output[:, covered], volume.to(output.dtype)[:, covered])
        assert (output[:, ~covered] == -7.5).all()
    else:
        other = output != volume.to(output.dtype)
        assert (output[other] == -7.5).all()
        assert skipped or not other.any()


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
def test_a_mask_on_which_all_patches_agree_loses_no_voxel(mode: str) -> None:
    """Ones of 90 x 108 x 90 voxels, in a type without fractions."""
    sampler = GridSampler(Subject(mask=LabelMap(torch.ones(1, 90, 108, 90, dtype=torch.uint8))), 48, 8)
    aggregator = GridAggregator(sampler, mode)
    for n in range(len(sampler)):
        aggregator.add_batch(sampler.cut("mask", n)[None], sampler.locations[[n]])
    assert bool((aggregator.get_output_tensor().long() == 1).all())


def test_a_mean_of_different_integers_is_not_rounded() -> None:
    """However small one weight is: the corner of one gaussian meets the middle of another."""
    grid = make_grid((12, 12, 12), 8, 4)
    aggregator = GridAggregator(Placed(grid), "gaussian", dtype=torch.float64)
    for n in range(len(grid)):
        aggregator.add_batch(torch.full((1, 1, 8, 8, 8), n == 0, dtype=torch.uint8), grid.locations[[n]])
    corner = aggregator.scores()[0, 7, 7, 7].item()
    assert 0 < corner < 1e-4


def test_fractions_that_follow_integers_are_not_rounded() -> None:
    """The first batch holds integer zeros, the next one tiny floats, which are averaged as they are."""
    grid = make_grid((6, 4, 4), 4, 2)
    aggregator = GridAggregator(Placed(grid), "average")
    aggregator.add_batch(torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8), grid.locations[:1])
    aggregator.add_batch(torch.full((1, 1, 4, 4, 4), 1e-12), grid.locations[1:])
    assert aggregator.scores()[0, -1, 0, 0].item() == pytest.approx(1e-12)


# Errors, and that they change nothing.


def ready(mode: str = "crop") -> tuple[GridAggregator, Tensor, Tensor]:
    """An aggregator, all patches of a volume (n, C, 4, 4, 4), and their locations."""
    sampler = sampler_of(random_volume((2, 9, 8, 7), torch.float32, 0), 4, 2)
    patches = torch.stack([sampler[n]["image"][DATA] for n in range(len(sampler))])
    return GridAggregator(sampler, mode), patches, torch.from_numpy(sampler.locations)


def test_a_missing_patch_is_an_error_not_a_hole() -> None:
    """The output of an incomplete volume is a LedgerError that counts the missing patches and names a location."""
    aggregator, patches, locations = ready()
    keep = [n for n in range(len(patches)) if n not in (3, 17)]
    aggregator.add_batch(patches[keep], locations[keep])
    for ask in (aggregator.get_output_tensor, aggregator.scores):
        with pytest.raises(LedgerError, match=f"2 of {len(patches)} patches are missing") as error:
            ask()
        assert isinstance(error.value, (RuntimeError, AssertionError))
        for n in (3, 17):
            assert str(tuple(locations[n].tolist())) in str(error.value)


def test_an_output_without_any_patch_is_an_error() -> None:
    """An AssertionError, as in TorchIO, but it says what is missing."""
    aggregator, patches, _ = ready()
    with pytest.raises(AssertionError, match=f"{len(patches)} of {len(patches)} patches are missing"):
        aggregator.get_output_tensor()


REJECTED = {
    "repeated": (lambda p, x: (p[:2], x[:2]), LedgerError, "came twice: (0, 0, 0, 4, 4, 4)"),
    "repeated beside new ones": (lambda p, x: (p[1:5], x[1:5]), LedgerError, "came twice: (0, 0, 2, 4, 4, 6)"),
    "twice in one batch": (
        lambda p, x: (p[[9, 8, 9]], x[[9, 8, 9]]),
        LedgerError,
        "came twice: (2, 0, 0, 6, 4, 4)",
    ),
    "misplaced": (
        lambda p, x: (p[7:9], x[7:9] + 1),
        PatchShapeError,
        "no patch of the grid lies at (1, 5, 3, 5, 9, 7)",
    ),
    "location of another size": (
        lambda p, x: (p[7:8], x[7:8] - torch.tensor([0, 0, 0, 0, 0, 1])),
        PatchShapeError,
        "no patch of the grid lies at (0, 4, 2, 4, 8, 5)",
    ),
    "misshapen": (
        lambda p, x: (p[7:9, :, :3], x[7:9]),
        PatchShapeError,
        "(3, 4, 4) voxels: the shape does not match the shape of the target location, (4, 4, 4)",
    ),
    "too few locations": (
        lambda p, x: (p[7:9], x[7:8]),
        BatchError,
        "the batch has 2 patches but there are 1 locations",
    ),
    "too many locations": (
        lambda p, x: (p[7:9], x[7:10]),
        BatchError,
        "the batch has 2 patches but there are 3 locations",
    ),
    "no batch axis": (lambda p, x: (p[7], x[7:9]), PatchShapeError, "this one has 4 axes: (2, 4, 4, 4)"),
    "other channels": (
        lambda p, x: (p[7:9, :1], x[7:9]),
        PatchShapeError,
        "patches with 1 channels after patches with 2",
    ),
    "a wider type": (
        lambda p, x: (p[7:9].double(), x[7:9]),
        PatchShapeError,
        "patches of torch.float64 after patches of torch.float32",
    ),
    "complex": (lambda p, x: (p[7:9] * 1j, x[7:9]), BatchError, "complex"),
    "locations of five": (lambda p, x: (p[7:9], x[7:9, :5]), BatchError, "locations are (B, 6)"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", REJECTED)
def test_a_rejected_batch_leaves_the_aggregator_unchanged(case: str, mode: str) -> None:
    """Each kind of wrong batch has its error, which says what came; the volume can still be completed."""
    choose, kind, message = REJECTED[case]
    aggregator, patches, locations = ready(mode)
    aggregator.add_batch(patches[:2], locations[:2])
    before = aggregator.ledger.arrived.copy()
    # The shape checks that the tests add would answer some of these first, so the function is called without them.
    add = bare(GridAggregator.add_batch)
    with pytest.raises(kind) as error:
        add(aggregator, *choose(patches, locations))
    assert message in str(error.value)
    np.testing.assert_array_equal(aggregator.ledger.arrived, before)
    aggregator.add_batch(patches[2:], locations[2:])
    whole = GridAggregator(Placed(aggregator.grid), mode)
    whole.add_batch(patches, locations)
    assert torch.equal(aggregator.get_output_tensor(), whole.get_output_tensor())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case", ["twice in one batch", "misplaced", "location of another size", "misshapen", "complex"]
)
def test_a_rejected_first_batch_fixes_neither_channels_nor_type(case: str, mode: str) -> None:
    """Both come from the first batch that was accepted."""
    choose, kind, _ = REJECTED[case]
    aggregator, patches, locations = ready(mode)
    with pytest.raises(kind):
        aggregator.add_batch(*choose(patches[:, :1].byte() if case != "complex" else patches, locations))
    aggregator.add_batch(patches, locations)
    whole = GridAggregator(Placed(aggregator.grid), mode)
    whole.add_batch(patches, locations)
    assert torch.equal(aggregator.get_output_tensor(), whole.get_output_tensor())


def test_errors_derive_from_the_built_in_types_that_torchio_raises() -> None:
    """Code that catches TorchIO's errors catches ours."""
    assert issubclass(PatchShapeError, RuntimeError)
    assert issubclass(BatchError, ValueError)
    assert issubclass(LedgerError, RuntimeError)
    assert issubclass(LedgerError, AssertionError)


def test_an_unknown_overlap_mode_is_an_error_that_suggests_the_nearest() -> None:
    """A ConfigError, which is a ValueError."""
    with pytest.raises(ConfigError, match=r"overlap_mode must be one of crop, .* it is 'han'\. Did you mean hann\?"):
        GridAggregator(Placed(make_grid((4, 4, 4), 2)), "han")


# Types and rounding.


@pytest.mark.parametrize("mode", AVERAGING)
def test_sums_of_integers_do_not_wrap(mode: str) -> None:
    """A constant uint8 200 averages to 200, although its sums far exceed 255."""
    output = cut_and_quilt(sampler_of(torch.full((1, 20, 20, 20), 200, dtype=torch.uint8), 10, 8), mode)
    torch.testing.assert_close(output, torch.full((1, 20, 20, 20), 200.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", AVERAGING)
def test_half_precision_patches_are_summed_in_float32(mode: str, dtype: torch.dtype) -> None:
    """343 overlapping patches of 1000.5, or of the largest float16 values, average without loss."""
    volume = torch.full((1, 13, 13, 13), 1000.5).to(dtype)
    volume[0, 6, 6, 6] = 60000.0
    output = cut_and_quilt(sampler_of(volume, 7, 6), mode)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, volume.float(), rtol=5e-6, atol=0)


def test_the_average_of_int64_patches_is_an_unrounded_float32() -> None:
    """Two patches of 0 and 1 share two voxels: 0.5 there, without a warning."""
    grid = make_grid((6, 1, 1), (4, 1, 1), (2, 0, 0))
    aggregator = GridAggregator(Placed(grid), "average")
    batch = torch.tensor([0, 1])[:, None, None, None, None].expand(2, 1, 4, 1, 1)
    aggregator.add_batch(batch, grid.locations)
    assert aggregator.get_output_tensor().flatten().tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_labels_of_int64_become_int32_with_a_warning() -> None:
    """As in TorchIO, since ITK does not read int64; the values stay."""
    volume = random_volume((1, 5, 5, 5), torch.int64, 0)
    sampler = sampler_of(volume, 3, 2)
    aggregator = GridAggregator(sampler)
    aggregator.add_batch(torch.stack([p["image"][DATA] for p in sampler]), sampler.locations)
    with pytest.warns(RuntimeWarning, match="from int64 to int32"):
        output = aggregator.get_output_tensor()
    assert output.dtype == torch.int32
    assert torch.equal(output.long(), volume)


def test_labels_that_do_not_fit_int32_stay_int64() -> None:
    """Values from 2^31 on or below -2^31 would wrap; the warning says that they stay int64."""
    for value in (2**31, -(2**31) - 1):
        sampler = sampler_of(torch.full((1, 2, 2, 2), value), 2)
        aggregator = GridAggregator(sampler)
        aggregator.add_batch(sampler[0]["image"][DATA][None], sampler.locations)
        with pytest.warns(RuntimeWarning, match="stays int64"):
            output = aggregator.get_output_tensor()
        assert output.dtype == torch.int64
        assert output.unique().tolist() == [value]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float16), (torch.float64, torch.float32), (torch.int16, torch.uint8)]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_later_batch_may_have_a_narrower_type(mode: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """It fits into the first batch's type without loss; a wider type is refused."""
    grid = make_grid((4, 2, 2), 2)
    aggregator = GridAggregator(Placed(grid), mode)
    for n, dtype in enumerate(dtypes):
        aggregator.add_batch(torch.full((1, 1, 2, 2, 2), n + 1).to(dtype), grid.locations[n : n + 1])
    assert aggregator.get_output_tensor().unique().tolist() == [1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_spreads_to_no_other_voxel(mode: str) -> None:
    """For every mode, a NaN of the volume comes back at its voxel and nowhere else."""
    volume = random_volume((1, 9, 9, 9), torch.float32, 0)
    volume[0, 4, 5, 6] = torch.nan
    output = cut_and_quilt(sampler_of(volume, 5, 4), mode)
    assert output.isnan().nonzero().tolist() == [[0, 4, 5, 6]]


# Limits.


@pytest.mark.parametrize("mode", MODES)
def test_the_densest_grid_is_averaged_without_overflow(mode: str) -> None:
    """Patch 7, overlap 6: up to 343 patches cover a voxel, more than uint8 can count."""
    volume = random_volume((1, 14, 13, 7), torch.float32, 7)
    sampler = sampler_of(volume, 7, 6)
    assert sampler.grid.counts == (8, 7, 1)
    torch.testing.assert_close(cut_and_quilt(sampler, mode), volume, rtol=0, atol=tolerance(volume))
    sampler = sampler_of(volume[:, :, :, :1].expand(-1, -1, -1, 13), 7, 6)
    torch.testing.assert_close(
        cut_and_quilt(sampler, mode), volume[:, :, :, :1].expand(-1, -1, -1, 13), rtol=0, atol=tolerance(volume)
    )


@pytest.mark.parametrize("mode", MODES)
def test_more_than_255_patches_may_cover_a_voxel_along_one_axis(mode: str) -> None:
    """Patches of 301 voxels that share 300: the middle voxel lies in 301 of 400 patches."""
    volume = random_volume((1, 700, 1, 1), torch.float32, 1)
    sampler = sampler_of(volume, (301, 1, 1), (300, 0, 0))
    assert len(sampler) == 400
    torch.testing.assert_close(cut_and_quilt(sampler, mode, size=64), volume, rtol=0, atol=tolerance(volume))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 5), (6, 1, 5), (6, 5, 1)])
def test_volumes_with_axes_of_one_voxel_come_back(mode: str, shape: tuple[int, int, int]) -> None:
    """Slices, lines and a single voxel."""
    volume = random_volume((3, *shape), torch.float32, 2)
    patch, overlap = [min(n, 3) for n in shape], [2 if n > 1 else 0 for n in shape]
    torch.testing.assert_close(
        cut_and_quilt(sampler_of(volume, patch, overlap), mode), volume, rtol=0, atol=tolerance(volume)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_volume_with_more_than_65535_voxels_along_an_axis_comes_back(mode: str) -> None:
    """TorchIO's 16-bit locations overflow here."""
    volume = random_volume((1, 70_001, 1, 2), torch.float32, 3)
    sampler = sampler_of(volume, (9000, 1, 2), (1000, 0, 0))
    torch.testing.assert_close(cut_and_quilt(sampler, mode), volume, rtol=0, atol=tolerance(volume))


def test_a_single_patch_has_weight_1_everywhere() -> None:
    """Also in the corners of a gaussian: the output is exactly the volume."""
    volume = random_volume((1, 9, 8, 7), torch.float32, 4)
    for mode in MODES:
        assert torch.equal(cut_and_quilt(sampler_of(volume, (9, 8, 7), 6), mode), volume)


# Outputs, and the memory that they keep alive.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [None, 0])
def test_outputs_of_two_calls_are_equal_and_do_not_alias(mode: str, padding: int | None) -> None:
    """Changing an output in place changes neither the next one nor the aggregator."""
    volume = random_volume((2, 7, 7, 7), torch.float32, 5)
    sampler = sampler_of(volume, 4, 2, padding)
    aggregator = GridAggregator(sampler, mode)
    aggregator.add_batch(torch.stack([p["image"][DATA] for p in sampler]), sampler.locations)
    first = aggregator.get_output_tensor()
    kept = first.clone()
    first.fill_(torch.nan)
    assert torch.equal(aggregator.get_output_tensor(), kept)


@pytest.mark.parametrize("mode", MODES)
def test_the_output_does_not_alias_the_patches(mode: str) -> None:
    """A network may return views of its input, and patch buffers may be reused after a batch was added."""
    volume = random_volume((1, 7, 7, 7), torch.float32, 6)
    sampler = sampler_of(volume, 4, 2)
    aggregator = GridAggregator(sampler, mode)
    buffer = torch.empty(1, 1, 4, 4, 4)
    for n in range(len(sampler)):
        buffer.copy_(sampler[n]["image"][DATA])
        aggregator.add_batch(buffer.view(1, 1, 64).view(1, 1, 4, 4, 4), sampler.locations[[n]])
        buffer.fill_(torch.nan)
    torch.testing.assert_close(aggregator.get_output_tensor(), volume, rtol=0, atol=tolerance(volume))


@pytest.mark.parametrize("mode", MODES)
def test_patches_that_are_views_of_the_volume_are_not_written_to(mode: str) -> None:
    """MONAI's sliding window scales such views in place."""
    volume = random_volume((1, 9, 9, 9), torch.float32, 7)
    kept = volume.clone()
    sampler = sampler_of(volume, 5, 2)
    aggregator = GridAggregator(sampler, mode)
    for n, location in enumerate(sampler.locations):
        patch = sampler.cut("image", n)
        assert patch.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()
        aggregator.add_batch(patch[None], location[None])
    torch.testing.assert_close(aggregator.get_output_tensor(), kept, rtol=0, atol=tolerance(kept))
    assert torch.equal(volume, kept)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_patches_added_in_inference_mode_can_be_changed_outside(mode: str) -> None:
    """Inference tensors would refuse it; sums are ordinary tensors."""
    volume = random_volume((1, 7, 7, 7), torch.float32, 8)
    sampler = sampler_of(volume, 4, 2)
    aggregator = GridAggregator(sampler, mode)
    half = len(sampler) // 2
    patches = torch.stack([p["image"][DATA] for p in sampler])
    with torch.inference_mode():
        aggregator.add_batch(patches[:half] * 1, sampler.locations[:half])
        rest = patches[half:] * 1
    assert rest.is_inference()
    aggregator.add_batch(rest, sampler.locations[half:])
    output = aggregator.get_output_tensor()
    output += 1
    torch.testing.assert_close(output, volume + 1, rtol=0, atol=tolerance(volume))


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_without_no_grad_keeps_no_graph(mode: str) -> None:
    """Patches with autograd history are detached, since the history would keep every activation in memory."""
    sampler = sampler_of(random_volume((1, 6, 6, 6), torch.float32, 9), 4, 2)
    weight = torch.nn.Parameter(torch.tensor(2.0))
    aggregator = GridAggregator(sampler, mode)
    aggregator.add_batch(torch.stack([p["image"][DATA] for p in sampler]) * weight, sampler.locations)
    output = aggregator.get_output_tensor()
    assert not output.requires_grad
    torch.testing.assert_close(output, sampler.volume("image") * 2, rtol=0, atol=2 * tolerance(output))


def test_no_reference_cycle_keeps_the_sums_alive() -> None:
    """`del aggregator` frees a volume of memory at once, without the garbage collector."""
    sampler = sampler_of(torch.zeros(1, 6, 6, 6), 4, 2)
    gc.collect()
    gc.disable()
    try:
        for mode in MODES:
            aggregator = GridAggregator(sampler, mode)
            aggregator.add_batch(torch.stack([p["image"][DATA] for p in sampler]), sampler.locations)
            output = aggregator.get_output_tensor()
            sums, itself = weakref.ref(aggregator.scores()), weakref.ref(aggregator)
            del aggregator
            assert sums() is None
            assert itself() is None
            assert output.sum() == 0
    finally:
        gc.enable()


def test_patches_of_a_sampler_are_added_by_their_own_locations() -> None:
    """The loop of the README: a batch of `sampler[n]` with its LOCATION."""
    volume = random_volume((1, 9, 9, 9), torch.float32, 10)
    sampler = sampler_of(volume, 5, 2)
    aggregator = GridAggregator(sampler, "hann")
    for patch in sampler():
        aggregator.add_batch(patch["image"][DATA][None], patch[LOCATION][None])
    torch.testing.assert_close(aggregator.get_output_tensor(), volume, rtol=0, atol=tolerance(volume))


def test_a_user_defined_blend_is_accepted() -> None:
    """Any positive window makes a partition of unity; a triangle is compared with the slow reference."""
    grid = make_grid((7, 5, 4), (4, 3, 2), (2, 2, 0))
    triangle = lambda p: torch.minimum(torch.arange(1, p + 1), torch.arange(p, 0, -1)).double()  # noqa: E731
    patches = random_volume((len(grid), 1, *grid.patch_size), torch.float32, 11)
    aggregator = GridAggregator(Placed(grid), Windowed(triangle))
    aggregator.add_batch(patches, grid.locations)
    WINDOWS["triangle"] = lambda p: triangle(p).numpy()
    expected = slow_average(patches.double().numpy(), grid.locations, grid.shape, "triangle")
    np.testing.assert_allclose(aggregator.get_output_tensor(), expected, rtol=0, atol=tolerance(patches))


# Networks whose output is smaller than their input.


@given(SMALL, st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(MODES), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=60)
def test_downsampled_patches_stitch_to_the_downsampled_volume(
    sizes: tuple[tuple[int, int, int], ...], factor: tuple[int, int, int], mode: str, pad: bool, seed: int
) -> None:
    """Every f-th voxel of the patches gives every f-th voxel of the volume, for any factor along each axis."""
    shape, patch, overlap = (tuple(np.multiply(s, factor).tolist()) for s in zip(*sizes, strict=True))
    border = [o // 2 for o in overlap]
    pad = pad and not any(b % f for b, f in zip(border, factor, strict=True))
    volume = random_volume((1, *shape), torch.float32, seed)
    sampler = sampler_of(volume, patch, overlap, "edge" if pad else None)
    aggregator = GridAggregator(sampler, mode, downsampling_factor=factor)
    fi, fj, fk = factor
    for n in np.random.default_rng(seed).permutation(len(sampler)).tolist():
        aggregator.add_batch(sampler[n]["image"][DATA][None, :, ::fi, ::fj, ::fk], sampler.locations[[n]])
    expected = volume[:, ::fi, ::fj, ::fk]
    torch.testing.assert_close(
        aggregator.get_output_tensor(), expected, rtol=0, atol=0 if mode == "crop" else tolerance(volume)
    )


@pytest.mark.parametrize("mode", MODES)
def test_means_over_4_voxels_stitch_without_holes_at_overlap_8(mode: str) -> None:
    """Factor 4, patch 20: TorchIO 1.2.1 leaves 992 of 1000 voxels zero, or raises."""
    volume = random_volume((1, 44, 32, 20), torch.float32, 12)
    sampler = sampler_of(volume, 20, 8)
    aggregator = GridAggregator(sampler, mode, downsampling_factor=4)
    pool = torch.nn.AvgPool3d(4)
    aggregator.add_batch(pool(torch.stack([p["image"][DATA] for p in sampler])), sampler.locations)
    torch.testing.assert_close(aggregator.get_output_tensor(), pool(volume), rtol=0, atol=tolerance(volume))


def test_a_grid_that_the_factor_does_not_divide_is_refused_before_any_patch() -> None:
    """Constructing the aggregator raises a GridError with the axis, the size and the factor."""
    with pytest.raises(GridError, match="axis j: volume 30 is not a multiple of downsampling_factor 4"):
        GridAggregator(Placed(make_grid((40, 30, 40), 20, 8)), downsampling_factor=4)


def test_padding_that_the_factor_does_not_divide_is_refused() -> None:
    """Half a voxel of padding cannot be cut off."""
    sampler = sampler_of(torch.zeros(1, 8, 8, 8), 4, 0)
    placed = Placed(sampler.grid, ((0, 0), (1, 3), (0, 0)))
    aggregator = GridAggregator(placed, downsampling_factor=2)
    aggregator.add_batch(torch.zeros(len(sampler), 1, 2, 2, 2), sampler.locations)
    with pytest.raises(GridError, match="axis j: padding 1, 3 is not a multiple of downsampling_factor 2"):
        aggregator.get_output_tensor()


def test_patches_that_were_not_downsampled_are_refused() -> None:
    """The message says which size was wanted after downsampling."""
    grid = make_grid((8, 8, 8), 4)
    with pytest.raises(PatchShapeError, match=r"\(2, 2, 2\) after downsampling by \(2, 2, 2\)"):
        GridAggregator(Placed(grid), downsampling_factor=2).add_batch(torch.zeros(1, 1, 4, 4, 4), grid.locations[:1])
