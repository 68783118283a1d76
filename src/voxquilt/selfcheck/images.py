"""Writes the synthetic images of a self-check: volumes whose every voxel says what has to come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import open_image
from voxquilt.geometry.frame import Triple, to_triple
from voxquilt.geometry.space import Box
from voxquilt.selfcheck.reference import BENT, spline_reach
from voxquilt.text import byte_size

RAMPS = ("ramp_x", "ramp_y", "ramp_z")
CONSTANT, NOISE, CLASSES = "constant", "noise", "classes"
CONSTANT_VALUE = 200
"""Two of them do not fit into eight bits, so that sums of bytes show."""
# Ramps of integers reach from -_STEPS to _STEPS: a step is far smaller than a voxel, and float16 holds it.
_STEPS = 30_000
# In place of those of a file, by which intensities could be beyond what half precision holds.
_SCALING = 0.5, 3.0
# Voxels that are 0 before and after an image along i, j, k, where crop leaves them out.
_MARGINS = (2, 1), (1, 3), (3, 2)
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class ImageForm:
    """What a synthetic image takes over from an image of the first subject.

    Args:
        name: Name of the image.
        channels: Its channels.
        dtype: Type of the voxels in the file.
        suffix: '.nii.gz' or '.nii'.
        affine: (4, 4) to mm.
        header: Its NIfTI header, for the orientation fields; None for another format.
        scaling: A slope and an intercept in the header, by which voxels of the file become intensities.
    """

    name: str
    channels: int
    dtype: str
    suffix: str
    affine: np.ndarray
    header: Any
    scaling: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Channel:
    """What a channel's voxels are: a . (i, j, k) + b, and how far the file's integers lie apart.

    Args:
        slope, offset: a and b.
        step: What an integer of the file is worth; 0 where the file holds fractions.
        per_mm: How much a ramp grows in a mm along its axis of the world; for others 1.
        intercept: What the file's header adds to its voxels, which is rounded with them.
    """

    slope: tuple[float, float, float]
    offset: float
    step: float = 0.0
    per_mm: float = 1.0
    intercept: float = 0.0

    def unknown(self, splines: int) -> float:
        """How far values may be off because the file holds integers, and because splines end at borders.

        A cubic spline through values that are off by 1/2 is off by at most (1 + 3 sqrt(3)) / 4 times as much along each
        axis, the norm of interpolation by cubic splines.

        Args:
            splines: How often cubic splines interpolate them along all three axes.
        """
        rounded = 0.5 * self.step * ((1 + 3 * 3**0.5) / 4) ** (3 * splines)
        scaled = 2 * float(np.finfo(np.float32).eps) * abs(self.intercept)
        return rounded + scaled + splines * BENT * sum(map(abs, self.slope))

    def at(self, voxels: np.ndarray) -> np.ndarray:
        """The values at (..., 3) voxel positions."""
        return voxels @ np.array(self.slope) + self.offset

    def over(self, i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The values of a volume whose voxels are at positions i, j, k along each axis."""
        a, b, c = self.slope
        return (a * i)[:, None, None] + (b * j)[:, None] + (c * k) + self.offset


def read_forms(case: SubjectFiles, names: Sequence[str]) -> list[ImageForm]:
    """The forms of a subject's images.

    Raises:
        InputError: a file cannot be read.
    """
    forms = []
    for name in names:
        path = case.images[name]
        file = open_image(path)
        suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)
        dtype, scaling = "float32", (1.0, 0.0)
        if file.header is not None:
            dtype = np.dtype(file.header.get_data_dtype()).name
            if file.header.get_slope_inter() not in ((1, 0), (None, None)):
                scaling = _SCALING
        forms.append(
            ImageForm(name, file.channels, dtype, suffix or ".nii", file.frame.affine, file.header, scaling)
        )  # fmt: skip
    return forms


def reduced_shape(shape: Triple, ratio: Sequence[float], patch: Triple, step: Triple, *, has_splines: bool) -> Triple:
    """The voxels of a smaller volume that has two patches or three along each axis, if the volume has as many.

    Patches lie otherwise along each axis, so that the weights of one are not those of another.

    Args:
        shape: Voxels along the native axes.
        ratio: Native voxels per model voxel along them.
        patch, step: Model voxels of a patch, and from patch to patch, along the native axes.
        has_splines: Whether the volume must be so large that its middle is far from the borders of splines.
    """
    kept = [
        min(n, int(np.ceil((p + s + 3 + 2 * axis) * r)) + 1)
        for axis, (n, r, p, s) in enumerate(zip(shape, ratio, patch, step, strict=True))
    ]
    if has_splines:
        kept = [n if n == 1 else max(n, int(2 * spline_reach(r)) + 8) for n, r in zip(kept, ratio, strict=True)]
    return to_triple(kept, "a shape")


