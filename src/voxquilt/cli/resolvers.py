"""Registers the interpolations of conf/, beside those that OmegaConf has."""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from voxquilt.example_files import fetch


def register_resolvers() -> None:
    """Register `${example:name}`, the path of an example file, and those that compute one setting from another."""
    OmegaConf.register_new_resolver("example", _example, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("if_averaged", _scores_activation, replace=True)
    OmegaConf.register_new_resolver("half", _half, replace=True)


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


def _half(size: Any) -> Any:
    """The even number of voxels that is about half of a patch, for one size or for each of several."""
    return [_half(length) for length in size] if isinstance(size, Iterable) else size // 4 * 2
