"""Writes what a run logs as an event file for TensorBoard."""

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch.utils.tensorboard import SummaryWriter

from voxquilt.reporting.run_logs import Guard
from voxquilt.text import escaped


class EventFile:
    """A run's event file; it is made with the first numbers.

    Args:
        folder: Output folder; the run has a folder of its own in `tensorboard` there.
    """

    takes_pictures, takes_statistics = True, False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._guard = Guard("nothing more is written for TensorBoard")

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._add(numbers, step))

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._guard(lambda: self._open().add_image(escaped(name), picture, step, dataformats="HWC"))

    def end(self, files: Iterable[Path]) -> None:
        """Close the file."""
        if (writer := self._writer) is not None:
            self._guard(writer.close)

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        writer = self._open()
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            # With the process's number, since shards may begin at the same time.
            name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
            self._writer = SummaryWriter(str(self._folder / "tensorboard" / name))
        return self._writer
