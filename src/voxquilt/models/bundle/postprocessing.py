"""Says in this project's settings what a bundle makes of a network's scores."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from voxquilt.models.bundle.config import BundleConfig
from voxquilt.models.bundle.preprocessing import FLOAT, Preprocessing
from voxquilt.models.bundle.preprocessing import SECTION as PREPROCESSING
from voxquilt.models.bundle.steps import Step, read_steps, transform_name

SECTION = "postprocessing"
_IGNORED = ("SaveImaged", "ToDeviced", "EnsureChannelFirstd", "DeleteItemsd")
_TYPES = ("EnsureTyped", "ToTensord", "CastToTyped")
# Options of MONAI's array transforms of the same name without the 'd', which take and give labels.
_OF_LABELS = {
    "KeepLargestConnectedComponentd": (
        "applied_labels", "is_onehot", "independent", "connectivity", "num_components",
    ),
    "FillHolesd": ("applied_labels", "connectivity"),
    "RemoveSmallObjectsd": ("min_size", "connectivity", "independent_channels"),
    "LabelFilterd": ("applied_labels",),
    "MapLabelValued": ("orig_labels", "target_labels"),
}  # fmt: skip


@dataclass
class Postprocessing:
    """What a bundle makes of scores, as far as its steps have been read.

    Args:
        key: The name of the scores; None until the first step.
        activation: 'softmax' or 'sigmoid', once there is one.
        discrete: How labels are made, 'argmax' or the threshold, once they are.
        order: By which scores or labels are brought back to the file's grid, once they are.
        activated_first, labels_first: Whether this was done before they were brought back.
        callables: What is done with labels in the file's grid.
    """

    key: str | None = None
    activation: str | None = None
    discrete: str | float | None = None
    order: int | None = None
    activated_first: bool = False
    labels_first: bool = False
    callables: list[dict[str, Any]] = field(default_factory=list)

    @property
    def renumbers(self) -> bool:
        """Whether the final labels are other numbers than those of the network's channels."""
        return any(node["_target_"].endswith(".MapLabelValue") for node in self.callables)

    def as_settings(self) -> dict[str, dict[str, Any]]:
        """The settings of the sections `stitch` and `model`."""
        stitch: dict[str, Any] = {"order": 1 if self.order is None else self.order, "restore": "scores"}
        if self.labels_first:
            stitch |= {"restore": "labels", "order": 1}
        elif self.activated_first and self.order == 1:
            stitch["restore"] = "probabilities"
        if isinstance(self.discrete, float):
            # MONAI's labels are 1 from the threshold on, ours above it: above the number before it.
            stitch["threshold"] = float(np.nextafter(np.float32(self.discrete), np.float32(-1)))
        if self.discrete is None:
            stitch["products"] = ["logits" if self.activation is None else "probabilities"]
        if self.callables:
            stitch["postprocess"] = self.callables
        return {"stitch": stitch, "model": {"activation": self.activation}}


def read_postprocessing(
    config: BundleConfig, before: Preprocessing, part: dict[str, str], channels: int | None
) -> Postprocessing:
    """What a bundle's `postprocessing` does.

    Args:
        config: The configuration.
        before: What it does to images.
        part: The arguments of `voxquilt.BundleTransform` that name the bundle.
        channels: Channels of the network's output, if they are known.

    Raises:
        ConfigError: a transform or an option that is not known, or an order that the settings do not have.
    """
    result = Postprocessing()
    step = None
    for step in read_steps(config, SECTION):
        name = transform_name(step)
        if name in _IGNORED:
            continue
        if name in _TYPES:
            if result.discrete is None:  # scores, which integers would round
                step.expect("dtype", *FLOAT)
            continue
        if name in _READERS or name in _OF_LABELS:
            keys = step.keys()
            result.key = result.key or (keys[0] if keys else None)
            if keys != [result.key]:
                raise step.refusal("keys", f"voxquilt reads post-processing of one entry, {result.key}.")
        if name in _READERS:
            _READERS[name](step, result, before)
        elif name in _OF_LABELS or config.is_trusted:
            _check_place(step, result, before)
            result.callables.append(_callable(step, name, result.key or "pred", part))
        else:
            raise step.unknown()
    if isinstance(result.discrete, float) and result.activation is None and channels not in (None, 1):
        raise config.refusal(SECTION, "it compares scores of several channels with a threshold, without sigmoid.", "")
    if result.order is None and before.spacing is not None:
        raise config.refusal(SECTION, "nothing brings its scores back to the file's grid, as Invertd does.", "")
    return result


