from importlib import import_module
from typing import Any


# TorchIO's users know `data.GridSampler` and `data.GridAggregator`; nothing is imported before they are asked for.
def __getattr__(name: str) -> Any:
    if name in ("GridAggregator", "GridSampler"):
        return getattr(import_module("voxquilt.inference"), name)
    raise AttributeError(f"module 'voxquilt.data' has no attribute {name!r}")
