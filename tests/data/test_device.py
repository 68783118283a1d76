"""Tests how subjects come to a device: there they are what they are on the host, and nothing is lost on the way."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import ImmediateStream, LateStream
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import noise, save
from torch import Tensor

from voxquilt.data.batch import PatchBatch, cut_batches
from voxquilt.data.device_feed import BEYOND_HALF, DeviceFeed
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.patch_source import PatchSource
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.staging import Staging
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.data.subject_task import LoadedSubject, SubjectTask, SubjectWork
from voxquilt.errors import InputError
from voxquilt.geometry.padding import pad_by_torch, to_padding

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64]
AFFINES = [
    np.eye(4),
    np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]]),
    np.array([[0.9, 0.3, 0, 1], [-0.3, 0.9, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1.0]]),
]


def voxels(shape: Sequence[int], dtype: torch.dtype = torch.int16, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 100, tuple(shape))
    return torch.from_numpy(values).to(dtype)


# Copies through two buffers


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 6)] * 4), min_size=1, max_size=3),
    order=st.permutations(range(4)),
    dtype=st.sampled_from(DTYPES),
    chunk=st.integers(1, 400),
    step=st.integers(1, 2),
)
def test_what_is_uploaded_arrives_however_late_copies_are(
    shapes: list[tuple[int, ...]], order: list[int], dtype: torch.dtype, chunk: int, step: int
) -> None:
    """A buffer is not filled again before its copy is done; axes keep their order in memory, and views are allowed."""
    stream = LateStream()
    staging = Staging(stream, chunk)
    given = [voxels([shape[n] for n in order], dtype, seed).permute(order) for seed, shape in enumerate(shapes)]
    given = [volume[:, ::step] for volume in given]
    made = [staging.upload(volume) for volume in given]
    stream.reach(stream.done + len(stream.pending))
    for volume, copy in zip(given, made, strict=True):
        assert torch.equal(volume, copy)
        assert volume.dtype == copy.dtype
        assert volume.data_ptr() != copy.data_ptr()
        if step == 1 and min(volume.shape) > 1:
            assert copy.stride() == volume.stride()


# Batches


def subjects_on_host(sizes: Sequence[int], channels: Sequence[int]) -> list[LoadedSubject]:
    """Subjects of one row of patches of 4 voxels, each of several images."""
    loader = GridLoader((4, 4, 4), (2, 2, 2), Preprocess())
    loaded = []
    for n, size in enumerate(sizes):
        images = {str(c): ScalarImage(tensor=voxels((c + 1, size, 5, 4), seed=7 * n + c)) for c in range(channels[n])}
        loaded.append(load_images(loader, images))
    return loaded


def load_images(loader: GridLoader, images: dict[str, Any], feed: DeviceFeed | None = None) -> LoadedSubject:
    model_subject, _ = loader.preprocess(Subject(images), feed)
    sampler = GridSampler(model_subject, loader.patch_size, loader.patch_overlap, fit=True)
    numbers = sampler.grid.streaming_order.tolist()
    work = object.__new__(SubjectWork)
    work.numbers, work.failed, work.task = numbers, False, SubjectTask(SubjectFiles("a", {}))
    return LoadedSubject(work, sampler.source(None if feed is None else feed.stream))


def one_ahead(batches: Iterator[PatchBatch]) -> list[Tensor]:
    """What a network gets if the next batch is always asked for before the last one is used, as Lightning does."""
    seen: list[Tensor] = []
    waiting: PatchBatch | None = None
    for batch in batches:
        if waiting is not None:
            seen.append(waiting.to(torch.device("cpu")).data.clone())
        waiting = batch
    return seen if waiting is None else [*seen, waiting.to(torch.device("cpu")).data.clone()]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 14), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    channels=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    last=st.booleans(),
    on_device=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_batches_on_a_device_hold_what_batches_on_the_host_hold(
    sizes: list[int], batch_size: int, channels: list[int], last: bool, on_device: list[bool]
) -> None:
    """For subjects that are on the device and others, in one batch, however late copies are, one batch ahead."""
    stream = LateStream()
    feed = DeviceFeed(stream, channels_last=last)
    wanted = one_ahead(cut_batches(subjects_on_host(sizes, channels), batch_size))
    subjects = subjects_on_host(sizes, channels)
    for there, loaded in zip(on_device, subjects, strict=False):
        if there:
            loaded.source._stream, loaded.source._arrived = stream, stream.mark()
    made = one_ahead(cut_batches(subjects, batch_size, feed))
    assert len(made) == len(wanted)
    for ours, theirs in zip(made, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    assert (stream.done == 0) == all(on_device[: len(sizes)])


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(3, 20), min_size=1, max_size=3), batch_size=st.integers(1, 3))
def test_pinned_memory_is_not_filled_again_before_it_was_copied(sizes: list[int], batch_size: int) -> None:
    """However far the device is behind: here the network reads no batch before the host has to wait."""
    stream = LateStream(fifo=True)
    wanted = one_ahead(cut_batches(subjects_on_host(sizes, [1, 1, 1]), batch_size))
    seen: list[Tensor] = []
    waiting: PatchBatch | None = None
    for batch in chain(cut_batches(subjects_on_host(sizes, [1, 1, 1]), batch_size, DeviceFeed(stream)), [None]):
        if waiting is not None:
            data = waiting.to(torch.device("cpu")).data
            seen.append(torch.empty_like(data))
            stream.copy(seen[-1], data)
        waiting = batch
    stream.reach(stream.done + len(stream.pending))
    assert all(torch.equal(*pair) for pair in zip(seen, wanted, strict=True))


def test_volumes_are_handed_over_before_the_first_patch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's stream waits for them, and they are not freed before it is done."""
    stream = LateStream()
    feed = DeviceFeed(stream)
    (loaded,) = subjects_on_host([9], [2])
    volumes = [volume.clone() for volume in loaded.source.volumes]
    for volume, content in zip(loaded.source.volumes, volumes, strict=True):
        volume.zero_()
        stream.copy(volume, content)
    source = PatchSource(loaded.source.volumes, loaded.source._grid, loaded.source.patch_size, stream)
    held: list[int] = []
    fill = PatchSource.fill
    monkeypatch.setattr(PatchSource, "fill", lambda *a: (held.append(len(stream.held)), fill(*a))[1])
    (wanted,) = one_ahead(cut_batches(subjects_on_host([9], [2]), 30))
    held.clear()
    (made,) = one_ahead(cut_batches([LoadedSubject(loaded.work, source)], 30, feed))
    assert set(held) == {2}
    assert torch.equal(made, wanted)


