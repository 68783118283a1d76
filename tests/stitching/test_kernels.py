"""Tests how stitching runs on a device, on the host: Triton's interpreter runs the kernels, and products are deferred.

On a CUDA device, tests/test_gpu.py runs the same ways for real.
"""

import importlib
import logging
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grids import Placed, to_grid
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import OutputError
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.geometry.neighbour_tables import NeighbourTables
from voxquilt.geometry.resample import resample
from voxquilt.geometry.slab_split import Part, split_rows
from voxquilt.geometry.space import AxisMap, AxisMaps, Space
from voxquilt.geometry.streamed_resample import Restorer
from voxquilt.stitching.blend import AxisWeights, Blend, to_blend
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.execution import Execution
from voxquilt.stitching.kernels import loading
from voxquilt.stitching.kernels.label_rule import ABOVE, ARG_MAX, LabelRule, label_rule
from voxquilt.stitching.kernels.launcher import Launcher, kind_of
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.output_volumes import Scratch
from voxquilt.stitching.products.base import ACTIVATIONS, NOT_FINITE
from voxquilt.stitching.products.labels import ArgMax, Threshold
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

pytest.importorskip("triton", reason="Triton exists on Linux only")

HOST, DEFERRED, KERNELS = Execution(), Execution(deferred=True), Execution(deferred=True, kernels=True)
# Per axis: patch size, half of the overlap, voxels beside the first patch. Triton's interpreter is slow.
AXES = st.tuples(*[st.tuples(st.integers(1, 4), st.integers(0, 1), st.integers(0, 4))] * 3)
AVERAGES = [mode for mode in BLENDS if to_blend(mode).averages]
# What Triton's interpreter computes on scores that are not finite, and where a voxel lies outside.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """The kernels are run by Triton's interpreter, which a kernel chooses when its module is imported."""

    def load() -> None:
        for name in ("blend_add", "probe", "restore_labels"):
            importlib.reload(importlib.import_module(f"voxquilt.stitching.kernels.{name}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        load()
    yield
    load()


def channels_last(patches: Tensor) -> Tensor:
    """The same patches, with channels as neighbours in memory."""
    return patches.contiguous(memory_format=torch.channels_last_3d)


# Adding patches.


def sums_of(
    grid: Grid, mode: str, axis: int, patches: Tensor, numbers: Sequence[int], batches: Sequence[int]
) -> Tensor:
    """(C + 1, I, J, K): the sums of patches and of their weights by the kernel, in a ring that is read row by row."""
    weights = [to_blend(mode).axis_weights(grid, n).float() for n in range(3)]
    shape = list(grid.shape)
    shape[axis] = grid.patch_size[axis]
    ring, covers = torch.zeros(patches.shape[1], *shape), torch.zeros(1, *shape)
    kernel = loading.load_blend_add(grid, axis, weights, [ring, covers])
    assert kernel.takes(patches)
    result = torch.zeros(patches.shape[1] + 1, *grid.shape)
    for row, start in enumerate(grid.starts[axis]):
        own = [n for n, number in enumerate(numbers) if grid.place(number)[axis] == row]
        edges = [0, *(edge for edge in batches if edge < len(own)), len(own)]
        for first, stop in pairwise(edges):
            if first < stop:
                kernel(patches[own[first:stop]], [numbers[n] for n in own[first:stop]])
        following = [*grid.starts[axis], grid.shape[axis]][row + 1]
        for plane in range(start, following if row + 1 < grid.counts[axis] else grid.shape[axis]):
            kept = plane % shape[axis]
            result.select(axis + 1, plane).copy_(torch.cat([ring, covers]).select(axis + 1, kept))
            ring.select(axis + 1, kept).zero_()
            covers.select(axis + 1, kept).zero_()
    return result


@settings(deadline=None, max_examples=12)
@given(
    AXES,
    st.sampled_from(AVERAGES),
    st.integers(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    st.sampled_from([1, 2, 5]),
    st.lists(st.integers(1, 4), max_size=2, unique=True).map(sorted),
    st.integers(0, 999),
)
def test_the_kernel_adds_every_patch_with_its_weights(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    axis: int,
    dtype: torch.dtype,
    last: bool,
    channels: int,
    batches: list[int],
    seed: int,
) -> None:
    """For every grid, ring axis and type, in any batches, in streaming order or not, some patches left out."""
    grid, rng = to_grid(axes), np.random.default_rng(seed)
    numbers = [int(n) for n in grid.order_along(axis) if rng.random() < 0.9]
    numbers = [*reversed(numbers)] if seed % 4 == 0 else numbers
    patches = torch.from_numpy(rng.normal(size=(len(numbers), channels, *grid.patch_size))).to(dtype)
    weights = [to_blend(mode).axis_weights(grid, n) for n in range(3)]
    expected = torch.zeros(channels + 1, *grid.shape, dtype=torch.float64)
    for patch, number in zip(patches, numbers, strict=True):
        (a, b, c), (i0, j0, k0, i1, j1, k1) = grid.place(number), grid.location(number)
        share = weights[0][a][:, None, None] * weights[1][b][:, None] * weights[2][c]
        expected[:, i0:i1, j0:j1, k0:k1] += torch.cat([patch.double(), torch.ones(1, *grid.patch_size)]) * share
    made = sums_of(grid, mode, axis, channels_last(patches) if last else patches, numbers, batches)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_sums_of_the_kernel_do_not_depend_on_batches() -> None:
    """To the bit: the patches of a voxel are added one after the other."""
    grid = make_grid((4, 9, 7), (4, 5, 3), 2)
    patches = torch.randn(len(grid), 3, *grid.patch_size, generator=torch.Generator().manual_seed(0))
    once, by_one = (sums_of(grid, "gaussian", 0, patches, range(len(grid)), b) for b in ([], range(1, len(grid))))
    assert torch.equal(once, by_one)


def test_tiles_of_the_kernel_cover_patches_that_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of contiguous patches and of channels last, a patch and its channels take several tiles along each axis."""
    from voxquilt.stitching.kernels import blend_add

    for name, value in (("_VALUES", 16), ("_ALONG_K", 8), ("_CHANNELS", 2)):
        monkeypatch.setattr(blend_add, name, value)
    grid = make_grid((1, 5, 18), (1, 5, 14), 0)
    patches = torch.randn(2, 3, *grid.patch_size, generator=torch.Generator().manual_seed(0))
    tiles = [blend_add._tile(patches), blend_add._tile(channels_last(patches))]
    assert tiles == [(1, 2, 8), (2, 1, 8)]
    expected = sums_of(grid, "average", 0, patches, [0, 1], [])
    assert torch.equal(sums_of(grid, "average", 0, channels_last(patches), [0, 1], []), expected)
    volume = torch.zeros(3, 1, 5, 18)
    volume[..., :14] += patches[0]
    volume[..., 4:] += patches[1]
    volume[..., 4:14] /= 2
    np.testing.assert_allclose(expected[:-1], volume, rtol=1e-6, atol=1e-6)


def test_the_patches_of_a_row_take_one_launch_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two where a patch between them is skipped; and a batch may span rows."""
    from voxquilt.stitching.kernels.blend_add import BlendAdd

    grid = make_grid((9, 4, 4), (5, 2, 2), 0)
    places, launched = grid.order_along(grid.streaming_axis).tolist(), list[list[int]]()
    monkeypatch.setattr(BlendAdd, "_launch", lambda _, batch, n: launched.append(places[n : n + len(batch)]))
    space = Preprocess().space(Subject(t1=ScalarImage(tensor=torch.zeros(1, *grid.shape))))
    quilt = SubjectStitcher(
        Stitch("hann", ["logits"], fill=0), Placed(grid), space, memory=Memory(execution=KERNELS), skipped=[6]
    )
    axis = grid.streaming_axis
    order = [n for n in grid.order_along(axis).tolist() if n != 6]
    quilt.add({"": torch.zeros(len(order), 2, *grid.patch_size)}, order)
    assert [n for numbers in launched for n in numbers] == order
    assert all(len({grid.place(n)[axis] for n in numbers}) == 1 for numbers in launched)
    assert len(launched) == grid.counts[axis] + 1


# Labels.


def restored(rule: LabelRule, maps: AxisMaps, scores: Tensor, labels: Tensor, mark: Tensor | None = None) -> Tensor:
    """Labels of a whole volume by the kernel."""
    neighbours = NeighbourTables([m.neighbours(scores.shape[m.axis + 1]) for m in maps])
    kernel = loading.load_restore_labels(rule, maps, neighbours, torch.zeros(1) if mark is None else mark)
    assert kernel.takes(scores)
    kernel(scores, (0, 0, 0), [slice(0, m.size) for m in maps], labels)
    return labels


MAPS = st.tuples(
    st.permutations(range(3)),
    st.tuples(*[st.tuples(st.integers(1, 7), st.sampled_from([1, -1, 0.6, -1.7, 1.3]), st.integers(1, 6))] * 3),
)


def to_maps(axes: Sequence[int], sizes: Sequence[tuple[int, float, int]]) -> tuple[AxisMaps, list[int]]:
    """Maps, and the shape of the scores that they read; some voxels beside those are repeated."""
    shape = [0, 0, 0]
    maps = []
    for axis, (size, scale, voxels) in zip(axes, sizes, strict=True):
        shape[axis] = max(voxels, size) if abs(scale) == 1 else voxels
        maps.append(AxisMap(axis, size, scale, 0.0 if scale > 0 else -scale * (size - 1)))
    return (maps[0], maps[1], maps[2]), shape


@settings(deadline=None, max_examples=20)
@given(
    MAPS,
    st.sampled_from([1, 2, 3, 14]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(0, 999),
)
@example(((0, 1, 2), ((5, 0.6, 4), (4, -0.7, 3), (5, 1.3, 6))), 3, torch.float32, 0, 2, 0)
@example(((2, 0, 1), ((5, 0.6, 4), (4, -0.7, 3), (5, 1.3, 6))), 3, torch.float32, 1, 2, 0)
@example(((1, 2, 0), ((5, -0.6, 4), (4, 0.7, 3), (5, 1.3, 6))), 14, torch.float64, 1, 1, 0)
def test_the_kernel_makes_the_labels_of_torch(
    axes: tuple[Sequence[int], tuple[tuple[int, float, int], ...]],
    classes: int,
    dtype: torch.dtype,
    axis: int,
    step: int,
    seed: int,
) -> None:
    """Through all permutations, flips and spacings, while planes come along any axis."""
    maps, shape = to_maps(*axes)
    scores = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = resample(scores, maps)
    labels = torch.full((1, *expected.shape[1:]), 99, dtype=torch.uint8)
    two = torch.cat([expected, torch.full_like(expected[:1], -torch.inf)]).topk(2, 0).values
    sure = two[0] - two[1] > 1e-6
    restorer = Restorer(maps, axis, (shape[0], shape[1], shape[2]))
    kernel = loading.load_restore_labels(LabelRule(ARG_MAX), maps, restorer.tables, torch.zeros(1))
    for start in range(0, shape[axis], step):
        for slab in restorer.slabs(start, scores.narrow(axis + 1, start, min(step, shape[axis] - start))):
            offsets = [slab.start if n == axis else 0 for n in range(3)]
            kernel(slab.planes, offsets, slab.where, labels[:, *slab.where])
    assert torch.equal(labels[0][sure], expected.argmax(0)[sure].to(torch.uint8))


@pytest.mark.parametrize(("classes", "dtype"), [(105, torch.uint8), (300, torch.uint16), (257, torch.uint32)])
def test_every_class_can_be_the_label(classes: int, dtype: torch.dtype) -> None:
    """The first, the last, and numbers beyond a byte."""
    best = torch.tensor([0, 1, classes - 1, 255 % classes, 254 % classes]).reshape(1, 1, -1)
    scores = torch.nn.functional.one_hot(best, classes).movedim(-1, 0).float()
    maps = (AxisMap(0, 1, 1, 0), AxisMap(1, 1, 1, 0), AxisMap(2, 5, 1, 0))
    made = restored(LabelRule(ARG_MAX), maps, scores, torch.empty(1, 1, 1, 5, dtype=dtype))
    assert made.flatten().tolist() == best.flatten().tolist()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_first_of_several_best_classes_is_the_label(scale: float) -> None:
    """As torch's arg-max has it."""
    scores = torch.tensor([[0.0, 3, 1, 2], [3, 3, 1, 2], [3, 0, 1, 2], [3, 3, 0, 2]]).reshape(4, 1, 1, 4)
    maps = (AxisMap(0, 1, 1, 0), AxisMap(1, 1, 1, 0), AxisMap(2, round(3 / scale) + 1, scale, 0))
    made = restored(LabelRule(ARG_MAX), maps, scores, torch.empty(1, 1, 1, maps[2].size).byte())
    assert torch.equal(made[0], resample(scores, maps).argmax(0).byte())
    assert made[0, 0, 0, :: round(1 / scale)].tolist() == [1, 0, 0, 0]


@settings(deadline=None, max_examples=8)
@given(MAPS, st.sampled_from([1, 3]), st.sampled_from(["none", "sigmoid"]), st.integers(0, 999))
def test_the_kernel_makes_the_masks_of_torch(
    axes: tuple[Sequence[int], tuple[tuple[int, float, int], ...]], channels: int, activation: str, seed: int
) -> None:
    """A mask per channel, where its activated score is above the threshold."""
    maps, shape = to_maps(*axes)
    scores = torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))
    activated = ACTIVATIONS[activation](resample(scores, maps))
    rule = label_rule(Threshold(ACTIVATIONS[activation], 0.6))
    assert rule is not None
    made = restored(rule, maps, scores, torch.full_like(activated, 9, dtype=torch.uint8))
    sure = (activated - 0.6).abs() > 1e-5
    assert torch.equal(made[sure], (activated > 0.6).byte()[sure])


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("where", "mode"), [((0, 0, 0, 0), ARG_MAX), ((2, 1, 1, 2), ARG_MAX), ((1, 0, 1, 1), ABOVE)])
def test_the_kernel_marks_scores_that_are_not_finite(
    scale: float, value: float, where: tuple[int, ...], mode: int
) -> None:
    """In any class and at any voxel; and finite scores, however large, are not marked."""
    scores = torch.full((3, 2, 2, 3), 1e30)
    scores[1] *= -1
    maps = [AxisMap(n, round((size - 1) / scale) + 1, scale, 0) for n, size in enumerate(scores.shape[1:])]
    labels = torch.empty(3 if mode else 1, *(m.size for m in maps), dtype=torch.uint8)
    for expected in (0, torch.nan):
        mark = torch.zeros(1)
        restored(LabelRule(mode), (maps[0], maps[1], maps[2]), scores, labels, mark)
        np.testing.assert_equal(mark.item(), expected)
        scores[where] = value


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_scores_may_lie_further_apart_than_32_bits_count(order: tuple[int, int, int]) -> None:
    """The kernel is told which planes of a volume it gets; here the last of 2^27 + 4."""
    first = 2**27
    scores = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    maps = [AxisMap(axis, scores.shape[axis + 1], 1.0, first if axis == 0 else 0) for axis in order]
    sizes = [first + 4 if m.axis == 0 else scores.shape[m.axis + 1] for m in maps]
    neighbours = NeighbourTables([m.neighbours(size) for m, size in zip(maps, sizes, strict=True)])
    kernel = loading.load_restore_labels(LabelRule(ARG_MAX), (maps[0], maps[1], maps[2]), neighbours, torch.zeros(1))
    labels = torch.empty(1, *(m.size for m in maps), dtype=torch.uint8)
    kernel(scores, (first, 0, 0), [slice(0, m.size) for m in maps], labels)
    assert torch.equal(labels[0], scores.argmax(0).permute(order).byte())


@pytest.mark.parametrize("codes", ["RAS", "PIL", "SAR"])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_a_subject_compiles_the_label_kernel_once(
    codes: str, spacing: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However thin the slabs are that come: constants, and the stride that is compiled in if it is 1, stay."""
    from voxquilt.stitching.kernels import blend_add, restore_labels

    launches: list[tuple[object, ...]] = []
    kernel = restore_labels._restore
    fixed = [name for name in kernel.arg_names if name.isupper() or name == "scores_w"]

    class Recorded:
        def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **constants: Any) -> None:
                # Integers beyond 32 bits would have another type.
                assert all(abs(value) < 2**31 for value in args if isinstance(value, int))
                values = dict(zip(kernel.arg_names, args, strict=False)) | constants
                launches.append(tuple(values[name] for name in fixed))  # and no label is made, which takes long here

            return launch

    monkeypatch.setattr(restore_labels, "_restore", Recorded())
    monkeypatch.setattr(blend_add, "_add", defaultdict(lambda: lambda *args, **constants: None))
    sampler, space = subject_in(codes, spacing, (12, 13, 9))
    volumes_of(Stitch("hann", ["labels"]), sampler, space, {"": scores_for(sampler, 2, 0)}, execution=KERNELS)
    assert len(launches) > 2
    assert len(set(launches)) == 1


def test_products_of_users_are_not_taken_for_labels_that_kernels_make() -> None:
    """A product that extends ArgMax may compute anything, and so may an activation."""

    class Own(ArgMax):
        pass

    assert label_rule(Own()) is None
    assert label_rule(Threshold(torch.tanh, 0.5)) is None
    assert label_rule(ArgMax(np.dtype(np.uint16))) == LabelRule(ARG_MAX)


# Whole subjects.


def volumes_of(
    stitch: Stitch,
    sampler: GridSampler,
    space: Space,
    outputs: dict[str, Tensor],
    *,
    execution: Execution,
    size: int = 4,
    skipped: Sequence[int] = (),
    scratch: Scratch | None = None,
    moved: bool = False,
) -> dict[str, np.ndarray]:
    """The products of a subject, whose sums may move to the host halfway."""
    memory = Memory(execution=execution, scratch=scratch)
    quilt = SubjectStitcher(stitch, sampler, space, memory=memory, skipped=skipped)
    order = patches_to_predict(sampler, skipped)
    for first in range(0, len(order), size):
        some = order[first : first + size]
        quilt.add({name: patches[some] for name, patches in outputs.items()}, some)
        if moved and first <= len(order) // 2 < first + size:
            quilt.to(torch.device("cpu"))
            for name, volumes in quilt._products.values():
                assert volumes.on_device(name, (slice(0, 1), slice(0, 1), slice(0, 1))) is None
    assert quilt.complete
    return quilt.volumes()


def subject_in(
    codes: str, spacing: float | Sequence[float | None] | None, shape: tuple[int, int, int]
) -> tuple[GridSampler, Space]:
    """A sampler of a subject whose voxel axes point elsewhere than the model's, and its space."""
    affine = np.array([[0, 0, 1.2, 3], [-1, 0, 0, 1], [0, 1, 0, -4], [0, 0, 0, 1]])
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, *shape), affine=affine))
    model_subject, space = Preprocess(codes, spacing)(subject)
    return GridSampler(model_subject, (4, 5, 3), 2, fit=True), space


