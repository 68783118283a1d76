"""Is the configuration of a training right? Answered before torch or anything else heavy is imported."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from voxquilt.cli.predict_config import check_keys, check_output, check_weights, to_plain
from voxquilt.cli.schema import (
    KEYS,
    check_grid,
    check_image_names,
    check_integer,
    check_labels,
    check_preprocess,
    check_stitch,
    check_trainer,
)
from voxquilt.data.discovery import find_cases
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.geometry.frame import to_triple
from voxquilt.training.continuation import check_folder, check_start, record
from voxquilt.training.splits import make_split
from voxquilt.vocabulary import TASKS, check_name

_KEYS = KEYS | {
    "data": {"inputs", "labels", "images", "task", "patch_size", "inference_patch_size", "patch_overlap",
             "padding_mode", "divisible_by", "batch_size", "num_workers", "patches_per_volume", "balanced", "augment",
             "cache", "folds", "fold", "split", "seed"},
    "run": {"seed", "overwrite"},
}  # fmt: skip


def check_train(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, once it is complete and its files are there.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    plain = to_plain(cfg)
    check_keys(plain, _KEYS)
    data = plain["data"]
    _check_data(data)
    check_preprocess(plain["preprocess"])
    check_stitch(plain["stitch"])
    _check_model(plain["model"], data["task"], plain["stitch"].get("class_names"))
    _check_label_values(plain["stitch"].get("label_values"), plain["model"]["net"].get("out_channels"), data["task"])
    check_integer(plain["run"], "seed", 0, "run.seed")
    if not isinstance(plain["run"].get("overwrite"), bool):
        raise ConfigError(f"run.overwrite must be true or false; it is {plain['run'].get('overwrite')!r}.")
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    check_trainer(plain["trainer"], 1, multirun=multirun)
    check_weights(plain)
    apart = [data["split"]] if data["split"] else ()
    cases = find_cases(data["inputs"], data["images"], apart, plain["output_dir"])
    check_image_names(plain["preprocess"].get("intensity"), cases)
    parts = make_split(cases, data["folds"], data["fold"], data["seed"], data["split"])
    if not parts.validation:
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


def _check_data(data: Mapping[str, Any]) -> None:
    to_triple(data["patch_size"], "data.patch_size", minimum=1)
    inference = to_triple(data["inference_patch_size"], "data.inference_patch_size", minimum=1)
    check_grid(inference, data["patch_overlap"])
    to_triple(data["divisible_by"], "data.divisible_by", minimum=1)
    for key, least in (("batch_size", 1), ("num_workers", 0), ("patches_per_volume", 1), ("fold", 0)):
        check_integer(data, key, least, f"data.{key}")
    if data["folds"] is not None:
        check_integer(data, "folds", 2, "data.folds (null: no validation)")
    check_name(data["task"], TASKS, "data.task")
    balanced = data["balanced"]
    if isinstance(balanced, bool) or not isinstance(balanced, int | float) or not 0 <= balanced <= 1:
        raise ConfigError(f"data.balanced is a share, 0 to 1; it is {balanced!r}.")
    check_labels(data["labels"])
    if data["labels"] is None and not str(data["inputs"]).lower().endswith(".csv"):
        raise ConfigError(
            "data.labels is missing: the label of each subject, such as 'labels/{subject}.nii.gz'; or data.inputs is a "
            ".csv with a column 'label'."
        )


def _check_label_values(values: Any, channels: Any, task: str) -> None:
    if values is None:
        return
    if task != "segmentation":
        raise ConfigError(f"stitch.label_values={values} is of classes; task={task} has none.")
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