def test_a_device_without_room_for_batches_gives_its_images_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then batches are made; a second time it is an error."""
    for times in (1, 2):
        feed = DeviceFeed(ImmediateStream())
        (loaded,) = subjects_on_host([9], [1])
        loaded.source._stream = feed.stream
        feed.keep(loaded.source)
        left, empty = [times], torch.empty

        def cramped(*size: Any, left: list[int] = left, empty: Callable[..., Tensor] = empty, **options: Any) -> Tensor:
            if "memory_format" in options:
                left[0] -= 1
                if left[0] >= 0:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return empty(*size, **options)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", cramped)
            batches = cut_batches([loaded], 30, feed)
            if times == 2:
                with pytest.raises(torch.OutOfMemoryError):
                    list(batches)
            else:
                (made,) = one_ahead(batches)
                assert torch.equal(made, one_ahead(cut_batches(subjects_on_host([9], [1]), 30))[0])
        assert not loaded.source.is_on_device
        assert not feed.takes_volumes


# Padding


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    padding=st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 6))] * 3),
    mode=st.sampled_from(["constant", "edge", "reflect", "symmetric", "wrap"]),
    dtype=st.sampled_from(DTYPES),
)
def test_padding_by_torch_equals_numpy(shape: tuple[int, ...], padding: Any, mode: str, dtype: torch.dtype) -> None:
    """Also by more voxels than the volume has, and for every type."""
    volume = voxels(shape, dtype)
    made = pad_by_torch(volume, padding, mode)
    np.testing.assert_array_equal(made.numpy(), np.pad(volume.numpy(), ((0, 0), *padding), mode=mode))  # type: ignore[call-overload]
    assert made.dtype == dtype
    if mode == "constant" and dtype != torch.bool:
        assert torch.equal(pad_by_torch(volume, padding, mode, 3), to_padding(3)(volume, padding))


# Preprocessing


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(DTYPES),
    affine=st.sampled_from(AFFINES),
    orientation=st.sampled_from([None, "RAS", "LPS", "SAR"]),
    spacing=st.sampled_from([None, 0.7, 1.9, (None, 1.1, None)]),
    transforms=st.sampled_from([[], [torch.neg], [lambda x: x.sub_(x.mean()), lambda x: x.numpy() * 2]]),
)
def test_a_subject_prepared_on_a_device_is_the_one_prepared_on_the_host(
    shape: tuple[int, ...], dtype: torch.dtype, affine: np.ndarray, orientation: Any, spacing: Any, transforms: Any
) -> None:
    """For every type, orientation, spacing and intensity; the subject's own voxels stay as they are."""
    tensor = voxels(shape, dtype)
    kept = tensor.clone()
    preprocess = Preprocess(orientation, spacing, transforms)
    wanted, space = preprocess(Subject(t1=ScalarImage(tensor=tensor, affine=affine)))
    made, other = preprocess(Subject(t1=ScalarImage(tensor=tensor, affine=affine)), DeviceFeed(ImmediateStream()))
    assert torch.equal(made["t1"].data, wanted["t1"].data)
    assert made["t1"].data.dtype == wanted["t1"].data.dtype
    assert space.maps == other.maps
    assert torch.equal(tensor, kept)
    assert made["t1"].data.data_ptr() != tensor.data_ptr()


