"""voxquilt: patch-wise prediction on 3D medical volumes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torch.utils.data import DataLoader as SubjectsLoader

    from voxquilt import datasets, inference
    from voxquilt import inference as data
    from voxquilt.data.grid_sampler import GridSampler
    from voxquilt.data.subject import (
        AFFINE,
        CHANNELS_DIMENSION,
        DATA,
        INTENSITY,
        LABEL,
        LOCATION,
        PATH,
        STEM,
        TYPE,
        Image,
        LabelMap,
        ScalarImage,
        Subject,
    )
    from voxquilt.errors import VoxquiltError
    from voxquilt.predict import predict_volume
    from voxquilt.stitching.aggregator import GridAggregator
    from voxquilt.stitching.stitch import Stitch

# Imported at their first use, so that a wrong command line is answered before torch has loaded.
_HOMES = {
    **dict.fromkeys(("AFFINE", "CHANNELS_DIMENSION", "DATA", "INTENSITY", "LABEL", "LOCATION", "PATH", "STEM", "TYPE"),
                    "voxquilt.data.subject"),
    **dict.fromkeys(("Image", "LabelMap", "ScalarImage", "Subject"), "voxquilt.data.subject"),
    "GridAggregator": "voxquilt.stitching.aggregator", "GridSampler": "voxquilt.data.grid_sampler", "Stitch":
    "voxquilt.stitching.stitch", "VoxquiltError": "voxquilt.errors", "predict_volume": "voxquilt.predict",
}  # fmt: skip
# TorchIO's names of what is elsewhere: its loader does what torch's does with our patches.
_MODULES = {"datasets": "voxquilt.datasets", "inference": "voxquilt.inference", "data": "voxquilt.inference"}

__all__ = [
    "AFFINE", "CHANNELS_DIMENSION", "DATA", "INTENSITY", "LABEL", "LOCATION", "PATH", "STEM", "TYPE",
    "GridAggregator", "GridSampler", "Image", "LabelMap", "ScalarImage", "Stitch", "Subject", "SubjectsLoader",
    "VoxquiltError", "data", "datasets", "inference", "predict_volume",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name == "SubjectsLoader":
        return import_module("torch.utils.data").DataLoader
    if name not in _HOMES:
        raise AttributeError(f"module 'voxquilt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
