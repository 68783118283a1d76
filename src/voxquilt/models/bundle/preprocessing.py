"""Says in this project's settings what a bundle does to images before they are predicted."""

from dataclasses import dataclass, field
from typing import Any

from voxquilt.models.bundle.config import BundleConfig
from voxquilt.models.bundle.steps import Step, is_numbers, read_steps, transform_name

SECTION = "preprocessing"
FLOAT = (None, "float32", "torch.float32")
_LABELS = (None, [["L", "R"], ["P", "A"], ["I", "S"]])
# Options of MONAI's array transforms of the same name without the 'd'.
_INTENSITY = {
    "ScaleIntensityRanged": ("a_min", "a_max", "b_min", "b_max", "clip"),
    "ScaleIntensityd": ("minv", "maxv", "factor", "channel_wise"),
    "NormalizeIntensityd": ("subtrahend", "divisor", "nonzero", "channel_wise"),
    "ScaleIntensityRangePercentilesd": ("lower", "upper", "b_min", "b_max", "clip", "relative", "channel_wise"),
    "ClipIntensityPercentilesd": ("lower", "upper", "sharpness_factor", "channel_wise"),
    "StdShiftIntensityd": ("factor", "nonzero", "channel_wise"),
    "ThresholdIntensityd": ("threshold", "above", "cval"),
    "AdjustContrastd": ("gamma", "invert_image", "retain_stats"),
    "ShiftIntensityd": ("offset",),
}
# Those that look at the voxels of all channels; AdjustContrastd has no option against it.
_JOINT = {name for name, options in _INTENSITY.items() if "channel_wise" in options} | {"AdjustContrastd"}
_SPATIAL = {
    "CropForegroundd": "it leaves out what is not above 0, which preprocess.crop=nonzero (what is 0) is not",
    "SpatialPadd": "patches are cut from the whole volume",
    "ResizeWithPadOrCropd": "patches are cut from the whole volume",
    "Resized": "voxels have a size in mm here, not volumes a number of voxels",
}


@dataclass
class Preprocessing:
    """What a bundle does to its images.

    Args:
        channels: Channels of the network's input; None if the bundle does not say.
        key: The name of the image; None until it is loaded.
        settings: The settings that are known so far.
        spacing: The step that changes the spacing.
        before: Whether the intensities that came so far were changed before it.
        intensity: Callables.
    """

    channels: int | None
    key: str | None = None
    settings: dict[str, Any] = field(default_factory=lambda: {"orientation": None})
    spacing: Step | None = None
    before: set[bool] = field(default_factory=set)
    intensity: list[dict[str, Any]] = field(default_factory=list)

    def as_settings(self) -> dict[str, Any]:
        """The settings of the section `preprocess`."""
        first = self.spacing is not None and True in self.before
        return self.settings | {"intensity": self.intensity or None, "intensity_first": first}


def read_preprocessing(config: BundleConfig, channels: int | None, part: dict[str, str]) -> Preprocessing:
    """What a bundle's `preprocessing` does.

    Args:
        config: The configuration.
        channels: Channels of the network's input, if they are known.
        part: The arguments of `voxquilt.BundleTransform` that name the bundle.

    Raises:
        ConfigError: a transform or an option that is not known, or an order that the settings do not have.
    """
    result = Preprocessing(channels)
    for step in read_steps(config, SECTION):
        name = transform_name(step)
        keys = step.keys() if name in _READERS or name in _INTENSITY or name in _SPATIAL else None
        if result.key is None and keys:
            result.key = keys[0]
        if keys is not None and keys != [result.key]:
            raise step.refusal("keys", f"voxquilt reads preprocessing of one entry, {result.key}.")
        if name in _SPATIAL:
            raise step.refusal("_target_", f"{_SPATIAL[name]}.")
        if name in _READERS:
            _READERS[name](step, result)
            step.finish()
        elif name in _INTENSITY:
            _add(result, step, _intensity(step, name, result.channels))
        elif config.is_trusted:
            key = {"key": result.key or "image"}
            _add(result, step, {"_target_": "voxquilt.BundleTransform", **part, "place": step.key, **key})
        else:
            raise step.unknown()
    if result.spacing is not None and len(result.before) > 1:
        raise result.spacing.refusal(None, "intensities are changed before it and after it; voxquilt does so once.")
    return result