def scores_for(sampler: GridSampler, channels: int, seed: int) -> Tensor:
    """Patches that agree nowhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(sampler), channels, *sampler.grid.patch_size, generator=generator)


def assert_labels(labels: np.ndarray, expected: np.ndarray, logits: np.ndarray) -> None:
    """Labels equal where the best class leads by more than rounding errors."""
    best = np.sort(logits, 0)
    sure = best[-1:] - best[-2:-1] > 1e-5
    assert labels.dtype == expected.dtype
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(labels[sure], expected[sure])


@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from([*BLENDS]),
    st.sampled_from(["RAS", "PIL", "SAR"]),
    st.sampled_from([None, 1.5, (0.8, 1, 1.4)]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([[], [1, 2]]),
    st.integers(1, 6),
)
def test_kernels_give_the_volumes_of_torch(
    mode: str,
    codes: str,
    spacing: float | tuple[float, ...] | None,
    classes: int,
    dtype: torch.dtype,
    skipped: list[int],
    size: int,
) -> None:
    """Labels, masks, and a product that torch computes beside them, for any batches."""
    sampler, space = subject_in(codes, spacing, (6, 7, 5))
    skipped = [number for number in skipped if number < len(sampler) - 1]
    outputs = {"": scores_for(sampler, classes, seed=size).to(dtype)}
    threshold = 0.1 if classes == 1 else None
    stitch = Stitch(mode, ["labels", "logits"], threshold=threshold, fill=0)
    run = partial(volumes_of, stitch, sampler, space, outputs, size=size, skipped=skipped)
    expected, made = run(execution=HOST), run(execution=KERNELS)
    np.testing.assert_allclose(made["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    logits = expected["logits"]
    assert_labels(made["labels"], expected["labels"], np.concatenate([logits, 0 * logits + 0.1])[: max(2, classes)])


@pytest.mark.parametrize("execution", [DEFERRED, KERNELS])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("per_slice", [None, True])
def test_every_order_in_a_box_gives_the_volumes_of_the_host(
    execution: Execution, order: int, per_slice: bool | None
) -> None:
    """By kernels where they can, and background around the box."""
    volume = torch.ones(1, 9, 8, 7)
    volume[:, :2], volume[..., 5:] = 0, 0
    affine = np.array([[0, 0, 1.2, 3], [-1, 0, 0, 1], [0, 1, 0, -4], [0, 0, 0, 1]])
    preprocess = Preprocess("SAR", 1.3, crop="nonzero", grid="corner")
    model, space = preprocess(Subject(t1=ScalarImage(tensor=volume, affine=affine)))
    sampler = GridSampler(model, (4, 5, 3), 2, fit=True)
    stitch = Stitch("nnunet", ["labels", "logits"], order=order, per_slice=per_slice)
    run = partial(volumes_of, stitch, sampler, space, {"": scores_for(sampler, 3, seed=1)})
    expected, made = run(execution=HOST), run(execution=execution)
    np.testing.assert_allclose(made["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert_labels(made["labels"], expected["labels"], expected["logits"])
    assert not made["labels"][0, :2].any()
    assert made["labels"].any()


@pytest.mark.parametrize("mode", ["gaussian", "crop"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("spacing", [None, 1.3])
@pytest.mark.parametrize("limit", [None, 100])
def test_deferred_products_are_those_of_the_host(
    mode: str, moved: bool, spacing: float | None, limit: float | None, tmp_path: Path
) -> None:
    """To the bit, for every product; also if the device's memory is full halfway, and if they wait in files."""
    sampler, space = subject_in("SAR", spacing, (9, 8, 7))
    outputs = {"": scores_for(sampler, 4, seed=1), "mask": scores_for(sampler, 1, seed=2)}
    names = ["labels", "logits", "probabilities", "entropy", "disagreement"]
    stitch = Stitch(mode, {"": names, "mask": ["image"]}, compare=[] if mode == "crop" else ["average"])
    scratch = None if limit is None else Scratch(tmp_path, limit)
    run = partial(volumes_of, stitch, sampler, space, outputs, scratch=scratch)
    expected, made = run(execution=HOST), run(execution=DEFERRED, moved=moved)
    assert made.keys() == expected.keys()
    for name, volume in expected.items():
        assert made[name].dtype == volume.dtype
        np.testing.assert_array_equal(made[name], volume, err_msg=name)


