"""Which words may a configuration use? Kept apart from what they mean, so that checking them imports nothing heavy."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from voxquilt.errors import ConfigError
from voxquilt.text import question

OVERLAP_MODES = ("crop", "average", "hann", "gaussian")
PRODUCTS = ("labels", "probabilities", "logits", "entropy", "disagreement", "image")
ACTIVATIONS = ("softmax", "sigmoid", "none")
APPLIED = ("applied", "applied_sigmoid")
"""Scores that were made probabilities before they were averaged: of one label per voxel, or of several."""
RESTORES = ("scores", "labels")
OFFLOAD = ("auto",)
AVERAGES = ("logits", "probabilities")
OUTPUTS = ("auto", "resampled", "cropped")
"""How an output lies in its patch; see `voxquilt.geometry.output_layout`."""
NONFINITE = ("error", "zero")
ON_ERROR = ("skip", "raise")
TASKS = ("segmentation", "multilabel", "image")
LOGS = ("auto", "rich", "plain", "json")
DISTRIBUTE = ("subject", "slab", "auto")
PADDING_MODES = (
    "constant", "edge", "linear_ramp", "maximum", "mean", "median", "minimum", "reflect", "symmetric", "wrap", "empty",
)  # fmt: skip


def check_name(value: object, allowed: Iterable[str], key: str) -> str:
    """One of the allowed words.

    Raises:
        ConfigError: (a ValueError) it is not; the nearest one is suggested.
    """
    allowed = list(allowed)
    if value in allowed:
        return str(value)
    raise ConfigError(f"{key} must be one of {', '.join(allowed)}; it is {value!r}.{question(str(value), allowed)}")


def check_label_values(values: object, class_names: Sequence[str] | None = None) -> list[int] | None:
    """The numbers that classes 0, 1, ... have in label files, or None where these are the classes' own.

    Raises:
        ConfigError: (a ValueError) not a list of different integers from 0 to 2^53, or another number of them than
            there are names.
    """
    if values is None:
        return None
    listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
    if listed is None or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in listed):
        listed = [-1]
    numbers = [int(n) for n in listed]
    if not all(0 <= n <= 2**53 for n in numbers):
        raise ConfigError(
            f"stitch.label_values is a list of the numbers that classes have in files, integers from 0, such as "
            f"[0,1002]; it is {values!r}."
        )
    again = sorted({n for n in numbers if numbers.count(n) > 1})
    if again or not numbers:
        raise ConfigError(f"stitch.label_values has a number for each class, each once; it is {numbers}.")
    if class_names and len(class_names) != len(numbers):
        raise ConfigError(
            f"stitch.label_values has {len(numbers)} numbers and stitch.class_names {len(class_names)} names; both are "
            f"of classes 0, 1, ..."
        )
    return numbers
