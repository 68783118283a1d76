"""Fills in what a trained model folder of nnU-Net asks for, and runs the models whose labels another one needs."""

import glob
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.folder import NnunetFolder, read_folder
from voxquilt.models.nnunet.settings import settings_of

log = logging.getLogger("voxquilt")

NNUNET = "voxquilt.predictor_from_nnunet"
"""The model of `model=nnunet`."""


# Overrides that a rough model is not run with.
_OF_MODEL = (
    "model", "ckpt_path", "data.patch_size", "data.patch_overlap", "data.step", "data.divisible_by", "data.labels",
    "preprocess", "stitch",
)  # fmt: skip


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
    _check_previous(model, previous)
    if not isinstance(postprocess, bool | None):
        raise ConfigError(f"model.postprocess must be true or false; it is {postprocess!r}.")
    settings = settings_of(model, previous=previous, postprocess=bool(postprocess))
    if OmegaConf.select(cfg, "run.dry_run") and previous is not None and not _exists(previous):
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
    try:
        weights = None if OmegaConf.is_missing(cfg, "ckpt_path") else cfg.ckpt_path
    except OmegaConfBaseException:
        weights = None
    if weights is not None:
        raise ConfigError(
            f"ckpt_path={weights}: model=nnunet has its weights in model.folder; choose them by model.folds and "
            f"model.checkpoint."
        )
    folds, checkpoint = cfg.model.get("folds"), cfg.model.get("checkpoint")
    if isinstance(folds, int | str):
        folds = [folds]
    return read_folder(
        Path(cfg.model.folder).expanduser(), checkpoint=str(checkpoint), folds=None if folds is None else list(folds)
    )


def _check_previous(model: NnunetFolder, previous: object) -> None:
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


def predict_stages_before(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Predict whose labels the model needs: the stages of a cascade before the last, and the model of data.within.

    Each runs as this command would, in a process and a folder of its own: what it has done already is not done again.

    Args:
        cfg: The composed configuration; changed in place.
        overrides: The job's overrides, as Hydra has them.

    Returns:
        The highest exit status of the stages before.

    Raises:
        ConfigError: a stage could not be started, or several processes are already running.
    """
    if OmegaConf.select(cfg, "run.status") or not isinstance(cfg.get("data"), DictConfig):
        return 0
    status = _predict_rough(cfg, overrides)
    folders = cfg.model.get("folder") if has_model_folder(cfg) else None
    if not isinstance(folders, ListConfig):
        return status
    stages = [str(folder) for folder in folders]
    if len(stages) < 2:
        raise ConfigError(f"model.folder is a folder, or the folders of a cascade in their order; it is {stages}.")
    if cfg.model.get("previous") is not None:
        raise ConfigError("model.previous goes with one folder: of several, each has the labels of the one before.")
    for stage in stages[:-1]:
        name = read_folder(Path(stage).expanduser(), checkpoint=str(cfg.model.checkpoint)).plan.configuration
        output_dir = str(Path(str(cfg.output_dir)).expanduser() / name)
        if is_first():
            previous = cfg.model.get("previous")
            own = {
                "model.folder": _quoted(stage), "output_dir": _quoted(output_dir), "stitch.products": "[labels]",
                "model.previous": "null" if previous is None else _quoted(previous),
                "stitch.compare": "[]", "data.labels": "null", "run.status": "false",
            }  # fmt: skip
            status = max(status, _predict_stage(overrides, own, stage))
        OmegaConf.update(cfg, "model.previous", _labels_in(output_dir, cfg), merge=False)
    OmegaConf.update(cfg, "model.folder", stages[-1], merge=False)
    return status


def _predict_rough(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Predict the model whose labels are the mask of `data.within`, if it names one."""
    rough = cfg.data.get("within")
    if not isinstance(rough, DictConfig):
        return 0
    known = ("folder", "ckpt_path", "classes")
    unknown = [str(key) for key in rough if key not in known]
    if unknown or ("folder" in rough) == ("ckpt_path" in rough):
        raise ConfigError(
            f"data.within is a mask's path, or a model: its folder (of nnU-Net) or its ckpt_path, and perhaps the "
            f"classes of its labels that count, such as '{{folder: rough_model, classes: [liver]}}'; it has "
            f"{list(rough)}."
        )
    output_dir = str(Path(str(cfg.output_dir)).expanduser() / "within")
    status = 0
    if is_first():
        model = (
            {"model": "nnunet", "model.folder": _quoted(str(rough.folder))}
            if "folder" in rough
            else {"model": "auto", "ckpt_path": _quoted(str(rough.ckpt_path))}
        )
        own = model | {
            "output_dir": _quoted(output_dir), "data.within": "null", "run.status": "false",
            "stitch.classes": _listed(rough.get("classes")),
        }  # fmt: skip
        # What the user said of the model, its patches and its labels is said of the other one.
        kept = [text for text in overrides if not text.lstrip("+~").startswith(_OF_MODEL)]
        status = _predict_stage(kept, own, str(rough.get("folder") or rough.get("ckpt_path")))
    mask = _labels_in(output_dir, cfg)
    is_planned = OmegaConf.select(cfg, "run.dry_run") and not _exists(mask)
    if is_planned:
        log.info("data.within is not known before %s has predicted: the plan is that of whole volumes.", rough)
    OmegaConf.update(cfg, "data.within", None if is_planned else mask, merge=False)
    return status


def _exists(pattern: str) -> bool:
    """Whether there is a file of any subject."""
    return any(glob.iglob("*".join(map(glob.escape, pattern.split("{subject}")))))


def _labels_in(output_dir: str, cfg: DictConfig) -> str:
    """The pattern of the label files of a run."""
    ending = ".gz" if OmegaConf.select(cfg, "callbacks.writer.compress", default=True) else ""
    return f"{output_dir}/{{subject}}_labels.nii{ending}"


def _predict_stage(overrides: Sequence[str], own: Mapping[str, str], stage: str) -> int:
    """Run this command with other settings; the exit status.

    Raises:
        ConfigError: nothing was started, or a launcher started several processes of this command.
    """
    if is_external():
        raise ConfigError(
            f"{stage} is to be predicted before, by the same command; where a launcher starts the processes, start a "
            f"run for each, the second with model.previous or data.within='first_run/{{subject}}_labels.nii.gz'."
        )
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in own]
    ended = subprocess.run([sys.executable, sys.argv[0], *kept, *(f"{key}={value}" for key, value in own.items())])
    if ended.returncode == 2:
        raise ConfigError(f"the stage of {stage} was not started, as said above.")
    return ended.returncode


def _listed(classes: Any) -> str:
    if classes is None:
        return "null"
    return f"[{','.join(_quoted(name) if isinstance(name, str) else str(name) for name in classes)}]"


def _quoted(value: str) -> str:
    text = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
