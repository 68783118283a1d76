"""Draws the thumbnails of a run's report: three planes of each subject with the outlines of its labels."""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image as Picture

from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame, Triple
from voxquilt.reporting.overlay import flat, outlined
from voxquilt.reporting.ras_planes import (
    VIEWS,
    View,
    centre_of,
    plane_of,
    ras_order,
    resized,
    resized_labels,
    to_grey,
    to_ras,
    window_of_planes,
)
from voxquilt.text import reason_of
from voxquilt.vocabulary import IMAGE

log = logging.getLogger("voxquilt")

FOLDER = Path("report") / "thumbnails"
"""Where thumbnails are, below the output folder: a folder for each kind, and in it a file for each subject."""
OVERLAY = "overlay"
"""The kind of the thumbnail that shows the input with the outlines of its labels."""
MAPS = ("disagreement", "entropy")
"""Products that have a thumbnail of their own, in colours; one of kind 'image' has one in grey."""
SIDE = 144
"""Pixels along each side of a plane; a thumbnail is three planes wide."""
SIZE = SIDE * len(VIEWS), SIDE
"""Width and height of a thumbnail in pixels."""

# Voxels of labels in which their centre is sought; larger volumes are thinned first.
_SEARCHED = 2**22
# Dark violet to yellow with rising lightness, so that it is also read without colours.
_HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float64)


def path_of(folder: Path, kind: str, subject: str) -> Path:
    """The file of a subject's thumbnail."""
    return folder / FOLDER / kind / f"{subject}.jpg"


