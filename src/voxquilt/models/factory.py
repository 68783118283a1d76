"""Makes a PatchPredictor from files of weights, one function per format."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from voxquilt.errors import ConfigError
from voxquilt.models.predictor import Options, PatchPredictor
from voxquilt.models.weights.detect import EXPORTED, LIGHTNING, TORCHSCRIPT, kind_of
from voxquilt.models.weights.reading import (
    Paths,
    listed,
    read_exported,
    read_lightning,
    read_state_dict,
    read_torchscript,
)


def predictor_from_file(
    ckpt_path: Paths,
    net: nn.Module | None = None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from weights that say what they are, or from a network and its weights.

    Raises:
        ConfigError: weights without a network, or files of several kinds.
    """
    if net is not None:
        members = read_state_dict(net, ckpt_path, prefix=prefix, strict=strict, trust=trust_checkpoint)
        return PatchPredictor(members, **options)
    kinds = {kind_of(path) for path in listed(ckpt_path)}
    if kinds == {TORCHSCRIPT}:
        return predictor_from_torchscript(ckpt_path, **options)
    if kinds == {EXPORTED}:
        return predictor_from_exported(ckpt_path, trust_checkpoint=trust_checkpoint, **options)
    what = (
        "a Lightning checkpoint without settings of voxquilt" if kinds == {LIGHTNING} else "weights without a network"
    )
    raise ConfigError(
        f"{listed(ckpt_path)[0]} is {what}: say which network they are for, by model.net._target_=my_package.MyNet and "
        f"its arguments (model.prefix=net. for a LightningModule's self.net), or by model=lightning "
        f"model.module_class=my_package.MyModule."
    )


def predictor_from_torchscript(ckpt_path: Paths, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from TorchScript archives; see `voxquilt.models.weights.reading.read_torchscript`."""
    return PatchPredictor(read_torchscript(ckpt_path), **options)


def predictor_from_exported(
    ckpt_path: Paths, *, trust_checkpoint: bool = False, **options: Unpack[Options]
) -> PatchPredictor:
    """A predictor from exported programs; see `voxquilt.models.weights.reading.read_exported`."""
    return PatchPredictor(read_exported(ckpt_path, trust=trust_checkpoint), **options)


def predictor_from_state_dict(
    net: nn.Module,
    ckpt_path: Paths | None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from a network and its weights; see `voxquilt.models.weights.reading.read_state_dict`."""
    members = read_state_dict(net, ckpt_path, prefix=prefix, strict=strict, trust=trust_checkpoint)
    return PatchPredictor(members, **options)


def predictor_from_lightning(
    module_class: str,
    ckpt_path: Paths,
    module_args: Mapping[str, Any] | None = None,
    *,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from a LightningModule and its checkpoint; see `voxquilt.models.weights.reading.read_lightning`."""
    return PatchPredictor(read_lightning(module_class, ckpt_path, module_args, trust=trust_checkpoint), **options)
