"""Checks the configuration of train.py before torch or anything else heavy is imported."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from voxquilt.cli.loggers import check_loggers
from voxquilt.cli.plain_config import check_image_names, check_output, check_weights, is_sweep, to_plain
from voxquilt.cli.process_check import check_trainer
from voxquilt.cli.schema import TOP, TRAIN
from voxquilt.cli.sections import check_sections
from voxquilt.data.discovery import find_cases
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.training.continuation import check_folder, check_start, record
from voxquilt.training.splits import make_split
from voxquilt.vocabulary import BEST


def check_train(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, once it is complete and its files are there.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    _check_sweep()
    plain = to_plain(cfg)
    check_sections(plain, TRAIN, TOP)
    check_loggers(plain.get("logger"))
    data = plain["data"]
    _check_label_source(data)
    _check_model(plain["model"], data["task"], plain["stitch"].get("class_names"))
    _check_label_values(plain["stitch"].get("label_values"), plain["model"]["net"].get("out_channels"), data["task"])
    check_trainer(plain["trainer"], 1, multirun=is_sweep())
    check_weights(plain)
    apart = [data["split"]] if data["split"] else ()
    cases = find_cases(data["inputs"], data["images"], apart, plain["output_dir"], suffixes=data["suffixes"])
    check_image_names(plain["preprocess"].get("intensity"), cases)
    parts = make_split(cases, data["folds"], data["fold"], data["seed"], data["split"])
    if not parts.validation:
        _check_objective(plain["run"]["objective"])
        # Nothing has a score.
        scored = [name for name, node in plain["callbacks"].items() if node and node.get("monitor") == "val_score"]
        plain["callbacks"] = {name: node for name, node in plain["callbacks"].items() if name not in scored}
    check_output(plain)
    plain["images"] = list(parts.training[0].images)
    plain["record"], plain["replaced"] = {}, []
    # Processes that Lightning starts come when rank 0 has been through this; torchrun's and SLURM's begin together, and
    # nothing is written before all of them are there.
    if is_first() or is_external():
        plain["record"] = record(plain, parts)
        plain["replaced"] = check_folder(plain)
        check_start(plain, plain["record"])
    return plain


def _check_sweep() -> None:
    if HydraConfig.initialized() and not is_sweep() and (chosen := HydraConfig.get().runtime.choices.get("hparams")):
        raise ConfigError(f"hparams={chosen} tries several settings: it goes with --multirun, or -m.")


def _check_objective(objective: str) -> None:
    """Refuse to look for the best score where nothing has one."""
    optimises = is_sweep() and HydraConfig.get().runtime.choices.get("hydra/sweeper") != "basic"
    if optimises and objective.startswith((BEST, "val_")):
        raise ConfigError(
            f"run.objective={objective} needs validation: set data.folds or data.split, or run.objective=train_loss "
            f"and hydra.sweeper.direction=minimize."
        )


def _check_label_source(data: Mapping[str, Any]) -> None:
    if data["labels"] is None and not str(data["inputs"]).lower().endswith(".csv"):
        raise ConfigError(
            "data.labels is missing: the label of each subject, such as 'labels/{subject}.nii.gz'; or data.inputs is a "
            ".csv with a column 'label'."
        )


def _check_label_values(values: Any, channels: Any, task: str) -> None:
    if values is None:
        return
    if task != "segmentation":
        raise ConfigError(f"stitch.label_values={values} numbers classes; task={task} has none.")
    if 0 not in values:
        raise ConfigError(f"stitch.label_values={values}: one class has 0 to train on, which volumes are padded with.")
    if isinstance(channels, int) and channels != len(values):
        raise ConfigError(
            f"stitch.label_values={values} has {len(values)} numbers; model.net.out_channels is {channels}."
        )


def _check_model(model: Any, task: str, names: Any) -> None:
    if not isinstance(model, Mapping) or not isinstance(model.get("net"), Mapping) or "_target_" not in model["net"]:
        raise ConfigError(
            "model.net needs a _target_: model/net=unet, dynunet, segresnet, swinunetr, or your own class."
        )
    channels = model["net"].get("out_channels")
    if names is None or not isinstance(channels, int) or task == "image":
        return
    if channels != len(names):
        raise ConfigError(
            f"stitch.class_names has {len(names)} names ({', '.join(map(str, names))}) and model.net.out_channels is "
            f"{channels}; with task={task} they are the same"
            f"{', the background being class 0' if task == 'segmentation' else ''}."
        )
