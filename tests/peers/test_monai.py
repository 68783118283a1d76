"""MONAI's sliding window beside ours: equal by averages, and how far by gaussians, as docs/from-monai.md says."""

import re
from pathlib import Path

import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from voxquilt import GridAggregator, GridSampler
from voxquilt.stitching.blend import Blend, Windowed, gaussian

SAID = (Path(__file__).parents[2] / "docs/from-monai.md").read_text("utf-8")
FLOORED = Windowed(lambda patch: gaussian(patch).clamp(min=0.03))


def both(size: int, overlap: int, ours: str | Blend, theirs: str) -> Tensor:
    """The absolute difference of the two, of random scores from 0 to 1 that no two patches have in common."""
    volume = torch.zeros(1, size, size, size)
    sampler = GridSampler(volume, 32, overlap)
    patches = torch.rand(len(sampler), 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))

    left = iter(patches)

    def network(x: Tensor) -> Tensor:
        return torch.stack([next(left) for _ in range(len(x))])

    made = sliding_window_inference(volume[None], (32, 32, 32), 1, network, overlap=overlap / 32, mode=theirs)
    assert isinstance(made, Tensor)
    aggregator = GridAggregator(sampler, ours)
    aggregator.add_batch(patches, sampler.locations)
    return (aggregator.get_output_tensor() - made[0]).abs()[0]


@pytest.mark.parametrize(("size", "overlap"), [(80, 16), (80, 8), (70, 16)])
def test_average_is_monais_constant(size: int, overlap: int) -> None:
    """Patches lie alike where the overlap is a share that gives whole voxels."""
    assert both(size, overlap, "average", "constant").max() < 1e-6


@pytest.mark.parametrize(("overlap", "size", "row"), [(16, 96, "0.5"), (8, 104, "0.25")])
def test_the_difference_of_the_gaussians_is_the_one_that_is_said(overlap: int, size: int, row: str) -> None:
    """Largest, mean, mean 8 voxels away from the volume's faces, and largest with a window of one's own."""
    found = re.search(rf"\| {re.escape(row)} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", SAID)
    assert found is not None
    gauss, floored = both(size, overlap, "gaussian", "gaussian"), both(size, overlap, FLOORED, "gaussian")
    measured = [gauss.max(), gauss.mean(), gauss[8:-8, 8:-8, 8:-8].mean(), floored.max()]
    for value, said in zip(measured, map(float, found.groups()), strict=True):
        assert float(value) == pytest.approx(said, rel=0.1, abs=0.0005)
