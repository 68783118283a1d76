"""Tests streaming: it equals aggregating the whole volume, to the bit for crop and to float32 rounding otherwise."""

import gc
import weakref

import numpy as np
import pytest
import torch
from grids import Placed, in_starts, to_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import BatchError, LedgerError
from voxquilt.geometry.frame import Frame
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.geometry.resample import resample
from voxquilt.geometry.space import AxisMap
from voxquilt.geometry.streamed_resample import Restorer
from voxquilt.predict import predict_volume
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.buffer_pool import BufferPool, choose_device
from voxquilt.stitching.products.base import ACTIVATIONS
from voxquilt.stitching.products.disagreement import Moments
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import FinishedPlanes
from voxquilt.stitching.subject_stitcher import SubjectStitcher

# Per axis: patch size, overlap as a share of the largest possible, voxels beside the first patch.
AXES = st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(0, 12))


def streamed(
    grid: Grid,
    patches: Tensor,
    order: list[int],
    mode: str,
    axis: int,
    size: int,
    buffers: BufferPool | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The volume assembled from slabs, and the planes of each slab."""
    pieces: list[Tensor] = []
    planes: list[tuple[int, int]] = []

    def keep(slab: FinishedPlanes) -> None:
        assert slab.axis == axis
        assert slab.scores.shape[axis + 1] == slab.stop - slab.start
        pieces.append(slab.scores.clone())
        planes.append((slab.start, slab.stop))

    aggregator = GridAggregator(Placed(grid), mode, consumer=keep, axis=axis, buffers=buffers, dtype=dtype)
    for first in range(0, len(order), size):
        some = order[first : first + size]
        aggregator.add_batch(patches[some], torch.from_numpy(grid.locations[some]))
    return torch.cat(pieces, axis + 1), planes


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(AXES, AXES, AXES),
    st.sampled_from([*BLENDS]),
    st.integers(0, 2),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
)
def test_streamed_planes_assemble_to_the_volume(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    axis: int,
    size: int,
    seed: int,
    given_type: torch.dtype,
    summed: torch.dtype | None,
) -> None:
    """For every axis, type and order within a start; planes come in order, each once."""
    grid, rng = to_grid(axes), np.random.default_rng(seed)
    patches = torch.from_numpy(rng.normal(size=(len(grid), 2, *grid.patch_size))).to(given_type)
    whole = GridAggregator(Placed(grid), mode, dtype=summed)
    whole.add_batch(patches, torch.from_numpy(grid.locations))
    found, planes = streamed(grid, patches, in_starts(grid, axis, rng), mode, axis, size, dtype=summed)
    kept = given_type if mode == "crop" else torch.promote_types(given_type, torch.float32)
    assert found.dtype == whole.scores().dtype == (summed or kept)
    if mode == "crop":
        assert torch.equal(found, whole.scores())
    else:
        near = 0.1 if summed == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, whole.scores(), rtol=near, atol=near)
    assert [start for start, _ in planes] == [0, *(stop for _, stop in planes[:-1])]
    assert planes[-1][1] == grid.shape[axis]


@pytest.mark.parametrize("mode", [*BLENDS])
def test_reused_buffers_do_not_leak_a_previous_volume(mode: str) -> None:
    """The second volume is smaller than the one whose buffers it reuses."""
    buffers, rng = BufferPool(), np.random.default_rng(0)
    places = []
    for shape in ((20, 9, 11), (14, 8, 10), (20, 9, 11)):
        grid = make_grid(shape, 6, 2)
        volume = torch.from_numpy(rng.normal(size=(3, *shape)).astype(np.float32))
        patches = torch.stack([volume[:, a:d, b:e, c:f] for a, b, c, d, e, f in grid.locations.tolist()])
        order = in_starts(grid, 0, rng)
        found, _ = streamed(grid, patches, order, mode, 0, 4, buffers)
        torch.testing.assert_close(found, volume, rtol=1e-5, atol=1e-5)
        places.append(tuple(sorted(kept.data_ptr() for kept in buffers._free)))
    assert len(set(places)) == 1


def test_sums_that_would_fill_a_gpu_are_kept_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums take at most half of the free memory, torch's reserve included; host memory is not queried."""
    free, reserved, allocated = 4 * 2**30, 3 * 2**30, 1 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    stats = {
        name: {"all": {"current": size}}
        for name, size in [("reserved_bytes", reserved), ("allocated_bytes", allocated)]
    }
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    gpu, host = torch.device("cuda", 1), torch.device("cpu")
    assert choose_device(gpu, 3 * 2**30) == gpu
    assert choose_device(gpu, 3 * 2**30 + 1) == host
    assert choose_device(host, 2**60) == host
    # What the last volume left is free for the next, whose sums are as large.
    assert choose_device(gpu, 3 * 2**30 + 1, pooled=2) == gpu
    assert choose_device(gpu, 3 * 2**30 + 2, pooled=2) == host


def test_a_pool_knows_what_is_free_on_a_device() -> None:
    """And gives it up where it is not wanted any more."""
    buffers, device = BufferPool(), torch.device("cpu")
    taken = buffers.take(10, torch.float32, device)
    assert buffers.held(device) == 0
    buffers.give(taken)
    assert (buffers.held(device), buffers.held(torch.device("meta"))) == (40, 0)
    buffers.release(torch.device("meta"))
    assert buffers.held(device) == 40
    buffers.release(device)
    assert buffers.held(device) == 0


def test_the_ring_holds_as_many_planes_as_a_patch_for_any_length() -> None:
    """For volumes of 30 and of 3,000 planes."""
    for length in (30, 3000):
        buffers = BufferPool()
        grid = make_grid((length, 5, 6), (8, 5, 6), (4, 0, 0))
        patches = torch.ones(1, 2, 8, 5, 6).expand(len(grid), -1, -1, -1, -1)
        streamed(grid, patches, list(range(len(grid))), "gaussian", 0, 3, buffers)
        (ring,) = buffers._free
        assert len(ring) == 2 * 8 * 5 * 6


def test_a_patch_that_comes_too_early_is_refused_and_named() -> None:
    """A patch of a later start would overwrite incomplete planes; nothing of its batch is added."""
    grid = make_grid((12, 4, 4), (6, 4, 2), (2, 0, 0))
    aggregator = GridAggregator(Placed(grid), "average", consumer=lambda slab: None)
    with pytest.raises(LedgerError, match="starts at 4 along i came while 2 of those at 0 are missing"):
        aggregator.add_batch(torch.ones(1, 1, 6, 4, 2), grid.locations[2:3])
    for n in range(len(grid)):
        aggregator.add_batch(torch.ones(1, 1, 6, 4, 2), grid.locations[n : n + 1])
    assert aggregator.ledger.missing == 0


def test_a_patch_for_planes_already_handed_over_is_refused() -> None:
    """It can only be a repeated patch, and the message says so."""
    grid = make_grid((12, 4, 4), (6, 4, 4), (2, 0, 0))
    aggregator = GridAggregator(Placed(grid), "average", consumer=lambda slab: None)
    aggregator.add_batch(torch.ones(2, 1, 6, 4, 4), grid.locations[:2])
    with pytest.raises(LedgerError, match=r"came twice: \(0, 0, 0, 6, 4, 4\)"):
        aggregator.add_batch(torch.ones(1, 1, 6, 4, 4), grid.locations[:1])


def test_a_streaming_aggregator_has_no_output_tensor() -> None:
    """Its planes went to the consumer: asking for the output is an error, not a wrong volume."""
    grid = make_grid((4, 4, 4), 4, 0)
    aggregator = GridAggregator(Placed(grid), consumer=lambda slab: None)
    aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), grid.locations)
    with pytest.raises(BatchError, match="keeps no volume"):
        aggregator.get_output_tensor()


