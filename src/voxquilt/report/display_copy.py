"""Makes what the viewer shows of a subject: copies of its volumes that a browser displays quickly and correctly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8, UInt16

from voxquilt.data.formats.image_file import open_image
from voxquilt.errors import InputError
from voxquilt.report.missing_thumbnails import is_series, label_values_of, outputs_of
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.overlay import PALETTE, flat
from voxquilt.text import escaped
from voxquilt.vocabulary import IMAGE, LABELS, MAP

MOST_VOXELS = 2**24
"""Voxels of a volume beyond which the viewer gets a copy at half resolution, or less."""
MOST_COLOURS = 63
"""Labels that NiiVue paints correctly in a volume of bytes: from 64 on it paints the background too."""
_LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL, by which NiiVue shows more labels, with soft edges
_MOST_CHANNELS = 128  # of a map, each an entry of its own


@dataclass(frozen=True)
class Entry:
    """A volume that the viewer can show.

    Args:
        name: What the viewer calls it.
        kind: 'image', 'labels' or 'map'.
        path: The file.
        channel: The channel of an image or a map; labels are shown with all of their channels.
    """

    name: str
    kind: str
    path: Path
    channel: int = 0


@dataclass(frozen=True)
class SubjectVolumes:
    """The volumes of one subject, as far as their files are there.

    Args:
        row: The subject's row.
        folder: The output folder.
        configuration: The configuration of the run, which has the names of classes.
    """

    row: Row
    folder: Path
    configuration: Mapping[str, Any]

    @cached_property
    def entries(self) -> list[Entry]:
        """Inputs, labels and maps, in this order."""
        inputs = {name: Path(path) for name, path in self.row.inputs.items()}
        found = [Entry(name if len(inputs) > 1 else "image", IMAGE, path) for name, path in inputs.items()]
        outputs = outputs_of(self.row, (LABELS, MAP, IMAGE))
        for wanted in (LABELS, IMAGE, MAP):
            for product, (file, kind) in outputs.items():
                path = self.folder / file
                if kind == wanted and self._is_inside(path):
                    found += [Entry(product, LABELS, path)] if kind == LABELS else self._channels(product, path)
        return [entry for entry in found if entry.path.is_file()]

    def _is_inside(self, path: Path) -> bool:
        """Whether a file is in the output folder, also if it is a link."""
        return path.resolve().is_relative_to(self.folder.resolve())

    def _channels(self, product: str, path: Path) -> list[Entry]:
        try:
            count = min(open_image(path).channels, _MOST_CHANNELS)
        except InputError:
            return []
        names = [str(n) if is_series(self.configuration) else self.class_names.get(n, str(n)) for n in range(count)]
        return [Entry(f"{product}: {name}" if count > 1 else product, MAP, path, n) for n, name in enumerate(names)]

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Names of classes 0, 1, ..."""
        names = (self.configuration.get("stitch") or {}).get("class_names") or ()
        return dict(enumerate(map(str, names)))

    @property
    def label_values(self) -> list[int] | None:
        """The numbers of classes in label files; None for 0, 1, ..."""
        return label_values_of(self.configuration)

    def describe(self) -> dict[str, Any]:
        """What the viewer is told before it asks for a volume."""
        return {
            "subject": escaped(self.row.subject),
            "volumes": [{"name": escaped(entry.name), "kind": entry.kind} for entry in self.entries],
        }

    def copy(self, number: int) -> tuple[bytes, dict[str, Any]]:
        """A volume for the viewer, as the bytes of a NIfTI file, and how it is shown.

        Args:
            number: Its number among `entries`.

        Raises:
            InputError: its file cannot be read, or there is no such entry.
        """
        if not 0 <= number < len(self.entries):
            raise InputError(f"{self.row.subject} has {len(self.entries)} volumes; there is no number {number}.")
        entry = self.entries[number]
        file = open_image(entry.path)
        step = step_for(file.frame.shape)
        voxels = file.read().numpy()[:, ::step, ::step, ::step]
        affine = file.frame.affine @ np.diag([step, step, step, 1.0])  # the centre of voxel 0 stays where it is
        about: dict[str, Any] = {"step": step, "shape": list(file.frame.shape)}
        if entry.kind == LABELS:
            voxels = voxels[: 1 if is_series(self.configuration) else None]
            shown, classes = dense_labels(flat(voxels))
            legend = [self._legend(n, value, len(voxels) > 1) for n, value in enumerate(classes)]
            intent = 0 if len(classes) <= MOST_COLOURS + 1 else _LABEL_INTENT
            return to_nifti(shown, affine, intent), about | {"classes": legend}
        data = voxels[entry.channel]
        if data.dtype not in (np.uint8, np.int16):  # types that take less memory in the browser
            data = np.nan_to_num(data.astype(np.float32))
        low, high = window_of(data) if entry.kind == IMAGE else (0.0, max(1.0, float(data.max())))
        return to_nifti(data, affine), about | {"low": low, "high": high}

    def _legend(self, shown: int, value: int, is_channels: bool) -> dict[str, Any]:
        """A class: its number in the display copy, its true number, name and colour."""
        if is_channels:
            rank, number = value, value - 1  # channels are masks, counted from 0
        else:
            values = [v for v in self.label_values or () if v]
            rank, number = values.index(value) + 1 if value in values else value, value
        names = self.class_names
        if not is_channels and self.label_values is not None:
            names = dict(zip(self.label_values, names.values(), strict=False))
        colour = PALETTE[(rank - 1) % len(PALETTE)].tolist() if value else [0, 0, 0]
        return {"shown": shown, "number": number, "name": escaped(names.get(number, str(number))), "colour": colour}


def step_for(shape: Sequence[int], most: int = MOST_VOXELS) -> int:
    """Every how many voxels along each axis the viewer gets: 1 for volumes that are not too large."""
    voxels = 1
    for n in shape:
        voxels *= n
    return max(1, ceil((voxels / most) ** (1 / 3)))


def dense_labels(
    labels: Shaped[np.ndarray, "i j k"],
) -> tuple[UInt8[np.ndarray, "i j k"] | UInt16[np.ndarray, "i j k"], list[int]]:
    """Labels as numbers from 0 without gaps, and the true number of each; 0 is the first, whether it occurs or not.

    >>> shown, numbers = dense_labels(np.array([[[0, 1002, 7]]]))
    >>> shown.tolist(), numbers
    ([[[0, 2, 1]]], [0, 7, 1002])
    """
    numbers = np.union1d([0], np.unique(labels))
    dtype = np.uint8 if len(numbers) <= 256 else np.uint16
    return np.searchsorted(numbers, labels).astype(dtype), [int(n) for n in numbers]


def window_of(data: Shaped[np.ndarray, "i j k"]) -> tuple[float, float]:
    """The intensities that are black and white: the 1st and 99th percentile of what is not 0."""
    some = data.ravel()[:: max(1, data.size // 2**20)]
    some = some[some != 0]
    low, high = (float(n) for n in np.percentile(some, (1, 99))) if some.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def to_nifti(data: Shaped[np.ndarray, "i j k"], affine: np.ndarray, intent: int = 0) -> bytes:
    """The bytes of a NIfTI file that is not packed, since it travels no further than this machine."""
    import nibabel as nib  # here, since a report on disk needs none

    image = nib.Nifti1Image(np.asfortranarray(data), affine)
    image.header.set_xyzt_units("mm")
    image.header["intent_code"] = intent
    return image.to_bytes()
