"""The names under which TorchIO users know the two: `voxquilt.inference.GridSampler` and `GridAggregator`."""

from voxquilt.aggregator import GridAggregator
from voxquilt.sampler import GridSampler

__all__ = ["GridAggregator", "GridSampler"]