@pytest.mark.parametrize("execution", [DEFERRED, KERNELS])
@pytest.mark.parametrize("highest", [255, 300, 70000])
def test_labels_of_any_type_stay_on_a_device(execution: Execution, highest: int) -> None:
    """With one, two and four bytes per voxel."""
    sampler, space = subject_in("SAR", None, (4, 4, 4))
    stitch = Stitch("crop", ["labels"], label_values=[0, highest, 7])
    run = partial(volumes_of, stitch, sampler, space, {"": scores_for(sampler, 3, seed=0)})
    expected, made = run(execution=HOST)["labels"], run(execution=execution)["labels"]
    assert made.dtype == np.min_scalar_type(highest)
    np.testing.assert_array_equal(made, expected)


@dataclass(frozen=True)
class Strided:
    """Another blend's weights, otherwise in memory: 'transposed', or where all patches have the same, 'expanded'."""

    blend: Blend
    how: str
    averages = True

    def axis_weights(self, grid: Grid, axis: int) -> AxisWeights:
        weights = self.blend.axis_weights(grid, axis)
        if self.how == "transposed":
            return weights.T.contiguous().T
        same = weights[:1].expand_as(weights)
        return same if torch.equal(same, weights) else weights


@pytest.mark.parametrize(("how", "overlap"), [("transposed", 2), ("expanded", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_read_weights_however_they_lie_in_memory(how: str, overlap: int, dtype: torch.dtype) -> None:
    """A blend of another package may transpose or expand them."""
    model_subject, space = Preprocess()(Subject(t1=ScalarImage(tensor=torch.zeros(1, 8, 10, 6))))
    sampler = GridSampler(model_subject, (4, 5, 3), overlap, fit=True)
    patches = {"": scores_for(sampler, 2, seed=0).to(dtype)}
    plain, strided = (Stitch(blend, ["logits"]) for blend in (to_blend("hann"), Strided(to_blend("hann"), how)))
    expected = volumes_of(plain, sampler, space, patches, execution=HOST)["logits"]
    made = volumes_of(strided, sampler, space, patches, execution=KERNELS)["logits"]
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moved", [False, True])
def test_labels_by_kernels_survive_a_full_device(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for volumes there, each slab goes to the host; sums may move there too."""
    monkeypatch.setattr("voxquilt.stitching.output_rings.choose_device", lambda device, *_: torch.device("cpu"))
    sampler, space = subject_in("SAR", 1.3, (6, 7, 5))
    run = partial(volumes_of, Stitch("hann", ["labels"]), sampler, space, {"": scores_for(sampler, 3, 0)})
    logits = volumes_of(Stitch("hann", ["logits"]), sampler, space, {"": scores_for(sampler, 3, 0)}, execution=HOST)[
        "logits"
    ]
    made = run(execution=KERNELS, moved=moved)
    assert_labels(made["labels"], run(execution=HOST)["labels"], logits)


@pytest.mark.parametrize("execution", [DEFERRED, KERNELS])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_on_a_device_make_the_volumes_of_one_process(execution: Execution, ranks: int) -> None:
    """Heads are exchanged, and parts placed, whether the owner's own planes have left the device or not."""
    sampler, space = subject_in("PIL", 1.2, (9, 6, 7))
    patches = scores_for(sampler, 3, seed=3)
    stitch = Stitch("gaussian", ["labels", "logits"])
    expected = volumes_of(stitch, sampler, space, {"": patches}, execution=HOST)
    parts = split_rows(sampler.grid, ranks)
    memory = Memory(execution=execution)

    def quilted(part: Part, *, owner: bool) -> SubjectStitcher:
        quilt = SubjectStitcher(stitch, sampler, space, memory=memory, part=part, holds_all=owner)
        order = patches_to_predict(sampler, [], part)
        quilt.add({"": patches[order]}, order)
        return quilt

    team = [quilted(part, owner=n == 1) for n, part in enumerate(parts)]
    for quilt, following in reversed([*pairwise(team)]):
        head = following.head()
        assert head is not None
        quilt.join(head)
    for quilt in [*team[:1], *team[2:]]:
        for name, where, array in quilt.parts():
            team[1].place(name, where, array)
    made = team[1].volumes()
    np.testing.assert_allclose(made["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert_labels(made["labels"], expected["labels"], expected["logits"])


@pytest.mark.parametrize("execution", [DEFERRED, KERNELS])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("products", [["labels"], ["probabilities"], ["disagreement"]])
def test_scores_that_are_not_finite_are_an_error_when_the_subject_is_finished(
    execution: Execution, value: float, products: list[str]
) -> None:
    """Not before, since that would wait for the device; and the next subject is not affected."""
    sampler, space = subject_in("RAS", None, (5, 6, 5))
    patches = scores_for(sampler, 2, seed=0)
    patches[len(patches) // 2, 1, 0, 0, 0] = value
    run = partial(volumes_of, Stitch("hann", products), sampler, space, execution=execution)
    with pytest.raises(OutputError, match=NOT_FINITE):
        run({"": patches})
    assert np.isfinite(run({"": patches.nan_to_num(0, 0)})[products[0]]).all()


def test_padding_that_is_not_finite_is_no_error() -> None:
    """It is not read."""
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 4, 4, 2)))
    sampler, space = GridSampler(subject, 4, 2, padding_mode="constant"), Preprocess().space(subject)
    assert max(max(pair) for pair in sampler.padding) > 0
    patches = scores_for(sampler, 2, seed=0)
    (i, *_), (j, *_), (k, *_) = sampler.padding
    for patch, (i0, j0, k0, *_) in zip(patches, sampler.grid.locations.tolist(), strict=True):
        patch[:, : max(0, i - i0)] = torch.nan
        patch[:, :, : max(0, j - j0)] = torch.nan
        patch[:, :, :, : max(0, k - k0)] = torch.nan
    assert patches.isnan().any()
    for execution in (HOST, DEFERRED, KERNELS):
        stitch = Stitch("hann", ["labels", "disagreement"])
        made = volumes_of(stitch, sampler, space, {"": patches}, execution=execution)
        assert made["labels"].shape == (1, 4, 4, 2)


# Where kernels can run.


def test_a_machine_without_what_triton_needs_stitches_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a container without a C compiler; the log says why it is slower."""

    def fail(_: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("voxquilt.stitching.kernels.probe.launch", fail)
    loading.kernels_run_on.cache_clear()
    with caplog.at_level(logging.WARNING, "voxquilt"):
        assert not loading.kernels_run_on(torch.device("cuda", 7))
        assert not loading.kernels_run_on(torch.device("cuda", 7))
    assert [record.message for record in caplog.records] == [
        "Triton does not work here (RuntimeError: Failed to find C compiler.): stitching on cuda:7 takes more kernels "
        "of torch and more time."
    ]
    assert not loading.kernels_run_on(torch.device("cpu"))
    loading.kernels_run_on.cache_clear()


def test_the_probe_launches_a_kernel() -> None:
    """Here in the interpreter."""
    from voxquilt.stitching.kernels.probe import launch

    assert launch(torch.device("cpu")).tolist() == [1]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from voxquilt.stitching.kernels import blend_add, probe, restore_labels


def compiled(kernel, pointers, constants):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(kernel, types, constexprs={(names.index(name),): value for name, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    print(kernel.__name__, len(code.asm["cubin"]) > 0)


weights = {f"weights_{axis}": "*fp32" for axis in "ijk"}
for axis, covers, stride, block in ((0, True, "batch_k", (1, 16, 64)), (2, False, "batch_c", (16, 1, 64))):
    constants = dict(AXIS=axis, HAS_COVERS=covers, BLOCK_C=block[0], BLOCK_J=block[1], BLOCK_K=block[2])
    pointers = {"batch": "*bf16", "sums": "*fp32", "covers": "*fp32", "table": "*i32"}
    compiled(blend_add._add, pointers | weights, constants | {stride: 1})
tables = {f"pairs_{axis}": "*i32" for axis in "dhw"} | {f"shares_{axis}": "*fp32" for axis in "dhw"}
for lerp, mode, far, double in ((True, 0, False, False), (False, 1, True, False), (True, 2, True, True)):
    constants = dict(LERP_D=lerp, LERP_H=True, LERP_W=lerp, FIRST=2, SECOND=0, THIRD=1, MODE=mode, FAR=far)
    pointers = {"scores": "*fp64" if double else "*fp32", "labels": "*u16", "not_finite": "*fp32", "threshold": "fp32"}
    compiled(restore_labels._restore, pointers | tables, constants | dict(DOUBLE=double, BLOCK_H=8, BLOCK_W=64))
compiled(probe._write_one, {"value": "*i32"}, {})
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts more than the compiler; compiling takes no GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    wanted = ["_add", "True"] * 2 + ["_restore", "True"] * 3 + ["_write_one", "True"]
    assert result.stdout.split() == wanted, result.stderr


# Launching.


def test_kinds_of_tensors_are_those_that_triton_tells_apart() -> None:
    """Types, strides, and on a GPU of AMD whether 32 bits count the memory: a first batch may be a single patch."""
    batches = [torch.empty(n, 2, 512, 512, 512, dtype=torch.float16, device="meta") for n in (1, 2, 4)]
    assert len({batch.stride() for batch in batches}) == 1
    assert kind_of(batches[0]) == kind_of(batches[1][1:]) != kind_of(batches[2])
    assert kind_of(batches[0]) == kind_of(batches[0].clone())
    assert kind_of(batches[0]) != kind_of(batches[0].float())
    assert kind_of(batches[0]) != kind_of(batches[0].to(memory_format=torch.channels_last_3d))


def test_a_kernel_is_compiled_once_for_launches_of_a_kind() -> None:
    """What Triton gives back for the first launch runs the others of its kind, with all their own arguments."""
    launches: list[tuple[object, ...]] = []

    class Compiled:
        def __init__(self, kind: object) -> None:
            self.kind = kind

        def __getitem__(self, programs: object) -> object:
            return lambda *arguments: launches.append(("compiled", self.kind, programs, *arguments))

    class Kernel:
        def __getitem__(self, programs: object) -> object:
            def run(*arguments: object, **options: object) -> Compiled:
                launches.append(("kernel", options, programs, *arguments))
                return Compiled(arguments[0])

            return run

    launcher = Launcher(Kernel())
    for kind, argument in (("a", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)):
        launcher(kind, (argument, 1, 1), kind, argument)
    options = {"enable_fp_fusion": False}
    assert launches == [
        ("kernel", options, (1, 1, 1), "a", 1),
        ("compiled", "a", (2, 1, 1), "a", 2),
        ("kernel", options, (3, 1, 1), "b", 3),
        ("compiled", "a", (4, 1, 1), "a", 4),
        ("compiled", "b", (5, 1, 1), "b", 5),
    ]


@pytest.mark.parametrize(("stride", "is_far"), [(2**30, True), (2**30 - 2, True), (2**30 - 3, False), (20, False)])
def test_the_kernel_is_told_of_scores_that_32_bits_do_not_count(stride: int, is_far: bool) -> None:
    """By the last voxel that is read, here 2 * stride + 4 behind the first."""
    from voxquilt.stitching.kernels.restore_labels import RestoreLabels

    shape, meta, kinds = (3, 4, 5), torch.device("meta"), list[tuple[object, ...]]()
    maps = (AxisMap(0, 3, 1, 0), AxisMap(1, 4, 1, 0), AxisMap(2, 5, 1, 0))
    kernel = RestoreLabels(LabelRule(ARG_MAX), maps, Restorer(maps, 1, shape).tables, torch.zeros(1, device=meta))
    kernel._launcher = lambda kind, *_: kinds.append(kind)  # type: ignore[assignment]
    scores = torch.empty_strided((2, *shape), (1, stride, 5, 1), device=meta)
    labels = torch.empty(1, *shape, dtype=torch.uint8, device=meta)
    kernel(scores, (0, 0, 0), [slice(0, n) for n in shape], labels)
    assert [kind[-1] for kind in kinds] == [is_far]
