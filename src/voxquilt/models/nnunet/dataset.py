"""Reads dataset.json of a model folder: channels, file ending and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxquilt.models.nnunet.json_values import Node, is_integer, is_list_of_integers, read_object

_RENUMBER = " Change the numbers in a copy of the file."


@dataclass(frozen=True)
class Labels:
    """What the channels of a network's output mean.

    As nnU-Net's utilities/label_handling/label_handling.py has it. For classes the label of a voxel is the number of
    its largest channel. For regions, which overlap, each channel of probability above 0.5 writes its value, in turn.

    Args:
        names: Names of the output's channels.
        values: The number that each channel writes into a label file.
        is_regions: Whether channels are regions.
        ignore: The number that marked voxels without a label in training; it is never predicted.
        foreground: All numbers of labels but 0 and `ignore`, ascending: the extra input channels of a cascade.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    is_regions: bool
    ignore: int | None
    foreground: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers that classes have in label files of the training; where they have gaps, not `values`."""
        return (0, *self.foreground)

    @property
    def heads(self) -> int:
        """Channels of the network's output."""
        return len(self.names)


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says.

    Args:
        channels: Names of the images, in the order of the files' numbers. A name may come twice.
        file_ending: End of the names of image files, such as '.nii.gz'.
        labels: What the output means.
    """

    channels: tuple[str, ...]
    file_ending: str
    labels: Labels


def read_dataset(file: Path) -> Dataset:
    """Read dataset.json.

    Raises:
        ConfigError: a value is missing or wrong.
    """
    node = read_object(file)
    ending = node.text("file_ending")
    if not ending.startswith("."):
        raise node.refusal("file_ending", "the end of a file's name, such as .nii.gz")
    return Dataset(_channels(node), ending, _labels(node))


def _channels(node: Node) -> tuple[str, ...]:
    key = "modality" if "modality" in node.values else "channel_names"  # which is the order that nnU-Net has, too
    names = node.values.get(key)
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise node.refusal(key, "a name for each image")
    ordered = [names.get(str(number)) for number in range(len(names))]
    if None in ordered:
        raise node.refusal(key, f"names by number, from '0' to '{len(names) - 1}'", _RENUMBER)
    return tuple(map(str, ordered))


def _labels(node: Node) -> Labels:
    labels = node.child("labels")
    entries = {name: _numbers(labels, name) for name in labels.values if name != "ignore"}
    if labels.values.get("background") != 0 or not is_integer(labels.values.get("background")):
        raise labels.refusal("background", "0, which nnU-Net asks for")
    present = sorted({number for numbers in entries.values() for number in numbers})
    ignore = _ignored(labels, present[-1] + 1)
    is_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values.values())
    names, values = _regions(node, entries) if is_regions else _classes(entries, present)
    if not present[1:] or not names:
        raise node.refusal("labels", "at least one label beside the background")
    return Labels(names, values, is_regions, ignore, tuple(present[1:]))


def _numbers(labels: Node, name: str) -> tuple[int, ...]:
    value = labels.values[name]
    numbers = value if isinstance(value, list) else [value]
    if not is_list_of_integers(numbers) or min(numbers, default=-1) < 0:
        raise labels.refusal(name, "an integer of at least 0, or a list of them", _RENUMBER)
    return tuple(numbers)


def _ignored(labels: Node, highest: int) -> int | None:
    ignore = labels.values.get("ignore")
    if ignore is not None and (not is_integer(ignore) or ignore != highest):
        raise labels.refusal("ignore", f"{highest}, one more than all labels, which nnU-Net asks for", _RENUMBER)
    return ignore


def _classes(entries: Mapping[str, tuple[int, ...]], present: list[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    # Where several names have one number the first counts, but for the background.
    first: dict[int, str] = {}
    for name, numbers in {"background": (0,), **entries}.items():
        first.setdefault(numbers[0], name)
    return tuple(first[number] for number in present), tuple(range(len(present)))


def _regions(node: Node, entries: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = tuple(name for name, numbers in entries.items() if set(numbers) != {0})
    order: Any = node.values.get("regions_class_order")
    if not is_list_of_integers(order) or len(order) != len(names) or min(order, default=0) < 0:
        raise node.refusal("regions_class_order", f"a number for each of the {len(names)} regions: {', '.join(names)}")
    return names, tuple(order)
