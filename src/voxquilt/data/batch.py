"""Cuts subjects into batches of patches, which know the subjects that they come from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from voxquilt.data.subject_task import LoadedSubject, SubjectWork
from voxquilt.errors import OutputError


@dataclass(frozen=True)
class SubjectRows:
    """Patches `first`, `first + 1`, ... of a subject's work, at rows [start, stop) of a batch."""

    work: SubjectWork
    first: int
    start: int
    stop: int

    @property
    def numbers(self) -> list[int]:
        """The patches' numbers in the subject's grid."""
        return self.work.numbers[self.first : self.first + self.stop - self.start]


def named_outputs(outputs: object, patches: int, source: str = "the network") -> dict[str, Tensor]:
    """Outputs (B, C, I, J, K) by name; a single tensor has the name ''.

    Args:
        outputs: A tensor, or tensors by name.
        patches: Number of patches in the batch.
        source: What gave them, for messages.

    Raises:
        OutputError: outputs that are not tensors, or have another number of patches.
    """
    named = outputs if isinstance(outputs, Mapping) else {"": outputs}
    for name, output in named.items():
        if not isinstance(output, Tensor):
            raise OutputError(f"{source} gave {type(output).__name__}; wanted are tensors (B, C, I, J, K).")
        if output.ndim == 0 or len(output) != patches:
            raise OutputError(f"output {name!r} has shape {tuple(output.shape)} for a batch of {patches} patches.")
    return dict(named)


class PatchBatch:
    """A (B, C, I, J, K) float32 tensor, and which rows of it belong to which subject.

    A plain class: Lightning rebuilds dataclasses and converts the floats in them, but here it only calls `to`.
    """

    def __init__(self, data: Tensor, rows: list[SubjectRows]) -> None:
        self.data = data
        self.rows = rows

    def to(self, device: torch.device) -> "PatchBatch":
        """The batch on another device."""
        return PatchBatch(self.data.to(device), self.rows)

    def named(self, outputs: object) -> dict[str, Tensor]:
        """The outputs of predict_step by name; a single tensor has the name ''.

        Raises:
            Exception: the network's error, where predict_step returned one.
            OutputError: the outputs do not belong to the batch.
        """
        if isinstance(outputs, Exception):
            raise outputs
        return named_outputs(outputs, len(self.data), "predict_step")

    def by_subject(self) -> "Iterator[PatchBatch]":
        """Split into one batch per subject."""
        for rows in self.rows:
            count = rows.stop - rows.start
            yield PatchBatch(self.data[rows.start : rows.stop], [SubjectRows(rows.work, rows.first, 0, count)])

    def pin_memory(self) -> "PatchBatch":
        """The batch in pinned memory."""
        return PatchBatch(self.data.pin_memory(), self.rows)


def cut_batches(subjects: Iterable[LoadedSubject], batch_size: int) -> Iterator[PatchBatch]:
    """Cut subjects into batches; all are full but the last, and those before the number of channels changes.

    Two buffers take turns, since first use of memory is slow: a batch is valid until the next but one is requested.
    """
    buffers: list[Tensor] = []
    rows: list[SubjectRows] = []
    filled = count = 0
    for loaded in subjects:
        work, sampler = loaded.work, loaded.sampler
        shape = (batch_size, sampler.channels, *sampler.patch_size)
        if filled and buffers[0].shape != shape:
            yield PatchBatch(buffers[count % 2][:filled], rows)
            rows, filled, count = [], 0, count + 1
        if not buffers or buffers[0].shape != shape:
            buffers = [torch.empty(shape), torch.empty(shape)]
        first, total = 0, len(work.numbers)
        while first < total and not work.failed:
            take = min(batch_size - filled, total - first)
            for n in range(take):
                sampler.fill(buffers[count % 2][filled + n], work.numbers[first + n])
            rows.append(SubjectRows(work, first, filled, filled + take))
            first, filled = first + take, filled + take
            if filled == batch_size:
                yield PatchBatch(buffers[count % 2], rows)
                rows, filled, count = [], 0, count + 1
        del loaded, sampler  # frees the volume before waiting for the next one
    if filled:
        yield PatchBatch(buffers[count % 2][:filled], rows)
