"""Checks values of a configuration.

Functions without a verb in their name say what a value must be: they take the value and its full key, or make such a
function. The others look at several values of a section. All raise ConfigError.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry.frame import to_triple
from voxquilt.geometry.grid import make_grid
from voxquilt.vocabulary import (
    BEST,
    FIT_MODES,
    METRICS,
    PADDING_MODES,
    VOLUMES,
    check_label_values,
    check_name,
    check_regions,
)

Check = Callable[[Any, str], object]


def anything(value: Any, key: str) -> None:
    """Left to the code that reads the value."""


def word(allowed: Iterable[str]) -> Check:
    """One of the allowed words, of which a registry may have more by the time of the check."""
    return lambda value, key: check_name(value, allowed, key)


def word_or_node(allowed: Iterable[str]) -> Check:
    """One of the allowed words, or a node with the _target_ of a class of the user's own."""
    return lambda value, key: None if isinstance(value, Mapping) and "_target_" in value else word(allowed)(value, key)


def flag(value: Any, key: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false; it is {value!r}.")


def flag_or(words: Iterable[str] = ()) -> Check:
    """True, false, or one of the words."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, bool):
            check_name(value, ("true", "false", *words), key)

    return check


def integer(least: int) -> Check:
    """An integer of at least `least`."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{key} must be an integer of at least {least}; it is {value!r}.")

    return check


def zero_or_one(value: Any, key: str) -> None:
    """0 or 1."""
    if not is_integer(value) or value not in (0, 1):
        raise ConfigError(f"{key} must be 0 or 1; it is {value!r}.")


def number(wanted: str, is_allowed: Callable[[float], bool] = lambda _: True) -> Check:
    """A number.

    Args:
        wanted: What the message says after the key, such as 'must be a number of mm from 0'.
        is_allowed: Whether a number is in range.
    """

    def check(value: Any, key: str) -> None:
        if not is_number(value) or not is_allowed(value):
            raise ConfigError(f"{key} {wanted}; it is {value!r}.")

    return check


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and neither true nor false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def list_of(example: str, check: Check = anything) -> Check:
    """A list or null, each of whose values passes a check."""

    def check_list(value: Any, key: str) -> None:
        if value is not None and not isinstance(value, list):
            raise ConfigError(f"{key} is a list, such as '[{example}]'; it is {value!r}.")
        for child in value or ():
            check(child, key)

    return check_list


def callables(value: Any, key: str) -> None:
    """A list of nodes with a _target_ each, or null."""
    nodes = value or []
    if not isinstance(nodes, list) or not all(isinstance(node, Mapping) and "_target_" in node for node in nodes):
        raise ConfigError(f"{key} must be a list of callables, each with its _target_; it is {nodes!r}.")


def or_null(check: Check) -> Check:
    """Null, or what passes a check."""
    return lambda value, key: None if value is None else check(value, key)


def first_of(exempt: Callable[[Any], bool], check: Check) -> Check:
    """What is exempt, or passes a check."""
    return lambda value, key: None if exempt(value) else check(value, key)


def by_name(check: Check, *, name_in_key: bool = False) -> Check:
    """A value that passes a check, or a mapping from names to such values."""

    def check_each(value: Any, key: str) -> None:
        if not isinstance(value, Mapping):
            check(value, key)
            return
        for name, child in value.items():
            check(child, f"{key}.{name}" if name_in_key else key)

    return check_each


def along_axes(value: Any, key: str) -> None:
    """A positive integer, or three along i, j, k."""
    to_triple(value, key, minimum=1)


def check_grid(data: Mapping[str, Any], size_key: str = "patch_size") -> None:
    """Refuse an overlap that makes no grid of the patches."""
    if size_key not in data:
        return
    patch_size, overlap = to_triple(data[size_key], f"data.{size_key}", minimum=1), data.get("patch_overlap", 0)
    step = data.get("step")
    try:
        make_grid(patch_size, patch_size, overlap, step=step)
    except VoxquiltError as error:
        shown = f"data.{size_key}={list(patch_size)}, data.patch_overlap={overlap}"
        raise ConfigError(f"{shown}{'' if step is None else f', data.step={step}'}: {error}") from error


def check_time(data: Mapping[str, Any]) -> None:
    """Refuse true labels of series, which are not compared."""
    if data.get("time") == VOLUMES and data.get("labels") is not None:
        raise ConfigError("data.labels goes with one volume per file; data.time=volumes predicts series.")


