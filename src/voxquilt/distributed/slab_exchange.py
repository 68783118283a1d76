"""Exchanges sums and finished planes between the processes that share a volume."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.process_group import Group
from voxquilt.errors import OutputError, RunError
from voxquilt.geometry.space import Where
from voxquilt.stitching.subject_stitcher import SubjectStitcher

Parts = Sequence[tuple[str, Where, np.ndarray]]
"""Native planes of each product: its name, where they belong, and (C, I, J, K)."""


class ElsewhereError(OutputError):
    """Another process that shares the volume could not do its part."""


@dataclass(frozen=True)
class SlabExchange:
    """One process's place among those that share a volume.

    Whatever fails, each member sends each of its messages once, with the data or with the reason why there are none, so
    that no process waits forever. Members take their subjects in the same order, so they cannot deadlock.

    Args:
        group: The processes of the run.
        task: The subject.
    """

    group: Group
    task: SubjectTask

    @property
    def place(self) -> int:
        """The number of this process's part of the grid."""
        return self.task.team.index(self.group.rank)

    @property
    def collects(self) -> bool:
        """Whether this process puts the volume together and writes it."""
        return self.place == 0

    @property
    def is_last(self) -> bool:
        """Whether no part follows this one."""
        return self.place == len(self.task.team) - 1

    def send_head(self, sums: Sequence[Tensor], error: str = "") -> None:
        """Send the sums of the planes that this part shares with the one before to that part's process."""
        self.group.send(self.task.team[self.place - 1], self._tag(0), {"error": error}, sums)

    def receive_head(self) -> list[Tensor]:
        """Receive the sums of the planes that this part shares with the next one from that part's process.

        Raises:
            ElsewhereError: it could not do its part.
        """
        header, sums = self.group.receive(self.task.team[self.place + 1], self._tag(0))
        if header["error"]:
            raise ElsewhereError(header["error"])
        return sums

    def send_planes(self, parts: Parts, error: str = "") -> None:
        """Send this process's native planes of every product to the process that collects them."""
        where = {name: [[s.start, s.stop] for s in slices] for name, slices, _ in parts}
        arrays = [torch.from_numpy(array) for _, _, array in parts]
        self.group.send(self.task.team[0], self._tag(1), {"error": error, "where": where}, arrays)

    def receive_planes(self, stitcher: SubjectStitcher | None) -> None:
        """Receive the native planes of all other processes.

        Args:
            stitcher: Where planes are placed; None discards them.

        Raises:
            ElsewhereError: another process could not do its part; the messages of all have been received.
        """
        errors = []
        for rank in self.task.team[1:]:
            header, arrays = self.group.receive(rank, self._tag(1))
            errors += [header["error"]] if header["error"] else []
            for (name, where), array in zip(header["where"].items(), arrays, strict=True):
                if stitcher is not None:
                    i, j, k = (slice(*ends) for ends in where)
                    stitcher.place(name, (i, j, k), array.numpy())
        if errors:
            raise ElsewhereError(errors[0])

    def _tag(self, kind: int) -> int:
        return 2 * self.task.number + kind


def first_error(error: Exception | None, action: Callable[[], object]) -> Exception | None:
    """The given error, or else the action's; the error of a process that died is raised, since it ends the run."""
    try:
        action()
    except RunError:
        raise
    except Exception as error_of_action:
        return error or error_of_action
    return error
