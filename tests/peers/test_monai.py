"""Compares MONAI's sliding window with voxquilt: equal for averages, and for gaussians as docs/from-monai.md says."""

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
    """The absolute difference of the two, for random scores from 0 to 1 that no two patches share."""
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
def test_average_equals_monais_constant_mode(size: int, overlap: int) -> None:
    """Patches lie alike where the overlap is a share that gives whole voxels."""
    assert both(size, overlap, "average", "constant").max() < 1e-6


@pytest.mark.parametrize(("overlap", "size", "row"), [(16, 96, "0.5"), (8, 104, "0.25")])
def test_gaussian_differs_from_monais_as_documented(overlap: int, size: int, row: str) -> None:
    """Largest and mean difference, mean 8 voxels from the volume's faces, and largest with a user-defined window."""
    found = re.search(rf"\| {re.escape(row)} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", SAID)
    assert found is not None
    gauss, floored = both(size, overlap, "gaussian", "gaussian"), both(size, overlap, FLOORED, "gaussian")
    measured = [gauss.max(), gauss.mean(), gauss[8:-8, 8:-8, 8:-8].mean(), floored.max()]
    for value, said in zip(measured, map(float, found.groups()), strict=True):
        assert float(value) == pytest.approx(said, rel=0.1, abs=0.0005)
