"""Looks at the labels of a volume, and at images where they are, on a device: as label_statistics does on the host.

Every operation gives the same result each time: only integers are added by atomic operations.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Integer, Shaped
from torch import Tensor

from voxquilt.reporting.device_runs import DeviceComponents, DeviceRuns
from voxquilt.reporting.label_intensities import Bins, Intensities, has_bin_for_each
from voxquilt.reporting.label_runs import slowest_first
from voxquilt.stitching.device_transfer import upload


class Pieces(NamedTuple):
    """How much of a volume is looked at at a time: the more, the fewer times the device is waited for.

    Args:
        voxels: Voxels that are worked on at a time.
        whole: Volumes of so many bytes go over once; larger ones some planes at a time, whenever they are looked at.
        room: Bytes that all of it takes at most: two such volumes, and what is worked on.
    """

    voxels: int
    whole: int
    room: int


# The first that fits is taken. On an H100 the numbers of 256^3 voxels take 11 or 20 ms, those of 512 x 512 x 531 100 or
# 215 ms.
_PIECES = Pieces(2**24, 2**29, 5 * 2**29), Pieces(2**22, 2**27, 5 * 2**27)
# Labels up to which their counts take a few MiB.
_LABELS = 2**12
# Voxels of a volume whose numbers are computed on the host sooner than a device has begun.
_SMALL = 2**20
# Values that are summed at a time.
_ROW = 2**10
# Types that arrive as they are, and those that torch cannot compute with: they go over as signed numbers of as many
# bytes, and get the larger type of which the lowest bits are these.
_SAME = [np.dtype(name) for name in ("u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")]
_WIDER = {np.dtype("u2"): (np.int16, torch.int32), np.dtype("u4"): (np.int32, torch.int64)}


def is_worthwhile(device: torch.device, voxels: int) -> bool:
    """Whether numbers of a volume are computed on a device sooner than on the host, and there is memory for it."""
    return device.type == "cuda" and voxels >= _SMALL and _fitting(device) is not None


def _fitting(device: torch.device) -> Pieces | None:
    """The largest pieces for which there is memory that nothing else has used so far.

    What torch keeps of the memory that the network has used is for its next batch.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _PIECES[0].room
    return next((pieces for pieces in _PIECES if pieces.room <= free), None)


