"""Computes from headers the sizes of subjects and runs: voxels, patches, and the memory to load and stitch them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    """The sizes of a subject, from its headers.

    Args:
        native, model: Voxels along i, j, k in the file and as the network sees it, without padding.
        spacing: mm along the file's i, j, k.
        channels: Channels of all images.
        patches: Patches of the grid.
        ring: Voxels of the planes whose sums are kept.
        loaded: Bytes of the images while patches are cut from them.
        reading: Further bytes that reading and resampling need.
        file: Bytes of the images as the files store them, unpacked.
        stored: Bytes of the largest of these images.
        volumes: Number of volumes of a series, which count in `patches`, `loaded`, `file` and `stored`.
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
    stored: int
    volumes: int = 1

    @property
    def voxels(self) -> int:
        """Native voxels of all volumes."""
        return prod(self.native) * self.volumes

    def as_series(self, volumes: int) -> "SubjectSize":
        """The size of a series of such volumes, which is kept as it is stored while they are predicted in turn."""
        if volumes == 1:
            return self
        file, stored = self.file * volumes, self.stored * volumes
        loaded = self.loaded + file
        return self._replace(patches=self.patches * volumes, loaded=loaded, file=file, stored=stored, volumes=volumes)


def measure_subject(
    subject: Subject,
    space: Space,
    grid: Grid,
    padding: Padding,
    *,
    transformed: bool,
    halo: Padding = NO_PADDING,
    order: int = 1,
    one_hot: Mapping[str, Sequence[int]] | None = None,
) -> SubjectSize:
    """The sizes of a subject, computed from headers.

    Args:
        subject: The subject, whose voxels are not read.
        space: The mapping to model space.
        grid, padding: The grid and its padding in model space.
        transformed: Whether intensity transforms are applied, which make voxels float32.
        halo: Voxels around the grid that patches include.
        order: Order by which images are interpolated.
        one_hot: Labels that become a channel each, by the name of their image.
    """
    native, model, padded = (prod(shape) for shape in (space.native.shape, space.model.shape, grid.shape))
    padded_with_halo = prod(n + sum(around) for n, around in zip(grid.shape, halo, strict=True))
    resampled = native != model or any(abs(abs(m.scale) - 1) > 1e-6 for m in space.maps)
    is_padded = (padding, halo) != (NO_PADDING, NO_PADDING)
    loaded = reading = file = channels = most = beside = 0
    for name, image in subject.images.items():
        labels = (one_hot or {}).get(name)
        count, stored = image.shape[0] if labels is None else len(labels), image.file.voxel_bytes
        size = _FLOAT if transformed or resampled or labels is not None else stored
        channels += count
        file += count * native * stored
        most = max(most, count * native * stored)
        loaded += count * size * padded_with_halo
        # The file's voxels; along one axis at a time, two neighbours per voxel; then copies for transforms.
        # A cubic spline is computed of one channel at a time, in float64.
        along = _FLOAT * (native + 2 * max(native, model)) if resampled else 0
        along = along if order < 3 else along + 2 * _FLOAT * max(native, model)
        changed = 2 * _FLOAT * model if transformed else 0
        reading = max(reading, count * max(native * stored + along, changed))
        beside += count * size * model * is_padded
    for labels in (labels for name, labels in (one_hot or {}).items() if name not in subject.images):
        channels += len(labels)  # of a file that is still to be made, in a plan
        loaded += len(labels) * _FLOAT * padded_with_halo
    axis = grid.streaming_axis
    ring = padded // grid.shape[axis] * grid.patch_size[axis]
    reading = max(reading, beside)  # until all images are padded, those without padding are kept
    native_frame = space.native.shape, space.model.shape, space.native.spacing
    return SubjectSize(*native_frame, channels, len(grid), ring, loaded, reading, file, most)


@dataclass(frozen=True)
class RunSize:
    """Totals and maxima over the subjects of a run.

    Args:
        subjects, patches, voxels, file: Totals; voxels are native.
        largest: Native voxels of the largest subject.
        channels, ring, loaded, reading, stored: Maxima; see SubjectSize.
        unread: Subjects that are known to fail.
        largest_file: The most bytes of a subject's images as they are stored.
        channel_counts: Number of subjects by number of channels.
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
    stored: int = 0
    unread: int = 0
    largest_file: int = 0
    channel_counts: Mapping[int, int] = field(default_factory=dict)


def largest_of(costs: Sequence["SubjectCost"]) -> "SubjectCost":
    """The cost of a subject that several models predict one after the other."""
    problem = next((cost for cost in costs if cost.problem), None)
    if problem is not None or len(costs) == 1:
        return problem or costs[0]
    sizes = [cost.size for cost in costs if cost.size is not None]
    most = {key: max(getattr(size, key) for size in sizes) for key in ("ring", "loaded", "reading")}
    patches = sum(size.patches for size in sizes)
    largest = max(sizes, key=lambda size: prod(size.model))
    size = largest._replace(patches=patches, **most)
    return SubjectCost(patches + 1, min(cost.parts for cost in costs), size, volumes=size.volumes)


def run_size(subjects: Iterable[SubjectSize | None]) -> RunSize:
    """The size of a run with these subjects; None stands for a subject that will fail."""
    subjects = list(subjects)
    sizes = [size for size in subjects if size is not None]

    def most(key: str) -> int:
        return max((getattr(size, key) for size in sizes), default=0)

    voxels = [size.voxels for size in sizes]
    return RunSize(
        subjects=len(subjects),
        patches=sum(size.patches for size in sizes),
        voxels=sum(voxels),
        file=sum(size.file for size in sizes),
        largest=max(voxels, default=0),
        largest_file=most("file"),
        unread=len(subjects) - len(sizes),
        channel_counts=Counter(size.channels for size in sizes),
        **{key: most(key) for key in ("channels", "ring", "loaded", "reading", "stored")},
    )


def combined(runs: Iterable[RunSize]) -> RunSize:
    """The size of several runs together."""
    sizes = list(runs)

    def total(key: str) -> int:
        return sum(getattr(size, key) for size in sizes)

    def most(key: str) -> int:
        return max((getattr(size, key) for size in sizes), default=0)

    sums = {key: total(key) for key in ("subjects", "patches", "voxels", "file", "unread")}
    channel_counts = sum((Counter(size.channel_counts) for size in sizes), Counter[int]())
    return RunSize(
        channel_counts=channel_counts,
        **sums,
        **{key: most(key) for key in ("largest", "largest_file", "channels", "ring", "loaded", "reading", "stored")},
    )


@dataclass(frozen=True)
class SubjectCost:
    """The cost of predicting a subject.

    Args:
        patches: Number of patches, plus one for reading and writing.
        parts: Number of slabs into which the grid can be divided for the ranks of a run.
        size: Its sizes; None where headers cannot be used, and where sizes were not computed.
        problem: Why the subject will fail, where its headers show that.
        volumes: Number of volumes of a series.
    """

    patches: int
    parts: int = 1
    size: SubjectSize | None = None
    problem: str = ""
    volumes: int = 1
