"""Reads a trained model folder of nnU-Net v2, without torch: all that predicting needs, checked, as plain values."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.checkpoint_record import read_record
from voxquilt.models.nnunet.dataset import Dataset, read_dataset
from voxquilt.models.nnunet.location import locate_model
from voxquilt.models.nnunet.plans import Plan, read_plan
from voxquilt.text import question

log = logging.getLogger("voxquilt")

ALL = "all"
Folds = Sequence[int | str] | int | str | None
"""Numbers, or 'all'; one or several. None is every fold that is there."""


@dataclass(frozen=True)
class NnunetFolder:
    """A trained model.

    Args:
        path: The folder; for an exported zip, the folder that it was unpacked to.
        folds: The folds that predict, each a number or 'all'.
        checkpoints: Their checkpoints.
        trainer: Name of the trainer's class.
        mirror_axes: Axes of the network's input along which it may be mirrored: 0, 1, 2, or 0, 1 for a 2-D network.
        dataset: What dataset.json says.
        plan: What plans.json says about the configuration that was trained.
    """

    path: Path
    folds: tuple[int | str, ...]
    checkpoints: tuple[Path, ...]
    trainer: str
    mirror_axes: tuple[int, ...]
    dataset: Dataset
    plan: Plan

    @property
    def is_2d(self) -> bool:
        """Whether the network predicts slices across the model's first axis."""
        return len(self.plan.patch_size) == 2

    @property
    def flips(self) -> tuple[int, ...]:
        """The model's axes i, j, k (0, 1, 2) along which patches may be mirrored."""
        return tuple(axis + self.is_2d for axis in self.mirror_axes)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the images and, in a cascade, a mask for each foreground label."""
        masks = len(self.dataset.labels.foreground) if self.plan.previous_stage is not None else 0
        return len(self.dataset.channels) + masks


def read_folder(folder: str | Path, *, checkpoint: str = "checkpoint_final.pth", folds: Folds = None) -> NnunetFolder:
    """Read a model folder, or the zip of one that nnU-Net exported.

    Args:
        folder: The folder TRAINER__PLANS__CONFIGURATION with plans.json and dataset.json; or a zip, with the folder in
            it behind the zip's name if there are several.
        checkpoint: Name of the file in each fold's folder.
        folds: Numbers, or 'all'. By default every fold that has the checkpoint, but fold_all only if it is alone.

    Raises:
        ConfigError: something is missing, wrong or not supported.
    """
    path = locate_model(Path(folder))
    chosen = find_folds(path, checkpoint, folds)
    files = tuple(path / f"fold_{fold}" / checkpoint for fold in chosen)
    record = read_record(files[0])  # as nnU-Net does; of the other folds only the weights count
    dataset = read_dataset(path / "dataset.json")
    _warn_of_gaps(path, dataset)
    plan = read_plan(path / "plans.json", record.configuration, len(dataset.channels))
    _warn_of_order(path, plan)
    plan = replace(plan, architecture=record.trained(plan.architecture))
    if max(record.mirror_axes, default=0) >= len(plan.patch_size):
        raise ConfigError(
            f"{files[0]}: inference_allowed_mirroring_axes is {record.mirror_axes}, but patches have "
            f"{len(plan.patch_size)} axes. Do plans.json and the checkpoint belong together?"
        )
    return NnunetFolder(path, chosen, files, record.trainer, record.mirror_axes, dataset, plan)


def _warn_of_gaps(path: Path, dataset: Dataset) -> None:
    labels = dataset.labels
    if not labels.is_regions and labels.numbers != labels.values:
        _warn(
            f"{path / 'dataset.json'}: labels have the numbers {', '.join(map(str, labels.numbers))}; nnU-Net writes "
            f"their positions, 0 to {len(labels.numbers) - 1}, and so does this. "
            f"stitch.label_values=[{','.join(map(str, labels.numbers))}] writes the numbers."
        )


def _warn_of_order(path: Path, plan: Plan) -> None:
    if plan.resample_probabilities.order == 3:
        _warn(
            f"{path / 'plans.json'}: resampling_fn_probabilities has order 3, after which nnU-Net cuts off what lies "
            f"beyond each channel's range. This does not: probabilities differ where splines overshoot, and labels may."
        )


def _warn_of_absent(path: Path, checkpoint: str, chosen: tuple[int | str, ...]) -> None:
    """Say which folds are left out: their training may have been broken off, or copying them."""
    names = {entry.name.removeprefix("fold_") for entry in path.glob("fold_*") if entry.is_dir()}
    absent = sorted(int(name) for name in names if name.isdecimal() and int(name) not in chosen)
    if chosen and absent:
        _warn(
            f"{path}: of fold {', '.join(map(str, absent))} there is no {checkpoint}; what predicts is fold "
            f"{', '.join(map(str, chosen))}."
        )


@cache
def _warn(text: str) -> None:
    """Log a warning once: a folder is read several times in a run."""
    log.warning("%s", text)


def find_folds(path: Path, checkpoint: str, folds: Folds) -> tuple[int | str, ...]:
    """The folds of a model folder that predict; see `read_folder`.

    Raises:
        ConfigError: there is none, or one of those that are named is not there.
    """
    if "/" in checkpoint or "\\" in checkpoint:
        raise ConfigError(f"checkpoint={checkpoint!r} is a path; wanted is the name of the file in each fold's folder.")
    names = {entry.name.removeprefix("fold_") for entry in path.glob("fold_*") if (entry / checkpoint).is_file()}
    # Not a copy such as fold_0_old, which would be averaged with the others.
    numbers = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    present = [*numbers, *names & {ALL}]
    if folds is None:
        chosen = tuple(numbers or present)
        _warn_of_absent(path, checkpoint, chosen)
    else:
        listed = [folds] if isinstance(folds, str | int) else folds
        chosen = tuple(dict.fromkeys(int(fold) if str(fold).isdecimal() else fold for fold in listed))
    missing = [fold for fold in chosen if fold not in present]
    if chosen and not missing:
        return chosen
    files = sorted({file.name for file in path.glob("fold_*/*.pth")})
    there = f"folds {', '.join(map(str, present))}" if present else "no fold"
    advice = f" Its checkpoints are called {', '.join(files)}." if files and not present else ""
    asked = f"fold {missing[0]}" if missing else "a fold"
    raise ConfigError(
        f"{path}: {asked} with {checkpoint} was wanted; {there} with that file came.{advice}"
        f"{question(checkpoint, files) if not present else ''} Choose other folds or another checkpoint."
    )
