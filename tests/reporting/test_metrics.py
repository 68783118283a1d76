"""Tests metrics: Dice, surface Dice, the Hausdorff distance and volumes equal their definitions, in mm."""

from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from voxquilt.reporting.metrics import Agreement, agreements, class_dice

NEIGHBOURS = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
OBLIQUE = np.array([[0.5, 0.1, 0, 3], [-0.1, 0.5, 0.2, -4], [0, 0.3, 1.5, 5], [0, 0, 0, 1]])


def surface(volume: np.ndarray, value: int) -> list[tuple[int, ...]]:
    """Surface voxels, found voxel by voxel."""
    inside = {tuple(index) for index in np.argwhere(volume == value).tolist()}
    return [v for v in inside if any(tuple(np.add(v, step).tolist()) not in inside for step in NEIGHBOURS)]


def plain(labels: np.ndarray, truth: np.ndarray, affine: np.ndarray, tolerance: float) -> dict[int, Agreement]:
    """The definitions as slow loops."""
    found = {}
    for value in sorted({*labels.ravel().tolist(), *truth.ravel().tolist()} - {0}):
        a, b = labels == value, truth == value
        ours, theirs = ([affine[:3, :3] @ v for v in surface(volume, value)] for volume in (labels, truth))
        there, back = (
            [min((float(np.linalg.norm(p - q)) for q in others), default=inf) for p in points]
            for points, others in ((ours, theirs), (theirs, ours))
        )
        near = sum(d <= tolerance for d in there + back) / len(there + back)
        voxel = abs(np.linalg.det(affine[:3, :3])) / 1000
        hd95_mm = inf if inf in there + back else max(np.percentile(there, 95), np.percentile(back, 95))
        dice = 2 * int((a & b).sum()) / int(a.sum() + b.sum())
        found[value] = Agreement(dice, near, hd95_mm, a.sum() * voxel, b.sum() * voxel)
    return found


def same(a: dict[int, Agreement], b: dict[int, Agreement]) -> None:
    assert a.keys() == b.keys()
    for value in a:
        for name, number in vars(a[value]).items():
            assert number == pytest.approx(getattr(b[value], name), rel=1e-9, abs=1e-9, nan_ok=True), (value, name)


SHAPES = st.tuples(*[st.integers(1, 6)] * 3)
VOLUMES = SHAPES.flatmap(
    lambda shape: st.tuples(*[arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 2, 9]))] * 2)
)


@settings(deadline=None, max_examples=150)
@given(VOLUMES, st.sampled_from([np.eye(4), np.diag([-0.5, 1.5, 3.1, 1]), OBLIQUE]), st.sampled_from([0.4, 1.0, 2.3]))
def test_metrics_equal_their_definitions(
    volumes: tuple[np.ndarray, np.ndarray], affine: np.ndarray, tolerance: float
) -> None:
    """By a slow voxel-wise reference, for classes of either volume, with oblique axes too."""
    same(agreements(*volumes, affine, tolerance), plain(*volumes, affine, tolerance))


@settings(deadline=None, max_examples=50)
@given(VOLUMES)
def test_swapping_labels_and_truth_swaps_only_the_volumes(volumes: tuple[np.ndarray, np.ndarray]) -> None:
    """All other metrics are symmetric."""
    a, b = agreements(*volumes, OBLIQUE, 1.0), agreements(*volumes[::-1], OBLIQUE, 1.0)
    for value, one in a.items():
        other = b[value]
        assert (one.volume_ml, one.true_volume_ml) == (other.true_volume_ml, other.volume_ml)
        assert (one.dice, one.hd95_mm) == pytest.approx((other.dice, other.hd95_mm))
        assert one.surface_dice == pytest.approx(other.surface_dice)


@pytest.mark.filterwarnings("ignore:monai.metrics:FutureWarning")
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_those_of_monai(seed: int) -> None:
    """For shifted balls at 0.5 x 1 x 2 mm; MONAI counts surfaces and distances alike."""
    rng = np.random.default_rng(seed)
    grid, spacing = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij")), (0.5, 1.0, 2.0)

    def ball() -> np.ndarray:
        centre = rng.uniform(9, 15, 3)[:, None, None, None]
        return ((grid - centre) ** 2).sum(0) < rng.uniform(4, 8) ** 2

    labels, truth = ball(), ball()
    one_hot = [torch.tensor(mask)[None, None].float() for mask in (labels, truth)]
    found = agreements(labels.astype(np.uint8), truth.astype(np.uint8), np.diag([*spacing, 1]), 1.5)[1]
    wanted = compute_surface_dice(*one_hot, [1.5], include_background=True, spacing=spacing).item()
    assert found.surface_dice == pytest.approx(wanted, abs=1e-6)
    far = compute_hausdorff_distance(*one_hot, include_background=True, percentile=95, spacing=spacing).item()
    assert found.hd95_mm == pytest.approx(far, abs=1e-5)
    dice = class_dice(torch.tensor(labels).long(), torch.tensor(truth).long(), 2)[1].item()
    assert found.dice == pytest.approx(dice, abs=1e-12)


def test_equal_masks_have_perfect_metrics() -> None:
    """Dice and surface Dice 1, distance 0, also at the volume's border and for a single voxel."""
    labels = np.zeros((5, 4, 3), np.uint8)
    labels[:2] = 1
    labels[4, 3, 2] = 2
    for found in agreements(labels, labels, OBLIQUE, 0.0).values():
        assert (found.dice, found.surface_dice, found.hd95_mm, found.volume_error_ml, found.relative_volume_error) == (
            1,
            1,
            0,
            0,
            0,
        )


def test_a_class_missing_on_one_side_is_infinitely_far() -> None:
    """Dice and surface Dice 0, true volumes; a class that both lack has no row."""
    labels, truth = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, :2], truth[3] = 1, 3
    found = agreements(labels, truth, np.diag([10, 10, 10, 1]), 1.0)
    same(found, {1: Agreement(0, 0, inf, 2, 0), 3: Agreement(0, 0, inf, 0, 16)})
    assert (found[1].volume_error_ml, found[1].relative_volume_error) == (pytest.approx(2), inf)
    assert found[3].relative_volume_error == -1
    assert isnan(Agreement(nan, nan, nan, 0, 0).relative_volume_error)
    assert agreements(truth * 0, truth * 0, np.eye(4), 1.0) == {}


def test_label_values_may_be_large_and_far_apart() -> None:
    """FreeSurfer's 2035, and more than 65535: the result equals that for small numbers."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 4, (2, 8, 7, 6))
    wanted = agreements(*small.astype(np.uint8), OBLIQUE, 1.0)
    for values in ([0, 3, 2035, 9000], [0, 7, 70000, 2**31 + 5]):
        large = np.array(values)[small]
        found = agreements(*large, OBLIQUE, 1.0)
        assert list(found) == values[1:]
        assert list(found.values()) == list(wanted.values())


def test_a_shift_by_two_voxels_is_a_distance_of_two_spacings() -> None:
    """Along k at 3 mm: all distances are at most 6 mm, those of the faces exactly 6."""
    labels, truth = np.zeros((9, 9, 20), np.uint8), np.zeros((9, 9, 20), np.uint8)
    labels[2:7, 2:7, 3:12], truth[2:7, 2:7, 5:14] = 1, 1
    found = agreements(labels, truth, np.diag([1, 1, 3, 1]), 1.0)[1]
    assert found.hd95_mm == 6
    assert found.dice == pytest.approx(7 / 9)
    assert found.volume_ml == pytest.approx(225 * 3 / 1000)
