"""Tests the transform to model space and back: every voxel keeps its world position, and copies are exact."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from voxquilt.errors import ConfigError, GridError, InputError
from voxquilt.geometry.frame import Frame, closest_axes, parse_axcodes, to_spacing
from voxquilt.geometry.resample import resample
from voxquilt.geometry.space import AxisMaps, Space, inverse, make_space

ORIENTATIONS = ["".join(c) for p in permutations(("LR", "PA", "IS")) for c in product(*p)]
SIGNED_PERMUTATIONS = [
    np.eye(3)[:, list(p)] * signs for p in permutations(range(3)) for signs in product((1, -1), repeat=3)
]
DTYPES = [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)


@st.composite
def affines(draw: st.DrawFn, *, oblique: float = 40.0, shear: float = 0.05) -> np.ndarray:
    """Axes permuted and flipped, rotated by at most `oblique` degrees, with spacings and a little shear."""
    axes = draw(st.sampled_from(SIGNED_PERMUTATIONS))
    random = np.random.default_rng(draw(SEEDS))
    vector = random.normal(size=3)
    angle = np.radians(oblique) * random.random() * draw(st.sampled_from([0, 1]))
    rotation = Rotation.from_rotvec(vector / np.linalg.norm(vector) * angle).as_matrix()
    shears = np.eye(3) + np.triu(random.uniform(-shear, shear, (3, 3)), 1) * draw(st.sampled_from([0, 1]))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ axes @ shears * random.uniform(0.3, 4, 3)
    affine[:3, 3] = random.uniform(-200, 200, 3)
    return affine


def spacings(low: float = 0.3, high: float = 5.0) -> st.SearchStrategy:
    value = st.one_of(st.none(), st.floats(low, high).map(lambda mm: round(mm, 2)))
    return st.one_of(value, st.tuples(value, value, value))


def world(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ voxels + affine[:3, 3:]


def voxels_of(shape: tuple[int, ...]) -> np.ndarray:
    """Indices of all voxels, (3, n)."""
    return np.indices(shape).reshape(3, -1).astype(float)


def mapped(maps: AxisMaps, voxels: np.ndarray) -> np.ndarray:
    """Unclamped source positions of native voxels (3, n)."""
    found = np.empty_like(voxels)
    for x, m in zip(voxels, maps, strict=True):
        found[m.axis] = m.scale * x + m.offset
    return found


# Orientation.


def test_there_are_48_orientations_and_each_is_read_back() -> None:
    """Six permutations of three axes with two directions each, in upper and lower case."""
    assert len(set(ORIENTATIONS)) == 48
    for codes in ORIENTATIONS:
        axes, signs = parse_axcodes(codes.lower())
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for n in range(3):
            affine[axes[n], n] = signs[n]
        assert "".join(nib.aff2axcodes(affine)) == Frame((1, 1, 1), affine).axcodes == codes


@given(affines())
@settings(deadline=None, max_examples=150)
def test_axis_codes_are_those_of_nibabel(affine: np.ndarray) -> None:
    """Up to 40 degrees from the anatomical axes, where the nearest axis is unambiguous."""
    frame = Frame((2, 2, 2), affine)
    assert frame.axcodes == "".join(nib.aff2axcodes(affine))
    axes, signs = closest_axes(affine)
    np.testing.assert_array_equal(np.stack([axes, signs], 1), nib.io_orientation(affine))


@given(SEEDS)
@example(6)
@settings(deadline=None, max_examples=100)
def test_axis_codes_maximise_the_alignment_for_any_rotation(seed: int) -> None:
    """Each axis is used once. Where nibabel, which chooses greedily, differs, its alignment is lower."""
    rotation = Rotation.random(random_state=seed).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation
    axes, signs = closest_axes(affine)
    theirs = nib.io_orientation(affine)[:, 0].astype(int)
    assert sorted(axes) == [0, 1, 2]
    kept = sum(rotation[axes[n], n] ** 2 for n in range(3))
    assert kept >= sum(rotation[theirs[n], n] ** 2 for n in range(3)) - 1e-9
    assert all(signs[n] * rotation[axes[n], n] > 0 for n in range(3))


@given(affines(oblique=0, shear=0))
@settings(deadline=None, max_examples=30)
def test_a_tie_at_45_degrees_is_decided_alike_in_spite_of_noise(affine: np.ndarray) -> None:
    """Else rounding in a header would turn the images of one subject differently."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    turned = turn @ affine
    noisy = turned.astype(np.float32).astype(np.float64)
    assert Frame((2, 2, 2), turned).axcodes == Frame((2, 2, 2), noisy).axcodes


