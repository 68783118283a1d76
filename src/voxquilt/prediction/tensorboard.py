"""Writes the numbers of subjects, and pictures of the first of them, for TensorBoard."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import open_image
from voxquilt.distributed.control_channel import Message
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.overlay import flat, overlay
from voxquilt.text import escaped, reason_of

log = logging.getLogger("voxquilt")

# The number of subjects that have pictures: each takes a few tenths of a second, and nobody looks at thousands.
PICTURES = 20


class RunEvents:
    """Writes a run's event file, on rank 0; it is made with the first subject.

    Args:
        folder: Output folder; the run has a folder of its own in `tensorboard` there.
        cases: All subjects; a subject's step is its number among them.
        label_values: See `voxquilt.Stitch`.
        series: Whether 4-D files are series, of which the first volume is drawn.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[SubjectFiles],
        label_values: Sequence[int] | None = None,
        *,
        series: bool = False,
    ) -> None:
        self._folder, self._label_values, self._series = folder, label_values, series
        self._cases = {case.subject: (n, case) for n, case in enumerate(cases)}
        self._pictures = 0
        self._board: SummaryWriter | None = None
        self._failed = False

    def row(self, row: Row) -> None:
        """Write a subject that is done or has failed."""
        if row.subject in self._cases:
            self._write_safely(lambda: self._add(row))

    def end(self, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
        """Write how the run ended.

        Args:
            outcome: The content of run.json.
            summaries: Summaries of its processes.
        """
        if (board := self._board) is not None:
            self._write_safely(lambda: _finish(board, outcome, summaries))

    def _write_safely(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            write()
        except Exception as error:  # for example of a full disk, which is no reason for the run to fail
            log.warning("nothing more is written for TensorBoard: %s", reason_of(error))
            self._failed = True

    def _add(self, row: Row) -> None:
        if self._board is None:
            # With the process's number, since shards may begin at the same time.
            name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
            self._board = SummaryWriter(str(self._folder / "tensorboard" / name))
        board = self._board
        step, case = self._cases[row.subject]
        numbers = {"subject/failed": float(row.status == "failed"), "subject/seconds": row.seconds}
        if row.status == "done":
            numbers |= {"subject/patches_per_second": row.patches / row.seconds if row.seconds else 0.0}
            numbers |= {f"volume_ml/{name}": volume for name, volume in row.class_ml.items()}
        numbers["memory_mib/rank_0"] = psutil.Process().memory_info().rss / 2**20
        picture = self._picture(row, case) if self._pictures < PICTURES else None
        for name, number in numbers.items():
            board.add_scalar(name, number, step)
        if picture is not None:
            board.add_image(f"overlay/{escaped(row.subject)}", picture, step, dataformats="HWC")

    def _picture(self, row: Row, case: SubjectFiles) -> np.ndarray | None:
        if not row.label_files:
            return None
        drawn, name = f"{row.subject}_overlay.png", row.label_files[0]
        self._pictures += 1
        try:
            if drawn in row.outputs:
                return np.asarray(Image.open(self._folder / drawn))
            file, label_file = open_image(next(iter(case.images.values()))), open_image(self._folder / name)
            labels = flat(label_file.read().numpy()[: 1 if self._series else None], self._label_values)
            return np.asarray(overlay(file.read()[0].numpy(), labels, file.frame.affine))
        except Exception as error:  # a missing picture is no reason for the run to fail either
            log.debug("no picture of %s: %s", row.subject, reason_of(error))
            return None


def _finish(board: SummaryWriter, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
    for name in ("patches_per_second", "voxels_per_second", "seconds", "done", "failed"):
        if name in outcome:
            board.add_scalar(f"run/{name}", outcome[name], 0)
    for summary in summaries:
        if "peak_memory_mib" in summary:
            board.add_scalar(f"run/peak_memory_mib/rank_{summary['rank']}", summary["peak_memory_mib"], 0)
    board.close()
