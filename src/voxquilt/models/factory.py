"""Makes a PatchPredictor from files of weights, one function per source."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from voxquilt.models.predictor import Options, PatchPredictor
from voxquilt.models.weights.reading import (
    Paths,
    read_by_format,
    read_exported,
    read_lightning,
    read_onnx,
    read_state_dict,
    read_torchscript,
)
from voxquilt.models.weights.registry import ReadOptions


def predictor_from_file(
    ckpt_path: Paths | None,
    net: nn.Module | None = None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from files that say which format they have: any of `voxquilt.models.weights.registry`.

    Args:
        ckpt_path: A file; a list makes an ensemble. None leaves `net` as it is.
        net: The network of weights that bring none.
        prefix: Only keys that begin so are used, without it.
        strict: Whether every key must fit.
        trust_checkpoint: Unpickle anything that a file holds, which can run its code.
        options: See `voxquilt.PatchPredictor`.

    Raises:
        ConfigError: weights without a network, or a file that cannot be read.
    """
    return PatchPredictor(read_by_format(ckpt_path, ReadOptions(net, prefix, strict, trust_checkpoint)), **options)


def predictor_from_torchscript(ckpt_path: Paths, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from TorchScript archives; see `voxquilt.models.weights.reading.read_torchscript`."""
    return PatchPredictor(read_torchscript(ckpt_path), **options)


def predictor_from_exported(
    ckpt_path: Paths, *, trust_checkpoint: bool = False, **options: Unpack[Options]
) -> PatchPredictor:
    """A predictor from exported programs; see `voxquilt.models.weights.reading.read_exported`."""
    return PatchPredictor(read_exported(ckpt_path, trust=trust_checkpoint), **options)


def predictor_from_onnx(ckpt_path: Paths, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from ONNX files; see `voxquilt.models.weights.reading.read_onnx`."""
    return PatchPredictor(read_onnx(ckpt_path), **options)


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
