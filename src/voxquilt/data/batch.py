"""Cuts subjects into batches of patches, which know the subjects that they come from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from voxquilt.data.batch_buffer import BatchBuffer
from voxquilt.data.copy_stream import Mark
from voxquilt.data.device_feed import DeviceFeed
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

    def __init__(self, data: Tensor, rows: list[SubjectRows], arrived: Mark | None = None) -> None:
        self.data = data
        self.rows = rows
        self._arrived = arrived

    @property
    def model(self) -> int:
        """Which of several models the batch is for."""
        return self.rows[0].work.task.model

    def to(self, device: torch.device) -> "PatchBatch":
        """The batch on another device; Lightning calls it just before the network, and it waits for no other batch."""
        if self._arrived is not None:
            self._arrived.order()
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


def cut_batches(
    subjects: Iterable[LoadedSubject], batch_size: int, feed: DeviceFeed | None = None
) -> Iterator[PatchBatch]:
    """Cut subjects into batches; all are full but the last, and those before the channels or the model change.

    Two buffers take turns, since first use of memory is slow: a batch is valid until the next but one is requested.

    Args:
        subjects: The subjects, in order.
        batch_size: Patches per batch.
        feed: The device that batches lie on; None for the host.
    """
    buffers: list[BatchBuffer] = []
    rows: list[SubjectRows] = []
    filled = count = 0

    def take_batch() -> PatchBatch:
        nonlocal rows, filled, count
        buffer = buffers[count % 2]
        batch = PatchBatch(buffer.data[:filled], rows, buffer.arrived)
        rows, filled, count = [], 0, count + 1
        return batch

    for loaded in subjects:
        work, source = loaded.work, loaded.source
        source.hand_over()
        shape = (batch_size, source.channels, *source.patch_size)
        if filled and (buffers[0].data.shape != shape or rows[0].work.task.model != work.task.model):
            yield take_batch()
        if not buffers or buffers[0].data.shape != shape:
            buffers = _make_buffers(shape, feed)
        first, total = 0, len(work.numbers)
        while first < total and not work.failed:
            if filled == 0:
                buffers[count % 2].begin()
            take = min(batch_size - filled, total - first)
            buffers[count % 2].fill(source, work.numbers[first : first + take], filled)
            rows.append(SubjectRows(work, first, filled, filled + take))
            first, filled = first + take, filled + take
            if filled == batch_size:
                yield take_batch()
        del loaded, source  # frees the volume before waiting for the next one
    if filled:
        yield take_batch()


def _make_buffers(shape: Sequence[int], feed: DeviceFeed | None) -> list[BatchBuffer]:
    try:
        return [BatchBuffer(shape, feed), BatchBuffer(shape, feed)]
    except torch.OutOfMemoryError:
        if feed is None or not feed.to_host():
            raise
    return [BatchBuffer(shape, feed), BatchBuffer(shape, feed)]