def _activations(step: Step, result: Postprocessing, _: Preprocessing) -> None:
    softmax, sigmoid = step.take_one("softmax", False), step.take_one("sigmoid", False)
    if softmax is sigmoid or result.activation is not None or result.discrete is not None:
        raise step.refusal(None, "wanted is softmax or sigmoid, once, and before labels are made.")
    step.expect("other", None)
    step.expect("dim", 0)
    step.finish()
    result.activation = "softmax" if softmax is True else "sigmoid"
    result.activated_first = result.order is None


def _discrete(step: Step, result: Postprocessing, _: Preprocessing) -> None:
    argmax, threshold = step.take_one("argmax", False), step.take_one("threshold")
    if result.discrete is not None or (argmax is True) is (threshold is not None):
        raise step.refusal(None, "wanted is argmax or a threshold, once.")
    if argmax is not True and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise step.refusal("threshold", "wanted is a number.")
    if result.activation == ("sigmoid" if argmax is True else "softmax"):
        raise step.refusal(None, f"this does not go with {result.activation}: argmax is for softmax, a threshold not.")
    step.expect("to_onehot", None)
    step.expect("rounding", None)
    step.expect("dim", 0)
    step.expect("keepdim", True)
    step.ignore("dtype")
    step.finish()
    result.discrete = "argmax" if argmax is True else float(threshold)
    result.labels_first = result.order is None


def _invert(step: Step, result: Postprocessing, before: Preprocessing) -> None:
    transform, _ = step.config.raw(step.place("transform"))
    originals = step.take_one("orig_keys", result.key)
    inverted, _ = step.config.raw(PREPROCESSING)  # which may itself be a reference
    if transform != inverted or originals != before.key or result.order is not None:
        raise step.refusal(None, f"wanted is the inverse of @{PREPROCESSING} with orig_keys {before.key}, once.")
    nearest = step.take_one("nearest_interp", True)
    if not isinstance(nearest, bool):
        raise step.refusal("nearest_interp", "wanted is true or false.")
    order = 0 if nearest else before.settings.get("interpolation", 1)
    if result.discrete is not None and order != 0 and before.spacing is not None:
        raise step.refusal(
            "nearest_interp", "labels would be interpolated linearly, to fractions; voxquilt takes the nearest."
        )
    step.expect("post_func", None)
    step.ignore("transform")
    step.finish()
    result.order = order


_READERS = {"Activationsd": _activations, "AsDiscreted": _discrete, "Invertd": _invert}


def _check_place(step: Step, result: Postprocessing, before: Preprocessing) -> None:
    if result.discrete is None:
        raise step.refusal(None, "voxquilt post-processes labels: after AsDiscreted.")
    moves = before.spacing is not None or before.settings["orientation"] is not None
    if result.order is None and moves:
        raise step.refusal(None, "voxquilt post-processes labels in the file's grid: after Invertd.")


def _callable(step: Step, name: str | None, key: str, part: dict[str, str]) -> dict[str, Any]:
    if name not in _OF_LABELS:
        return {"_target_": "voxquilt.BundleTransform", **part, "place": step.key, "key": key}
    options = {option: step.take(option) for option in _OF_LABELS[name] if option in step.options}
    step.expect("by_measure", False)
    step.expect("pixdim", None)
    step.finish()
    return {"_target_": f"monai.transforms.{name.removesuffix('d')}", **options}
