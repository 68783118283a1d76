"""The names under which TorchIO users know the two: `voxquilt.inference.GridSampler` and `GridAggregator`."""

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.stitching.aggregator import GridAggregator

__all__ = ["GridAggregator", "GridSampler"]