class FailsOnDevice:
    """Adds one in place; the first `times` calls fail afterwards, as a call of numpy on a device's tensor does."""

    def __init__(self, times: int = 1) -> None:
        self.left, self.calls = times, 0

    def __call__(self, data: Tensor) -> Tensor:
        self.calls += 1
        data.add_(1)
        self.left -= 1
        if self.left >= 0:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return data * 2

    def __repr__(self) -> str:
        return "FailsOnDevice()"


def test_a_transform_that_fails_on_the_device_runs_on_the_host(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it would have got on the device, and from then on at once; the log names it once."""
    copies: list[int] = []
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (copies.append(1), tensor)[1])
    feed, transform = DeviceFeed(ImmediateStream()), FailsOnDevice()
    subject = Subject(t1=ScalarImage(tensor=voxels((1, 4, 5, 6))))
    preprocess = Preprocess(intensity=[lambda x: x.mul_(3), transform, torch.neg])
    for calls in (2, 3, 4):
        made = preprocess(subject, feed).subject["t1"].data
        assert torch.equal(made, -2 * (subject["t1"].data.float() * 3 + 1))
        assert transform.calls == calls
        assert len(copies) == calls - 1
    assert [r.getMessage() for r in caplog.records if "FailsOnDevice() runs on the host" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_transform_that_fails_on_the_host_too_is_the_subjects_error(caplog: pytest.LogCaptureFixture) -> None:
    """It is not blamed on the device: the next subject's transform runs there again."""
    feed, transform = DeviceFeed(ImmediateStream()), FailsOnDevice(times=2)
    subject = Subject(t1=ScalarImage(tensor=voxels((1, 4, 5, 6))))
    preprocess = Preprocess(intensity=[transform])
    with pytest.raises(TypeError, match="can't convert"):
        preprocess(subject, feed)
    assert torch.equal(preprocess(subject, feed).subject["t1"].data, 2 * (subject["t1"].data.float() + 1))
    assert transform.calls == 3
    assert not caplog.records


# Subjects that cannot be on the device


@pytest.fixture
def task(tmp_path: Path) -> SubjectTask:
    save(tmp_path / "a.nii", noise((9, 8, 7)), np.diag([-1.0, 1, 1.5, 1]))
    return SubjectTask(SubjectFiles("a", {"image": tmp_path / "a.nii"}))


LOADER = GridLoader((4, 4, 4), (2, 2, 2), Preprocess(spacing=1.2), "reflect", skip=85.0)


def same(a: LoadedSubject, b: LoadedSubject) -> bool:
    pairs = zip(a.source.volumes, b.source.volumes, strict=True)
    return all(torch.equal(*pair) for pair in pairs) and a.work.numbers == b.work.numbers


def test_a_subject_is_loaded_onto_the_device(task: SubjectTask) -> None:
    """With the volumes and the patches to predict that it has on the host."""
    feed = DeviceFeed(ImmediateStream())
    loaded, wanted = LOADER.load(task, 0, feed), LOADER.load(task)
    assert same(loaded, wanted)
    assert loaded.source.is_on_device
    assert not wanted.source.is_on_device
    assert 0 < len(loaded.work.skipped) < len(loaded.work.grid)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "too small for a subject's images"),
        (NotImplementedError('"index_select" not implemented'), "cannot be prepared on the device"),
    ],
)
def test_a_subject_that_does_not_come_to_the_device_is_loaded_on_the_host(
    error: Exception, message: str, task: SubjectTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time; the log says so once."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Staging, "upload", fail)
    feed = DeviceFeed(ImmediateStream())
    for _ in range(2):
        loaded = LOADER.load(task, 0, feed)
        assert not loaded.source.is_on_device
        assert same(loaded, LOADER.load(task))
    assert [message in record.getMessage() for record in caplog.records] == [True]


def test_a_subject_that_cannot_be_used_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is that of the host, it is read once, and the device is not blamed."""
    array = noise((5, 5, 5)).astype(np.float32)
    array[1, 2, 3] = np.nan
    save(tmp_path / "a.nii", array)
    uploads: list[int] = []
    upload = Staging.upload
    monkeypatch.setattr(Staging, "upload", lambda *a: (uploads.append(1), upload(*a))[1])
    task = SubjectTask(SubjectFiles("a", {"image": tmp_path / "a.nii"}))
    with pytest.raises(InputError, match="has 1 voxels that are NaN or infinite"):
        LOADER.load(task, 0, DeviceFeed(ImmediateStream()))
    assert len(uploads) == 1
    assert not caplog.records


def test_a_full_device_gives_back_its_volumes_and_takes_no_more(
    task: SubjectTask, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that are loaded, those being loaded at the time, and all later ones; the log says so once."""
    feed = DeviceFeed(ImmediateStream())
    early, late = LOADER.load(task, 0, feed), LOADER.load(task, 0, feed)
    assert feed.to_host()
    assert not feed.to_host()
    assert not early.source.is_on_device
    late.source._stream = feed.stream
    assert not feed.keep(late.source).is_on_device
    assert not LOADER.load(task, 0, feed).source.is_on_device
    assert same(early, LOADER.load(task))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        (torch.int32, 65504, True),
        (torch.int32, -70000, False),
        (torch.float32, 65519.0, True),
        (torch.float32, 65521.0, False),
        (torch.uint8, 255, True),
    ],
)
def test_voxels_that_half_precision_cannot_hold_are_refused(dtype: torch.dtype, value: float, fits: bool) -> None:
    """With 16-true alone, and once per subject."""
    volume = torch.zeros(1, 4, 4, 4, dtype=dtype)
    volume[0, 1, 2, 3] = value
    source = subjects_on_host([4], [1])[0].source
    source.volumes = [volume]
    DeviceFeed(ImmediateStream()).check_range(source)
    feed = DeviceFeed(ImmediateStream(), precision="16-true")
    if fits:
        feed.check_range(source)
    else:
        with pytest.raises(InputError) as error:
            feed.check_range(source)
        assert str(error.value) == BEYOND_HALF
