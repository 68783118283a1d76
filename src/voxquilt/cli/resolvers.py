"""Registers the interpolations of conf/, beside those that OmegaConf has."""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from voxquilt.example_files import fetch
from voxquilt.reporting.manifest import of_shard


def register_resolvers() -> None:
    """Register `${example:name}`, the path of an example file, and those that compute one setting from another."""
    OmegaConf.register_new_resolver("example", _example, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("if_averaged", _scores_activation, replace=True)
    OmegaConf.register_new_resolver("half", _half, replace=True)
    OmegaConf.register_new_resolver("of_shard", _of_shard, replace=True)


def _scores_activation(average: str | None, activation: str | None) -> str | None:
    """The activation that makes probabilities of scores: 'applied' if the network averaged probabilities already."""
    if average != "probabilities":
        return activation
    return "applied_sigmoid" if activation == "sigmoid" else "applied"


def _example(name: str) -> str:
    if name != "tissue":
        return str(fetch(name))
    from voxquilt.datasets import tissue_table  # which imports torch, and this name is train.py's alone

    return str(tissue_table())


def _of_shard(name: str, *, _root_: Any) -> str:
    """The name of a run, with the number of its shard where it is one of several, as in the names of its tables."""
    shard = _root_.get("shard") or {}  # which train.py does not have
    return of_shard(f"{name}.", (int(shard.get("index", 0)), int(shard.get("count", 1))))[:-1]


def _half(size: Any) -> Any:
    """The even number of voxels that is about half of a patch, for one size or for each of several."""
    return [_half(length) for length in size] if isinstance(size, Iterable) else size // 4 * 2