@pytest.mark.parametrize("codes", ["", "R", "RA", "RASS", "RRS", "RLS", "XYZ", "123", "RA S", "RAS+"])
def test_an_invalid_orientation_is_a_config_error(codes: str) -> None:
    """The message says what an orientation looks like and what came."""
    with pytest.raises(ConfigError) as error:
        parse_axcodes(codes)
    assert str(error.value) == (
        f"an orientation has one letter of each pair L/R, A/P, S/I, such as RAS; it is {codes!r}."
    )


@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), float("inf"), True, (1, 1), (1, 1, 1, 1), (1, 1, 0), (1, None, -1), ()]
)
def test_an_invalid_spacing_is_a_config_error(value: object) -> None:
    """Zero, negative, infinite, boolean, or not three values."""
    with pytest.raises(ConfigError, match="spacing must be null, a positive number of mm, or three along i, j, k"):
        to_spacing(value)  # type: ignore[arg-type]


# The model frame.


@given(affines(), SHAPES, st.sampled_from([None, *ORIENTATIONS]), spacings())
@settings(deadline=None, max_examples=200)
def test_every_voxel_keeps_its_world_position(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: str | None, spacing: object
) -> None:
    """The model affine at a voxel's model coordinates equals the native affine at the voxel, and conversely."""
    space = make_space(Frame(shape, affine), orientation, spacing)
    native = voxels_of(shape)
    model = mapped(space.maps, native)
    np.testing.assert_allclose(world(space.model.affine, model), world(affine, native), rtol=0, atol=1e-4)
    back = inverse(space.maps, space.model.shape)
    assert tuple(m.size for m in space.maps) == shape
    assert tuple(m.size for m in back) == space.model.shape
    np.testing.assert_allclose(mapped(back, model), native, rtol=0, atol=1e-6)
    grid = voxels_of(space.model.shape)
    np.testing.assert_allclose(world(affine, mapped(back, grid)), world(space.model.affine, grid), rtol=0, atol=1e-4)


@given(affines(), SHAPES, st.sampled_from(ORIENTATIONS), spacings())
@settings(deadline=None, max_examples=150)
def test_the_model_frame_has_the_requested_orientation_and_spacing(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: str, spacing: object
) -> None:
    """An unset spacing is the file's; the centre of the field of view stays where it was."""
    native = Frame(shape, affine)
    model = make_space(native, orientation, spacing).model
    assert model.axcodes == "".join(nib.aff2axcodes(model.affine)) == orientation
    order = [closest_axes(affine)[0].index(w) for w in closest_axes(model.affine)[0]]
    for axis, mm in enumerate(to_spacing(spacing)):  # type: ignore[arg-type]
        old, n = native.spacing[order[axis]], native.shape[order[axis]]
        kept = mm is None or abs(mm / old - 1) < 1e-4
        assert model.spacing[axis] == pytest.approx(old if kept else mm, rel=1e-12)
        # The nearest whole number of voxels to the field of view, and at least one.
        assert model.shape[axis] == (n if kept else max(1, round(n * old / mm)))
    centres = [world(f.affine, (np.array(f.shape)[:, None] - 1) / 2) for f in (native, model)]
    np.testing.assert_allclose(centres[1], centres[0], rtol=0, atol=1e-9)
    # Axes are permuted, flipped and scaled, never rotated: each model axis runs along a native one.
    for axis, n in enumerate(order):
        cosine = model.affine[:3, axis] @ affine[:3, n] / model.spacing[axis] / native.spacing[n]
        assert abs(cosine) == pytest.approx(1, abs=1e-12)


@given(affines(), SHAPES)
@settings(deadline=None, max_examples=50)
def test_without_orientation_and_spacing_nothing_changes(affine: np.ndarray, shape: tuple[int, int, int]) -> None:
    """The model frame is the native one, and voxels are not copied."""
    space = make_space(Frame(shape, affine), None, None)
    np.testing.assert_allclose(space.model.affine, affine, rtol=0, atol=1e-9)
    assert space.model.shape == shape
    volume = torch.rand(1, *shape)
    assert resample(volume, inverse(space.maps, shape)).data_ptr() == volume.data_ptr()


