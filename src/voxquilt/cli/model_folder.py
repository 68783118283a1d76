"""Fills in what a trained model folder of nnU-Net asks for."""

import glob
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.folder import NnunetFolder, read_folder
from voxquilt.models.nnunet.settings import settings_of

NNUNET = "voxquilt.predictor_from_nnunet"
"""The model of `model=nnunet`."""


def has_model_folder(cfg: DictConfig) -> bool:
    """Whether the configuration's model is a folder of nnU-Net."""
    return isinstance(cfg.get("model"), DictConfig) and cfg.model.get("_target_") == NNUNET


def take_model_folder(cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """The folder's path and its settings, by section; the weights become `ckpt_path`.

    Args:
        cfg: The composed configuration; keys of the model that only decide about settings are taken out.

    Raises:
        ConfigError: the folder cannot be used.
    """
    model = _read(cfg)
    previous, postprocess, _ = (cfg.model.pop(key, None) for key in ("previous", "postprocess", "parts"))
    check_previous(model, previous)
    if not isinstance(postprocess, bool | None):
        raise ConfigError(f"model.postprocess must be true or false; it is {postprocess!r}.")
    settings = settings_of(model, previous=previous, postprocess=bool(postprocess))
    if OmegaConf.select(cfg, "run.dry_run") and previous is not None and not has_files(previous):
        # A plan counts the channels of labels that are still to be predicted.
        settings["data"]["extra_images"] = None
    if cfg.data.get("images"):
        del settings["data"]["suffixes"]  # the user says which files are a subject's images
    if cfg.data.get("patch_overlap"):
        del settings["data"]["step"]
    OmegaConf.update(cfg, "ckpt_path", [str(path) for path in model.checkpoints], merge=False)
    return model.path, settings


def _read(cfg: DictConfig) -> NnunetFolder:
    if OmegaConf.is_missing(cfg.model, "folder") or not isinstance(cfg.model.get("folder"), str):
        given = "missing" if OmegaConf.is_missing(cfg.model, "folder") else repr(cfg.model.get("folder"))
        raise ConfigError(
            f"model.folder is the folder of a trained model, TRAINER__PLANS__CONFIGURATION; it is {given}."
        )
    check_no_weights(cfg, "model=nnunet", "model.folds and model.checkpoint")
    folds, checkpoint = cfg.model.get("folds"), cfg.model.get("checkpoint")
    if isinstance(folds, int | str):
        folds = [folds]
    return read_folder(
        Path(cfg.model.folder).expanduser(), checkpoint=str(checkpoint), folds=None if folds is None else list(folds)
    )


def check_no_weights(cfg: DictConfig, model: str, keys: str) -> None:
    """Refuse a ckpt_path beside a folder that has its weights in it.

    Args:
        cfg: The composed configuration.
        model: What was chosen, such as 'model=nnunet'.
        keys: The keys that choose its weights.

    Raises:
        ConfigError: there is one.
    """
    try:
        weights = None if OmegaConf.is_missing(cfg, "ckpt_path") else cfg.ckpt_path
    except OmegaConfBaseException:
        weights = None
    if weights is not None:
        raise ConfigError(f"ckpt_path={weights}: {model} has its weights in model.folder; choose them by {keys}.")


def check_previous(model: NnunetFolder, previous: object) -> None:
    """Refuse a folder that takes labels of a stage before without them, and another one with them.

    Args:
        model: The folder.
        previous: `model.previous`, a path with `{subject}`.

    Raises:
        ConfigError: so it is.
    """
    stage = model.plan.previous_stage
    if stage is None and previous is not None:
        raise ConfigError(
            f"model.previous={previous}: {model.plan.configuration} of {model.path} takes no labels of a stage before."
        )
    if stage is not None and not (isinstance(previous, str) and "{subject}" in previous):
        given = "" if previous is None else f"; model.previous={previous!r} has no {{subject}}"
        raise ConfigError(
            f"{model.path}: {model.plan.configuration} takes the labels of {stage} as input{given}. Set "
            f"model.previous='folder/{{subject}}_labels.nii.gz', or model.folder=[<folder of {stage}>,{model.path}] to "
            f"predict both."
        )


def has_files(pattern: str) -> bool:
    """Whether there is a file of any subject."""
    return any(glob.iglob("*".join(map(glob.escape, pattern.split("{subject}")))))
