"""Lists the words that a configuration may use, and has registries of what they name; imports nothing heavy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.text import question

LABELS, MAP, IMAGE, PICTURE = "labels", "map", "image", "picture"
"""Kinds of outputs: integers with names and colours; numbers such as probabilities; intensities; a PNG file."""
ACTIVATIONS = ("softmax", "sigmoid", "none")
APPLIED = ("applied", "applied_sigmoid")
"""Scores that were made probabilities before they were averaged: of one label per voxel, or of several."""
DTYPES = ("float32", "float16", "uint8")
"""Types of probabilities and other maps with a known range."""
ONE, PER_CLASS = "one", "per_class"
FILES = (ONE, PER_CLASS)
"""Whether a map with a channel per class is one file, or one per class."""
RESTORES = ("scores", "probabilities", "labels")
OFFLOAD = ("auto",)
AVERAGES = ("logits", "probabilities")
OUTPUTS = ("auto", "resampled", "cropped")
"""How an output lies in its patch; see `voxquilt.geometry.output_layout`."""
ORDERS = (0, 1, 3)
"""Orders of interpolation: nearest voxel, linear, cubic spline."""
CHECKPOINT = "checkpoint"
"""The value of `model.flips` that takes the axes from nnU-Net's checkpoint."""
ORDERED, MEAN = "ordered", "mean"
COMBINE = (ORDERED, MEAN)
"""How the outputs of several models are combined; see `voxquilt.stitching.combination`."""
CHANNELS, VOLUMES = "channels", "volumes"
TIMES = (CHANNELS, VOLUMES)
"""What the last axis of a 4-D file has: channels of one volume, or the volumes of a series."""
CROPS = ("nonzero",)
NONFINITE = ("error", "zero")
HALF = "half"
"""Labels are resampled by their shares of a voxel in half precision."""
DEVICES = ("auto", "cpu")
"""Where images are prepared: on the network's device, or on the host."""
ON_ERROR = ("skip", "raise")
TASKS = ("segmentation", "multilabel", "image")
METRICS = ("train_loss", "val_score", "val_dice", "val_mae", "val_psnr")
"""What a training logs, beside val_dice_<class>."""
BEST = "best"
"""The value of `run.objective` that is the score of best.ckpt."""
LOGS = ("auto", "rich", "plain", "json")
SUBJECT, SLAB = "subject", "slab"
DISTRIBUTE = (SUBJECT, SLAB, "auto")
"""What several processes share: each has subjects of its own, or a part of every volume."""
PADDING_MODES = (
    "constant", "edge", "linear_ramp", "maximum", "mean", "median", "minimum", "reflect", "symmetric", "wrap", "empty",
)  # fmt: skip
FIT_MODES = ("fit_edge", "fit_reflect", "fit_wrap")
"""The same modes where only what a patch does not fit is padded, and not a border of half the overlap."""

ADDED_SETTINGS = {
    "data.placement": "regular", "data.time": "channels", "data.margin": 0, "data.label_interpolation": 0,
    "preprocess.grid": "centre", "preprocess.interpolation": 1, "preprocess.intensity_first": False,
    "preprocess.one_hot_interpolation": 1,
    "stitch.order": 1, "stitch.dtype": "float32", "stitch.files": "one", "stitch.temperature": 1,
}  # fmt: skip
"""Settings that later versions have added, each with the value of the runs and trainings before."""

# Settings with a number for each axis, or one for all three.
_ALONG_AXES = ("data.patch_size", "data.patch_overlap", "data.divisible_by", "preprocess.spacing")


def check_name(value: object, allowed: Iterable[str], key: str) -> str:
    """One of the allowed words.

    Raises:
        ConfigError: (a ValueError) it is not; the nearest one is suggested.
    """
    allowed = list(allowed)
    if value in allowed:
        return str(value)
    raise ConfigError(f"{key} must be one of {', '.join(allowed)}; it is {value!r}.{question(str(value), allowed)}")


def check_positive(value: object, key: str) -> None:
    """Raises ConfigError where a value is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{key} must be a number above 0; it is {value!r}.")


def check_order(value: object, key: str) -> None:
    """Raises ConfigError where a value is no order of interpolation."""
    if isinstance(value, bool) or value not in ORDERS:
        raise ConfigError(f"{key} must be 0 (nearest voxel), 1 (linear) or 3 (cubic spline); it is {value!r}.")


def check_label_interpolation(value: object, key: str) -> None:
    """Raises ConfigError where a value is no way to interpolate labels."""
    if isinstance(value, bool) or value not in (0, 1, HALF):
        raise ConfigError(
            f"{key} must be 0 (nearest voxel), 1 (the largest share) or {HALF} (of shares in half precision); it is "
            f"{value!r}."
        )


def check_per_slice(value: object, key: str) -> None:
    """Raises ConfigError where a value is no threshold above which slices are interpolated each by itself."""
    if value is not None and not isinstance(value, bool) and not (isinstance(value, int | float) and value >= 1):
        raise ConfigError(
            f"{key} is a ratio of voxel sizes from 1, such as 3, or true (always), or null (never); it is {value!r}."
        )


def check_regions(values: object, label_values: object = None) -> None:
    """Raises ConfigError where values are not the numbers that a network's regions write into labels."""
    if values is None:
        return
    given: list[Any] = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [None]
    if not given or not all(isinstance(n, Integral) and not isinstance(n, bool) and 0 <= int(n) < 2**31 for n in given):
        raise ConfigError(f"stitch.regions is a list of the number of each region, such as [1,2,3]; it is {values!r}.")
    if label_values is not None:
        raise ConfigError("stitch.regions are the numbers in label files: leave out stitch.label_values.")


