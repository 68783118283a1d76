"""Fills in what the plans of an nnU-Net folder say about a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from voxquilt.cli.chosen_settings import Choice, defaults_of, fill_section, log_choice
from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.training_plan import TrainingPlan, read_training_plan

_KEYS = ("folder", "plans", "configuration", "folds", "checkpoint", "trust_checkpoint")


def has_plans(cfg: DictConfig) -> bool:
    """Whether the configuration of a training has a folder of nnU-Net."""
    return isinstance(cfg.get("model"), DictConfig) and "plans" in cfg.model


def take_plans(cfg: DictConfig, overrides: Sequence[str], conf: Path) -> dict[str, Any] | None:
    """Fill in the settings of the plans, where the user chose none.

    Args:
        cfg: The composed configuration; changed in place, and keys of the model that name the folder are taken out.
        overrides: Overrides of the command line, as Hydra has them.
        conf: The folder of the defaults.

    Returns:
        The checkpoint with the weights to begin with, and whether it is trusted; None for random weights.

    Raises:
        ConfigError: the folder cannot be used, or not for this training.
    """
    OmegaConf.set_struct(cfg, False)
    plan, trusted = _read(cfg)
    settings = plan.settings
    if cfg.data.task != "segmentation":
        raise ConfigError(f"model=nnunet goes with task=segmentation; it is {cfg.data.task}.")
    if cfg.data.get("images"):
        del settings["data"]["suffixes"]  # the user says which files are a subject's images
    typed = [text.lstrip("+~").partition("=")[0].replace("data/", "data.") for text in overrides]
    if "data.patch_overlap" in typed:
        del settings["data"]["step"]
    if "data.folds" in typed:
        settings["data"].pop("split", None)
    choice = Choice(typed, {}, [], set())
    for section, own in settings.items():
        defaults = defaults_of(conf, section, ("train",) if section in ("data", "model") else ("default",))
        if section == "data":
            defaults["augment"] = defaults_of(conf, "data/augment")
        fill_section(cfg, section, own, defaults, choice)
    log_choice(plan.file, choice)
    return None if plan.weights is None else {"path": plan.weights, "trust": trusted}


def _read(cfg: DictConfig) -> tuple[TrainingPlan, bool]:
    if OmegaConf.is_missing(cfg.model, "folder") or not isinstance(cfg.model.get("folder"), str):
        raise ConfigError("model.folder is needed: a folder of nnU-Net with plans and dataset.json.")
    folder, plans, configuration, folds, checkpoint, trusted = (cfg.model.pop(key, None) for key in _KEYS)
    if isinstance(folds, ListConfig) and len(folds) == 1:
        folds = folds[0]
    if not isinstance(folds, int | str | None) or isinstance(folds, bool):
        raise ConfigError(f"model.folds is the one fold whose weights the training begins with; it is {folds}.")
    for key, value in (("plans", plans), ("configuration", configuration)):
        if not isinstance(value, str | None):
            raise ConfigError(f"model.{key} is a name; it is {value!r}.")
    if not isinstance(trusted, bool):
        raise ConfigError(f"model.trust_checkpoint must be true or false; it is {trusted!r}.")
    plan = read_training_plan(folder, plans=plans, configuration=configuration, fold=folds, checkpoint=str(checkpoint))
    return plan, trusted
