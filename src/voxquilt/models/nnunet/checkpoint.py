"""Loads the weights of nnU-Net's checkpoints without running anything that is pickled in them."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.models.weights.safe_loading import load_safely
from voxquilt.models.weights.state_dict_keys import check_keys

Network = TypeVar("Network", bound=nn.Module)

log = logging.getLogger("voxquilt")

_HEADS = "decoder.seg_layers."
# Put before all names by DistributedDataParallel and torch.compile.
_WRAPPING = re.compile(r"^(?:module\.|_orig_mod\.)+")


class _NoType:
    """Stands in for numpy.dtype, and forgets what it is made of."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _no_scalar(*_: Any) -> None:
    """Stands in for the function that makes NumPy's scalars."""


# Each checkpoint has the losses of its training as NumPy's scalars, which torch refuses. Nothing here needs them, so
# that no code of NumPy has to run on the file's bytes. The name of the first depends on NumPy's version.
_STAND_INS = [
    (_no_scalar, "numpy._core.multiarray.scalar"),
    (_no_scalar, "numpy.core.multiarray.scalar"),
    (_NoType, "numpy.dtype"),
]


def load_weights(path: Path, network: Network, *, trust: bool = False, other_heads: bool = False) -> Network:
    """Load a checkpoint's weights into a network of `voxquilt.models.nnunet.networks`.

    Args:
        path: The checkpoint.
        network: The network, which is changed and returned.
        trust: Unpickle anything that the file holds, which can run its code.
        other_heads: Whether the network may have other classes than the checkpoint; its last layers then keep their
            weights, as with nnU-Net's -pretrained_weights.

    Raises:
        ConfigError: the file is damaged, holds more than tensors, plain values and NumPy's scalars, or has weights of
            other names or shapes; they are listed.
    """
    with torch.serialization.safe_globals(_STAND_INS):
        # Mapped, since a checkpoint also holds the optimizer's state, which is as large as the weights or larger.
        stored = load_safely(path, trust=trust, mmap=True)
    weights = stored.get("network_weights") if isinstance(stored, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{path} holds no network_weights; wanted is a checkpoint that nnU-Net v2 wrote.")
    state, wanted = own_weights(weights), network.state_dict()
    heads = [name for name in wanted if name.startswith(_HEADS)]
    if other_heads and any(name in state and state[name].shape != wanted[name].shape for name in heads):
        log.info("%s has other classes: the network's last layers begin with random weights.", path)
        state |= {name: wanted[name] for name in heads}
    hint = "\n  Does plans.json belong to the checkpoint? Or does its trainer change the network?"
    check_keys(path, wanted, state, strict=True, hint=hint)
    network.load_state_dict(state)
    return network


def own_weights(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors under one name each, out of a state dict that has most of them several times."""
    plain = {_WRAPPING.sub("", str(name)): tensor for name, tensor in weights.items()}
    return {
        name: tensor
        for name, tensor in plain.items()
        if isinstance(tensor, Tensor) and not name.startswith("decoder.encoder.") and ".all_modules." not in name
    }
