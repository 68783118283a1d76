"""Tests skipping: a patch without foreground is not predicted, counts as background, and never gives NaN."""

import numpy as np
import pytest
import torch
from grids import Placed, in_starts, to_grid
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxquilt import predict_volume
from voxquilt.data.foreground import empty_patches, mask_foreground, patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.errors import BatchError, InputError, LedgerError, OutputError
from voxquilt.geometry.frame import Frame
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend import MonaiGaussian, to_blend
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.stitch import Stitch

# Per axis: patch size, overlap as a share of the largest possible, voxels beside the first patch.
AXES = st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(0, 12))


def renormalised(grid: Grid, patches: Tensor, skipped: set[int], mode: str, fill: list[float]) -> Tensor:
    """A reference: weighted sums over the patches added, divided by their weights; the fill where there are none."""
    blend = to_blend(mode)
    i, j, k = (blend.axis_weights(grid, axis) for axis in range(3))
    if isinstance(blend, MonaiGaussian):  # whose weights are raised where they are small
        i, j, k = (blend.window(n).expand(count, -1) for n, count in zip(grid.patch_size, grid.counts, strict=True))
    total = torch.zeros(patches.shape[1], *grid.shape, dtype=torch.float64)
    cover = torch.zeros(grid.shape, dtype=torch.float64)
    for n in set(range(len(grid))) - skipped:
        (a, b, c), (i0, j0, k0, i1, j1, k1) = grid.place(n), grid.location(n)
        weights = i[a][:, None, None] * j[b][:, None] * k[c]
        weights = weights.clamp(min=blend.floor) if isinstance(blend, MonaiGaussian) else weights
        total[:, i0:i1, j0:j1, k0:k1] += patches[n].double() * weights
        cover[i0:i1, j0:j1, k0:k1] += weights
    return torch.where(cover > 0, total / cover, torch.tensor(fill, dtype=torch.float64)[:, None, None, None])


def covering(grid: Grid, skipped: set[int]) -> Tensor:
    """How many patches are added to each voxel."""
    count = torch.zeros(grid.shape, dtype=torch.float64)
    for n in set(range(len(grid))) - skipped:
        i0, j0, k0, i1, j1, k1 = grid.location(n)
        count[i0:i1, j0:j1, k0:k1] += 1
    return count


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(AXES, AXES, AXES),
    st.sampled_from([*BLENDS]),
    st.integers(0, 2),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.2, 0.6, 0.95, 1.0]),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 999),
)
@example(((5, 2, 4), (7, 3, 5), (7, 3, 6)), "average", 0, 1, 0.2, torch.float16, False, 0)  # 160 patches cover a voxel
def test_skipped_patches_have_no_weight_and_holes_hold_the_fill(
    axes: tuple[tuple[int, int, int], ...],
    mode: str,
    axis: int,
    size: int,
    share: float,
    dtype: torch.dtype,
    streams: bool,
    seed: int,
) -> None:
    """Equal to the reference for every blend, axis, order and choice of patches, all and none included."""
    grid, rng = to_grid(axes), np.random.default_rng(seed)
    patches = torch.from_numpy(rng.normal(5, 1, size=(len(grid), 2, *grid.patch_size))).to(dtype)
    skipped = {n for n in range(len(grid)) if rng.random() < share}
    found = torch.full((2, *grid.shape), torch.nan, dtype=torch.float64)

    def keep(slab: object) -> None:
        found.narrow(axis + 1, slab.start, slab.stop - slab.start).copy_(slab.scores)  # type: ignore[attr-defined]

    aggregator = GridAggregator(
        Placed(grid), mode, consumer=keep if streams else None, axis=axis, skipped=skipped, fill=[-3.0, 8.0]
    )
    order = [n for n in in_starts(grid, axis, rng) if n not in skipped]
    aggregator.add_batch(patches[:0], grid.locations[:0])
    for first in range(0, len(order), size):
        some = order[first : first + size]
        aggregator.add_batch(patches[some], grid.locations[some])
    if not streams:
        found = aggregator.get_output_tensor().double()
    aggregator.add_batch(patches[:0], grid.locations[:0])  # changes nothing any more
    expected = renormalised(grid, patches, skipped, mode, [-3.0, 8.0])
    if mode == "crop":
        assert torch.equal(found, expected)
    else:
        # Sums of n products of a value and three factors, in float32, divided by sums of n weights: each sum is within
        # (n + 3) 2^-24 of its terms (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2).
        bound = (2 * covering(grid, skipped) + 8) * 2.0**-24 * expected.abs()
        assert ((found - expected).abs() <= bound).all()


