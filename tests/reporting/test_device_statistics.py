"""Tests that torch gives the numbers of labels that NumPy gives; on a GPU: tests/test_gpu.py."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_numbers import check_numbers

from voxquilt.geometry.frame import Frame
from voxquilt.reporting import components, device_runs, device_statistics, label_intensities, statistics_table
from voxquilt.reporting.label_intensities import Intensities
from voxquilt.reporting.label_statistics import LabelStatistics, label_statistics
from voxquilt.reporting.statistics_table import statistics_rows

CPU = torch.device("cpu")
AFFINE = np.array([[0, -1.3, 0.2, 4], [0.8, 0, 0, -9], [0, 0.1, 2, 7], [0, 0, 0, 1.0]])


def placed(random: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """The same array in another order in memory, with gaps or backwards."""
    steps = random.choice([-1, 1, 2], 3)
    axes = random.permutation(3)
    room = np.zeros([array.shape[axis] * abs(steps[axis]) for axis in axes], array.dtype)
    view = room.transpose(np.argsort(axes))[tuple(slice(None, None, step) for step in steps)]
    view[...] = array
    return view


@st.composite
def volumes(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels, noise or in blocks, and images of several types, all in any order in memory."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(["u1", "u2", "u4", "i2", "i4", "i8"]))
    numbers = draw(st.sampled_from([[1], [3, 255], [3, 300, 30000], [3, 300, 65535], [1, 2**31 + 7]]))
    numbers = [n for n in numbers if n <= np.iinfo(dtype).max]
    labels = random.choice(np.array([0, *numbers], dtype), shape)
    grain = draw(st.integers(1, 3))
    blocks = [np.arange(n) // grain for n in shape]
    labels = labels[np.ix_(*blocks)]
    labels[random.random(shape) < draw(st.sampled_from([0, 0.6, 0.97, 1]))] = 0
    images = {}
    for kind in draw(st.lists(st.sampled_from(["?", "u1", "i1", "i2", "u2", "u4", "wide", "f2", "f4", "f8", "same"]))):
        image = random.normal(100, 30, shape)
        image = (image * 1e6).astype(np.int32) if kind == "wide" else image
        image = np.full(shape, 2.7, np.float32) if kind == "same" else image
        image = image.astype(kind) if kind not in ("wide", "same") else image
        if kind[0] == "f":
            image[random.random(shape) < 0.1] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        images[kind] = placed(random, image)
    return placed(random, labels), images


@contextmanager
def some_at_a_time(voxels: int) -> Iterator[None]:
    """As of large volumes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_statistics, "_PIECES", [device_statistics.Pieces(voxels, 8 * voxels, 0)])
        patch.setattr(device_statistics, "_ROW", 5)
        patch.setattr(device_runs, "_RUNS", voxels // 4)
        patch.setattr(label_intensities, "_TABLE", 2**16 + voxels)
        yield


def check(found: dict[int, LabelStatistics], wanted: dict[int, LabelStatistics]) -> None:
    """Means and standard deviations of binned intensities have rounding."""
    check_numbers(found, wanted, check_moments)


def check_moments(ours: Intensities, theirs: Intensities) -> None:
    """What is left of squares that cancel is less exact."""
    assert ours.mean == pytest.approx(theirs.mean, rel=1e-13)
    assert ours.sd**2 == pytest.approx(theirs.sd**2, rel=1e-9, abs=1e-13 * theirs.mean**2)


@settings(max_examples=150, deadline=None)
@given(volumes(), st.lists(st.sampled_from([0, 1, 2, 300])), st.sampled_from([4, 40, 2**22]), st.booleans())
def test_numbers_are_those_of_the_host(
    drawn: tuple[np.ndarray, dict[str, np.ndarray]], known: list[int], voxels: int, strict: bool
) -> None:
    """However many planes are looked at at a time, and where torch must be deterministic."""
    labels, images = drawn
    frame = Frame(labels.shape, AFFINE)
    wanted = label_statistics(labels, frame, images, known)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        with some_at_a_time(voxels):
            found = label_statistics(labels, frame, images, known, CPU)
            again = label_statistics(labels, frame, images, known, CPU)
    finally:
        torch.use_deterministic_algorithms(before)
    check(found, wanted)
    assert again == found


def test_many_labels_are_counted_in_several_goes() -> None:
    """Where one table of all histograms would be too large; and thousands of labels are left to the host."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 150, (40, 30, 30)).astype(np.uint8)
    images = {"a": random.normal(size=labels.shape), "b": random.integers(-30000, 30000, labels.shape).astype("i2")}
    frame = Frame(labels.shape, AFFINE)
    check(label_statistics(labels, frame, images, device=CPU), label_statistics(labels, frame, images))
    labels = np.arange(5000, dtype=np.uint16).reshape(10, 25, 20)
    with pytest.raises(OverflowError, match="4999 labels"):
        label_statistics(labels, Frame(labels.shape, AFFINE), {}, device=CPU)


@pytest.mark.parametrize("grain", [1, 6])
def test_components_of_noise_are_not_counted(grain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same number of runs as on the host."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, (30, 40, 50)).astype(np.uint8).repeat(grain, 2)
    frame = Frame(labels.shape, AFFINE)
    runs = int(np.count_nonzero(np.diff(labels, axis=2, prepend=0) * (labels > 0)))
    for most in (runs - 1, runs):
        monkeypatch.setattr(components, "_RUNS", most)
        monkeypatch.setattr(components, "_VOXELS", 2**20)
        with some_at_a_time(5000):
            found = label_statistics(labels, frame, {}, device=CPU)
        check(found, label_statistics(labels, frame, {}))
        assert (found[1].components is None) == (most < runs)


def test_a_winding_component_is_one() -> None:
    """A comb whose teeth meet in the last plane only, and a spiral of one voxel's width."""
    labels = np.zeros((40, 41, 41), np.uint8)
    labels[:, :, ::2] = 5
    labels[-1] = 5
    low, high = 0, 40
    labels[:8] = 0
    while low < high:  # each ring is joined to the next
        labels[3, low : high + 1, [low, high]] = 2
        labels[3, [low, high], low : high + 1] = 2
        labels[3, low + 1 : low + 3, low + 1] = 2
        labels[3, low + 2, low] = 0
        low, high = low + 2, high - 2
    frame = Frame(labels.shape, AFFINE)
    for view in (labels, labels[::-1], labels.transpose(2, 0, 1)):
        with some_at_a_time(41 * 41 * 3):
            found = label_statistics(view, Frame(view.shape, AFFINE), {}, device=CPU)
        check(found, label_statistics(view, Frame(view.shape, AFFINE), {}))
    assert label_statistics(labels, frame, {}, device=CPU)[5].components == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), TypeError("uint64"), None])
