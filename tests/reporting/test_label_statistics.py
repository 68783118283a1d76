"""Tests the numbers of labels: they are those of a plain reference in SciPy and NumPy, and of MONAI's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage

from voxquilt.geometry.frame import Frame
from voxquilt.reporting import components
from voxquilt.reporting import label_statistics as statistics_module
from voxquilt.reporting.components import ComponentCounter
from voxquilt.reporting.label_runs import slowest_first
from voxquilt.reporting.label_statistics import Intensities, LabelStatistics, label_statistics
from voxquilt.reporting.statistics_table import statistics_rows

AFFINE = np.array([[0, -1.3, 0.2, 4], [0.8, 0, 0, -9], [0, 0.1, 2, 7], [0, 0, 0, 1.0]])
CORNERS = np.ones((3, 3, 3))


@st.composite
def volumes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and an image of any type, both in any order in memory."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = draw(st.sampled_from([[1], [1, 2, 3], [7, 255], [3, 1002], [1, 70000], [2**40, 2**53]]))
    dtype = np.min_scalar_type(max(numbers))
    labels = random.choice(np.array([0, *numbers], dtype), shape)
    labels[random.random(shape) < draw(st.sampled_from([0, 0.6, 0.97, 1]))] = 0
    kind = draw(st.sampled_from(["u1", "i2", "i4", "wide", "f4", "f8"]))
    image = random.normal(100, 30, shape)
    image = (image * 1e6).astype(np.int32) if kind == "wide" else image.astype(kind)
    orders = draw(st.tuples(st.sampled_from("CF"), st.sampled_from("CF")))
    flip = draw(st.sampled_from([1, -1]))
    return np.asarray(labels, order=orders[0]), np.asarray(image, order=orders[1])[:, ::flip]


def reference(labels: np.ndarray, image: np.ndarray, number: int) -> LabelStatistics:
    """One label at a time, over the whole volume."""
    mask = labels == number
    voxels = np.argwhere(mask)
    if not len(voxels):
        return LabelStatistics()
    centre = np.array(ndimage.center_of_mass(mask))
    (box,) = ndimage.find_objects(mask.astype(np.int8))
    values = image[mask].astype(np.float64)
    border = any(n > 1 and {0, n - 1} & {*voxels[:, axis].tolist()} for axis, n in enumerate(labels.shape))
    percentiles = np.percentile(values, [5, 50, 95])
    return LabelStatistics(
        len(voxels), len(voxels) * abs(np.linalg.det(AFFINE[:3, :3])) / 1000,
        tuple(AFFINE[:3, :3] @ centre + AFFINE[:3, 3]),
        (*(along.start for along in box), *(along.stop for along in box)),
        {"t1": Intensities(values.mean(), values.std(), tuple(percentiles))},
        ndimage.label(mask, CORNERS)[1], border,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(volumes(), st.sampled_from([1, 3]))
def test_numbers_are_those_of_a_plain_reference(drawn: tuple[np.ndarray, np.ndarray], threads: int) -> None:
    """Exact for integers of 16 bits; percentiles of others are within half a bin of the labels' range."""
    labels, image = drawn
    frame = Frame(labels.shape, AFFINE)
    with pytest.MonkeyPatch.context() as patch:
        if threads > 1:  # as of a large volume, some voxels at a time
            patch.setattr(statistics_module, "_LARGE", 0)
            patch.setattr(statistics_module, "_VOXELS", 20)
            patch.setattr(components, "_AT_A_TIME", 20)
            patch.setattr(statistics_module, "spare_threads", lambda: threads)
        found = label_statistics(labels, frame, {"t1": image}, known=[1, 4, 0])
    assert list(found) == sorted({*np.unique(labels).tolist(), 1, 4} - {0})
    labelled = image[labels > 0].astype(np.float64)
    exact = image.dtype.kind in "iu" and (not len(labelled) or np.ptp(labelled) < 2**16)
    error = 0 if exact or not len(labelled) else np.ptp(labelled) / 2**17
    for number, numbers in found.items():
        wanted = reference(labels, image, number)
        for key in ("voxels", "box", "components", "touches_border"):
            assert getattr(numbers, key) == getattr(wanted, key), key
        assert numbers.ml == pytest.approx(wanted.ml)
        assert numbers.centroid == pytest.approx(wanted.centroid)
        if wanted.intensities is not None and numbers.intensities is not None:
            ours, theirs = numbers.intensities["t1"], wanted.intensities["t1"]
            assert (ours.mean, ours.sd) == pytest.approx((theirs.mean, theirs.sd), rel=1e-6, abs=1e-6)
            assert ours.percentiles == pytest.approx(theirs.percentiles, abs=error + 1e-9 * abs(theirs.mean))


