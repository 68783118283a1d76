"""Provides the memory of a batch, which is filled with patches of subjects on the host or on the device."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from voxquilt.data.copy_stream import Mark
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.patch_source import PatchSource


class BatchBuffer:
    """A (B, C, pi, pj, pk) float32 tensor, on the host or on a device.

    Patches of a subject on the device are cut into it there. Those of a subject on the host are cut into pinned memory
    and copied while the network predicts the batch before.

    Args:
        shape: (B, C, pi, pj, pk).
        feed: The device; None keeps the batch on the host.

    Raises:
        torch.OutOfMemoryError: the device has too little memory.
    """

    def __init__(self, shape: Sequence[int], feed: DeviceFeed | None = None) -> None:
        device = torch.device("cpu") if feed is None else feed.stream.device
        last = feed is not None and feed.channels_last
        self.data: Float[Tensor, "b c pi pj pk"] = torch.empty(
            tuple(shape), device=device, memory_format=torch.channels_last_3d if last else torch.contiguous_format
        )
        self._staged = None if feed is None else _StagedRows(self.data, feed)

    def begin(self) -> None:
        """Begin another batch; the network has been given the one before."""
        if self._staged is not None:
            self._staged.begin()

    def fill(self, source: PatchSource, numbers: Sequence[int], first: int) -> None:
        """Cut patches with these numbers into the rows from `first` on."""
        staged = None if source.is_on_device else self._staged
        rows = self.data if staged is None else staged.rows
        for row, number in enumerate(numbers, first):
            source.fill(rows[row], number)
        if staged is not None:
            staged.send(first, first + len(numbers))

    @property
    def arrived(self) -> Mark | None:
        """The point at which the batch is complete on the device; None if it is as soon as it is filled."""
        return None if self._staged is None else self._staged.sent


class _StagedRows:
    """Pinned memory of a batch; none is pinned before a subject on the host needs it."""

    def __init__(self, data: Tensor, feed: DeviceFeed) -> None:
        self._data, self._stream = data, feed.stream
        self._rows: Tensor | None = None
        self._free = feed.stream.mark()
        self.sent: Mark | None = None

    @property
    def rows(self) -> Tensor:
        """Where patches are cut to on the host."""
        if self._rows is None:
            self._rows = self._stream.host_buffer(self._data)
        return self._rows

    def begin(self) -> None:
        """Wait until the pinned rows have been copied, and note what the network still reads."""
        if self.sent is not None:
            self.sent.wait()
        self.sent, self._free = None, self._stream.mark()

    def send(self, start: int, stop: int) -> None:
        """Copy rows to the device beside the network, once it has read the batch that was there."""
        with self._stream.active():
            self._free.order()
            self._stream.copy(self._data[start:stop], self.rows[start:stop])
            self._stream.hold([self._data])
            self.sent = self._stream.mark()