AXIS_MAPS = st.tuples(st.floats(0.3, 3.0), st.booleans(), st.floats(-2, 2), st.integers(1, 9), st.booleans())


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.permutations([0, 1, 2]),
    st.tuples(AXIS_MAPS, AXIS_MAPS, AXIS_MAPS),
    st.integers(0, 2),
    st.lists(st.integers(1, 3), min_size=9, max_size=9),
    st.integers(1, 400),
)
def test_planes_restored_one_by_one_equal_the_restored_volume(
    shape: tuple[int, int, int],
    axes: list[int],
    lines: tuple[tuple[float, bool, float, int, bool], ...],
    axis: int,
    cuts: list[int],
    voxels: int,
) -> None:
    """To the bit, for every permutation, flip, scale and shift, and every division into slabs."""
    source = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32))
    maps = []
    for a, (scale, flip, offset, size, whole) in zip(axes, lines, strict=True):
        scale, offset = (1.0, float(round(offset))) if whole else (scale, offset)
        maps.append(AxisMap(a, size, -scale if flip else scale, shape[a] - 1 - offset if flip else offset))
    restorer = Restorer((maps[0], maps[1], maps[2]), axis, shape, voxels=voxels)
    found = torch.full((2, *(m.size for m in maps)), torch.nan)
    start = 0
    for count in cuts:
        count = min(count, shape[axis] - start)
        if count:
            planes = source.narrow(axis + 1, start, count).clone()
            for piece in restorer.feed(start, planes):
                where, slab = piece.where, piece.restored()
                assert found[:, *where].isnan().all()  # each voxel once
                line = 2 * min(found.shape[1:]) * sorted(found.shape[1:])[1]
                assert slab.numel() <= max(voxels, line)
                found[:, *where] = slab
            planes.fill_(torch.nan)  # as the ring does, it is used again
        start += count
    if start == shape[axis]:
        assert torch.equal(found, resample(source, (maps[0], maps[1], maps[2])))


