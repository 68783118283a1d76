"""Reads the networks of files: one function per source, each with a list for an ensemble.

Nothing that is pickled in a file is run, unless the user trusts it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_has_network, check_is_weights, kind_of
from voxquilt.models.weights.lightning_module import import_module_class, read_module
from voxquilt.models.weights.registry import STATE_DICT, WEIGHTS, ReadOptions

Paths = str | Path | Sequence[str | Path]


def read_by_format(ckpt_path: Paths | None, options: ReadOptions) -> list[nn.Module]:
    """Networks from files that say which format they have; without a file, the network as it is built.

    In an ensemble, some files may be networks by themselves, and others need `options.net`.

    Raises:
        ConfigError: weights without a network, a network for files that all are one by themselves, or a file that
            cannot be read.
    """
    if ckpt_path is None and options.net is not None:
        return [options.net]
    files = to_files(ckpt_path)
    if options.net is None:
        check_has_network(files)
    kinds = [kind_of(file) for file in files]
    needs = [WEIGHTS.load(kind)().needs_network for kind in kinds]
    # In an ensemble, a network is for the files that bring none.
    alone = replace(options, net=None) if any(needs) else options
    return [_read(kind, file, options if need else alone) for kind, file, need in zip(kinds, files, needs, strict=True)]


def read_torchscript(ckpt_path: Paths) -> list[nn.Module]:
    """TorchScript archives, as `torch.jit.save` makes them.

    Raises:
        ConfigError: a file is not such an archive.
    """
    return [_read("torchscript", file, ReadOptions()) for file in to_files(ckpt_path)]


def read_exported(ckpt_path: Paths, *, trust: bool = False) -> list[nn.Module]:
    """Programs, as `torch.export.save` writes them (.pt2).

    Args:
        ckpt_path: One file or several.
        trust: Load the file as it is, which can run its code; else only numbers and a program of torch's operators.

    Raises:
        ConfigError: a file is not such an archive, or holds more than is loaded without trust.
    """
    return [_read("exported", file, ReadOptions(trust=trust)) for file in to_files(ckpt_path)]


def read_onnx(ckpt_path: Paths) -> list[nn.Module]:
    """ONNX files, which onnxruntime runs.

    Raises:
        ConfigError: a file is damaged, or cannot be run; or onnxruntime is missing.
    """
    return [_read("onnx", file, ReadOptions()) for file in to_files(ckpt_path)]


def read_state_dict(
    net: nn.Module, ckpt_path: Paths | None, *, prefix: str | None = None, strict: bool = True, trust: bool = False
) -> list[nn.Module]:
    """Copies of a network, each with the weights of one file: .pt, .pth, .ckpt or .safetensors.

    Args:
        net: The network.
        ckpt_path: A state dict, or a mapping that holds one, at any depth: as 'state_dict', 'model_state_dict', 'model'
            or 'network_weights', or else the only one, or the only one that fits. None leaves the network as it is.
            What torch.compile (`_orig_mod.`) and DDP (`module.`) put into keys does not count.
        prefix: Only keys that begin so are used, without it: 'net.' for a LightningModule's self.net, or for a mapping
            that holds the state dict as 'net'.
        strict: Whether every key must fit; at least one must in any case.
        trust: Unpickle anything the file holds, which can run its code.

    Raises:
        ConfigError: a file cannot be read safely, or keys or shapes do not fit; they are listed.
    """
    if ckpt_path is None:
        return [net]
    options = ReadOptions(net, prefix, strict, trust)
    return [_read(STATE_DICT, file, options) for file in to_files(ckpt_path)]


def read_lightning(
    module_class: str, ckpt_path: Paths, module_args: Mapping[str, Any] | None = None, *, trust: bool = False
) -> list[nn.Module]:
    """LightningModules of a class, from their checkpoints.

    Args:
        module_class: 'package.module.Class'.
        ckpt_path: What Lightning saved.
        module_args: Arguments of the class that are not in the checkpoint's hyperparameters.
        trust: Unpickle anything the file holds, which can run its code.

    Raises:
        ConfigError: there is no such class, it has no forward, or a checkpoint does not fit it.
    """
    cls = import_module_class(module_class, module_args or {})
    return [read_module(cls, file, module_args or {}, trust=trust) for file in to_files(ckpt_path)]


def to_files(ckpt_path: Paths | None) -> list[Path]:
    """One or several files.

    Raises:
        ConfigError: there is none, or one is something else than weights.
    """
    paths = [ckpt_path] if isinstance(ckpt_path, str | Path) else list(ckpt_path or ())
    if not paths:
        raise ConfigError("ckpt_path names no file.")
    files = [Path(path).expanduser() for path in paths]
    for file in files:
        check_is_weights(file)
    return files


def _read(name: str, file: Path, options: ReadOptions) -> nn.Module:
    weights_format = WEIGHTS.load(name)()
    if options.net is not None and not weights_format.needs_network:
        raise ConfigError(f"{file} ({name}) is a network by itself, beside which model.net has no use: leave it out.")
    network = weights_format.read(file, options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{file}: the weights format {name!r} made a {type(network).__name__}; wanted is a network.")
    return network
