"""Keeps statistics.csv in step with the manifest: over several runs into one folder, and over shards."""

import logging
from collections.abc import Iterable
from pathlib import Path

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import open_image
from voxquilt.data.grid_loader import GridLoader
from voxquilt.errors import VoxquiltError
from voxquilt.prediction.resume import finished
from voxquilt.prediction.run_plan import RunPlan
from voxquilt.reporting.manifest import Row, of_shard
from voxquilt.reporting.statistics_table import (
    Cells,
    StatisticsTable,
    read_statistics,
    statistics_rows,
    write_statistics,
)
from voxquilt.stitching.stitch import Stitch
from voxquilt.text import of_subjects, reason_of

log = logging.getLogger("voxquilt")

NAME = "statistics.csv"
_OF_SHARDS = "statistics_*_of_*.csv"


class RunStatistics:
    """The statistics of a run, on rank 0. Rows of subjects that are made again go as the run begins.

    A shard has a table of its own, as it has a manifest, so that none waits for another; each that ends puts the rows
    of all together in statistics.csv.

    Args:
        folder: Output folder.
        plan: The plan of the run.
        shard: (index, count).
        enabled: Whether rows are added; those of subjects that are made again go in any case.
    """

    def __init__(self, folder: Path, plan: RunPlan, shard: tuple[int, int], *, enabled: bool) -> None:
        self._folder, self._plan, self._is_shard, self._enabled = folder, plan, shard[1] > 1, enabled
        path = folder / of_shard(NAME, shard)
        tables = _tables(folder)
        self._known: set[str] = set()
        self._table: StatisticsTable | None = None
        if not enabled and not tables:
            return
        names = {row["subject"] for row in read_statistics(path)} if self._is_shard else None
        done = {row.subject for row in plan.done}
        complete = ((finished(folder).keys() | done) if tables else set[str]()) - {*plan.subjects}
        kept = {
            name: rows
            for name, rows in _latest(tables).items()
            if name in complete and (names is None or name in names | done)
        }
        self._known = {*kept}
        self._table = StatisticsTable(path, (row for rows in kept.values() for row in rows))

    def add(self, row: Row) -> None:
        """Add the rows of a subject that is done.

        Raises:
            OutputError: the table cannot be written.
        """
        if self._enabled and self._table is not None:
            self._table.add(row.statistics)
            self._known.add(row.subject)

    def close(self) -> None:
        """Leave the rows in the order of subjects; with shards, those of all shards so far in statistics.csv.

        Raises:
            OutputError: a table cannot be written.
        """
        if self._table is None:
            return
        self._table.close()
        if not self._is_shard:
            for path in self._folder.glob(_OF_SHARDS):  # whose rows were taken over as the run began
                path.unlink(missing_ok=True)
            return
        merged: dict[str, list[Cells]] | None = None
        # Again if another shard has ended meanwhile, since the last one to write may not be the last one to end.
        while (rows := self._rows_of_all()) != merged:
            merged = rows
            write_statistics(self._folder / NAME, (row for rows in merged.values() for row in rows))

    def _rows_of_all(self) -> dict[str, list[Cells]]:
        assert self._table is not None
        own = _latest([self._table.path])
        complete = finished(self._folder).keys() - ({*self._plan.subjects} - own.keys())
        return {name: rows for name, rows in (_latest(_tables(self._folder)) | own).items() if name in complete}

    def fill(self, grids: GridLoader, stitch: Stitch) -> None:
        """Add the subjects that runs without statistics have done, from their label files; then close again.

        Args:
            grids: How subjects are read.
            stitch: Has the classes' names and numbers.

        Raises:
            OutputError: the table cannot be written.
        """
        if not self._enabled or self._table is None:
            return
        missing = [row for row in self._plan.done if row.label_files and row.subject not in self._known]
        if not missing:
            return
        log.info("%s: %s of earlier runs are read again for it.", NAME, of_subjects(len(missing)))
        cases = {case.subject: case for case in self._plan.cases}
        try:
            for row in missing:
                try:
                    self._table.add(_rows_of_files(self._folder, row, cases[row.subject], grids, stitch))
                except VoxquiltError as error:
                    log.warning("%s has no rows of %s: %s", NAME, row.subject, reason_of(error))
        finally:
            self.close()


def _rows_of_files(folder: Path, row: Row, case: SubjectFiles, grids: GridLoader, stitch: Stitch) -> list[Cells]:
    """The rows of a subject whose outputs were written before; classes without a name only if a voxel has them."""
    files = {name: open_image(folder / name) for name in row.label_files}
    labels = {name: file.read().numpy() for name, file in files.items()}
    subject = grids.subject_of(case)
    for image in subject.images.values():
        image.hold()
    rows: list[Cells] = []
    volumes = grids.volumes_of(subject)
    for n, volume in enumerate(volumes):
        images = {name: image.stored().numpy() for name, image in volume.get_images_dict().items()}
        for name, array in labels.items():
            output = name.removeprefix(f"{row.subject}_").partition(".nii")[0]
            own = array[n : n + 1] if len(volumes) > 1 else array
            known = stitch.label_numbers(len(stitch.names)) if len(own) == 1 else ()
            found = statistics_rows(
                row.subject, output, own, files[name].frame, images, stitch.names_of(len(own)), known
            )
            rows += [{**cells, "frame": str(n)} for cells in found] if len(volumes) > 1 else found
    return rows


def _tables(folder: Path) -> list[Path]:
    """All tables in a folder, those that shards wrote later behind those that they wrote earlier."""
    of_shards = sorted(folder.glob(_OF_SHARDS), key=lambda path: path.stat().st_mtime_ns)
    return [path for path in (folder / NAME, *of_shards) if path.is_file()]


def _latest(tables: Iterable[Path]) -> dict[str, list[Cells]]:
    """The rows of each subject, of the last table that has some."""
    found: dict[str, list[Cells]] = {}
    for path in tables:
        own: dict[str, list[Cells]] = {}
        for row in read_statistics(path):
            own.setdefault(row["subject"], []).append(row)
        found |= own
    return found
