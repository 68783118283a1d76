"""Reads a LightningModule of the user's from its checkpoint."""

import importlib
import inspect
import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from voxquilt.errors import ConfigError
from voxquilt.models.weights.safe_loading import load_safely
from voxquilt.models.weights.state_dict_keys import check_keys, rename_keys
from voxquilt.text import plain_text, question

log = logging.getLogger("voxquilt")


def import_module_class(name: str, module_args: Mapping[str, Any]) -> type[LightningModule]:
    """The class of a LightningModule.

    Args:
        name: 'package.module.Class'.
        module_args: Arguments that it is to take.

    Raises:
        ConfigError: there is no such class, it has no forward, or it does not take an argument.
    """
    cls = _import_object(name)
    if not (isinstance(cls, type) and issubclass(cls, LightningModule)):
        raise ConfigError(f"model.module_class={name} is not a LightningModule.")
    if cls.forward is LightningModule.forward:
        raise ConfigError(f"{name} has no forward, which is what a run calls with (B, C, I, J, K) patches.")
    if cls.predict_step is not LightningModule.predict_step:
        log.warning(
            "%s.predict_step is not called: a run calls forward, and makes its products from the outputs.", name
        )
    parameters = inspect.signature(cls).parameters
    unknown = sorted(set(module_args) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        # Lightning would drop them in silence.
        near = question(unknown[0], parameters, prefix="model.module_args.")
        raise ConfigError(f"model.module_args names {unknown}; {name} takes {list(parameters)}.{near}")
    return cls


def read_module(
    cls: type[LightningModule], path: Path, module_args: Mapping[str, Any], *, trust: bool
) -> LightningModule:
    """A LightningModule with the hyperparameters and weights of a checkpoint.

    Args:
        cls: Its class.
        path: The checkpoint.
        module_args: Arguments of the class that are not in the checkpoint's hyperparameters.
        trust: Unpickle anything that the file holds, which can run its code.

    Raises:
        ConfigError: the file is not a checkpoint of Lightning's, or does not fit the class.
    """
    loaded = load_safely(path, trust=trust)
    if not isinstance(loaded, Mapping) or "pytorch-lightning_version" not in loaded:
        raise ConfigError(
            f"{path} is not a Lightning checkpoint; use model=state_dict with model.net for bare weights."
        )

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
        state = rename_keys(dict(state), module.state_dict())
        check_keys(path, module.state_dict(), state, strict=True)
        module.load_state_dict(state)
        return module
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} does not fit {cls.__qualname__}: {plain_text(error)}") from error


def _import_object(name: str) -> object:
    module, _, attribute = str(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.module_class={name} cannot be imported: {error}") from error
