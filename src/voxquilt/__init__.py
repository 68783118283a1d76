"""voxquilt: patch-wise prediction on 3D medical volumes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from voxquilt import datasets, inference
    from voxquilt.aggregator import GridAggregator
    from voxquilt.errors import VoxquiltError
    from voxquilt.predict import predict_volume
    from voxquilt.sampler import GridSampler
    from voxquilt.stitch import Stitch
    from voxquilt.subject import AFFINE, CHANNELS_DIMENSION, DATA, LOCATION, LabelMap, ScalarImage, Subject

# Imported at their first use, so that a wrong command line is answered before torch has loaded.
_HOMES = {
    "AFFINE": "subject", "CHANNELS_DIMENSION": "subject", "DATA": "subject", "LOCATION": "subject",
    "GridAggregator": "aggregator", "GridSampler": "sampler", "LabelMap": "subject", "ScalarImage": "subject",
    "Stitch": "stitch", "Subject": "subject", "VoxquiltError": "errors", "predict_volume": "predict",
}  # fmt: skip

__all__ = [
    "AFFINE", "CHANNELS_DIMENSION", "DATA", "LOCATION", "GridAggregator", "GridSampler", "LabelMap", "ScalarImage",
    "Stitch", "Subject", "VoxquiltError", "datasets", "inference", "predict_volume",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("datasets", "inference"):
        return import_module(f"voxquilt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'voxquilt' has no attribute {name!r}")
    return getattr(import_module(f"voxquilt.{_HOMES[name]}"), name)
