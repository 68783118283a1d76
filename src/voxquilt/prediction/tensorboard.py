"""What does TensorBoard show of a predict run? Each subject's numbers and, of the first ones, a picture."""

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

# Subjects of which there are pictures: they take a few tenths of a second each, and nobody looks at thousands.
PICTURES = 20


class RunEvents:
    """Writes a run's event file, once there is something to say; on rank 0.

    Args:
        folder: Where outputs are; a folder of the run's own is made in its `tensorboard`.
        cases: Every subject; a subject's step is its number among them.
        label_values: See `voxquilt.Stitch`.
    """

    def __init__(self, folder: Path, cases: Sequence[SubjectFiles], label_values: Sequence[int] | None = None) -> None:
        self._folder, self._label_values = folder, label_values
        self._cases = {case.subject: (n, case) for n, case in enumerate(cases)}
        self._pictures = 0
        self._board: SummaryWriter | None = None
        self._failed = False

    def row(self, row: Row) -> None:
        """A subject is done or has failed."""
        if row.subject in self._cases:
            self._tried(lambda: self._add(row))

    def end(self, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
        """The run has ended.

        Args:
            outcome: What is in run.json.
            summaries: Of its processes.
        """
        if (board := self._board) is not None:
            self._tried(lambda: _finish(board, outcome, summaries))

    def _tried(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            write()
        except Exception as error:  # of a full disk, say: no reason for the run to fail
            log.warning("nothing more is written for TensorBoard: %s", reason_of(error))
            self._failed = True

    def _add(self, row: Row) -> None:
        if self._board is None:
            # With the process's number, since shards may begin together.
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
        drawn, name = f"{row.subject}_overlay.png", next((name for name in row.outputs if "_labels" in name), None)
        if name is None:
            return None
        self._pictures += 1
        try:
            if drawn in row.outputs:
                return np.asarray(Image.open(self._folder / drawn))
            file, made = open_image(next(iter(case.images.values()))), open_image(self._folder / name)
            labels = flat(made.read().numpy(), self._label_values)
            return np.asarray(overlay(file.read()[0].numpy(), labels, file.frame.affine))
        except Exception as error:  # nor is a picture
            log.debug("no picture of %s: %s", row.subject, reason_of(error))
            return None


def _finish(board: SummaryWriter, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
    for name in ("patches_per_second", "voxels_per_second", "seconds", "done", "failed"):
        if name in outcome:
            board.add_scalar(f"run/{name}", outcome[name], 0)
    for one in summaries:
        if "peak_memory_mib" in one:
            board.add_scalar(f"run/peak_memory_mib/rank_{one['rank']}", one["peak_memory_mib"], 0)
    board.close()