def maps_of(volumes: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> dict[str, Shaped[np.ndarray, "i j k"]]:
    """The volumes that have thumbnails of their own, by kind; of several outputs, those of the first.

    Args:
        volumes: (C, I, J, K) by product.
        kinds: 'labels', 'map' or 'image' by product.
    """
    maps: dict[str, np.ndarray] = {}
    for product, volume in volumes.items():
        kind = IMAGE if kinds[product] == IMAGE else next((m for m in MAPS if re.search(rf"(^|_){m}$", product)), "")
        if kind and len(volume) == 1:
            maps.setdefault(kind, volume[0])
    return maps


def try_thumbnails(folder: Path, subject: str, *arguments: Any) -> None:
    """Write thumbnails as `write_thumbnails` does; a failure is a line of the log, and no old picture remains."""
    try:
        write_thumbnails(folder, subject, *arguments)
    except Exception as error:
        log.warning("%s: no thumbnail for the report: %s", subject, reason_of(error))
        for kind in (OVERLAY, IMAGE, *MAPS):
            with contextlib.suppress(OSError):
                path_of(folder, kind, subject).unlink(missing_ok=True)


def write_thumbnails(
    folder: Path,
    subject: str,
    image: Shaped[np.ndarray, "i j k"] | None,
    labels: Shaped[np.ndarray, "c i j k"] | None,
    maps: Mapping[str, Shaped[np.ndarray, "i j k"]],
    affine: np.ndarray,
    label_values: Sequence[int] | None = None,
) -> None:
    """Write a subject's thumbnails, each of which appears only when it is complete.

    The planes meet in the centre of mass of the labels, or in the middle of the volume; left is on the left.

    Args:
        folder: The output folder.
        subject: The id.
        image: The first image; None where it cannot be had, which leaves the background black.
        labels: Labels as files hold them; None without labels.
        maps: Further volumes by kind. Of 'image' black and white are as in the input's picture; of others black is 0
            and yellow is the largest value in the planes.
        affine: (4, 4) voxel indices to mm in RAS.
        label_values: The numbers of classes 0, 1, ... in files, which decide on colours.

    Raises:
        OutputError: a file cannot be written.
    """
    shapes = [volume.shape[-3:] for volume in (image, labels, *maps.values()) if volume is not None]
    if not shapes:
        return
    frame = Frame(shapes[0], affine)
    centre = _centre(frame, labels)
    pictures = {}
    if image is not None or labels is not None:
        drawn = None if labels is None else [_flat_plane(labels, label_values, view, frame, centre) for view in VIEWS]
        pictures[OVERLAY] = _grey_planes(image, frame, centre, drawn)
    for kind, volume in maps.items():
        pictures[kind] = (_grey_planes if kind == IMAGE else _heat_map)(volume, frame, centre)
    for kind, picture in pictures.items():
        path = path_of(folder, kind, subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = BytesIO()
        # Without subsampling of colours, which would blur outlines of one pixel.
        Picture.fromarray(picture).save(packed, format="JPEG", quality=80, subsampling=0)
        with replacing(path, durable=False) as file:
            file.write(packed.getbuffer())


def _centre(frame: Frame, labels: Shaped[np.ndarray, "c i j k"] | None) -> Triple:
    """The voxel, in RAS order, in which the planes meet."""
    i, j, k = (frame.shape[axis] // 2 for axis in ras_order(frame))
    if labels is None:
        return i, j, k
    channels = [to_ras(channel, frame) for channel in labels]
    step = max(1, round((labels.size / _SEARCHED) ** (1 / 3)))
    for n in dict.fromkeys((step, 1)):  # all voxels only where thinning has left no label
        thinned = [channel[::n, ::n, ::n] for channel in channels]
        inside = thinned[0] if len(thinned) == 1 else np.logical_or.reduce(thinned)
        if inside.any():
            i, j, k = (min(at * n, size - 1) for at, size in zip(centre_of(inside), channels[0].shape, strict=True))
            break
    return i, j, k


def _flat_plane(
    labels: np.ndarray, label_values: Sequence[int] | None, view: View, frame: Frame, centre: Triple
) -> Shaped[np.ndarray, "up right"]:
    """The labels of a plane, one per voxel: only planes are flattened, since a volume may have many channels."""
    planes = np.stack([plane_of(to_ras(channel, frame), view, centre) for channel in labels])
    return flat(planes[:, None], label_values)[0]


def _grey_planes(
    image: np.ndarray | None, frame: Frame, centre: Triple, labels: Sequence[np.ndarray] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    planes = None if image is None else [plane_of(to_ras(image, frame), view, centre) for view in VIEWS]
    black, white = window_of_planes(planes or [])
    panels = []
    for n, view in enumerate(VIEWS):
        size = _size(view, frame)
        grey = np.zeros(size, np.uint8) if planes is None else resized(to_grey(planes[n], black, white), size)
        shown = np.zeros(size, np.int64) if labels is None else resized_labels(labels[n], size)
        panels.append(_padded(outlined(grey, shown, width=1)))
    return np.concatenate(panels, axis=1)


def _heat_map(volume: np.ndarray, frame: Frame, centre: Triple) -> UInt8[np.ndarray, "h w 3"]:
    planes = [np.nan_to_num(plane_of(to_ras(volume, frame), view, centre).astype(np.float64)) for view in VIEWS]
    highest = max(float(plane.max()) for plane in planes) or 1.0
    stops = np.linspace(0, 255, len(_HEAT))
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in _HEAT.T], axis=1).round()
    panels = [
        _padded(table.astype(np.uint8)[resized(to_grey(plane, 0.0, highest), _size(view, frame))])
        for view, plane in zip(VIEWS, planes, strict=True)
    ]
    return np.concatenate(panels, axis=1)


def _size(view: View, frame: Frame) -> tuple[int, int]:
    """Height and width in pixels of a view, of one scale in all views of a subject."""
    mm = [frame.shape[axis] * frame.spacing[axis] for axis in ras_order(frame)]
    scale = SIDE / max(mm)
    return max(1, round(mm[view.up] * scale)), max(1, round(mm[view.right] * scale))


def _padded(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "side side 3"]:
    """A picture in the middle of a black square."""
    square = np.zeros((SIDE, SIDE, 3), np.uint8)
    top, left = ((SIDE - n) // 2 for n in picture.shape[:2])
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return square