def test_a_spacing_that_differs_by_rounding_is_not_resampled() -> None:
    """0.9999999 mm from a float32 header counts as 1 mm; 0.999 mm does not."""
    for mm, scale in ((0.9999999, 1), (1.00005, 1), (0.999, 0.999)):
        space = make_space(Frame((10, 10, 10), np.diag([mm, mm, mm, 1])), "RAS", 1.0)
        assert [m.scale for m in space.maps] == pytest.approx([scale] * 3, rel=1e-12)


def test_a_volume_thinner_than_the_spacing_keeps_one_voxel() -> None:
    """One slice of 1 mm at a spacing of 5 mm stays one voxel with the same centre."""
    space = make_space(Frame((1, 4, 1), np.diag([1.0, 1, 1, 1])), "RAS", 5)
    assert space.model.shape == (1, 1, 1)
    np.testing.assert_allclose(space.model.affine[:3, 3], [0, 1.5, 0])


# Permutations and flips.


@given(affines(oblique=40), SHAPES, st.sampled_from([None, *ORIENTATIONS]), st.sampled_from([*DTYPES, *FLOATS]), SEEDS)
@settings(deadline=None, max_examples=120)
def test_reorienting_and_back_copies_every_voxel_to_the_bit(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: str | None, dtype: torch.dtype, seed: int
) -> None:
    """Without a new spacing nothing is interpolated, for any type; the reoriented volume equals nibabel's."""
    volume = torch.from_numpy(np.random.default_rng(seed).integers(-(2**40), 2**40, (2, *shape))).to(dtype)
    space = make_space(Frame(shape, affine), orientation, None)
    model = resample(volume, inverse(space.maps, space.model.shape))
    assert model.dtype == dtype
    if orientation is not None:
        ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
        index = torch.arange(volume[0].numel()).reshape(shape)
        turned = nib.orientations.apply_orientation(index.numpy(), ornt)
        assert torch.equal(model, volume.reshape(2, -1)[:, torch.from_numpy(turned.copy())])
    restored = resample(model, space.maps)
    assert restored.dtype == dtype
    assert torch.equal(restored, volume)


def test_nan_and_infinity_survive_reorientation() -> None:
    """A flip does no arithmetic."""
    volume = torch.tensor([1, torch.nan, torch.inf, -0.0]).reshape(1, 4, 1, 1)
    space = make_space(Frame((4, 1, 1), np.diag([-1.0, 1, 1, 1])), "RAS", None)
    model = resample(volume, inverse(space.maps, (4, 1, 1)))
    assert torch.equal(model.flatten().view(torch.int32), volume.flip(1).flatten().view(torch.int32))


# Interpolation.


def slow_resample(source: np.ndarray, maps: AxisMaps, order: int = 1) -> np.ndarray:
    """scipy's interpolation at the mapped coordinates, in float64, with edge values repeated."""
    shape = tuple(m.size for m in maps)
    places = mapped(maps, voxels_of(shape))
    return np.stack(
        [
            ndimage.map_coordinates(channel.astype(np.float64), places, order=order, mode="nearest").reshape(shape)
            for channel in source
        ]
    )


@given(affines(), SHAPES, st.sampled_from(ORIENTATIONS), spacings(), st.sampled_from(FLOATS[2:]), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=150)
def test_linear_interpolation_equals_that_of_scipy(
    affine: np.ndarray,
    shape: tuple[int, int, int],
    orientation: str,
    spacing: object,
    dtype: torch.dtype,
    forth: bool,
    seed: int,
) -> None:
    """To model space and back: interpolating axis by axis equals trilinear interpolation."""
    space = make_space(Frame(shape, affine), orientation, spacing)
    maps = inverse(space.maps, space.model.shape) if forth else space.maps
    source = np.random.default_rng(seed).normal(size=(2, *(shape if forth else space.model.shape)))
    tensor = torch.from_numpy(source).to(dtype)
    result = resample(tensor, maps)
    assert result.dtype == dtype
    # Coordinates within 1e-6 of a voxel count as that voxel.
    np.testing.assert_allclose(result.double(), slow_resample(tensor.numpy(), maps), rtol=0, atol=2e-5)


