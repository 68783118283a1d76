"""Fills in what a bundle of MONAI asks for."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from voxquilt.cli.model_folder import check_no_weights
from voxquilt.errors import ConfigError
from voxquilt.models.bundle.settings import read_bundle

log = logging.getLogger("voxquilt")

_KEYS = ("folder", "config", "checkpoint", "trust_bundle")


def has_bundle(cfg: DictConfig) -> bool:
    """Whether the configuration's model is a bundle."""
    return isinstance(cfg.get("model"), DictConfig) and "trust_bundle" in cfg.model


def take_bundle(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """The configuration file of a bundle and its settings, by section; the weights become `ckpt_path`.

    Args:
        cfg: The composed configuration; keys of the model that name the bundle are taken out.

    Raises:
        ConfigError: the bundle cannot be used.
    """
    if OmegaConf.is_missing(cfg.model, "folder") or not isinstance(cfg.model.get("folder"), str):
        raise ConfigError("model.folder is needed: the folder of a MONAI bundle, or its zip.")
    folder, config, checkpoint, trust = (cfg.model.pop(key, None) for key in _KEYS)
    if not isinstance(trust, bool):
        raise ConfigError(f"model.trust_bundle must be true or false; it is {trust!r}.")
    check_no_weights(cfg, "model=bundle", "model.checkpoint")
    bundle = read_bundle(Path(folder).expanduser(), config=config, checkpoint=checkpoint, trust=trust)
    settings = bundle.settings
    if cfg.data.get("patch_overlap") and "step" in settings["data"]:
        del settings["data"]["step"]
    if len(bundle.input_names) > 1:
        log.info("from %s: its network takes %s, in this order.", bundle.file.name, ", ".join(bundle.input_names))
    OmegaConf.update(cfg, "ckpt_path", str(bundle.weights), merge=False)
    return bundle.file, settings