def test_adding_a_skipped_patch_is_an_error() -> None:
    """The message does not call it repeated; the other patches are still required."""
    grid = make_grid((8, 4, 4), 4)
    aggregator = GridAggregator(Placed(grid), skipped=[1])
    with pytest.raises(LedgerError, match=r"patch that is skipped came: \(4, 0, 0, 8, 4, 4\)"):
        aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), grid.locations[1:])
    with pytest.raises(LedgerError, match="1 of 2 patches are missing"):
        aggregator.get_output_tensor()


def test_a_volume_without_predicted_patches_needs_an_empty_batch() -> None:
    """Otherwise the number of channels is unknown."""
    grid = make_grid((4, 4, 4), 4)
    aggregator = GridAggregator(Placed(grid), skipped=[0], fill=7)
    with pytest.raises(BatchError, match="an empty batch"):
        aggregator.get_output_tensor()
    aggregator.add_batch(torch.ones(0, 3, 4, 4, 4), grid.locations[:0])
    assert torch.equal(aggregator.get_output_tensor(), torch.full((3, 4, 4, 4), 7.0))


def test_fill_has_as_many_values_as_channels() -> None:
    """Another number is an error as soon as the channels are known."""
    grid = make_grid((8, 4, 4), 4)
    with pytest.raises(BatchError, match="fill has 2 values for patches with 3 channels"):
        GridAggregator(Placed(grid), skipped=[1], fill=[1.0, 2.0]).add_batch(
            torch.ones(1, 3, 4, 4, 4), grid.locations[:1]
        )


# Patches without foreground.