@given(affines(), SHAPES, st.sampled_from(ORIENTATIONS), spacings(), st.sampled_from(DTYPES), SEEDS)
@settings(deadline=None, max_examples=80)
def test_labels_take_the_nearest_voxel(
    affine: np.ndarray,
    shape: tuple[int, int, int],
    orientation: str,
    spacing: object,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Only existing labels occur, in their own type; at a tie either neighbour is right."""
    space = make_space(Frame(shape, affine), orientation, spacing)
    maps = inverse(space.maps, space.model.shape)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 200, (1, *shape))).to(dtype)
    result = resample(labels, maps, linear=False)
    assert result.dtype == dtype
    places = mapped(maps, voxels_of(tuple(m.size for m in maps)))
    places = places.clip(0, np.array(shape)[:, None] - 1)
    near = [np.stack([np.floor(places + 0.5 + e), np.ceil(places - 0.5 - e)]) for e in (-1e-6, 1e-6)]
    index = np.indices(space.model.shape).reshape(3, -1)
    for column in range(index.shape[1]):
        candidates = product(*({int(x) for pair in near for x in pair[:, axis, column]} for axis in range(3)))
        found = [labels[0, *c].item() for c in candidates if all(0 <= x < n for x, n in zip(c, shape, strict=True))]
        assert result[0, *index[:, column]].item() in found


def test_halving_and_doubling_give_values_counted_by_hand() -> None:
    """Four voxels of 1 mm become means of pairs at 2 mm, and values at quarters between them at 0.5 mm."""
    volume = torch.tensor([0.0, 4, 8, 20]).reshape(1, 4, 1, 1)
    frame = Frame((4, 1, 1), np.eye(4))
    coarse = make_space(frame, "RAS", (2, None, None))
    assert resample(volume, inverse(coarse.maps, (2, 1, 1))).flatten().tolist() == [2, 14]
    fine = make_space(frame, "RAS", (0.5, None, None))
    assert resample(volume, inverse(fine.maps, (8, 1, 1))).flatten().tolist() == [0, 1, 3, 5, 7, 11, 17, 20]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float16, torch.bfloat16])
def test_integers_and_float16_are_interpolated_in_float32(dtype: torch.dtype) -> None:
    """Nothing is rounded to the type of the voxels."""
    volume = torch.tensor([0, 1]).to(dtype).reshape(1, 2, 1, 1)
    space = make_space(Frame((2, 1, 1), np.eye(4)), "RAS", (0.5, None, None))
    result = resample(volume, inverse(space.maps, (4, 1, 1)))
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == [0, 0.25, 0.75, 1]


# Scores of padded and downsampled patches.


def ramp(frame: Frame, direction: np.ndarray) -> np.ndarray:
    """A linear function of the world position of every voxel."""
    return (direction @ world(frame.affine, voxels_of(frame.shape))).reshape(frame.shape)


def scores_frame(space: Space, padding: tuple[tuple[int, int], ...], factor: tuple[int, int, int]) -> Frame:
    """The frame of a network's output: padding shifts its origin, and each voxel is the mean of factor^3 voxels."""
    shape = [(n + b + a) // f for n, (b, a), f in zip(space.model.shape, padding, factor, strict=True)]
    affine = space.model.affine.copy()
    first = np.array([[(f - 1) / 2 - b] for (b, _), f in zip(padding, factor, strict=True)])
    affine[:3, 3:] = world(space.model.affine, first)
    affine[:3, :3] *= factor
    return Frame(tuple(shape), affine)  # type: ignore[arg-type]


@given(
    affines(),
    st.tuples(*[st.integers(2, 9)] * 3),
    st.sampled_from(ORIENTATIONS),
    spacings(0.4, 4),
    st.tuples(*[st.integers(0, 3)] * 6),
    st.tuples(*[st.integers(1, 4)] * 3),
    SEEDS,
)
@settings(deadline=None, max_examples=200)
def test_a_linear_ramp_is_restored_in_place(
    affine: np.ndarray,
    shape: tuple[int, int, int],
    orientation: str,
    spacing: object,
    pads: tuple[int, ...],
    factor: tuple[int, int, int],
    seed: int,
) -> None:
    """Interpolation keeps linear functions, so a shift of half a voxel would show, for every padding and factor."""
    space = make_space(Frame(shape, affine), orientation, spacing)
    # As a sampler pads it: the padded volume is a multiple of the factor.
    padding = tuple(
        (b, a + -(n + b + a) % f) for n, b, a, f in zip(space.model.shape, pads[:3], pads[3:], factor, strict=True)
    )
    frame = scores_frame(space, padding, factor)
    direction = np.random.default_rng(seed).normal(size=3)
    maps = space.in_scores(padding, factor)
    restored = resample(torch.from_numpy(ramp(frame, direction))[None], maps)[0].numpy()
    expected = ramp(space.native, direction)
    # Beyond the centres of the outermost scores of the volume, these are repeated: a ramp is kept only inside.
    places = mapped(maps, voxels_of(shape)).reshape(3, *shape)
    edges = []
    for n, (before, _), f in zip(space.model.shape, padding, factor, strict=True):
        full = [y for y in range((n + before) // f) if y * f >= before]
        some = [y for y in range(-(-(n + before) // f)) if (y + 1) * f > before]
        edges.append([(full or some)[0], (full or some)[-1]])
    low, limits = np.array(edges).T.reshape(2, 3, 1, 1, 1)
    inside = ((places >= low - 1e-6) & (places <= limits + 1e-6)).all(0)
    scale = np.abs(direction @ affine[:3, :3]).max() * max(factor) * 4
    np.testing.assert_allclose(restored[inside], expected[inside], rtol=0, atol=2e-5 * max(1, scale))
    # Outside, the value is the nearest score's, never extrapolated.
    clamped = (direction @ world(frame.affine, places.clip(low, limits).reshape(3, -1))).reshape(shape)
    np.testing.assert_allclose(restored, clamped, rtol=0, atol=2e-5 * max(1, scale))


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAR", "PIL"])
@pytest.mark.parametrize("spacing", [None, 2.0])
def test_a_pooled_voxel_lies_at_the_centre_of_the_voxels_it_averages(orientation: str, spacing: float | None) -> None:
    """A ramp is pooled after padding that continues its slope; the interior is restored exactly."""
    native = Frame((24, 20, 16), np.diag([-1.0, 1.0, 1.0, 1.0]))
    space = make_space(native, orientation, spacing)
    direction = np.array([1.0, -2.0, 3.0])
    padding, factor = ((4, 4), (2, 2), (0, 0)), (2, 1, 4)
    rest = [(b, a + -(n + b + a) % f) for n, (b, a), f in zip(space.model.shape, padding, factor, strict=True)]
    padded = scores_frame(space, tuple(rest), (1, 1, 1))
    pooled = torch.nn.functional.avg_pool3d(torch.from_numpy(ramp(padded, direction))[None], factor)
    restored = resample(pooled, space.in_scores(rest, factor))[0].numpy()
    inner = (slice(5, -5),) * 3
    np.testing.assert_allclose(restored[inner], ramp(native, direction)[inner], rtol=0, atol=1e-4)


# Errors.


@pytest.mark.parametrize(
    "affine",
    [
        np.zeros((4, 4)),
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        np.array([[1, 1, 0, 0], [0, 1e-6, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    ],
    ids=["zeros", "a zero axis", "two equal axes", "two axes equal but for 1e-6"],
)
def test_a_degenerate_affine_is_refused(affine: np.ndarray) -> None:
    """Axes in one plane cannot be inverted; the message shows the affine."""
    with pytest.raises(InputError, match="the affine is degenerate: it does not span three dimensions"):
        Frame((2, 2, 2), affine)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_affine_that_is_not_finite_is_refused(value: float) -> None:
    """At any position in the matrix, the offset included."""
    for place in ((0, 0), (1, 3), (2, 1)):
        affine = np.eye(4)
        affine[place] = value
        with pytest.raises(InputError, match="must be a finite 4 x 4 matrix"):
            Frame((2, 2, 2), affine)
    with pytest.raises(InputError, match="must be a finite 4 x 4 matrix"):
        Frame((2, 2, 2), np.eye(3))


def test_an_empty_frame_is_refused() -> None:
    """A volume has at least one voxel along each axis."""
    with pytest.raises(GridError, match="at least 1 along axis j; it is 0"):
        Frame((2, 0, 2), np.eye(4))


@pytest.mark.parametrize("mm", [1e-3, 1.0, 1e4])
def test_a_small_or_large_scale_is_not_degenerate(mm: float) -> None:
    """Micrometres, metres and strong shears span three dimensions too."""
    affine = np.diag([mm, mm * 100, mm, 1])
    affine[0, 1] = mm * 90
    frame = Frame((2, 2, 2), affine)
    assert frame.spacing == pytest.approx((mm, mm * np.hypot(100, 90), mm))


def test_frames_are_equal_by_value() -> None:
    """Only shape and affine are compared."""
    frame = Frame((2, 3, 4), np.eye(4))
    assert frame == Frame((2, 3, 4), np.eye(4))
    assert frame != Frame((2, 3, 5), np.eye(4))
    assert frame != Frame((2, 3, 4), np.diag([1, 1, 2, 1]))
    assert frame != (2, 3, 4)
    assert not frame.matches(Frame((2, 3, 5), np.eye(4)))
