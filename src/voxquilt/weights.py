"""How do weights come out of a checkpoint? Never by running what is pickled in it, unless the user trusts it."""

import copyreg
import importlib
import inspect
import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from voxquilt.archive import checked
from voxquilt.errors import ConfigError
from voxquilt.exported import ExportedNetwork

Paths = str | Path | Sequence[str | Path]
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network_weights")


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
        ckpt_path: A state dict, or a mapping that holds one as 'state_dict', 'model_state_dict', 'model' or
            'network_weights'. A list makes an ensemble. None leaves the network as it is.
        prefix: Only keys that begin so are used, without it: 'net.' for a LightningModule's self.net.
        strict: Whether every key must fit; at least one must in any case.
        trust: Unpickle anything the file holds, which can run its code.

    Raises:
        ConfigError: a file that cannot be read safely, or keys or shapes that do not fit; they are listed.
    """
    if ckpt_path is None:
        return [net]
    members = []
    for path in listed(ckpt_path):
        state = _strip(_state_of(path, _read(path, trust=trust)), prefix, path)
        member = deepcopy(net)
        _check(path, member.state_dict(), state, strict=strict)
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
        ConfigError: no such class, or a checkpoint that does not fit it.
    """
    found = _import(module_class)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"model.module_class={module_class} is not a LightningModule.")
    parameters = inspect.signature(found).parameters
    unknown = sorted(set(module_args or {}) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        # Lightning would drop them in silence.
        raise ConfigError(f"model.module_args names {unknown}; {module_class} takes {list(parameters)}.")
    return [_read_lightning(found, path, module_args or {}, trust=trust) for path in listed(ckpt_path)]


def _read_lightning(
    cls: type[LightningModule], path: Path, module_args: Mapping[str, Any], *, trust: bool
) -> LightningModule:
    loaded = _read(path, trust=trust)
    if not isinstance(loaded, Mapping) or "pytorch-lightning_version" not in loaded:
        raise ConfigError(f"{path} is no Lightning checkpoint; use model=state_dict with model.net for bare weights.")
    try:
        return cls.load_from_checkpoint(path, map_location="cpu", weights_only=not trust, **module_args)
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} does not fit {cls.__qualname__}: {error}") from error


def listed(ckpt_path: Paths) -> list[Path]:
    """One or several files.

    Raises:
        ConfigError: none.
    """
    paths = [ckpt_path] if isinstance(ckpt_path, str | Path) else list(ckpt_path or ())
    if not paths:
        raise ConfigError("ckpt_path names no file.")
    return [Path(path).expanduser() for path in paths]


def _read_torchscript(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.export cannot read what jit saved
            return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        detail = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{path} is no TorchScript archive ({detail}); use model=state_dict or model=lightning for other weights."
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
        detail = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} cannot be used as an exported program: {detail}.") from error


def _read(path: Path, *, trust: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TorchScript archives before it refuses them
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        first = str(error).split("\n")[0]
        raise ConfigError(
            f"{path} holds more than tensors and plain values, or is damaged; it was not unpickled, since that can run "
            f"code ({first}). If you know where it comes from, set model.trust_checkpoint=true."
        ) from error
    except Exception as error:
        detail = str(error).split("\n")[0]
        raise ConfigError(f"{path} cannot be read as weights: {detail}") from error


def _state_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, nn.Module):
        return loaded.state_dict()
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return dict(loaded)
    raise ConfigError(f"{path} holds no state dict, neither by itself nor as one of {', '.join(_WRAPPERS)}.")


def _strip(state: dict[str, Tensor], prefix: str | None, path: Path) -> dict[str, Tensor]:
    if not prefix:
        return state
    stripped = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not stripped:
        raise ConfigError(f"{path}: no key begins with model.prefix={prefix!r}; keys are {_some(state)}.")
    return stripped


def _check(path: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, strict: bool) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    strict = strict or len(missing) == len(wanted)  # where nothing fits, nothing was loaded
    problems = {"missing": missing * strict, "unexpected": unexpected * strict, "of another shape": shapes}
    if not any(problems.values()):
        return
    lines = "".join(f"\n  {len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys)
    raise ConfigError(f"{path} does not fit the network:{lines}{_hint(wanted, unexpected)}")


def _hint(wanted: Mapping[str, Tensor], unexpected: Sequence[str]) -> str:
    for key in wanted:
        prefixes = {other.removesuffix(key) for other in unexpected if other.endswith("." + key)}
        if prefixes:
            return f"\n  The keys fit behind a prefix: try model.prefix={min(prefixes, key=len)}"
    return ""


def _some(keys: Sequence[str] | Mapping[str, Any]) -> str:
    keys = list(keys)
    return ", ".join(keys[:8]) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")


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