def patterns_of(kind: str, forms: Sequence[ImageForm], shape: Triple) -> list[Channel]:
    """What the channels of a synthetic subject are, those of all its images one after the other.

    The channels of a ramp have slopes of their own, so that one in the place of another shows.

    Args:
        kind: One of RAMPS, CONSTANT or CLASSES.
        forms: The images.
        shape: Voxels along i, j, k.
    """
    channels: list[Channel] = []
    total = sum(form.channels for form in forms)
    for form in forms:
        dtype = _stored_type(kind, form)
        for _ in range(form.channels):
            gain = 1 - len(channels) / (2 * total)
            times, plus = form.scaling
            if kind == CONSTANT:
                value = (CONSTANT_VALUE - len(channels) % 100) * times + plus
                channels.append(Channel((0, 0, 0), value, intercept=plus))
                continue
            slope = _direction(kind, form.affine, shape) * gain
            reach = float(np.abs(slope) @ (np.array(shape) - 1)) / 2 or 1.0
            scale = _STEPS * gain / reach if dtype.kind in "iu" else 1.0
            slope = slope * scale
            middle = float(slope @ (np.array(shape) - 1)) / 2
            # Unsigned ones begin at 1, so that `crop` finds nothing to leave out.
            offset = (_STEPS + 1 if dtype.kind == "u" else 0.0) - middle
            i, j, k = (slope * times).tolist()
            step = abs(times) if dtype.kind in "iu" else 0.0
            per_mm = scale * gain * abs(times) if kind in RAMPS else 1.0
            channels.append(Channel((i, j, k), offset * times + plus, step, per_mm, plus))
    return channels


def write_subject(
    folder: Path, kind: str, forms: Sequence[ImageForm], shape: Triple, box: Box | None = None
) -> tuple[SubjectFiles, list[np.ndarray]]:
    """Write the images of a synthetic subject by nibabel.

    Args:
        folder: Where to.
        kind: What they show.
        forms: The images.
        shape: Voxels along i, j, k.
        box: The voxels beyond which all are 0, for `preprocess.crop`; None for no such margin.

    Returns:
        The subject, and for NOISE the (I, J, K) channels as readers show them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = [np.arange(n, dtype=np.float64) for n in shape]
    channels = [] if kind == NOISE else patterns_of(kind, forms, shape)
    made: list[np.ndarray] = []
    paths: dict[str, Path] = {}
    for form, first in zip(forms, _firsts(forms), strict=True):
        dtype, stored = _stored_type(kind, form), list[np.ndarray]()
        for c in range(first, first + form.channels):
            times, plus = form.scaling
            values = _noise(shape, dtype, seed=c) if kind == NOISE else (channels[c].over(*axes) - plus) / times
            stored.append((np.rint(values) if dtype.kind in "iu" else values).astype(dtype))
            if box is not None:
                stored[-1] = _only_inside(stored[-1], box)
            made.append(stored[-1] if form.scaling == (1, 0) else stored[-1] * times + plus)
        volume = stored[0] if form.channels == 1 else np.stack(stored, -1)
        name = kind if len(forms) == 1 else f"{kind}_{form.name}"
        paths[form.name] = folder / f"{name}{form.suffix}"
        header = None
        if form.header is not None:
            header = form.header.copy()
            header.set_data_dtype(dtype)
        # Without an affine nibabel leaves the header's orientation fields as they are.
        image = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        made_image = image(volume, form.affine if header is None else None, header)
        made_image.header.set_slope_inter(*form.scaling)  # here, since making an image drops it
        content = made_image.to_bytes()
        # nibabel's own packing takes ten times as long.
        paths[form.name].write_bytes(igzip.compress(content, 1) if form.suffix.endswith(".gz") else content)
    return SubjectFiles(kind, paths), made if kind == NOISE else []


def with_margin(shape: Triple) -> tuple[Triple, Box]:
    """A larger shape, and the voxels of the former one in it; axes of one voxel stay as they are."""
    box = [(first, first + n) if n > 1 else (0, 1) for n, (first, _) in zip(shape, _MARGINS, strict=True)]
    ends = [stop + after if n > 1 else 1 for n, (_, stop), (_, after) in zip(shape, box, _MARGINS, strict=True)]
    return to_triple(ends, "a shape"), (box[0], box[1], box[2])


def _only_inside(values: np.ndarray, box: Box) -> np.ndarray:
    inside = tuple(slice(*ends) for ends in box)
    result = np.zeros_like(values)
    result[inside] = values[inside]
    return result


def describe(forms: Sequence[ImageForm], shape: Triple) -> str:
    """What the synthetic images are, for people."""
    size = sum(form.channels * np.dtype(form.dtype).itemsize for form in forms) * int(np.prod(shape))
    types = ", ".join(sorted({form.dtype for form in forms}))
    count = sum(form.channels for form in forms)
    return f"{' x '.join(map(str, shape))} voxels, {count} channel{'s' * (count != 1)} of {types}, {byte_size(size)}"


def _firsts(forms: Sequence[ImageForm]) -> list[int]:
    return [sum(form.channels for form in forms[:n]) for n in range(len(forms))]


def _direction(kind: str, affine: np.ndarray, shape: Triple) -> np.ndarray:
    """mm along a world axis per voxel along i, j, k; for CLASSES equal shares of all axes."""
    if kind in RAMPS:
        return affine[RAMPS.index(kind), :3].copy()
    return np.array([100.0 / max(n - 1, 1) if n > 1 else 0.0 for n in shape])


def _stored_type(kind: str, form: ImageForm) -> np.dtype:
    """The file's type; a ramp of bytes would have steps as large as a voxel, and becomes int16."""
    dtype = np.dtype(form.dtype)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        return np.dtype(np.float32)
    return np.dtype(np.int16) if dtype.itemsize == 1 and kind not in (CONSTANT, NOISE) else dtype


def _noise(shape: Triple, dtype: np.dtype, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if dtype.kind == "f":
        return draw.normal(size=shape)
    least = {1: 1, 2: -1000}.get(dtype.itemsize, -1000) if dtype.kind == "i" else 1
    return draw.integers(least, 100 if dtype.itemsize == 1 else 1000, shape)
