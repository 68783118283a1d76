"""How do weights come out of a checkpoint? Never by running what is pickled in it, unless the user trusts it."""

import copyreg
import importlib
import inspect
import io
import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_is_weights
from voxquilt.models.weights.exported import ExportedNetwork
from voxquilt.models.weights.exported_archive import checked
from voxquilt.models.weights.state_dict import check, renamed, state_of
from voxquilt.text import first_line, plain_text, question

log = logging.getLogger("voxquilt")

Paths = str | Path | Sequence[str | Path]


def read_torchscript(ckpt_path: Paths) -> list[nn.Module]:
    """TorchScript archives, as `torch.jit.save` makes them.

    Raises:
        ConfigError: not such an archive.
    """
    return [_read_torchscript(path) for path in listed(ckpt_path)]


def read_exported(ckpt_path: Paths, *, trust: bool = False) -> list[ExportedNetwork]:
    """Programs, as `torch.export.save` writes them (.pt2).

    Args:
        ckpt_path: A list makes an ensemble.
        trust: Load the file as it is, which can run its code; else only numbers and a program of torch's operators.

    Raises:
        ConfigError: not such an archive, or one that holds more than is loaded without trust.
    """
    return [_read_exported(path, trust=trust) for path in listed(ckpt_path)]


def read_state_dict(
    net: nn.Module, ckpt_path: Paths | None, *, prefix: str | None = None, strict: bool = True, trust: bool = False
) -> list[nn.Module]:
    """Copies of a network, each with the weights of one file: .pt, .pth, .ckpt or .safetensors.

    Args:
        net: The network.
        ckpt_path: A state dict, or a mapping that holds one, at any depth: as 'state_dict', 'model_state_dict', 'model'
            or 'network_weights', or else the only one, or the only one that fits. A list makes an ensemble. None leaves
            the network as it is. What torch.compile (`_orig_mod.`) and DDP (`module.`) put into keys does not count.
        prefix: Only keys that begin so are used, without it: 'net.' for a LightningModule's self.net, or for a mapping
            that holds the state dict as 'net'.
        strict: Whether every key must fit; at least one must in any case.
        trust: Unpickle anything the file holds, which can run its code.

    Raises:
        ConfigError: a file that cannot be read safely, or keys or shapes that do not fit; they are listed.
    """
    if ckpt_path is None:
        return [net]
    members = []
    for path in listed(ckpt_path):
        member = deepcopy(net)
        state = state_of(path, _read(path, trust=trust), member.state_dict(), prefix)
        check(path, member.state_dict(), state, strict=strict)
        member.load_state_dict(state, strict=strict)
        members.append(member)
    return members


def read_lightning(
    module_class: str, ckpt_path: Paths, module_args: Mapping[str, Any] | None = None, *, trust: bool = False
) -> list[nn.Module]:
    """LightningModules of a class, from their checkpoints.

    Args:
        module_class: 'package.module.Class'.
        ckpt_path: What Lightning saved. A list makes an ensemble.
        module_args: Arguments of the class that are not in the checkpoint's hyperparameters.
        trust: Unpickle anything the file holds, which can run its code.

    Raises:
        ConfigError: no such class, one without a forward, or a checkpoint that does not fit it.
    """
    found = _import(module_class)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"model.module_class={module_class} is not a LightningModule.")
    if found.forward is LightningModule.forward:
        raise ConfigError(f"{module_class} has no forward, which is what a run calls with (B, C, I, J, K) patches.")
    if found.predict_step is not LightningModule.predict_step:
        log.warning(
            "%s.predict_step is not called: a run calls forward, and makes its own of what that gives.", module_class
        )
    parameters = inspect.signature(found).parameters
    unknown = sorted(set(module_args or {}) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        # Lightning would drop them in silence.
        near = question(unknown[0], parameters, prefix="model.module_args.")
        raise ConfigError(f"model.module_args names {unknown}; {module_class} takes {list(parameters)}.{near}")
    return [_read_lightning(found, path, module_args or {}, trust=trust) for path in listed(ckpt_path)]


def _read_lightning(
    cls: type[LightningModule], path: Path, module_args: Mapping[str, Any], *, trust: bool
) -> LightningModule:
    loaded = _read(path, trust=trust)
    if not isinstance(loaded, Mapping) or "pytorch-lightning_version" not in loaded:
        raise ConfigError(f"{path} is no Lightning checkpoint; use model=state_dict with model.net for bare weights.")

    def load(*, strict: bool) -> LightningModule:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found keys that are")  # what is not loaded is loaded below
            return cls.load_from_checkpoint(
                path, map_location="cpu", weights_only=not trust, strict=strict, **module_args
            )

    try:
        state = loaded.get("state_dict") or {}
        if not any("_orig_mod." in key or "module." in key for key in state):
            return load(strict=True)
        # What was compiled or wrapped in training may not be so here.
        module = load(strict=False)
        state = renamed(dict(state), module.state_dict())
        check(path, module.state_dict(), state, strict=True)
        module.load_state_dict(state)
        return module
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} does not fit {cls.__qualname__}: {plain_text(error)}") from error