def check_margin(data: Mapping[str, Any]) -> None:
    """Refuse a margin around no box, which would have no effect."""
    if data.get("margin") and data.get("within") is None:
        raise ConfigError(f"data.margin={data['margin']} is around the box of data.within, which is null; set both.")


def padding_mode(value: Any, key: str) -> None:
    """Null, a number, or a mode of numpy.pad."""
    if value is not None and not is_number(value):
        check_name(value, (*PADDING_MODES, *FIT_MODES), f"{key} (null, a number, or a mode of numpy.pad)")


def label_patterns(value: Any, key: str) -> None:
    """A path with {subject}, or several by name."""
    patterns = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(text, str) and "{subject}" in text for text in patterns):
        raise ConfigError(
            f"{key} is a path with {{subject}}, such as 'labels/{{subject}}.nii.gz', or one for each channel of the "
            f"labels; it is {value!r}."
        )


def labels_by_image(value: Any, key: str) -> None:
    """Lists of labels by the names of images."""
    lists = list(value.values()) if isinstance(value, Mapping) else [None]
    if not all(isinstance(labels, list) and labels and all(map(is_integer, labels)) for labels in lists):
        raise ConfigError(
            f"{key} has a list of labels for each image of labels, such as '{{stage1: [1,2]}}'; it is {value!r}."
        )


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and neither true nor false."""
    return isinstance(value, int) and not isinstance(value, bool)


def name_or_number(value: Any, key: str) -> None:
    """A name, or an integer from 0."""
    if not isinstance(value, str) and not (is_integer(value) and value >= 0):
        raise ConfigError(f"{key} has names or numbers of labels; it has {value!r}.")


def split(value: Any, key: str) -> None:
    """Null, the name of a column, or a file of splits."""
    if not isinstance(value, str | None) or value == "":
        raise ConfigError(
            f"{key} must be the name of a column of the .csv, a .json file such as splits_final.json, or null; it is "
            f"{value!r}."
        )


def mask_path(value: Any, key: str) -> None:
    """A path with {subject}."""
    if not isinstance(value, str) or "{subject}" not in value:
        raise ConfigError(
            f"{key} is a mask's path with {{subject}}, or a model whose labels are one, such as "
            f"'{{folder: rough_model, classes: [liver]}}'; it is {value!r}."
        )


def threshold_or_mask(value: Any, key: str) -> None:
    """A number, or a path."""
    if not is_number(value) and not isinstance(value, str):
        raise ConfigError(f"{key} is null, a number, or a mask's path with {{subject}}; it is {value!r}.")


def number_or_numbers(value: Any, key: str) -> None:
    """A number, or a list of them."""
    if not all(map(is_number, value if isinstance(value, list) else [value])):
        raise ConfigError(f"{key} is null, a number, or a number for each channel; it is {value!r}.")


def shard_number(value: Any, key: str) -> None:
    """An integer from 0, or its text."""
    if isinstance(value, bool) or not str(value).isdecimal():  # also the text of an environment variable
        raise ConfigError(f"{key} must be an integer; it is {value!r}.")


def check_shard(shard: Mapping[str, Any]) -> None:
    """Refuse an index beyond the count."""
    if not int(shard["index"]) < int(shard["count"]):
        raise ConfigError(
            f"shard.index={shard['index']} is not below shard.count={shard['count']}: shards are counted from 0, so a "
            f"SLURM array of 4 is --array=0-3."
        )


def flag_or_time(value: Any, key: str) -> None:
    """True, false, or time."""
    if not isinstance(value, bool) and value != "time":
        raise ConfigError(f"{key} must be true, false or time; it is {value!r}.")


def objective(value: Any, key: str) -> None:
    """Best, or the name of a metric; those that do not begin as ours do are the user's own."""
    if not isinstance(value, str) or (value.startswith(("val", "train")) and not value.startswith("val_dice_")):
        check_name(value, (BEST, *METRICS), key)


def check_classes(stitch: Mapping[str, Any]) -> None:
    """Refuse numbers of labels that are not one for each class."""
    check_label_values(stitch.get("label_values"), stitch.get("class_names"))
    check_regions(stitch.get("regions"), stitch.get("label_values"))