@pytest.mark.parametrize("spacing", [None, 1.7, (0.8, 2.3, 1.1)])
@pytest.mark.parametrize("orientation", ["RAS", "SPL", "AIL"])
@pytest.mark.parametrize("mode", [*BLENDS])
def test_streamed_labels_equal_those_of_the_whole_score_volume(
    mode: str, orientation: str, spacing: float | tuple[float, float, float] | None
) -> None:
    """Whole scores that are interpolated and then arg-maxed give the same labels and scores."""
    rng = np.random.default_rng(3)
    affine = np.diag([1.5, 1.1, 2.0, 1.0]) @ np.array([[0, -1, 0, 3], [1, 0, 0, 2], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    subject = Subject(t1=ScalarImage(tensor=rng.normal(size=(1, 17, 14, 21)).astype(np.float32), affine=affine))
    preprocess = Preprocess(orientation, spacing)

    def network(patches: Tensor) -> Tensor:
        return torch.cat([patches, -patches, patches.abs() - 0.5], 1)

    volumes = predict_volume(
        network, subject, 8, 4, preprocess=preprocess, stitch=Stitch(mode, ["labels", "logits"]), batch_size=3
    )
    model_subject, space = preprocess(subject)
    sampler = GridSampler(model_subject, 8, 4, fit=True)
    whole = GridAggregator(sampler, mode)
    for patch in sampler:
        whole.add_batch(network(patch["t1"]["data"][None]), patch["location"][None])
    scores = resample(whole.scores(), space.in_scores(sampler.padding, (1, 1, 1)))
    np.testing.assert_allclose(volumes["logits"], scores.numpy(), rtol=1e-5, atol=1e-5)
    margin = scores.topk(2, 0).values
    sure = (margin[0] - margin[1]).abs() > 1e-4
    assert torch.equal(torch.from_numpy(volumes["labels"][0]).long()[sure], scores.argmax(0)[sure])
    assert sure.float().mean() > 0.99


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.tuples(AXES, AXES, AXES),
    st.sampled_from([*BLENDS]),
    st.sampled_from([None, "RAS", "SPL", "AIL"]),
    st.sampled_from([None, 0.7, 1.9]),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_streamed_output_and_product_equals_the_unstreamed(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    orientation: str | None,
    spacing: float | None,
    size: int,
    seed: int,
) -> None:
    """Two named outputs, one of them smaller, for any order of patches that streaming accepts."""
    doubled = to_grid(tuple((2 * p, 2 * half, 2 * more) for p, half, more in axes))
    overlap = tuple(o - o % 4 for o in doubled.patch_overlap)  # steps that a factor of 2 divides
    rng, affine = np.random.default_rng(seed), np.diag([-1.3, 0.8, 1.0, 1.0])
    subject = Subject(t1=ScalarImage(torch.zeros(1, *doubled.shape), affine=affine))
    model_subject, space = Preprocess(orientation, spacing)(subject)
    sampler = GridSampler(model_subject, doubled.patch_size, overlap, fit=True, divisible_by=2)
    grid = sampler.grid
    shapes = {"seg": (3, grid.patch_size), "small": (2, tuple(p // 2 for p in grid.patch_size))}
    patches = {
        name: torch.from_numpy(rng.normal(0, 3, (len(grid), channels, *patch))).float()
        for name, (channels, patch) in shapes.items()
    }
    names = ["labels", "logits", "probabilities", "entropy", "disagreement"]
    quilt, order = SubjectStitcher(Stitch(mode, names), sampler, space), in_starts(grid, grid.streaming_axis, rng)
    for first in range(0, len(order), size):
        some = order[first : first + size]
        quilt.add({name: tensor[some] for name, tensor in patches.items()}, some)
    made = quilt.volumes()
    assert len(made) == 10
    for name, factor in (("seg", 1), ("small", 2)):
        maps = space.in_scores(sampler.padding, (factor,) * 3)
        sums = []
        for averaged in (patches[name], Moments(ACTIVATIONS["softmax"], each=False)(patches[name])):
            whole = GridAggregator(sampler, mode, downsampling_factor=factor)
            whole.add_batch(averaged, grid.locations)
            sums.append(whole.scores())
        scores = resample(sums[0], maps)
        p = scores.softmax(0)
        expected = {
            "logits": scores,
            "probabilities": p,
            "entropy": torch.special.entr(p).sum(0)[None],
            "disagreement": resample((sums[1][-1:] - sums[1][:-1].square().sum(0)[None]).clamp(min=0), maps),
        }
        for product, volume in expected.items():
            np.testing.assert_allclose(made[f"{name}_{product}"], volume.numpy(), rtol=1e-4, atol=1e-5)
        margin = scores.topk(2, 0).values
        sure = (margin[0] - margin[1]) > 1e-4
        assert torch.equal(torch.from_numpy(made[f"{name}_labels"][0]).long()[sure], scores.argmax(0)[sure])


def test_a_finished_subject_is_freed_without_the_garbage_collector() -> None:
    """No reference cycle holds the volumes of a SubjectStitcher."""
    native = Frame((6, 6, 6), np.eye(4))
    gc.collect()
    gc.disable()
    try:
        quilt = SubjectStitcher(Stitch("crop"), Placed(make_grid((6, 6, 6), 6)), Preprocess().space(_subject(native)))
        quilt.add({"": torch.ones(1, 2, 6, 6, 6)}, [0])
        labels = weakref.ref(quilt.volumes()["labels"].base)
        del quilt
        assert labels() is None
    finally:
        gc.enable()


def _subject(frame: Frame) -> Subject:
    return Subject(image=ScalarImage(tensor=torch.zeros(1, *frame.shape), affine=frame.affine))
