"""Writes finished volumes to files, which are named by subject and product."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import torch
from lightning.pytorch import LightningModule

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.nifti import write
from voxquilt.data.subject_task import SubjectWork
from voxquilt.errors import OutputError, VoxquiltError
from voxquilt.planning.machine import device_memory
from voxquilt.planning.preflight import AUTO, weights_on_device
from voxquilt.planning.resource_estimate import RunSettings
from voxquilt.prediction.class_files import parts_of
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.label_volumes import series_of_labels
from voxquilt.reporting.label_tables import write_label_tables
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.overlay import flat, overlay, save_png
from voxquilt.reporting.statistics_table import Cells, statistics_rows
from voxquilt.reporting.thumbnails import maps_of, try_thumbnails
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.output_volumes import Scratch
from voxquilt.stitching.stitch import Stitch
from voxquilt.text import reason_of
from voxquilt.vocabulary import LABELS, PICTURE

log = logging.getLogger("voxquilt")

# The number of subjects whose pictures are logged: each takes a tenth of a second, and nobody looks at thousands.
PICTURES = 20


@dataclass(frozen=True)
class OutputOptions:
    """What is written of a run, and where.

    Args:
        folder: Folder of the outputs.
        stitch: How patches become volumes; it has the classes' names.
        suffix: '.nii.gz' or '.nii'.
        overlay: Whether a picture is written with each subject's volumes.
        tensorboard: Whether numbers and pictures are written for TensorBoard.
        report: Whether thumbnails are drawn for the report of the run.
        in_memory: Bytes; larger products are kept in scratch files until they are written.
        combination: How the volumes of several models become those of the run; None for one model.
        statistics: Whether numbers of each label are computed for statistics.csv.
        logged: Whether numbers and pictures are logged by loggers of Lightning's.
    """

    folder: Path
    stitch: Stitch
    suffix: str = ".nii.gz"
    overlay: bool = False
    tensorboard: bool = False
    report: bool = False
    in_memory: float = float("inf")
    combination: Combination | None = None
    statistics: bool = False
    logged: bool = False

    def stitch_of(self, model: int) -> Stitch:
        """How the patches of one of the models become volumes."""
        return self.stitch if self.combination is None else self.combination.stitches[model]

    @property
    def scratch(self) -> Scratch:
        """Keeps products that are too large for memory."""
        return Scratch(self.folder, self.in_memory)

    @property
    def pictures(self) -> bool:
        """Whether pictures of labels are drawn."""
        return self.overlay or self.tensorboard or self.logged or self.report

    @property
    def keeps_images(self) -> bool:
        """Whether images are needed again when the outputs are written."""
        return self.statistics or self.report

    def settings(self, data: GridDataModule, module: LightningModule, model: int = 0) -> RunSettings:
        """The settings that determine the memory and disk of a run, as far as one of its models goes."""
        feed = data.feed
        return RunSettings(
            self.stitch_of(model),
            self.folder,
            data.models[model].patch_size,
            1 if data.batch_size == AUTO else int(data.batch_size),
            data.num_workers,
            self.in_memory,
            self.suffix.endswith(".gz"),
            psutil.Process().memory_info().rss,
            gpu=feed is not None,
            weights=weights_on_device(module),
            skips=data.grids.skip is not None,
            pictures=self.pictures,
            keeps_images=self.in_memory if self.keeps_images else 0,
            images_on_device=feed is not None and feed.takes_volumes,
            device_memory=2**63 if feed is None else device_memory(feed.stream.device),
        )


class OutputFiles:
    """Writes the products of a run's subjects into one folder, never over an input.

    Args:
        options: What is written; the folder exists.
        cases: All subjects, whose images must not be overwritten.
        drawn: Takes pictures (H, W, 3) of the first subjects, by subject, for whoever logs them; None: nobody does.
        device: Where the network is.
    """

    def __init__(
        self,
        options: OutputOptions,
        cases: Iterable[SubjectFiles],
        drawn: dict[str, np.ndarray] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.options, self._cases, self._drawn, self._device = options, cases, drawn, device
        self._left = 0 if drawn is None else PICTURES
        self._written: set[Path] = set()
        self._described: set[tuple[int, ...]] = set()

    def write(self, work: SubjectWork, volumes: Mapping[str, FinishedVolume]) -> Row:
        """Write a subject's products.

        Args:
            work: The subject.
            volumes: By product; pictures are of the first of a series.

        Raises:
            OutputError: a file cannot be written, or is an input of the run, or another subject's.
        """
        subject, native = work.task.case.subject, work.space.native
        outputs: dict[str, str] = {}
        for product, volume in volumes.items():
            names = self.options.stitch.names_of(len(volume.array)) if volume.kind == LABELS else None
            for end, array in parts_of(volume, self.options.stitch):
                path = self._check_path(f"{subject}_{product}{end}{self.options.suffix}")
                write(path, array, native, header=work.file.header, label_names=names, slope=volume.slope)
                outputs[path.name] = volume.kind
            self._describe(product, volume)
        series = series_of_labels(volumes)
        outputs |= self._draw(work, volumes, series[0] if series else None)
        return Row(
            subject,
            "done",
            tuple(outputs),
            patches=len(work.grid) - len(work.skipped),
            skipped=len(work.skipped),
            fingerprint=work.task.fingerprint,
            kinds=tuple(outputs.values()),
            inputs=work.task.case.paths,
        )

    def _draw(
        self, work: SubjectWork, volumes: Mapping[str, FinishedVolume], labels: np.ndarray | None
    ) -> dict[str, str]:
        """Draw a subject's pictures, of a series its first volume; returns the outputs among them by their kind."""
        options, subject, affine = self.options, work.task.case.subject, work.space.native.affine
        is_output, is_logged = (labels is not None and wanted for wanted in (options.overlay, self._left > 0))
        if not (is_output or is_logged or options.report):
            return {}
        first = None
        try:
            first = _first_image(work, volumes)
        except VoxquiltError as error:  # of a file that is read again, and has gone meanwhile
            if is_output:
                raise
            if options.report:
                log.warning("%s: its thumbnail for the report has no background: %s", subject, reason_of(error))
        if options.report:
            arrays = {name: v.array[:, 0] if v.array.ndim == 5 else v.array for name, v in volumes.items()}
            maps = maps_of(arrays, {name: volume.kind for name, volume in volumes.items()})
            try_thumbnails(options.folder, subject, first, labels, maps, affine, options.stitch.numbers)
        if labels is None or first is None or not (is_output or is_logged):
            return {}
        try:
            picture = overlay(first, flat(labels, options.stitch.numbers), affine)
        except Exception as error:
            if is_output:
                raise
            log.debug("no picture of %s: %s", subject, reason_of(error))  # no reason for the subject to fail
            return {}
        if is_logged and self._drawn is not None:
            self._drawn[subject] = np.asarray(picture)
            self._left -= 1
        if not is_output:
            return {}
        path = self._check_path(f"{subject}_overlay.png")
        save_png(picture, path)
        return {path.name: PICTURE}

    def _describe(self, product: str, volume: FinishedVolume) -> None:
        """Write names and colours of labels for viewers, once for each set of classes."""
        stitch = self.options.stitch
        numbers = tuple(stitch.label_numbers(volume.classes)) if volume.kind == LABELS else ()
        if numbers and numbers not in self._described:
            self._described.add(numbers)
            write_label_tables(self.options.folder, product, numbers, stitch.names, stitch.numbers)

    def statistics(self, work: SubjectWork, volumes: Mapping[str, FinishedVolume]) -> list[Cells]:
        """The rows of a volume for statistics.csv; none, and a warning, where they cannot be made."""
        if not self.options.statistics:
            return []
        try:
            return self._statistics(work, volumes)
        except Exception as error:  # such as of an image that is read again, and has gone meanwhile
            subject = work.task.case.subject
            log.warning("%s has no rows of statistics.csv, which the next run adds: %s", subject, reason_of(error))
            return []

    def _statistics(self, work: SubjectWork, volumes: Mapping[str, FinishedVolume]) -> list[Cells]:
        labels = {name: volume for name, volume in volumes.items() if volume.kind == LABELS}
        images = {name: image.stored().numpy() for name, image in work.images.items()} if labels else {}
        rows: list[Cells] = []
        for name, volume in labels.items():
            names = self.options.stitch.names_of(len(volume.array))
            known = self.options.stitch.label_numbers(volume.classes)
            subject, frame = work.task.case.subject, work.space.native
            rows += statistics_rows(subject, name, volume.array, frame, images, names, known, self._device)
        return rows

    def _check_path(self, name: str) -> Path:
        path = self.options.folder / name
        if path.exists() and _identity(path) in self._inputs:
            raise OutputError(f"{path} is an input of this run and is not overwritten; choose another output_dir.")
        if path in self._written:  # a's output x_y and a_x's output y
            raise OutputError(f"{path} is another subject's file of this run; rename an output or a subject.")
        self._written.add(path)
        return path

    @cached_property
    def _inputs(self) -> set[tuple[int, int] | None]:
        # Computed only if an output exists already: a stat of every input of a large cohort, in every process, is too
        # much for a network file system.
        return {_identity(path) for case in self._cases for path in case.images.values()} - {None}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _first_image(work: SubjectWork, volumes: Mapping[str, FinishedVolume]) -> np.ndarray:
    """The first channel as it is stored, since the network has seen it in model space and with other intensities."""
    is_series = any(volume.array.ndim == 5 for volume in volumes.values())
    image = None if is_series else next((image.stored() for image in work.images.values()), None)
    return (work.file.read() if image is None else image)[0].numpy()
