"""Puts the finished volumes of a series together, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from voxquilt.data.subject_task import SubjectWork
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.statistics_table import Cells
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.output_volumes import Scratch


@dataclass
class SeriesResults:
    """The products of a subject's volumes so far.

    Args:
        volumes: Number of volumes.
        scratch: Keeps products that are too large for memory.
    """

    volumes: int
    scratch: Scratch
    work: SubjectWork | None = None
    """The work on the first volume."""
    row: Row = field(default_factory=lambda: Row("", "done"))
    """Counts and seconds so far."""
    _finished: dict[str, FinishedVolume] = field(default_factory=dict)
    _statistics: list[tuple[int, Cells]] = field(default_factory=list)
    _taken: int = 0

    def add(self, work: SubjectWork, volumes: Mapping[str, FinishedVolume], row: Row, rows: list[Cells]) -> None:
        """Add what was made of one volume.

        Args:
            work: The work on the volume.
            volumes: By product.
            row: Its counts and seconds.
            rows: Its statistics.
        """
        index = work.task.volume
        if index == 0:
            self.work = work
        for name, volume in volumes.items():
            whole = self._room_for(name, volume)
            whole.array[:, index] = volume.array
        self._statistics += [(index, {**cells, "frame": str(index)}) for cells in rows]
        self._taken += 1
        self.row = replace(
            self.row,
            patches=self.row.patches + row.patches,
            skipped=self.row.skipped + row.skipped,
            seconds=self.row.seconds + row.seconds,
        )

    @property
    def is_complete(self) -> bool:
        """Whether all volumes have come."""
        return self._taken == self.volumes

    def finish(self) -> tuple[dict[str, FinishedVolume], list[Cells]]:
        """The products, (C, T, I, J, K), and all statistics."""
        return self._finished, [cells for _, cells in sorted(self._statistics, key=lambda entry: entry[0])]

    def _room_for(self, name: str, volume: FinishedVolume) -> FinishedVolume:
        channels, *shape = volume.array.shape
        whole = self._finished.get(name)
        if whole is None:
            # In the order of NIfTI files, whose last axis but one is time and whose last has channels.
            size = (channels, self.volumes, *shape[::-1])
            dtype = volume.array.dtype
            bytes_needed = int(np.prod(size)) * dtype.itemsize
            array = np.empty(size, dtype) if bytes_needed <= self.scratch.limit else self.scratch.empty(size, dtype)
            whole = replace(volume, array=array.transpose(0, 1, 4, 3, 2))
        # Post-processing may give larger numbers in one volume than in those before.
        dtype = np.promote_types(whole.array.dtype, volume.array.dtype)
        if dtype != whole.array.dtype:
            whole = replace(whole, array=whole.array.astype(dtype))
        self._finished[name] = whole
        return whole
