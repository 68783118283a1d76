"""What do the processes that share a volume send each other? Sums where their slabs overlap, then finished planes."""

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
    """Another process of the team could not do its part."""


@dataclass(frozen=True)
class SlabExchange:
    """One process's place among those that share a volume.

    Whatever fails, each member sends each of its messages once, with the data or with the reason why there are none:
    nobody waits for what does not come. Members take their subjects in one order, so nobody waits in a circle either.

    Args:
        group: The processes of the run.
        task: The subject.
    """

    group: Group
    task: SubjectTask

    @property
    def place(self) -> int:
        """Which part of the grid is this process's."""
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
        """To the process with the part before: this one's sums of the planes that both have patches in."""
        self.group.send(self.task.team[self.place - 1], self._tag(0), {"error": error}, sums)

    def receive_head(self) -> list[Tensor]:
        """From the process with the part behind.

        Raises:
            ElsewhereError: it could not do its part.
        """
        header, sums = self.group.receive(self.task.team[self.place + 1], self._tag(0))
        return sums if not header["error"] else _raise(header["error"])

    def send_planes(self, parts: Parts, error: str = "") -> None:
        """To the process that collects: this one's native planes of every product."""
        where = {name: [[s.start, s.stop] for s in slices] for name, slices, _ in parts}
        arrays = [torch.from_numpy(array) for _, _, array in parts]
        self.group.send(self.task.team[0], self._tag(1), {"error": error, "where": where}, arrays)

    def receive_planes(self, quilt: SubjectStitcher | None) -> None:
        """From all others, into the quilt of the process that collects; or to nowhere.

        Raises:
            ElsewhereError: one of them could not do its part; the messages of all have been taken.
        """
        errors = []
        for rank in self.task.team[1:]:
            header, arrays = self.group.receive(rank, self._tag(1))
            errors += [header["error"]] if header["error"] else []
            for (name, where), array in zip(header["where"].items(), arrays, strict=True):
                if quilt is not None:
                    i, j, k = (slice(*ends) for ends in where)
                    quilt.place(name, (i, j, k), array.numpy())
        if errors:
            _raise(errors[0])

    def _tag(self, kind: int) -> int:
        return 2 * self.task.number + kind


def _raise(reason: str) -> list[Tensor]:
    raise ElsewhereError(reason)


def first_error(error: Exception | None, action: Callable[[], object]) -> Exception | None:
    """The first error: the one that was there, or the action's; a process that died is not a subject's error."""
    try:
        action()
    except RunError:
        raise
    except Exception as own:
        return error or own
    return error
