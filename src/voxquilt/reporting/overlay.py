"""Draws the outlines of labels on three planes of an image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from PIL import Image
from torch.nn import functional

from voxquilt.errors import InputError
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame
from voxquilt.reporting.colours import PALETTE
from voxquilt.reporting.pictures import side_by_side, with_letters
from voxquilt.reporting.ras_planes import (
    VIEWS,
    centre_of,
    pixels_per_mm,
    plane_of,
    ras_order,
    resized,
    resized_labels,
    to_grey,
    to_ras,
    window_of_planes,
)
from voxquilt.stitching.label_values import iterate_planes


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    *,
    planes_of: np.ndarray | None = None,
    window_of: np.ndarray | None = None,
) -> Image.Image:
    """Draw a sagittal, a coronal and an axial plane side by side, with the outline of each label in its own colour.

    The planes meet in the centre of mass of all labels, or in the middle of the volume without any. Whatever the
    orientation of the arrays, superior or anterior is up, and the patient's left is on the left of the picture.
    Pictures to be compared need the same `planes_of` and `window_of`.

    Args:
        image: (I, J, K) numbers; black to white is the 1st to the 99th percentile of the planes' values other than 0.
        labels: (I, J, K) integers, 0 for background.
        affine: (4, 4) voxel indices to mm in RAS.
        planes_of: (I, J, K) labels that determine where the planes are; None: `labels`.
        window_of: (I, J, K) numbers that determine what is black and white; None: `image`.

    Raises:
        InputError: these are not 3-D or differ in shape, or the affine is degenerate.
    """
    planes_of = labels if planes_of is None else planes_of
    window_of = image if window_of is None else window_of
    shapes = {volume.shape for volume in (image, labels, planes_of, window_of)}
    if image.ndim != 3 or len(shapes) > 1:
        raise InputError(
            f"an overlay needs an image and labels of one shape (I, J, K), without channels; "
            f"the image is {image.shape} and the labels are {labels.shape}."
        )
    frame = Frame(image.shape, affine)
    centre = centre_of(to_ras(planes_of, frame))
    image, labels, window_of = (to_ras(volume, frame) for volume in (image, labels, window_of))
    spacing = [frame.spacing[axis] for axis in ras_order(frame)]
    black, white = window_of_planes([plane_of(window_of, view, centre) for view in VIEWS])
    greys = [to_grey(plane_of(image, view, centre), black, white) for view in VIEWS]
    extents = [n * mm for n, mm in zip(image.shape, spacing, strict=True)]
    scale = pixels_per_mm(extents, min(spacing))
    panels = []
    for view, grey in zip(VIEWS, greys, strict=True):
        size = tuple(max(1, round(extents[axis] * scale)) for axis in (view.up, view.right))
        picture = outlined(resized(grey, size), resized_labels(plane_of(labels, view, centre), size))
        panels.append(with_letters(picture, view.letters))
    return side_by_side(panels)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, which appears only when it is complete; its folder must exist.

    Raises:
        OutputError: the file cannot be written.
    """
    with replacing(path) as file:
        picture.save(file, format="PNG")


def flat(
    labels: Shaped[np.ndarray, "c i j k"], label_values: Sequence[int] | None = None
) -> Shaped[np.ndarray, "i j k"]:
    """One label per voxel, for drawing. Several channels are masks, numbered from 1, of which the last one counts.

    Args:
        labels: Labels as files hold them.
        label_values: The numbers of classes 0, 1, ... in files: the colour of a class does not depend on its number.
    """
    if len(labels) == 1:
        if label_values is None:
            return labels[0]
        numbers = np.array(sorted({0, *label_values}))
        # Numbers other than 0 count from 1, in the order of the classes.
        ranks_by_number = {number: n for n, number in enumerate((v for v in label_values if v), 1)}
        ranks = np.array([ranks_by_number.get(int(number), 0) for number in numbers], np.min_scalar_type(len(numbers)))
        drawn = np.empty_like(labels, ranks.dtype)
        for plane, into in zip(iterate_planes(labels), iterate_planes(drawn), strict=True):
            places = np.searchsorted(numbers, plane).clip(max=len(numbers) - 1)
            into[...] = np.where(numbers[places] == plane, ranks[places], 0)
        return drawn[0]
    flattened = np.zeros(labels.shape[1:], np.uint8 if len(labels) < 256 else np.uint16)
    for n, mask in enumerate(labels, 1):
        flattened[mask > 0] = n
    return flattened


def _edges(labels: Int[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """The outermost pixels inside each label; outside the picture is background, so that outlines are closed."""
    # In double precision, which holds all labels; SciPy's filters of integers would take longer to import than to run.
    padded = functional.pad(torch.from_numpy(labels.astype(np.float64))[None], (width,) * 4)
    low, high = (functional.max_pool2d(sign * padded, 2 * width + 1, stride=1)[0] * sign for sign in (-1, 1))
    return (labels != 0) & (low != high).numpy()


def outlined(
    grey: UInt8[np.ndarray, "h w"], labels: Int[np.ndarray, "h w"], *, width: int = 2
) -> UInt8[np.ndarray, "h w 3"]:
    """A grey picture with the outline of each label, so many pixels wide and inside the label."""
    picture = np.repeat(grey[..., None], 3, axis=2)
    edges = _edges(labels, width)
    picture[edges] = PALETTE[(labels[edges] - 1) % len(PALETTE)]
    return picture