def _add(result: Preprocessing, step: Step, node: dict[str, Any]) -> None:
    result.intensity.append(node)
    result.before.add(result.spacing is None)


def _load(step: Step, _: Preprocessing) -> None:
    step.ignore("image_only", "ensure_channel_first", "simple_keys", "overwriting", "prune_meta_pattern")
    step.expect("reader", None, "NibabelReader", "ITKReader")
    step.expect("dtype", *FLOAT)


def _channel_first(step: Step, _: Preprocessing) -> None:
    step.ignore("strict_check")
    step.expect("channel_dim", None, "no_channel", -1)


def _type(step: Step, _: Preprocessing) -> None:
    step.ignore("data_type", "track_meta", "wrap_sequence")
    step.expect("dtype", *FLOAT)


def _orientation(step: Step, result: Preprocessing) -> None:
    if result.spacing is not None:
        raise step.refusal(None, "here axes are turned before the spacing is changed, which gives another grid.")
    step.expect("labels", *_LABELS)
    codes, canonical = step.take("axcodes"), step.take("as_closest_canonical", False)
    if canonical is not True and not isinstance(codes, str):
        raise step.refusal("axcodes", "wanted are three letters, such as RAS.")
    result.settings["orientation"] = "RAS" if canonical is True else codes


def _spacing(step: Step, result: Preprocessing) -> None:
    if result.spacing is not None:
        raise step.refusal(None, "here the spacing is changed once.")
    pixdim = step.take("pixdim")
    values: Any = pixdim if isinstance(pixdim, list) else [pixdim]
    if not is_numbers(values) or not 1 <= len(values) <= 3:
        raise step.refusal("pixdim", "wanted are three numbers of mm.")
    values = [*values, *[values[-1]] * (3 - len(values))]
    mode = step.take_one("mode", "bilinear")
    orders = {"bilinear": 1, "nearest": 0}
    if mode not in orders:
        raise step.refusal("mode", "voxquilt reads bilinear and nearest.")
    step.expect("padding_mode", "border")
    step.expect("diagonal", False)
    step.expect("scale_extent", False)
    step.expect("min_pixdim", None)
    step.expect("max_pixdim", None)
    step.expect("dtype", "float64", *FLOAT)
    # MONAI then forgets where the volume lies, so that its Invertd takes scores from other places.
    step.expect("recompute_affine", False)
    # With the border repeated, voxels lie alike however corners are aligned; the other concerns several images.
    step.ignore("align_corners", "ensure_same_shape")
    result.spacing = step
    result.settings |= {
        "spacing": [value if value > 0 else None for value in values],
        "grid": "monai",
        "interpolation": orders[mode],
    }


_READERS = {
    "LoadImaged": _load, "EnsureChannelFirstd": _channel_first, "EnsureTyped": _type, "CastToTyped": _type,
    "ToTensord": _type, "ToDeviced": _type, "Orientationd": _orientation, "Spacingd": _spacing,
}  # fmt: skip


def _intensity(step: Step, name: str, channels: int | None) -> dict[str, Any]:
    """The callable of an intensity transform."""
    options = {option: step.take(option) for option in _INTENSITY[name] if option in step.options}
    step.expect("dtype", *FLOAT)
    step.finish()
    lists = [option for option, value in options.items() if isinstance(value, list | dict)]
    if lists:
        raise step.refusal(None, f"voxquilt reads one number for {lists[0]}.")
    takes_all = name in _JOINT and not options.get("channel_wise") and not _is_fixed(name, options)
    if takes_all and channels != 1:
        raise step.refusal(None, "it takes all channels together; voxquilt changes images one by one (channel_wise).")
    return {"_target_": f"monai.transforms.{name.removesuffix('d')}", **options}


def _is_fixed(name: str, options: dict[str, Any]) -> bool:
    """Whether a transform does not depend on the voxels of other channels."""
    if name == "NormalizeIntensityd":
        return options.get("subtrahend") is not None and options.get("divisor") is not None
    return name == "ScaleIntensityd" and options.get("minv", 0) is None and options.get("maxv", 1) is None
