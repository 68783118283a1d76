"""Reads the plans of an nnU-Net folder, of which nothing needs to be trained yet, as settings of a training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.architecture import as_planned
from voxquilt.models.nnunet.checkpoint_record import CheckpointRecord, read_record
from voxquilt.models.nnunet.dataset import Labels, read_dataset
from voxquilt.models.nnunet.folder import NnunetFolder, find_folds
from voxquilt.models.nnunet.json_values import Node, is_integer, read_object
from voxquilt.models.nnunet.location import locate_plans
from voxquilt.models.nnunet.plans import Plan, read_plan, resolve_configuration
from voxquilt.models.nnunet.settings import settings_of
from voxquilt.text import question

_USUAL = "3d_fullres"
_SPLITS = "splits_final.json"  # of nnUNet_preprocessed; a folder of results has none
_OF_SPACE = ("orientation", "transpose", "spacing", "grid", "crop", "interpolation", "per_slice", "intensity",
             "intensity_first")  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """What train.py takes from a folder.

    Args:
        file: The file with the plans.
        settings: Settings by section and key: plain values, with a `_target_` for what is a callable.
        weights: The checkpoint with the weights to begin with, if any.
    """

    file: Path
    settings: dict[str, dict[str, Any]]
    weights: Path | None


def read_training_plan(
    folder: str | Path,
    *,
    plans: str | None = None,
    configuration: str | None = None,
    fold: int | str | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> TrainingPlan:
    """Read the plans of a folder.

    Args:
        folder: A trained model folder or its zip, a folder of nnUNet_preprocessed, or any with plans and dataset.json;
            or the file of the plans.
        plans: Name of the file with the plans; by default plans.json, or the only one with 'Plans' in its name.
        configuration: Which one of the plans; by default the trained one, 3d_fullres, or the only one.
        fold: The fold whose weights the training begins with; None for random weights.
        checkpoint: Name of the file with these weights.

    Raises:
        ConfigError: something is missing or wrong, or cannot be trained here; it is named.
    """
    path, file = locate_plans(Path(folder).expanduser(), plans)
    content, dataset = read_object(file), read_dataset(path / "dataset.json")
    weights = None if fold is None else path / f"fold_{find_folds(path, checkpoint, fold)[0]}" / checkpoint
    trained = weights or next(iter(sorted(path.glob(f"fold_*/{checkpoint}"))), None)
    record = None if trained is None else read_record(trained)
    name = _choose(content, configuration, record)
    plan = read_plan(file, name, len(dataset.channels))
    _check_trainable(file, path / "dataset.json", plan, dataset.labels)
    if weights is not None and record is not None and record.configuration != name:
        raise ConfigError(
            f"model.configuration={name}: the weights of {weights} are of {record.configuration}. Leave out "
            f"model.folds, for random weights."
        )
    architecture = plan.architecture if record is None else record.trained(plan.architecture)
    model = NnunetFolder(path, (), (), "", (), dataset, plan)
    common, labels = settings_of(model), dataset.labels
    batch_size, batch_dice = _batch(resolve_configuration(content, name))
    augment = {"augment": None} if model.is_2d else {}  # a rotation in space would leave the slice
    splits = path / _SPLITS
    split: dict[str, Any] = {"split": str(splits)} if splits.is_file() else {}
    if isinstance(fold, int) and split:
        split["fold"] = fold  # the weights have seen the others
    settings: dict[str, dict[str, Any]] = {
        "data": {
            **{key: common["data"][key] for key in ("patch_size", "placement", "step", "suffixes")},
            "patch_overlap": 0,
            "batch_size": batch_size,
            "label_interpolation": min(plan.resample_seg.order, 1),
            **augment,
            **split,
        },
        "preprocess": {key: common["preprocess"][key] for key in _OF_SPACE},
        "model": {
            "net": {
                "_target_": "voxquilt.PlannedUNet",
                "in_channels": model.input_channels,
                "out_channels": labels.heads,
                "architecture": as_planned(architecture),
            },
            "squeeze_axis": 0 if model.is_2d else None,
            "loss": {"_target_": "monai.losses.DiceCELoss", "batch": batch_dice},
        },
        "stitch": {key: common["stitch"][key] for key in ("overlap_mode", "order", "per_slice", "class_names")}
        | {"label_values": None if labels.numbers == labels.values else list(labels.numbers)},
    }
    return TrainingPlan(file, settings, weights)


def _choose(plans: Node, configuration: str | None, record: CheckpointRecord | None) -> str:
    """The configuration to train."""
    if configuration is None and record is not None:
        return record.configuration
    there = list(plans.child("configurations").values)
    if configuration is None and (_USUAL in there or len(there) == 1):
        return _USUAL if _USUAL in there else there[0]
    if configuration not in there:
        asked = "is needed" if configuration is None else f"{configuration!r} is not there"
        raise ConfigError(
            f"model.configuration {asked}: {plans.file} has {', '.join(there)}.{question(str(configuration), there)}"
        )
    return configuration


def _check_trainable(file: Path, dataset: Path, plan: Plan, labels: Labels) -> None:
    if plan.previous_stage is not None:
        raise ConfigError(
            f"{file}: {plan.configuration} takes the labels of {plan.previous_stage} as input, with which train.py "
            f"cannot train. Choose another one by model.configuration, or train it with nnU-Net."
        )
    if plan.resample_seg.order == 3 or plan.resample_seg.per_slice != plan.resample_data.per_slice:
        raise ConfigError(
            f"{file}: {plan.configuration} resamples labels by cubic splines, or slices of labels otherwise than those "
            f"of images (resampling_fn_seg_kwargs), which train.py does not. Train it with nnU-Net."
        )
    if labels.is_regions:
        raise ConfigError(
            f"{dataset}: labels are regions ({', '.join(labels.names)}), which train.py does not train. Train with "
            f"nnU-Net, or on the labels themselves, by a copy of the file in which each is one number."
        )
    if labels.ignore is not None:
        raise ConfigError(
            f"{dataset}: labels.ignore is {labels.ignore}, and train.py leaves no voxel out of the loss. Train with "
            f"nnU-Net, or without voxels of that label, by a copy of the file in which it is not named."
        )


def _batch(configuration: Node) -> tuple[int, bool]:
    """Patches per batch, and whether Dice is that of the whole batch."""
    size = configuration.values.get("batch_size")
    if not is_integer(size) or size < 1:
        raise configuration.refusal("batch_size", "an integer of at least 1")
    return size, configuration.flag("batch_dice", False)
