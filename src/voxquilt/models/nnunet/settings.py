"""Says in this project's settings what a model folder of nnU-Net asks for: nothing else needs to know of nnU-Net."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from voxquilt.models.nnunet.folder import NnunetFolder
from voxquilt.models.nnunet.plans import Normalisation
from voxquilt.models.nnunet.postprocessing import read_postprocessing
from voxquilt.models.nnunet.resampling import NONE, TORCH, Resampling
from voxquilt.vocabulary import HALF

PREVIOUS = "previous"
"""The name of the image that has the labels of the stage before."""


def settings_of(model: NnunetFolder, *, previous: str | None = None, postprocess: bool = False) -> dict[str, Any]:
    """The settings of a model folder, by section and key: plain values, with a `_target_` for what is a callable.

    Args:
        model: The folder.
        previous: A path with `{subject}` to the labels of the stage before, for a cascade.
        postprocess: Whether to keep only the largest components that its cross-validation found to be better.

    Raises:
        ConfigError: the folder's postprocessing.json is wrong.
    """
    plan, labels = model.plan, model.dataset.labels
    flat = [1] if model.is_2d else []
    spacing = None if plan.resample_data.function == NONE else [*([None] if model.is_2d else []), *plan.spacing]
    channels = channel_names(model)
    settings: dict[str, Any] = {
        "data": {
            "patch_size": [*flat, *plan.patch_size],
            "placement": "even",
            "step": 0.5,
            "suffixes": {name: f"_{n:04d}" for n, name in enumerate(channels)},
            "extra_images": {PREVIOUS: previous} if previous is not None else None,
        },
        "preprocess": {
            "orientation": "RAS" if plan.reader.endswith("WithReorient") else None,
            # The reader's axes are those of the file in reverse.
            "transpose": [2 - axis for axis in plan.transpose_forward],
            "spacing": spacing,
            "grid": "corner_measured" if plan.reader == "NibabelIOWithReorient" else "corner",
            "crop": "nonzero",
            "interpolation": plan.resample_data.order,
            "per_slice": plan.resample_data.per_slice,
            "intensity": {n: [_node(given)] for n, given in enumerate(plan.normalisations) if _changes(given)} or None,
            "intensity_first": True,
            "one_hot": {PREVIOUS: list(labels.foreground)} if plan.previous_stage is not None else None,
        },
        "model": {
            "flips": list(model.flips),
            "activation": "sigmoid" if labels.is_regions else "softmax",
        },
        "stitch": {
            "overlap_mode": "nnunet",
            "order": plan.resample_probabilities.order,
            "per_slice": plan.resample_probabilities.per_slice,
            "class_names": list(labels.names),
            "regions": list(labels.values) if labels.is_regions else None,
        },
    }
    if plan.previous_stage is not None:
        settings["preprocess"]["one_hot_interpolation"] = _of_labels(plan.resample_seg)
    unions = read_postprocessing(model) if postprocess else ()
    if unions:
        settings["stitch"]["postprocess"] = [{"_target_": "voxquilt.KeepLargest", "unions": [list(u) for u in unions]}]
    return settings


def channel_names(model: NnunetFolder) -> list[str]:
    """A name for each image of a subject, all different."""
    names: list[str] = []
    for n, name in enumerate(model.dataset.channels):
        names.append(name if name not in names and name != PREVIOUS else f"{name}_{n:04d}")
    return names


def checkpoints_of(model: NnunetFolder) -> list[Path]:
    """The files of weights."""
    return list(model.checkpoints)


def _of_labels(given: Resampling) -> int | str:
    return HALF if given.function == TORCH else min(given.order, 1)


def _changes(given: Normalisation) -> bool:
    return given.scheme != "NoNormalization"


def _node(given: Normalisation) -> Mapping[str, Any]:
    options: dict[str, Any] = {}
    if given.intensities is not None:
        options = asdict(given.intensities)
    elif given.scheme == "ZScoreNormalization":
        options = {"use_mask": given.use_mask}
    return {"_target_": f"voxquilt.{given.scheme}", **options}
