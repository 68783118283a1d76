"""Turns a configuration into plain values, and checks what predict.py and train.py share."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cli.schema import HINTS
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.listing import meant
from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_is_weights
from voxquilt.old_names import with_new_targets


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Plain dictionaries and lists, everything resolved.

    Raises:
        ConfigError: a value that is still ???, or an interpolation that leads nowhere.
    """
    if OmegaConf.is_missing(cfg.get("data") or {}, "inputs") and cfg.data.get("images"):
        cfg.data.inputs = None  # data.images finds the subjects by itself
    # Not OmegaConf.missing_keys, which follows interpolations and then names neither key.
    missing = sorted(_missing_keys(OmegaConf.to_container(cfg, resolve=False)))
    if missing:
        if "ckpt_path" not in missing:
            with suppress(OmegaConfBaseException):
                # A checkpoint that is not where it was said to be would have brought what is missing.
                check_weights(cfg)
        lines = "".join(f"\n  {key}: {HINTS.get(key, 'needs a value')}" for key in missing)
        raise ConfigError(f"these keys need a value:{lines}")
    try:
        plain = with_new_targets(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).split("\n")[0]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _missing_keys(node: Any, key: str = "") -> Iterator[str]:
    if node == "???":
        yield key
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from _missing_keys(child, f"{key}.{name}".lstrip("."))


def is_sweep() -> bool:
    """Whether Hydra runs several jobs (--multirun)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_image_names(intensity: Any, cases: Iterable[SubjectFiles]) -> None:
    """Raises ConfigError where intensities are given by image names that no subject has."""
    names = {name for case in cases for name in case.images}
    given = {str(name) for name in intensity} if isinstance(intensity, Mapping) else set()
    given = {name for name in given if not name.isdecimal() or str(int(name)) != name}  # others are of channels
    unknown = sorted(given - names)
    if unknown:
        raise ConfigError(f"preprocess.intensity names {unknown}; the images are {sorted(names)}.")


def check_weights(plain: Mapping[Any, Any]) -> None:
    """Raises ConfigError where ckpt_path does not name a file, or one that is something else than weights."""
    paths = plain["ckpt_path"]
    for path in paths if isinstance(paths, list | ListConfig) else [paths]:
        if path is None:
            continue
        file = Path(os.path.expanduser(str(path)))
        if not os.path.isfile(file):
            raise ConfigError(f"ckpt_path: there is no file {path} (relative to {Path.cwd()}).{meant(file)}")
        check_is_weights(file)


def check_output(plain: Mapping[str, Any]) -> None:
    """Raises ConfigError where output_dir cannot be written."""
    name = plain["output_dir"]
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"output_dir must be a folder's name, a number in quotes ('\"12\"'); it is {name!r}.")
    try:
        folder = Path(os.path.expanduser(name)).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, by older and newer Pythons
        raise ConfigError(f"output_dir={name} cannot be written: {error}.") from error
    # Nothing is made yet, since building may still fail.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "may not be written" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"output_dir={name} cannot be written: {existing} {problem}.")