def test_many_labels_are_counted_in_several_goes() -> None:
    """Where one histogram of all labels would be too large; none is left out, and the last go is not full."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 150, (40, 30, 30)).astype(np.uint8)
    image = random.integers(-30000, 30000, labels.shape).astype(np.int16)
    found = label_statistics(labels, Frame(labels.shape, AFFINE), {"t1": image})
    assert len(found) == 149
    for number, numbers in found.items():
        values = image[labels == number]
        assert numbers.intensities is not None
        assert numbers.intensities["t1"].percentiles == pytest.approx(np.percentile(values, [5, 50, 95]).tolist())
        assert numbers.intensities["t1"].sd == pytest.approx(values.std())


def test_voxels_that_are_not_finite_count_as_zero() -> None:
    """As the network sees them with data.nonfinite=zero."""
    image = np.array([np.nan, np.inf, -np.inf, 8], np.float32).reshape(1, 1, 4)
    found = label_statistics(np.ones((1, 1, 4), np.uint8), Frame((1, 1, 4), AFFINE), {"t1": image})
    assert found[1].intensities is not None
    assert found[1].intensities["t1"].mean == 2


def count_components(labels: np.ndarray, threads: int = 1) -> dict[int, int] | None:
    """The components of each label above 0, and a look at the runs on the way."""
    counter = ComponentCounter(labels.transpose(slowest_first(labels)), threads)
    assert (
        sum((stop - first).sum() for runs in counter.runs() for *_, first, stop in [runs.places]) == (labels > 0).sum()
    )
    return counter.counts()


@settings(max_examples=100, deadline=None)
@given(volumes(), st.integers(1, 4), st.sampled_from([1, 50, 2**20]))
def test_components_are_those_of_scipy(drawn: tuple[np.ndarray, np.ndarray], threads: int, voxels: int) -> None:
    """With 26 neighbours, for every label by itself, however many planes are looked at at a time."""
    labels, _ = drawn
    numbers = [number for number in np.unique(labels).tolist() if number]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "_AT_A_TIME", voxels)
        found = count_components(labels, threads)
    assert found == {n: ndimage.label(labels == n, CORNERS)[1] for n in numbers}


def test_a_label_has_one_component_where_monai_has_kept_its_largest() -> None:
    """A second opinion: its default connects corners, too."""
    labels = (np.random.default_rng(1).random((12, 11, 10)) < 0.12).astype(np.uint8)
    assert count_components(labels)[1] > 3
    largest = np.asarray(get_largest_connected_component_mask(labels)).astype(np.uint8)
    assert 1 < largest.sum() < labels.sum()
    assert count_components(largest) == {1: 1}


@pytest.mark.parametrize("dtype", ["u4", "i4", "u8", "i8"])
def test_integers_may_take_all_bits_of_their_type(dtype: str) -> None:
    """All, the upper half, and few at the upper end, of which each has a bin: no type holds the squares of the first,
    and some no differences."""
    random, ends = np.random.default_rng(0), np.iinfo(dtype)
    image = random.integers(ends.min, ends.max, (6, 7, 8), dtype, endpoint=True)
    labels = random.integers(0, 3, image.shape).astype(np.uint8)
    for low in (int(ends.min), int(ends.max) // 2, int(ends.max) - 300):
        volume = image.clip(low)
        for number, found in label_statistics(labels, Frame(labels.shape, AFFINE), {"t1": volume}).items():
            values = [int(value) - low for value in volume[labels == number]]
            ours = (found.intensities or {})["t1"]
            assert ours.mean == pytest.approx(low + sum(values) / len(values), rel=1e-12, abs=1e-9 * max(values))
            assert ours.sd == pytest.approx(float(np.std(np.array(values, np.float64))), rel=1e-9)
            wanted = [low + value for value in np.percentile(np.array(values, np.float64), [5, 50, 95]).tolist()]
            assert ours.percentiles == pytest.approx(wanted, rel=1e-15, abs=max(values) / 1e5)


def test_a_winding_component_is_one() -> None:
    """A comb whose teeth meet in the last plane only, so that many runs are joined late."""
    labels = np.zeros((40, 9, 41), np.uint8)
    labels[:, :, ::2] = 5
    assert count_components(labels) == {5: 21}
    labels[-1] = 5
    assert count_components(labels) == {5: 1}
    assert count_components(labels[::-1].copy(order="F")) == {5: 1}


def test_components_of_noise_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many runs as voxels, whose components would take gigabytes; its other numbers are there."""
    random = np.random.default_rng(0)
    labels = random.integers(1, 3, (30, 40, 50)).astype(np.uint8)
    monkeypatch.setattr(components, "_RUNS", 2**10)
    found = label_statistics(labels, Frame(labels.shape, AFFINE), {"t1": labels})
    assert [numbers.components for numbers in found.values()] == [None, None]
    assert sum(numbers.voxels for numbers in found.values()) == labels.size
    assert count_components(labels) is None
    assert count_components(labels, 3) is None
    rows = statistics_rows("a", "labels", labels[None], Frame(labels.shape, AFFINE), {"t1": labels[None]}, {})
    assert [row["components"] for row in rows] == ["", ""]
    labels[:] = 1  # long runs
    assert count_components(labels) == {1: 1}
