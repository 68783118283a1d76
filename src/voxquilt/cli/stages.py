"""Runs the models whose labels another one needs: earlier stages of a cascade, and the rough model of data.within."""

import logging
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from voxquilt.cli.exit_status import DONE, FAILED, NOT_STARTED
from voxquilt.cli.model_folder import check_previous, has_files, has_model_folder
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.folder import read_folder

log = logging.getLogger("voxquilt")

# The model and the key of a rough model, by how data.within names it.
_ROUGH = {
    "folder": ("nnunet", "model.folder"), "bundle": ("bundle", "model.folder"), "ckpt_path": ("auto", "ckpt_path"),
}  # fmt: skip
# What is said of the labels that are written is said of the last stage's: the next stage takes all labels of the one
# before, by the network's own numbers.
_OF_LAST = {
    "stitch.products": "[labels]", "stitch.compare": "[]", "stitch.classes": "null", "stitch.label_values": "null",
    "stitch.class_names": "null", "stitch.regions": "null", "stitch.threshold": "null", "stitch.postprocess": "[]",
    "data.labels": "null", "run.status": "false",
}  # fmt: skip
# Overrides that a rough model is not run with.
_OF_MODEL = (
    "model", "ckpt_path", "data.patch_size", "data.patch_overlap", "data.step", "data.divisible_by", "data.labels",
    "preprocess", "stitch",
)  # fmt: skip


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
    # Also the last one's, before hours are spent on the others.
    checkpoint = str(cfg.model.checkpoint)
    models = [read_folder(Path(stage).expanduser(), checkpoint=checkpoint) for stage in stages]
    for n, model in enumerate(models):
        check_previous(model, "{subject}" if n else None)
    for stage, name in zip(stages[:-1], (model.plan.configuration for model in models), strict=False):
        output_dir = str(Path(str(cfg.output_dir)).expanduser() / name)
        if is_first():
            previous = cfg.model.get("previous")
            own = {
                **_OF_LAST, "model.folder": _quoted(stage), "output_dir": _quoted(output_dir),
                "model.previous": "null" if previous is None else _quoted(previous),
            }  # fmt: skip
            status = max(status, _predict_stage(cfg, overrides, own, stage))
        OmegaConf.update(cfg, "model.previous", _labels_in(output_dir, cfg), merge=False)
    OmegaConf.update(cfg, "model.folder", stages[-1], merge=False)
    return status


def _predict_rough(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Predict the model whose labels are the mask of `data.within`, if it names one."""
    rough = cfg.data.get("within")
    if not isinstance(rough, DictConfig):
        return 0
    kinds = [str(key) for key in rough if key != "classes"]
    if len(kinds) != 1 or kinds[0] not in _ROUGH:
        raise ConfigError(
            f"data.within is a mask's path, or a model: its folder (of nnU-Net), its bundle (of MONAI) or its "
            f"ckpt_path, and perhaps the classes of its labels that count, such as "
            f"'{{folder: rough_model, classes: [liver]}}'; it has {list(rough)}."
        )
    place = str(rough[kinds[0]])
    output_dir = str(Path(str(cfg.output_dir)).expanduser() / "within")
    status = 0
    if is_first():
        option, key = _ROUGH[kinds[0]]
        own = {
            "model": option, key: _quoted(place),
            "output_dir": _quoted(output_dir), "data.within": "null", "data.margin": "0", "run.status": "false",
            "stitch.classes": _listed(rough.get("classes")),
        }  # fmt: skip
        # What the user said of the model, its patches and its labels is said of the other one.
        kept = [text for text in overrides if not text.lstrip("+~").startswith(_OF_MODEL)]
        status = _predict_stage(cfg, kept, own, place)
    mask = _labels_in(output_dir, cfg)
    predicts = not (OmegaConf.select(cfg, "run.dry_run") or OmegaConf.select(cfg, "run.selfcheck"))
    has_mask = predicts or has_files(mask)
    if not has_mask:
        log.info("data.within is not known before %s has predicted: whole volumes are taken.", rough)
        OmegaConf.update(cfg, "data.margin", 0)
    OmegaConf.update(cfg, "data.within", mask if has_mask else None, merge=False)
    return status


def _labels_in(output_dir: str, cfg: DictConfig) -> str:
    """The pattern of the label files of a run."""
    ending = ".gz" if OmegaConf.select(cfg, "callbacks.writer.compress", default=True) else ""
    return f"{output_dir}/{{subject}}_labels.nii{ending}"


def _predict_stage(cfg: DictConfig, overrides: Sequence[str], own: Mapping[str, str], stage: str) -> int:
    """Run this command with other settings; the exit status.

    Raises:
        ConfigError: nothing was started, or several processes or shards of this command run beside each other.
    """
    if is_external():
        raise ConfigError(
            f"{stage} is to be predicted before, by the same command; where a launcher starts the processes, start a "
            f"run for each, the second with model.previous or data.within='first_run/{{subject}}_labels.nii.gz'."
        )
    if str(OmegaConf.select(cfg, "shard.count", default=1)) != "1":
        raise ConfigError(
            f"{stage} is to be predicted before, and shards of the two would not have the same subjects: start the "
            f"shards of a run for each, the second with model.previous or "
            f"data.within='first_run/{{subject}}_labels.nii.gz'."
        )
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in own]
    process = subprocess.Popen([sys.executable, sys.argv[0], *kept, *(f"{key}={value}" for key, value in own.items())])
    try:
        status = process.wait()
    except (KeyboardInterrupt, SystemExit) as error:  # of Ctrl-C, which the other process got too, and ends in order
        process.wait()
        raise SystemExit(128 + signal.SIGINT) from error
    if status == NOT_STARTED:
        raise ConfigError(f"the stage of {stage} was not started, as said above.")
    if status not in (DONE, FAILED):  # stopped by a signal
        raise SystemExit(status if status > 0 else 128 - status)
    return status


def _listed(classes: Any) -> str:
    if classes is None:
        return "null"
    return f"[{','.join(_quoted(name) if isinstance(name, str) else str(name) for name in classes)}]"


def _quoted(value: str) -> str:
    text = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