def listed(ckpt_path: Paths) -> list[Path]:
    """One or several files.

    Raises:
        ConfigError: none, or one that is something else than weights.
    """
    paths = [ckpt_path] if isinstance(ckpt_path, str | Path) else list(ckpt_path or ())
    if not paths:
        raise ConfigError("ckpt_path names no file.")
    found = [Path(path).expanduser() for path in paths]
    for path in found:
        check_is_weights(path)
    return found


def _read_torchscript(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.export cannot read what jit saved
            return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no TorchScript archive ({first_line(error)}); use model=state_dict or model=lightning for "
            f"other weights."
        ) from error


def _read_exported(path: Path, *, trust: bool) -> ExportedNetwork:
    try:
        content = path.expanduser() if trust else checked(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} was not loaded as an exported program, since {error}. If it is one and you know where it comes "
            f"from, set model.trust_checkpoint=true; use model=torchscript or model=state_dict for other weights."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ExportedNetwork(torch.export.load(content))
    except Exception as error:  # torch raises of any kind where a program does not fit this version
        raise ConfigError(f"{path} cannot be used as an exported program: {first_line(error)}.") from error


def _read(path: Path, *, trust: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TorchScript archives before it refuses them
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ConfigError(_refused(path, plain_text(error))) from error
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as weights: {first_line(error)}") from error


def _refused(path: Path, text: str) -> str:
    """What torch's restricted unpickler met, out of a text that is mostly about how to do without it."""
    named = re.search(r"GLOBAL (\S+) (?:was not|whose module)", text)
    other = re.search(r"(?:WeightsUnpickler error:|^)\s*((?:Unsupported|Trying|Can only)[^\n]*)", text, re.MULTILINE)
    if named is None and (other is None or "operand" in other[1]):
        return (
            f"{path} cannot be read as weights: it is damaged, or not of a format that torch reads without running "
            f"what is in it. If you know where it comes from, try model.trust_checkpoint=true."
        )
    what = named[1] if named else other[1].split(". ")[0] if other else ""
    whole = (
        " If the whole network was saved, torch.save(network.state_dict(), ...) makes a file that needs no trust."
        if named and not named[1].startswith(("numpy.", "collections.", "pathlib.", "argparse.", "omegaconf."))
        else ""
    )
    return (
        f"{path} holds more than tensors and plain values: {what}. It was not unpickled, since that can run code. If "
        f"you know where the file comes from, set model.trust_checkpoint=true.{whole}"
    )


def _import(name: str) -> object:
    module, _, attribute = str(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.module_class={name} cannot be imported: {error}") from error


def _from_bytes(content: bytes) -> nn.Module:
    return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()


def _pickled(module: torch.jit.ScriptModule) -> tuple[Any, tuple[bytes]]:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return _from_bytes, (buffer.getvalue(),)


# torch refuses to pickle them, but ddp_spawn hands the network to its processes so.
copyreg.pickle(torch.jit.RecursiveScriptModule, _pickled)  # type: ignore[reportPrivateImportUsage]
