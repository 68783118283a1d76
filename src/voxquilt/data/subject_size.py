"""What can be said of a subject before a voxel is read? Shapes, patches, and how much of everything there will be."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from voxquilt.data.subject import Subject
from voxquilt.geometry.frame import Padding, Triple
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.padding import NO_PADDING
from voxquilt.geometry.space import Space

_FLOAT = 4


class SubjectSize(NamedTuple):
    """A subject, from its headers.

    Args:
        native, model: Voxels along i, j, k in the file and as the network sees it, without padding.
        spacing: mm along the file's i, j, k.
        channels: Of all images together.
        patches: Of the grid.
        ring: Voxels of the planes whose sums are kept.
        loaded: Bytes of its images while patches are cut from them.
        reading: Bytes that reading and resampling take beside.
        file: Bytes of its images unpacked, as the files store them.
    """

    native: Triple
    model: Triple
    spacing: tuple[float, float, float]
    channels: int
    patches: int
    ring: int
    loaded: int
    reading: int
    file: int


def outline(
    subject: Subject, space: Space, grid: Grid, padding: Padding, *, transformed: bool, halo: Padding = NO_PADDING
) -> SubjectSize:
    """From headers alone.

    Args:
        subject: Its images, not read.
        space: To model space.
        grid, padding: In model space.
        transformed: Whether intensities are changed, which makes them float32.
        halo: What the padded volume has around the grid.
    """
    native, model, padded = (prod(shape) for shape in (space.native.shape, space.model.shape, grid.shape))
    held = prod(n + sum(around) for n, around in zip(grid.shape, halo, strict=True))
    resampled = native != model or any(abs(abs(m.scale) - 1) > 1e-6 for m in space.maps)
    loaded = reading = file = channels = 0
    for image in subject.images.values():
        count, stored = image.shape[0], image.file.voxel_bytes
        size = _FLOAT if transformed or resampled else stored
        channels += count
        file += count * native * stored
        # GridSampler keeps the volume beside the padded one.
        loaded += count * size * (model + (held if (padding, halo) != (NO_PADDING, NO_PADDING) else 0))
        # The file's voxels; along each axis in turn, the two neighbours of every voxel; then copies for transforms.
        along = _FLOAT * (native + 2 * max(native, model)) if resampled else 0
        changed = 2 * _FLOAT * model if transformed else 0
        reading = max(reading, count * max(native * stored + along, changed))
    axis = grid.streaming_axis
    ring = padded // grid.shape[axis] * grid.patch_size[axis]
    return SubjectSize(
        space.native.shape, space.model.shape, space.native.spacing, channels, len(grid), ring, loaded, reading, file
    )


@dataclass(frozen=True)
class RunSize:
    """How much there is of some subjects: sums, and the most that any of them has.

    Args:
        subjects, patches, voxels, file: Of all together; native voxels.
        largest: Native voxels of one.
        channels, ring, loaded, reading: See Outline.
        unread: Subjects of which is known that they will fail.
        of_channels: How many subjects have so many channels.
    """

    subjects: int = 0
    patches: int = 0
    voxels: int = 0
    file: int = 0
    largest: int = 0
    channels: int = 0
    ring: int = 0
    loaded: int = 0
    reading: int = 0
    unread: int = 0
    of_channels: Mapping[int, int] = field(default_factory=dict)


def extent(outlines: Iterable[SubjectSize | None]) -> RunSize:
    """Of subjects; None is one that will fail."""
    known = list(outlines)
    there = [one for one in known if one is not None]

    def most(key: str) -> int:
        return max((getattr(one, key) for one in there), default=0)

    voxels = [prod(one.native) for one in there]
    return RunSize(
        subjects=len(known),
        patches=sum(one.patches for one in there),
        voxels=sum(voxels),
        file=sum(one.file for one in there),
        largest=max(voxels, default=0),
        unread=len(known) - len(there),
        of_channels=Counter(one.channels for one in there),
        **{key: most(key) for key in ("channels", "ring", "loaded", "reading")},
    )


def together(extents: Iterable[RunSize]) -> RunSize:
    """Of all of them."""
    known = list(extents)

    def total(key: str) -> int:
        return sum(getattr(one, key) for one in known)

    def most(key: str) -> int:
        return max((getattr(one, key) for one in known), default=0)

    sums = {key: total(key) for key in ("subjects", "patches", "voxels", "file", "unread")}
    of_channels = sum((Counter(one.of_channels) for one in known), Counter[int]())
    return RunSize(
        of_channels=of_channels,
        **sums,
        **{key: most(key) for key in ("largest", "channels", "ring", "loaded", "reading")},
    )


@dataclass(frozen=True)
class SubjectCost:
    """What a subject takes.

    Args:
        patches: From its headers; reading and writing count as one more.
        parts: Into how many slabs its grid can be divided for the ranks of a run.
        outline: What else its headers say; None where they cannot be used, and where it was left out.
        problem: Why the subject will fail, where its headers tell.
    """

    patches: int
    parts: int = 1
    outline: SubjectSize | None = None
    problem: str = ""