class DeviceVolume:
    """Labels and images, of which only the labelled voxels are looked at, some planes at a time.

    Args:
        labels: Numbers of labels.
        images: Intensities on the same grid.
        known: Numbers that count as labels even if no voxel has them.
        device: Where to compute.

    Raises:
        TypeError: labels of a type that torch cannot compute with.
        OverflowError: thousands of labels, which take more memory than there may be; planes of more voxels than 32 bits
            count.
    """

    def __init__(
        self,
        labels: Shaped[np.ndarray, "i j k"],
        images: Mapping[str, Shaped[np.ndarray, "i j k"]],
        known: Sequence[int],
        device: torch.device,
    ) -> None:
        self._axes, self._device = slowest_first(labels), device
        self._pieces = _fitting(device) or _PIECES[-1]
        self._labels = _Planes(labels.transpose(self._axes), device, self._pieces.whole)
        self._images = [image.transpose(self._axes) for image in images.values()]
        self._step = max(1, self._pieces.voxels // (self._labels.shape[1] * self._labels.shape[2]))
        # Those that are worked on at a time, with the one before and the gaps between lines and planes: DeviceRuns.
        if (self._step + 1) * (self._labels.shape[1] + 1) * (self._labels.shape[2] + 1) >= 2**31:
            raise OverflowError(f"planes of {self._labels.shape[1:]} voxels")
        self.numbers: list[int] = sorted({*known, *self._values_of_voxels()} - {0})
        """Labels in ascending order; the place of a label among them is its rank."""
        if len(self.numbers) > _LABELS:
            raise OverflowError(f"{len(self.numbers)} labels")
        wide = torch.int32 if max(self.numbers, default=0) < 2**31 else torch.int64
        self._numbers = upload(torch.tensor(self.numbers, dtype=wide), device)
        components = DeviceComponents(labels.size)
        self.profiles = self._count_along_axes(components)
        """The voxels of each rank along i, j, k."""
        counts = components.counts(len(self.numbers))
        self.components = None if counts is None else dict(zip(self.numbers, counts, strict=True))
        """Components by number; None of noise."""

    def _values_of_voxels(self) -> list[int]:
        planes = self._labels.shape[0]
        found = [self._labels.take(n, min(n + self._step, planes)).unique() for n in range(0, planes, self._step)]
        return torch.cat(found).unique().tolist()

    def _rank(self, labels: Integer[Tensor, " n"]) -> Integer[Tensor, " n"]:
        return torch.searchsorted(self._numbers, labels.to(self._numbers.dtype), out_int32=True)

    def _count_along_axes(self, components: DeviceComponents) -> list[np.ndarray]:
        planes, lines, length = self._labels.shape
        counts = self._zeros(planes), self._zeros(lines), self._zeros(length + 1)
        for start in range(0, planes, self._step):
            seen = min(start, 1)
            runs = DeviceRuns(self._labels.take(start - seen, min(start + self._step, planes)), seen)
            ranks = self._rank(runs.labels)
            across, line, first, stop = runs.places
            voxels, ones = (stop - first).long(), torch.ones_like(stop, dtype=torch.int64)
            _add_counts(counts[0], ranks, across + (start - seen), voxels)
            _add_counts(counts[1], ranks, line, voxels)
            # A run adds a voxel from its first on, and takes it away behind its last.
            _add_counts(counts[2], ranks, first, ones)
            _add_counts(counts[2], ranks, stop, -ones)
            components.add(runs, ranks)
        along = torch.cat([*counts[:2], counts[2].cumsum(1)[:, :-1]], 1).cpu().numpy()
        found = np.split(along, [planes, planes + lines], axis=1)
        return [found[self._axes.index(axis)] for axis in range(3)]

    def _zeros(self, places: int) -> Tensor:
        return torch.zeros(len(self.numbers), places, dtype=torch.int64, device=self._device)

    def intensities(self, image: int) -> list[Intensities | None]:
        """The intensities of one of the images, by rank; None for a rank without voxels.

        Raises:
            TypeError: an image of a type that torch cannot compute with.
            OverflowError: a range of intensities that integers do not hold.
        """
        planes = _Planes(self._images[image], self._device, self._pieces.whole)
        bins = Bins.between(*self._range(planes), integers=not planes.is_float)
        found: list[Intensities | None] = []
        for rank in range(0, len(self.numbers), bins.labels_at_a_time):
            count = min(bins.labels_at_a_time, len(self.numbers) - rank)
            table = torch.zeros(count * bins.count, dtype=torch.int64, device=self._device)
            sums: list[Tensor] = []
            for ranks, values in self._values(planes, bins.least):
                if count < len(self.numbers):
                    mine = ((ranks >= rank) & (ranks < rank + count)).nonzero().view(-1)
                    ranks, values = ranks[mine] - rank, values[mine]
                if bins.exact:
                    places = values
                else:
                    sums.append(_sums(ranks, values.double(), count))
                    places = (values.double() / (bins.width or 1)).long().clamp(max=bins.count - 1)
                table += torch.bincount(ranks * bins.count + places, minlength=len(table))
            found += bins.describe(table.view(count, -1).cpu().numpy(), *_add_up(sums, count))
        return found

    def _range(self, image: "_Planes") -> tuple[float | int, float | int]:
        """The lowest and highest intensity of labelled voxels; of all voxels, where each number has its own bin."""
        if not image.is_float:
            planes = image.shape[0]
            chunks = (image.take(n, min(n + self._step, planes)) for n in range(0, planes, self._step))
            least, greatest = _ends(chunks)
            if has_bin_for_each(least, greatest):
                return least, greatest
        least, greatest = _ends(values for _, values in self._values(image, 0))
        if not greatest - least < 2**62:
            raise OverflowError(f"intensities from {least} to {greatest}")
        return least, greatest

    def _values(self, image: "_Planes", least: float | int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ranks and intensities of labelled voxels, less the lowest."""
        places = np.flatnonzero(self.profiles[self._axes[0]].sum(axis=0))
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        for first in range(start, stop, self._step):
            planes = first, min(first + self._step, stop)
            flat = self._labels.take(*planes).view(-1)
            voxels = flat.nonzero().view(-1)
            if not len(voxels):
                continue
            values = image.take(*planes).view(-1)[voxels]
            values = values.double().where(values.isfinite(), 0) if image.is_float else values.long()
            yield self._rank(flat[voxels]), values - least


class _Planes:
    """Planes of a volume of the host on a device.

    Args:
        volume: In any order in memory.
        device: The device.
        whole: A volume of at most so many bytes goes over once.

    Raises:
        TypeError: a type that torch cannot compute with.
    """

    def __init__(self, volume: Shaped[np.ndarray, "n lines length"], device: torch.device, whole: int) -> None:
        volume = volume.view(np.uint8) if volume.dtype == np.bool_ else volume
        if volume.dtype not in (*_SAME, *_WIDER):
            raise TypeError(f"{volume.dtype} is not computed with on a device")
        self.shape, self.is_float, self._device = volume.shape, volume.dtype.kind == "f", device
        stored, self._wider = _WIDER.get(volume.dtype, (volume.dtype, None))
        self._lowest = 256**volume.itemsize - 1
        self._host, self._whole = volume.view(stored), None
        if volume.nbytes <= whole:
            # As it lies in memory: the device puts axes into another order in less time.
            axes = slowest_first(volume)
            self._whole = self._upload(self._host.transpose(axes)).permute([axes.index(axis) for axis in range(3)])

    def take(self, start: int, stop: int) -> Shaped[Tensor, "n lines length"]:
        """Some of the planes, contiguous."""
        planes = self._upload(self._host[start:stop]) if self._whole is None else self._whole[start:stop].contiguous()
        return planes if self._wider is None else planes.to(self._wider) & self._lowest

    def _upload(self, planes: np.ndarray) -> Tensor:
        # torch takes no steps backwards, and warns of memory that must not be written to.
        is_usable = planes.flags.writeable and min(planes.strides) >= 0
        return upload(torch.from_numpy(planes if is_usable else planes.copy()), self._device)


def _ends(chunks: Iterable[Tensor]) -> tuple[float | int, float | int]:
    """The lowest and the highest of all values; 0 and 0 without any."""
    ends = [torch.stack(chunk.aminmax()) for chunk in chunks]
    if not ends:
        return 0, 0
    least, greatest = torch.stack(torch.stack(ends).aminmax()).tolist()
    return least, greatest


def _add_counts(into: Tensor, ranks: Tensor, places: Tensor, voxels: Tensor) -> None:
    """Add voxels at places along an axis to the counts of their ranks."""
    into.view(-1).scatter_add_(0, ranks.long() * into.shape[1] + places, voxels)


def _sums(ranks: Integer[Tensor, " n"], values: Float64[Tensor, " n"], count: int) -> Float64[Tensor, "3 rows"]:
    """Sums of values, and of their squares, of the same voxels in the same order each time, which atomics do not give.

    Args:
        ranks: The rank of each value.
        values: The values.
        count: Number of ranks.

    Returns:
        The rank of each row of values, their sum, and that of their squares; rows of rank `count` are empty.
    """
    ranks, order = ranks.sort(stable=True)
    every = torch.arange(count, device=ranks.device, dtype=ranks.dtype)
    ends = torch.searchsorted(ranks, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    # Each rank begins in a row of its own.
    needed = (counts + (_ROW - 1)).div(_ROW, rounding_mode="floor")
    row_ends = needed.cumsum(0)
    shift = (row_ends - needed) * _ROW - (ends - counts)
    rows = values.new_zeros(len(values) // _ROW + count, _ROW)
    rows.view(-1)[torch.arange(len(values), device=ranks.device) + shift[ranks.long()]] = values[order]
    of_rows = torch.searchsorted(row_ends, torch.arange(len(rows), device=ranks.device), right=True)
    return torch.stack([of_rows.double(), rows.sum(1), (rows * rows).sum(1)])


def _add_up(sums: Sequence[Float64[Tensor, "3 _"]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums of each rank, and those of squares, of rows of values."""
    if not sums:
        return np.zeros(count), np.zeros(count)
    ranks, values, squares = torch.cat(list(sums), 1).cpu().numpy()
    of_rank = [np.bincount(ranks.astype(np.int64), rows, count)[:count] for rows in (values, squares)]
    return of_rank[0], of_rank[1]