def check_label_values(values: object, class_names: Sequence[str] | None = None) -> list[int] | None:
    """The numbers that classes 0, 1, ... have in label files, or None where these are the classes' own.

    Raises:
        ConfigError: (a ValueError) not a list of different integers from 0 to 2^53, or another number of them than
            there are names.
    """
    if values is None:
        return None
    given: list[Any] = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [None]
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and 0 <= int(n) <= 2**53 for n in given):
        raise ConfigError(
            f"stitch.label_values is a list of the numbers that classes have in files, integers from 0, such as "
            f"[0,1002]; it is {values!r}."
        )
    numbers = [int(n) for n in given]
    again = sorted({n for n in numbers if numbers.count(n) > 1})
    if again or not numbers:
        raise ConfigError(f"stitch.label_values has a number for each class, each once; it is {numbers}.")
    if class_names and len(class_names) != len(numbers):
        raise ConfigError(
            f"stitch.label_values has {len(numbers)} numbers and stitch.class_names {len(class_names)} names; both are "
            f"of classes 0, 1, ..."
        )
    return numbers


def flattened(node: object, key: str, *, numbered: bool = False) -> dict[str, Any]:
    """Settings by their full keys.

    >>> flattened({"spacing": 1.5, "intensity": [{"scale": 2}]}, "preprocess", numbered=True)
    {'preprocess.spacing': 1.5, 'preprocess.intensity.0.scale': 2}

    Args:
        node: The settings below a key, or the value that it has.
        key: The key.
        numbered: Whether lists of mappings, such as several transforms, are divided too, with numbers as keys.
    """
    if numbered and isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
        node = {str(n): child for n, child in enumerate(node)}
    if not isinstance(node, Mapping):
        return {key: node}
    parts = [flattened(child, f"{key}.{name}", numbered=numbered) for name, child in node.items()]
    return {name: value for part in parts for name, value in part.items()}


def normalised(key: str, value: object, names: Mapping[str, str]) -> Any:
    """One notation for values that mean the same: [8, 8, 8] and 8 along three axes, 1 and 1.0, two names of a class.

    >>> normalised("data.patch_size", [8.0, 8, 8], {})
    8

    Args:
        key: The full key of the setting.
        value: Its value.
        names: What replaces strings that are names of classes.
    """
    if isinstance(value, list):
        values = [normalised(key, entry, names) for entry in value]
        same = key in _ALONG_AXES and len(values) == 3 and values[0] == values[1] == values[2]
        return values[0] if same else values
    if isinstance(value, str):
        return names.get(value, value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Registry:
    """What may be chosen by name, such as blends: nothing of it is imported before it is used.

    Other packages add entries by an entry point: a line `name = "package.module:object"` below
    `[project.entry-points."<group>"]` in their pyproject.toml.

    >>> blends = Registry("blend", {"hann": "voxquilt.stitching.blend:HANN"}, "voxquilt.blends")
    >>> "hann" in blends
    True

    Args:
        kind: What the entries are, for messages.
        table: 'module:object' by name.
        group: The entry point group of other packages' entries. The table's own names cannot be replaced.
    """

    def __init__(self, kind: str, table: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self.group = group
        self._table = dict(table)

    @cached_property
    def _added(self) -> dict[str, str]:
        """Entries of other packages; read when a name is first asked for that the table does not have."""
        return {point.name: point.value for point in entry_points(group=self.group) if point.name not in self._table}

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the table, without those that other packages have added."""
        return tuple(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._added

    def __iter__(self) -> Iterator[str]:
        yield from self._table
        yield from self._added

    def check(self, name: object, key: str) -> str:
        """One of the names.

        Args:
            name: What was given.
            key: Where it was given, for the message.

        Raises:
            ConfigError: (a ValueError) no entry has the name; the nearest one is suggested.
        """
        if isinstance(name, str) and name in self:
            return name
        names = list(self)
        raise ConfigError(f"{key} must be one of {', '.join(names)}; it is {name!r}.{question(str(name), names)}")

    def load(self, name: str) -> Any:
        """Import the object of a name.

        Raises:
            ConfigError: (a ValueError) no entry has the name, or another package's cannot be imported.
        """
        self.check(name, self.kind)
        module, _, attribute = (self._table.get(name) or self._added[name]).partition(":")
        try:
            value: Any = import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except Exception as error:
            if name in self._table:
                raise
            raise ConfigError(
                f"the {self.kind} {name!r} cannot be imported from {module}:{attribute}, where the entry point group "
                f"{self.group} has it: {type(error).__name__}: {error}"
            ) from error
        return value
