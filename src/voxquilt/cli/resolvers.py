"""What may stand in ${...} of conf/, beside what OmegaConf has?"""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from voxquilt.example_files import fetch


def register_resolvers() -> None:
    """What conf/ uses in interpolations: `${example:name}` is the path of an example file, fetched once."""
    OmegaConf.register_new_resolver("example", _example, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("if_averaged", _scores_activation, replace=True)
    OmegaConf.register_new_resolver("half", _half, replace=True)


def _scores_activation(average: str | None, activation: str | None) -> str | None:
    """What turns scores into probabilities, unless the network averaged probabilities: then they are that already."""
    if average != "probabilities":
        return activation
    return "applied_sigmoid" if activation == "sigmoid" else "applied"


def _example(name: str) -> str:
    if name != "tissue":
        return str(fetch(name))
    from voxquilt.datasets import tissue_table  # which imports torch, and this name is train.py's alone

    return str(tissue_table())


def _half(size: Any) -> Any:
    """The even number of voxels that is about half of a patch; along each axis, if they differ."""
    return [_half(one) for one in size] if isinstance(size, Iterable) else size // 4 * 2