def test_the_host_takes_over_where_a_device_fails(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same rows, and one line in the log of all of a run."""
    labels, image = np.ones((1, 4, 4, 4), np.uint64), np.full((1, 4, 4, 4), 2.5)
    frame = Frame((4, 4, 4), AFFINE)
    wanted = statistics_rows("a", "labels", labels, frame, {"t1": image}, {})
    monkeypatch.setattr(statistics_table, "is_worthwhile", lambda *_: True)
    if error is not None:
        monkeypatch.setattr(device_statistics.DeviceVolume, "intensities", lambda *_: (_ for _ in ()).throw(error))
        labels = labels.astype(np.uint8)
    statistics_table._note.cache_clear()
    with caplog.at_level(logging.DEBUG, "voxquilt"):
        for _ in range(3):
            assert statistics_rows("a", "labels", labels, frame, {"t1": image}, {}, device=CPU) == wanted
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "computed on the host" in caplog.text
    assert (str(error) if error else "uint64") in caplog.text


def test_ranges_that_no_integer_holds_are_left_to_the_host() -> None:
    """An index out of bounds would end every computation on a GPU, the network's too."""
    labels = np.ones((1, 1, 2), np.uint8)
    for ends in ([-1.7e308, 1.7e308], [0.0, 1e30]):
        image = np.array(ends).reshape(1, 1, 2)
        with pytest.raises(OverflowError, match="intensities from"):
            label_statistics(labels, Frame(labels.shape, AFFINE), {"t1": image}, device=CPU)


def test_planes_that_32_bits_do_not_count_are_left_to_the_host() -> None:
    """Runs would begin at wrong places."""
    labels = np.broadcast_to(np.ones((), np.uint8), (2, 2**15, 2**15))
    with pytest.raises(OverflowError, match=r"planes of \(32768, 32768\) voxels"):
        label_statistics(labels, Frame(labels.shape, AFFINE), {}, device=CPU)


def test_small_volumes_and_other_devices_stay_on_the_host() -> None:
    """A GPU would take longer to begin."""
    assert not device_statistics.is_worthwhile(torch.device("cuda"), 2**20 - 1)
    assert not device_statistics.is_worthwhile(CPU, 2**30)
    assert not device_statistics.is_worthwhile(torch.device("meta"), 2**30)


def test_pieces_follow_the_memory_that_nothing_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger ones, the smaller ones, or none, and then the host computes."""
    large, small = device_statistics._PIECES
    assert large.room > small.room
    device = torch.device("cuda", 0)
    for free, wanted in ((large.room, large), (large.room - 1, small), (small.room, small), (small.room - 1, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**40))
        assert device_statistics._fitting(device) == wanted
        assert device_statistics.is_worthwhile(device, 2**20) == (wanted is not None)
