"""What does TensorBoard show of a predict run? Each subject's numbers and, of the first ones, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from voxquilt.cases import Case
from voxquilt.errors import VoxquiltError
from voxquilt.line import Message
from voxquilt.manifest import Row
from voxquilt.nifti import read_header
from voxquilt.overlay import overlay

# Subjects of which there are pictures: they take a few tenths of a second each, and nobody looks at thousands.
PICTURES = 20


class Events:
    """Writes a run's event files; on rank 0.

    Args:
        trainer: Whose loggers are used; without TensorBoard's nothing is written.
        folder: Where outputs are.
        cases: Every subject; a subject's step is its number among them.
    """

    def __init__(self, trainer: Trainer, folder: Path, cases: Sequence[Case]) -> None:
        self._boards: list[Any] = [one.experiment for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        self._folder = folder
        self._cases = {case.subject: (n, case) for n, case in enumerate(cases)}
        self._pictures = 0

    def row(self, row: Row) -> None:
        """A subject is done or has failed."""
        if not self._boards or row.subject not in self._cases:
            return
        step, case = self._cases[row.subject]
        numbers = {"subject/failed": float(row.status == "failed"), "subject/seconds": row.seconds}
        if row.status == "done":
            numbers |= {"subject/patches_per_second": row.patches / row.seconds if row.seconds else 0.0}
            numbers |= {f"volume_ml/{name}": volume for name, volume in row.class_ml.items()}
        numbers["memory_mib/rank_0"] = psutil.Process().memory_info().rss / 2**20
        picture = self._picture(row, case) if self._pictures < PICTURES else None
        for board in self._boards:
            for name, number in numbers.items():
                board.add_scalar(name, number, step)
            if picture is not None:
                board.add_image(f"overlay/{row.subject}", picture, step, dataformats="HWC")

    def end(self, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
        """The run has ended.

        Args:
            outcome: What is in run.json.
            summaries: Of its processes.
        """
        for board in self._boards:
            for name in ("patches_per_second", "voxels_per_second", "seconds", "done", "failed"):
                if name in outcome:
                    board.add_scalar(f"run/{name}", outcome[name], 0)
            for one in summaries:
                if "peak_memory_mib" in one:
                    board.add_scalar(f"run/peak_memory_mib/rank_{one['rank']}", one["peak_memory_mib"], 0)
            board.flush()

    def _picture(self, row: Row, case: Case) -> np.ndarray | None:
        labels = next((name for name in row.outputs if "_labels" in name), None)
        if labels is None:
            return None
        self._pictures += 1
        try:
            file, made = read_header(next(iter(case.images.values()))), read_header(self._folder / labels)
            drawn = overlay(file.read()[0].numpy(), made.read()[0].numpy(), file.frame.affine)
        except VoxquiltError:  # the picture is no reason for a run to fail
            return None
        return np.asarray(drawn)