@settings(deadline=None, max_examples=60)
@given(st.tuples(AXES, AXES, AXES), st.sampled_from([0.0, 0.01, 0.3, 1.0]), st.booleans(), st.integers(0, 999))
def test_a_patch_is_skipped_if_none_of_its_voxels_is_foreground(
    axes: tuple[tuple[int, int, int], ...], share: float, padded: bool, seed: int
) -> None:
    """Compared patch by patch; padding is never foreground."""
    grid = to_grid(axes)
    image = ScalarImage(torch.zeros(1, *grid.shape))
    sampler = GridSampler(
        Subject(t1=image), grid.patch_size, grid.patch_overlap, "edge" if padded else None, fit=True, divisible_by=3
    )
    foreground = torch.from_numpy(np.random.default_rng(seed).random(grid.shape) < share)
    around = torch.zeros(sampler.grid.shape, dtype=torch.bool)
    inner = [slice(b, n - a) for n, (b, a) in zip(sampler.grid.shape, sampler.padding, strict=True)]
    around[inner[0], inner[1], inner[2]] = foreground
    empty = [n for n, (a, b, c, d, e, f) in enumerate(sampler.locations.tolist()) if not around[a:d, b:e, c:f].any()]
    skipped = empty_patches(sampler, foreground)
    assert skipped == empty
    kept = patches_to_predict(sampler, skipped)
    order = sampler.grid.streaming_order.tolist()
    assert kept == ([n for n in order if n not in empty] or order[:1])


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.sampled_from([None, "RAS", "SPL", "AIL"]),
    st.sampled_from([None, 0.4, 1.0, 3.7, (0.6, 5.0, 1.0)]),
    st.integers(0, 999),
)
def test_no_voxel_of_a_mask_is_lost_in_model_space(
    shape: tuple[int, int, int], orientation: str | None, spacing: object, seed: int
) -> None:
    """Each native mask voxel marks the model voxel nearest in world space; voxels far from the mask are not marked."""
    rng = np.random.default_rng(seed)
    affine = np.diag([1.2, 0.9, 2.1, 1.0]) @ np.array([[0, -1, 0, 3], [1, 0, 0, 2], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    mask = torch.from_numpy(rng.random((1, *shape)) < 0.1)
    subject = Subject(t1=ScalarImage(torch.zeros(1, *shape), affine=affine))
    space = Preprocess(orientation, spacing).space(subject)  # type: ignore[arg-type]
    found = mask_foreground(LabelMap(mask.byte(), affine=affine), subject, space)
    model = np.stack(np.meshgrid(*map(np.arange, space.model.shape), indexing="ij"), -1).reshape(-1, 3)
    in_world = model @ space.model.affine[:3, :3].T + space.model.affine[:3, 3]
    # Half a voxel along each axis, and half as much again where the field of view is not a multiple of the spacing.
    reach = 0.76 * np.linalg.norm(np.maximum(space.model.spacing, np.array(subject.frame.spacing)[[1, 0, 2]].max()))
    voxels = mask[0].nonzero().numpy() @ affine[:3, :3].T + affine[:3, 3]
    for voxel in voxels:
        distances = np.linalg.norm(in_world - voxel, axis=1)
        nearest = np.flatnonzero(distances < distances.min() + 1e-6)
        assert found.ravel().numpy()[nearest].any()
    for point in in_world[found.ravel().numpy()]:
        assert np.linalg.norm(voxels - point, axis=1).min() <= reach


def test_a_mask_on_another_grid_is_an_error_that_names_it() -> None:
    """A shifted mask would skip the wrong patches."""
    subject = Subject(t1=ScalarImage(torch.zeros(1, 4, 4, 4)))
    mask = LabelMap(torch.ones(1, 4, 4, 4).byte(), affine=np.diag([1, 1, 2.0, 1]))
    with pytest.raises(InputError, match="the mask of skip"):
        predict_volume(lambda x: x, subject, 4, skip=mask)


# From images to labels.


@pytest.mark.parametrize("axis", range(3))
def test_all_patches_at_both_ends_may_be_skipped(axis: int) -> None:
    """Along every streaming axis."""
    volume = torch.zeros(1, 8, 8, 8).repeat_interleave(3, axis + 1)
    volume.narrow(axis + 1, 13, 5).fill_(20)
    made = predict_volume(over15, Subject(t1=ScalarImage(volume)), 6, 2, skip=5.0)
    np.testing.assert_array_equal(made["labels"], volume > 15)


HEAD = torch.zeros(1, 24, 20, 22)
HEAD[:, 2:9, 3:10, 4:12] = torch.from_numpy(np.random.default_rng(0).uniform(10, 20, (1, 7, 7, 8))).float()


def over15(x: Tensor) -> Tensor:
    return torch.cat([15 - x, x - 15], 1)


@pytest.mark.parametrize("mode", [*BLENDS])
@pytest.mark.parametrize("spacing", [None, 1.6])
def test_skipping_saves_patches_and_keeps_the_labels(mode: str, spacing: float | None) -> None:
    """By a threshold and by a mask."""
    subject = Subject(t1=ScalarImage(HEAD))
    everything = predict_volume(over15, subject, 6, 2, preprocess=Preprocess(spacing=spacing), stitch=Stitch(mode))
    for skip in (5.0, 0.0, LabelMap((HEAD > 0).byte())):  # strictly above: 0 is not above 0
        seen: list[int] = []
        some = predict_volume(
            lambda x: seen.append(len(x)) or over15(x),  # noqa: B023
            subject,
            6,
            2,
            preprocess=Preprocess(spacing=spacing),
            stitch=Stitch(mode, ["labels", "probabilities", "entropy", "disagreement", "logits"]),
            skip=skip,
            batch_size=2,
        )
        total = len(GridSampler(Preprocess(spacing=spacing)(subject).subject, 6, 2))
        assert 0 < sum(seen) < total / 3
        np.testing.assert_array_equal(some["labels"], everything["labels"])
        assert all(np.isfinite(volume).all() for volume in some.values())
        np.testing.assert_allclose(some["probabilities"].sum(0), 1, atol=1e-6)
        far = np.s_[:, -4:, -4:, -4:]
        assert (some["probabilities"][0][far[1:]] > 0.999999).all()
        assert some["entropy"][far].max() < 1e-6
        assert not some["disagreement"][far].any()
        assert (some["logits"][1][far[1:]] == -30).all()


@pytest.mark.parametrize(
    ("channels", "options", "fill", "labels"),
    [
        (3, {}, [0, -30, -30], 0),
        (3, {"activation": "none"}, [1, 0, 0], 0),
        (3, {"activation": "sigmoid"}, [-30, -30, -30], 0),
        (1, {"activation": "sigmoid", "threshold": 0.5}, [-30], 0),
        (1, {"threshold": 0.5}, [0], 0),
        (3, {"fill": [0, 0, 4]}, [0, 0, 4], 2),
        (2, {"fill": 3}, [3, 3], 0),
        (1, {"threshold": -5.0, "fill": -9}, [-9], 0),
    ],
)
def test_a_subject_without_foreground_is_all_background(
    channels: int, options: dict, fill: list[float], labels: int
) -> None:
    """One patch is predicted to learn the channels; its values are not used."""
    calls: list[int] = []

    def network(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.full_like(x, 99.0).expand(-1, channels, -1, -1, -1)

    made = predict_volume(
        network,
        Subject(t1=ScalarImage(torch.zeros(1, 9, 8, 7))),
        4,
        2,
        stitch=Stitch(products=["logits", "labels"], **options),
        skip=0.5,
    )
    assert calls == [1]
    np.testing.assert_array_equal(made["logits"], np.broadcast_to(np.reshape(fill, (-1, 1, 1, 1)), (channels, 9, 8, 7)))
    assert (made["labels"] == labels).all()


def test_a_fill_that_would_become_a_label_is_refused() -> None:
    """With a negative threshold a score of 0 is label 1, so skipped voxels would be foreground."""
    subject = Subject(t1=ScalarImage(HEAD))
    with pytest.raises(
        OutputError, match=r"not predicted would count as label 1.*stitch\.threshold=-1\.0; set stitch\.fill"
    ):
        predict_volume(lambda x: x, subject, 6, 2, stitch=Stitch(threshold=-1.0), skip=5.0)
    with pytest.raises(OutputError, match="would count as label 1"):
        predict_volume(
            lambda x: x, subject, 6, 2, stitch=Stitch("crop", ["image"], threshold=-1.0, compare=["hann"]), skip=5.0
        )
    with pytest.raises(OutputError, match="fill has 3 values; the output has 2 channels"):
        predict_volume(over15, subject, 6, 2, stitch=Stitch(fill=[1, 2, 3]), skip=5.0)


def test_each_named_output_is_filled_by_itself() -> None:
    """Named and smaller outputs have their own channels and grids."""
    frame = Frame((24, 20, 22), np.eye(4))

    def network(x: Tensor) -> dict[str, Tensor]:
        return {"seg": over15(x), "small": torch.nn.functional.avg_pool3d(x, 2), "image": x + 1}

    made = predict_volume(network, Subject(t1=ScalarImage(HEAD, affine=frame.affine)), 6, 2, skip=5.0)
    assert {name: volume.shape for name, volume in made.items()} == {
        "seg_labels": (1, 24, 20, 22),
        "small_image": (1, 24, 20, 22),
        "image_image": (1, 24, 20, 22),
    }
    np.testing.assert_array_equal(made["seg_labels"], HEAD > 15)
    assert (made["image_image"][:, -4:, -4:, -4:] == 0).all()
    np.testing.assert_allclose(made["image_image"][:, 2:9, 3:10, 4:12], HEAD[:, 2:9, 3:10, 4:12] + 1, rtol=1e-5)
