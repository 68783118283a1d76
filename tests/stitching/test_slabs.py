"""Tests volumes that several processes share: parts that exchange their boundary planes give what one process gives."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from grids import Placed, in_starts, to_grid
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import BatchError, ConfigError, LedgerError, PatchShapeError
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.geometry.slab_split import Part, split_rows
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend import to_blend
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import FinishedPlanes, boundary, planes_of
from voxquilt.stitching.subject_stitcher import SubjectStitcher

# Per axis: patch size, overlap as a share of the largest possible, voxels beside the first patch.
AXES = st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(0, 9))
LONG = ((7, 3, 9), (3, 1, 2), (2, 0, 1))  # a plane is in up to seven rows
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.uint8, torch.int16, torch.int64]
# None of the patches, some, most, all of a part, all.
SKIPS = st.sampled_from(["none", "some", "most", "part", "all"])
CUTS = st.lists(st.integers(0, 99), max_size=3)


def cut(grid: Grid, axis: int, cuts: Sequence[int]) -> list[Part]:
    """Parts that begin at any rows, not only where `split_rows` would begin them."""
    rows = grid.counts[axis]
    edges = sorted({0, rows, *(n % rows for n in cuts)})
    return [Part(axis, first, stop) for first, stop in pairwise(edges)]


def skip(grid: Grid, parts: Sequence[Part], which: str, rng: np.random.Generator) -> list[int]:
    """Choose the patches that are not predicted; returns their numbers."""
    if which == "part":
        return [int(n) for n in parts[rng.integers(len(parts))].patches(grid)]
    share = {"none": 0, "some": 0.3, "most": 0.85, "all": 1}[which]
    return [n for n in range(len(grid)) if rng.random() < share]


def play(
    team: Sequence[GridAggregator | SubjectStitcher], steps: list[list[Callable[[], None]]], rng: np.random.Generator
) -> None:
    """Run the steps of the processes in any interleaving; each joins the next one's head after its own steps."""
    waiting = set(range(len(team) - 1))
    favour = rng.permutation(len(team)) if rng.random() < 0.5 else None
    while waiting or any(steps):
        able = [n for n in range(len(team)) if steps[n] or (n in waiting and team[n + 1].head() is not None)]
        n = min(able, key=lambda n: favour[n]) if favour is not None else int(rng.choice(able))
        if steps[n]:
            steps[n].pop(0)()
        else:
            waiting.remove(n)
            team[n].join([planes.clone() for planes in team[n + 1].head() or []])


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(AXES, AXES, AXES),
    st.sampled_from([*BLENDS]),
    st.integers(0, 2),
    CUTS,
    SKIPS,
    st.sampled_from([1, 2]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.float64]),
    st.integers(0, 999),
)
@example(LONG, "hann", 0, [1, 2, 3], "none", 1, torch.float32, None, 0)
@example(LONG, "crop", 0, [1, 2, 3], "some", 1, torch.int16, None, 0)
@example(LONG, "gaussian", 0, [1, 2, 3], "part", 1, torch.float32, None, 0)
def test_planes_of_all_parts_equal_those_of_one_process(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    axis: int,
    cuts: list[int],
    which: str,
    factor: int,
    dtype: torch.dtype,
    summed: torch.dtype | None,
    seed: int,
) -> None:
    """To the bit for crop; each part finishes the next one's first planes too, and all memory is returned."""
    grid, rng = to_grid(axes), np.random.default_rng(seed)
    if factor == 2:
        doubled = to_grid(tuple((2 * p, 2 * half, 2 * more) for p, half, more in axes))
        grid = make_grid(doubled.shape, doubled.patch_size, [o - o % 4 for o in doubled.patch_overlap])
    parts = cut(grid, axis, cuts)
    skipped = skip(grid, parts, which, rng)
    size = [p // factor for p in grid.patch_size]
    patches = torch.from_numpy(rng.integers(0, 99, (len(grid), 2, *size))).to(dtype)
    options = {"downsampling_factor": factor, "dtype": summed, "skipped": skipped, "fill": [3.0, 8.0]}
    one = GridAggregator(Placed(grid), mode, **options)  # type: ignore[arg-type]
    one.add_batch(patches[:0], grid.locations[:0])
    kept = [n for n in range(len(grid)) if n not in skipped]
    one.add_batch(patches[kept], grid.locations[kept])
    expected = one.scores()

    buffers = [BufferPool() for _ in parts]
    slabs: list[list[FinishedPlanes]] = [[] for _ in parts]

    def worker(n: int) -> tuple[GridAggregator, list[Callable[[], None]]]:
        def keep(slab: FinishedPlanes) -> None:
            slabs[n].append(FinishedPlanes(slab.axis, slab.start, slab.stop, slab.scores.clone()))

        aggregator = GridAggregator(
            Placed(grid), mode, consumer=keep, axis=axis, buffers=buffers[n], part=parts[n], **options  # type: ignore[arg-type]
        )  # fmt: skip
        own = {int(number) for number in parts[n].patches(grid)} - set(skipped)
        order, size = [number for number in in_starts(grid, axis, rng) if number in own], int(rng.integers(1, 6))
        batches = [order[first : first + size] for first in range(0, len(order), size)] or [[]]
        return aggregator, [lambda b=b: aggregator.add_batch(patches[b], grid.locations[b]) for b in batches]

    team, steps = zip(*(worker(n) for n in range(len(parts))), strict=True)
    play(team, list(steps), rng)
    for n, (aggregator, part, mine) in enumerate(zip(team, parts, slabs, strict=True)):
        assert aggregator.finished
        assert aggregator.ledger.missing == 0
        assert len(buffers[n]._free) == 1 + (bool(skipped) or mode == "monai")
        own = planes_of(part, aggregator.grid, to_blend(mode))
        last = n == len(parts) - 1
        assert mine[0].start == own.start
        assert [slab.start for slab in mine[1:]] == [slab.stop for slab in mine[:-1]]
        assert mine[-1].stop == own.stop + (not last)
        found = torch.cat([slab.scores for slab in mine], axis + 1)
        wanted = expected.narrow(axis + 1, own.start, found.shape[axis + 1])
        assert found.dtype == wanted.dtype
        if mode == "crop":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if not last:
            theirs = slabs[n + 1][0].scores.narrow(axis + 1, 0, 1)
            assert torch.equal(found.narrow(axis + 1, found.shape[axis + 1] - 1, 1), theirs)


NAMES = ["labels", "logits", "probabilities", "entropy", "disagreement"]


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.tuples(AXES, AXES, AXES),
    st.sampled_from([*BLENDS]),
    st.sampled_from([None, *BLENDS]),
    st.sampled_from(["scores", "labels"]),
    st.one_of(st.integers(1, 4), st.tuples(st.integers(0, 2), CUTS)),
    SKIPS,
    st.tuples(st.sampled_from([None, "RAS", "SPL", "AIL"]), st.sampled_from([None, 0.7, 1.9])),
    st.integers(0, 999),
)
@example(LONG, "average", "crop", "scores", (0, [1, 2, 3]), "some", ("AIL", 0.7), 0)
@example(LONG, "crop", "hann", "labels", (0, [1, 2, 3]), "part", ("SPL", 1.9), 0)
def test_volumes_of_all_parts_equal_those_of_one_process(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    other: str | None,
    restore: str,
    team: int | tuple[int, list[int]],
    which: str,
    model: tuple[str | None, float | None],
    seed: int,
) -> None:
    """Two named outputs, one of them smaller, and every product; any process may be the owner."""
    doubled = to_grid(tuple((2 * p, 2 * half, more) for p, half, more in axes))
    overlap = tuple(o - o % 4 for o in doubled.patch_overlap)  # steps that a factor of 2 divides
    rng, affine = np.random.default_rng(seed), np.diag([-1.3, 0.8, 1.0, 1.0])
    subject = Subject(t1=ScalarImage(torch.zeros(1, *doubled.shape), affine=affine))
    model_subject, space = Preprocess(*model)(subject)
    sampler = GridSampler(model_subject, doubled.patch_size, overlap, fit=True, divisible_by=2)
    grid = sampler.grid
    parts = split_rows(grid, team) if isinstance(team, int) else cut(grid, *team)
    skipped = skip(grid, parts, which, rng)
    # At each voxel one class leads by at least 2 in every mean of patches.
    outputs = {}
    for name, channels, factor in (("seg", 3, 1), ("small", 2, 2)):
        truth = torch.from_numpy(rng.integers(0, channels, [n // factor for n in grid.shape]))
        lead = 4.0 * torch.nn.functional.one_hot(truth, channels).movedim(-1, 0)
        cuts = [lead[:, a:d, b:e, c:f] for a, b, c, d, e, f in (grid.locations // factor).tolist()]
        outputs[name] = torch.stack([patch + torch.from_numpy(rng.uniform(-1, 1, patch.shape)) for patch in cuts])
        outputs[name] = outputs[name].float()
    compare = [] if other in (None, mode) else [other]
    stitch = Stitch(mode, NAMES, restore=restore, compare=compare)

    def steps(quilt: SubjectStitcher, order: list[int], size: int) -> list[Callable[[], None]]:
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        return [lambda b=b: quilt.add({name: output[b] for name, output in outputs.items()}, b) for b in batches]

    def alone(stitch: Stitch) -> dict[str, np.ndarray]:
        quilt = SubjectStitcher(stitch, sampler, space, skipped=skipped)
        for step in steps(quilt, patches_to_predict(sampler, skipped), 5):
            step()
        assert quilt.complete
        return quilt.volumes()

    owner = int(rng.integers(len(parts)))
    quilts = [
        SubjectStitcher(stitch, sampler, space, skipped=skipped, part=part, holds_all=n == owner)
        for n, part in enumerate(parts)
    ]
    play(
        quilts,
        [
            steps(quilt, patches_to_predict(sampler, skipped, part), int(rng.integers(1, 6)))
            for quilt, part in zip(quilts, parts, strict=True)
        ],
        rng,
    )
    assert all(quilt.complete for quilt in quilts)
    for n in rng.permutation([n for n in range(len(parts)) if n != owner]):
        for name, where, array in quilts[n].parts():
            assert array.flags.c_contiguous
            quilts[owner].place(name, where, array)
    made, expected = quilts[owner].volumes(), alone(stitch)
    margins = {"": alone(Stitch(mode, ["logits"]))}
    margins |= {f"_{c}": alone(Stitch(c, ["logits"])) for c in compare}
    assert made.keys() == expected.keys()
    for name, volume in made.items():
        output, _, product = name.partition("_")
        assert volume.dtype == expected[name].dtype
        if not product.startswith("labels"):
            exact = mode == "crop" and product == "logits"
            near = 0 if exact else 1e-5
            np.testing.assert_allclose(volume, expected[name], rtol=near, atol=near)
        elif restore == "labels" or (product.removeprefix("labels_") if "_" in product else mode) == "crop":
            np.testing.assert_array_equal(volume, expected[name])
        else:
            logits = np.sort(margins[product.removeprefix("labels")][f"{output}_logits"], 0)
            sure = logits[-1:] - logits[-2:-1] > 1e-4
            np.testing.assert_array_equal(volume[sure], expected[name][sure])


# How rows are shared.


@settings(deadline=None, max_examples=200)
@given(st.tuples(AXES, AXES, AXES), st.integers(1, 12))
def test_split_assigns_every_row_once_and_evenly(axes: tuple[tuple[int, int, int], ...], ranks: int) -> None:
    """Shares are contiguous, along one axis and not empty; along no other axis would the largest be smaller."""
    grid = to_grid(axes)
    parts = split_rows(grid, ranks)
    axis = parts[0].axis
    assert {part.axis for part in parts} == {axis}
    assert [part.first for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == grid.counts[axis]
    assert len(parts) == min(ranks, grid.counts[axis])
    sizes = [part.stop - part.first for part in parts]
    assert max(sizes) - min(sizes) <= 1
    shares = [-(-rows // min(ranks, rows)) / rows for rows in grid.counts]
    assert max(sizes) / grid.counts[axis] == min(shares)
    best = [n for n in range(3) if shares[n] == min(shares)]
    assert grid.patch_size[axis] / grid.shape[axis] == min(grid.patch_size[n] / grid.shape[n] for n in best)
    numbers = [int(n) for part in parts for n in part.patches(grid)]
    assert numbers == grid.order_along(axis).tolist()
    if ranks == 1:
        assert axis == grid.streaming_axis
        assert numbers == grid.streaming_order.tolist()


def test_split_chooses_the_axis_with_the_smallest_largest_share() -> None:
    """Three rows along i would leave one process two thirds; four along k leave it a half."""
    assert split_rows(make_grid((30, 10, 40), 10), 2) == [Part(2, 0, 2), Part(2, 2, 4)]
    assert split_rows(make_grid((30, 10, 40), 10), 3) == [Part(0, 0, 1), Part(0, 1, 2), Part(0, 2, 3)]
    assert split_rows(make_grid((10, 10, 10), 10), 4) == [Part(0, 0, 1)]


@settings(deadline=None, max_examples=100)
@given(st.tuples(AXES, AXES, AXES), st.sampled_from([*BLENDS]), st.integers(0, 2), CUTS)
def test_each_plane_is_finished_by_exactly_one_part(
    axes: tuple[tuple[int, int, int], ...], mode: str, axis: int, cuts: list[int]
) -> None:
    """The planes exchanged at a boundary, and one more, fit into the ring of a patch's length."""
    grid, blend = to_grid(axes), to_blend(mode)
    parts = cut(grid, axis, cuts)
    assert [plane for part in parts for plane in planes_of(part, grid, blend)] == list(range(grid.shape[axis]))
    assert all(planes_of(part, grid, blend) for part in parts)
    for part in parts[1:]:
        edge = boundary(grid, blend, axis, part.first)
        assert 0 <= edge.high - edge.low < grid.patch_size[axis]


@settings(deadline=None, max_examples=50)
@given(st.tuples(AXES, AXES, AXES), st.integers(1, 4), SKIPS, st.integers(0, 99))
def test_every_part_predicts_at_least_one_patch(
    axes: tuple[tuple[int, int, int], ...], ranks: int, which: str, seed: int
) -> None:
    """Its patches that are not skipped, row by row; if all are, one of them, which tells the number of channels."""
    grid = to_grid(axes)
    sampler = GridSampler(
        Subject(t1=ScalarImage(torch.zeros(1, *grid.shape))), grid.patch_size, grid.patch_overlap, None
    )
    parts = split_rows(grid, ranks)
    skipped = skip(grid, parts, which, np.random.default_rng(seed))
    for part in parts:
        own = part.patches(grid).tolist()
        assert patches_to_predict(sampler, skipped, part) == ([n for n in own if n not in skipped] or own[:1])


# When heads are ready.


@pytest.mark.parametrize("mode", [*BLENDS])
def test_a_head_is_ready_before_the_part_is_finished(mode: str) -> None:
    """It waits neither for rows behind the boundary nor for the next part."""
    grid = make_grid((40, 4, 4), (8, 4, 4), (4, 0, 0))  # rows at 0, 4, ..., 32
    aggregator = GridAggregator(Placed(grid), mode, consumer=lambda slab: None, part=Part(0, 3, 7))
    there = []
    for n in range(3, 7):
        aggregator.add_batch(torch.ones(1, 1, 8, 4, 4), grid.locations[n : n + 1])
        there.append(aggregator.head() is not None)
    # Planes 12 to 16; for crop, plane 14 alone.
    assert there == ([True] * 4 if mode == "crop" else [False, True, True, True])
    head, *weights = aggregator.head() or []
    assert len(weights) == (mode == "monai")
    assert head.shape == (1, 1 if mode == "crop" else 5, 4, 4)
    assert head.is_contiguous()
    assert head.dtype == torch.float32


def test_heads_of_crop_never_wait_for_the_next_part() -> None:
    """Each voxel has one owner, also where parts are single rows and a plane lies in many of them."""
    grid = make_grid((12, 2, 2), (8, 2, 2), (6, 0, 0))  # rows at 0, 2, 4
    aggregator = GridAggregator(Placed(grid), "crop", consumer=lambda slab: None, part=Part(0, 1, 2))
    aggregator.add_batch(torch.ones(1, 1, 8, 2, 2), grid.locations[1:2])
    assert aggregator.head() is not None
    assert not aggregator.finished


def test_heads_made_in_inference_mode_are_ordinary_tensors() -> None:
    """Inference tensors could not be changed outside of it."""
    grid = make_grid((12, 2, 2), (8, 2, 2), (4, 0, 0))
    with torch.inference_mode():
        aggregator = GridAggregator(Placed(grid), "hann", consumer=lambda slab: None, part=Part(0, 1, 2))
        aggregator.add_batch(torch.ones(1, 1, 8, 2, 2), grid.locations[1:])
        assert not any(planes.is_inference() for planes in aggregator.head() or [])
        assert aggregator.head()


# Errors.


def two(part: Part, mode: str = "hann", skipped: Sequence[int] = ()) -> tuple[GridAggregator, Grid]:
    grid = make_grid((12, 4, 4), (8, 4, 4), (4, 0, 0))
    return GridAggregator(Placed(grid), mode, consumer=lambda slab: None, part=part, skipped=skipped), grid


@pytest.mark.parametrize("mode", [*BLENDS])
def test_a_patch_of_another_part_is_refused_and_named(mode: str) -> None:
    """Before or behind this one; the refused batch changes nothing."""
    for own, others in ((0, 1), (1, 0)):
        aggregator, grid = two(Part(0, own, own + 1), mode, skipped=[others])
        with pytest.raises(
            LedgerError, match=rf"of another part came: \({4 * others}, 0, 0.*Part\(axis=0, first={own}"
        ):
            aggregator.add_batch(torch.ones(1, 1, 8, 4, 4), grid.locations[others : others + 1])
        with pytest.raises(LedgerError, match=rf"1 of 1 patches are missing, among them \({4 * own}, 0, 0"):
            aggregator.check_finished()


def test_a_head_is_joined_once_after_the_own_patches_and_not_at_the_last_part() -> None:
    """An aggregator without parts refuses it too."""
    first, grid = two(Part(0, 0, 1))
    second, _ = two(Part(0, 1, 2))
    ones = torch.ones(1, 1, 8, 4, 4)
    second.add_batch(ones, grid.locations[1:])
    head = second.head()
    assert head is not None
    assert first.head() == []
    with pytest.raises(LedgerError, match="1 of 1 patches are missing"):
        first.join(head)
    first.add_batch(ones, grid.locations[:1])
    with pytest.raises(LedgerError, match="the head of the next part is missing"):
        first.check_finished()
    first.join(head)
    first.check_finished()
    with pytest.raises(LedgerError, match="a head came twice"):
        first.join(head)
    for last in (second, GridAggregator(Placed(grid)), GridAggregator(Placed(grid), consumer=lambda slab: None)):
        with pytest.raises(BatchError, match="no part follows"):
            last.join(head)


def test_a_head_of_another_shape_or_type_is_refused_and_changes_nothing() -> None:
    """Other planes, channels or type, or no weights where skipping needs them."""
    first, grid = two(Part(0, 0, 1))
    first.add_batch(torch.ones(1, 2, 8, 4, 4), grid.locations[:1])
    right = torch.ones(2, 5, 4, 4)
    for wrong in ([], [right, right[:1]], [right[:, 1:]], [right[:1]], [right.double()], [right[..., :3]]):
        with pytest.raises(PatchShapeError, match=r"the head of the next part is .*wanted is \[\(\(2, 5, 4, 4\)"):
            first.join(wrong)
    first.join([right])
    assert first.finished


def test_a_part_needs_a_consumer_and_its_own_axis_and_rows() -> None:
    """A whole volume has no parts."""
    grid = make_grid((12, 4, 4), (8, 4, 4), (4, 0, 0))
    for options in ({}, {"consumer": print, "axis": 1}):
        with pytest.raises(ConfigError, match="give a consumer and axis=0"):
            GridAggregator(Placed(grid), part=Part(0, 0, 1), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rows 1 to 3 along i: there are 2"):
        GridAggregator(Placed(grid), part=Part(0, 1, 3), consumer=print)
    for axis, first, stop in ((3, 0, 1), (0, 1, 1), (0, -1, 1), (0, 2, 1)):
        with pytest.raises(ConfigError, match="a part is at least one row"):
            Part(axis, first, stop)


def test_the_owner_requires_every_plane_of_every_product_once() -> None:
    """Missing, repeated and misshapen planes are refused, as is collecting on a process that is not the owner."""
    grid = make_grid((12, 4, 4), (8, 4, 4), (4, 0, 0))
    space = Preprocess()(Subject(t1=ScalarImage(torch.zeros(1, 12, 4, 4)))).space
    stitch = Stitch("average", ["logits", "labels"])
    owner, second = (
        SubjectStitcher(stitch, Placed(grid), space, part=Part(0, n, n + 1), holds_all=n == 0) for n in range(2)
    )
    assert owner.head() == []
    assert second.head() is None
    for unopened in (owner.volumes, lambda: owner.join([]), lambda: list(second.parts())):
        with pytest.raises(LedgerError, match="no patch has come"):
            unopened()
    owner.add({"": torch.ones(1, 2, 8, 4, 4)}, [0])
    second.add({"": torch.ones(1, 2, 8, 4, 4)}, [1])
    assert owner.complete
    with pytest.raises(LedgerError, match="the head of the next part is missing"):
        owner.volumes()
    head = second.head()
    assert head is not None
    with pytest.raises(PatchShapeError):
        owner.join(head * 2)
    owner.join(head)
    sent = {name: (where, array) for name, where, array in second.parts()}
    where, array = sent["logits"]
    assert where == (slice(8, 12), slice(0, 4), slice(0, 4))
    with pytest.raises(LedgerError, match="4 of 12 planes of logits are missing, the first at 8 along i"):
        owner.volumes()
    for wrong in (array[:1], array.astype(np.float64), array[:, 1:]):
        with pytest.raises(PatchShapeError, match=r"wanted is float32 \(2, 4, 4, 4\)"):
            owner.place("logits", where, wrong)
    owner.place("logits", where, array)
    with pytest.raises(LedgerError, match="planes of logits came twice"):
        owner.place("logits", where, array)
    with pytest.raises(LedgerError, match="4 of 12 planes of labels are missing"):
        owner.volumes()
    owner.place("labels", *sent["labels"])
    with pytest.raises(BatchError, match="no room for planes of 'entropy'"):
        owner.place("entropy", *sent["labels"])
    assert (owner.volumes()["logits"] == 1).all()
    for refused in (second.volumes, lambda: second.place("labels", *sent["labels"])):
        with pytest.raises(BatchError):
            refused()
