"""Turns classes into the numbers of label files, by post-processing and the number of each class."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int64, Integer, Shaped
from torch import Tensor

from voxquilt.errors import InputError, OutputError


def to_labels(
    classes: Shaped[np.ndarray, "c i j k"],
    postprocess: Sequence[Callable[[Tensor], Tensor]] = (),
    label_values: Sequence[int] | None = None,
    kept: Collection[int] | None = None,
) -> Shaped[np.ndarray, "c i j k"]:
    """The numbers of a label file for a volume of classes.

    Args:
        classes: Class indices, or a mask per channel, in an unsigned type. They are replaced in place if the type also
            holds `label_values` and there is no post-processing.
        postprocess: Callables on a (C, I, J, K) int64 tensor, applied in turn.
        label_values: The number of each class; None for the classes themselves.
        kept: The numbers that are kept, of one label per voxel, or of channels; others become 0. None keeps all.

    Raises:
        OutputError: post-processing changed the shape, or gave numbers that are not labels (negative, fractional, not
            finite) or, with `label_values`, not classes.
    """
    labels = _numbered(classes, postprocess, label_values)
    if kept is not None:
        for channel, volume in enumerate(labels):
            if len(labels) == 1:
                for plane in iterate_planes(volume[None]):
                    plane[~np.isin(plane, list(kept))] = 0
            elif channel not in kept:
                volume[...] = 0
    return labels


def _numbered(
    classes: np.ndarray, postprocess: Sequence[Callable[[Tensor], Tensor]], label_values: Sequence[int] | None
) -> np.ndarray:
    if not postprocess and label_values is None:
        return classes
    processed = _postprocess(classes, postprocess) if postprocess else classes
    if label_values is None:
        # Post-processing such as MapLabelValue may give larger numbers.
        return processed.astype(np.promote_types(classes.dtype, np.min_scalar_type(processed.max())), copy=False)
    if processed.max() >= len(label_values):
        source = "post-processing" if postprocess else "a product of labels"
        raise OutputError(
            f"{source} gave {processed.max()}, which is not a class: stitch.label_values has numbers for "
            f"classes 0 to {len(label_values) - 1}. Leave it out if {source} gives the numbers of the file."
        )
    dtype = np.promote_types(classes.dtype, np.min_scalar_type(max(label_values)))
    numbers, labels = np.array(label_values, dtype), processed.astype(dtype, copy=False)
    for plane in iterate_planes(labels):
        plane[...] = numbers[plane]
    return labels


def to_classes(labels: Integer[Tensor, "*volume"], label_values: Sequence[int]) -> Int64[Tensor, "*volume"]:
    """The classes of the numbers in a label file.

    Args:
        labels: Numbers of a label file.
        label_values: The number of each class.

    Raises:
        InputError: a number that no class has.
    """
    numbers, classes = torch.tensor(label_values, dtype=torch.int64).sort()
    places = torch.searchsorted(numbers, labels.long()).clamp(max=len(numbers) - 1)
    unknown = labels[numbers[places] != labels]
    if len(unknown):
        raise InputError(
            f"its label holds {int(unknown.min())}, which is none of stitch.label_values={list(label_values)}."
        )
    return classes[places]


def beyond(highest: int, classes: int) -> str:
    """The message about a label with a class that the network does not have."""
    return (
        f"its label has class {highest}; the network gives {classes}, 0 to {classes - 1}. Set model.net.out_channels "
        f"and stitch.class_names, or change the label: a value such as 255 for voxels to ignore is a class too."
    )


def iterate_planes(volume: Shaped[np.ndarray, "c i j k"]) -> Iterator[np.ndarray]:
    """Views of a volume, channel by channel and plane by plane, as they lie in memory."""
    for channel in volume:
        yield from np.moveaxis(channel, int(np.argmax(np.abs(channel.strides))), 0)


def count_labels(labels: Shaped[np.ndarray, "c i j k"]) -> tuple[int, dict[int, int]]:
    """The number of voxels with any label, and the number with each label: each value above 0, or each channel."""
    if len(labels) > 1:
        return int(np.count_nonzero(labels.any(axis=0))), {n: int(np.count_nonzero(c)) for n, c in enumerate(labels)}
    counts = Counter(count_values(labels[0]))
    del counts[0]
    return counts.total(), dict(counts)


def count_values(labels: Shaped[np.ndarray, "i j k"]) -> dict[int, int]:
    """The number of voxels with each value that a voxel has, from the least value up."""
    counts = Counter[int]()
    # Plane by plane, since counting takes 8 bytes per voxel.
    for plane in iterate_planes(labels[None]):
        flat = plane.ravel(order="K")
        if plane.dtype == np.uint8:  # NumPy's bincount makes 8 bytes of each first, and takes three times as long
            numbers = torch.from_numpy(flat).bincount().numpy()
        elif plane.dtype.itemsize <= 2:  # faster than sorting
            numbers = np.bincount(flat)
        else:
            values, numbers = np.unique(flat, return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
            continue
        counts.update({int(n): int(numbers[n]) for n in np.flatnonzero(numbers)})
    return dict(sorted(counts.items()))


def _postprocess(classes: np.ndarray, postprocess: Sequence[Callable[[Tensor], Tensor]]) -> np.ndarray:
    data = torch.from_numpy(classes.astype(np.int64))
    for transform in postprocess:
        data = torch.as_tensor(transform(data)).as_subclass(Tensor)
        if tuple(data.shape) != classes.shape:
            raise OutputError(f"post-processing {transform!r} turned {classes.shape} into {tuple(data.shape)}.")
    if data.is_complex():
        raise OutputError(f"post-processing gave {data.dtype}, which is not a type of labels.")
    fractions = data.is_floating_point()
    bad = data[~(data.isfinite() & (data == data.round()) & (data >= 0))] if fractions else data[data < 0]
    if len(bad):
        raise OutputError(
            f"post-processing gave {bad[0].item()} ({len(bad)} voxels are negative, fractional or not finite); labels "
            f"are integers from 0."
        )
    return data.cpu().numpy().astype(np.int64)
