"""Streams that stand in for a device's in tests, with the host's memory in place of its own."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from voxquilt.data.copy_stream import Mark
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.staging import Staging


class ImmediateStream:
    """The host in a stream's place: every copy is complete when the call returns."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def active(self) -> AbstractContextManager[object]:
        """Nothing to change."""
        return nullcontext()

    def host_buffer(self, like: Tensor) -> Tensor:
        """Plain memory."""
        return torch.empty_like(like, device="cpu")

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy at once."""
        into.copy_(source)

    def mark(self) -> Mark:
        """A point that is always reached."""
        return _Reached()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to keep."""


class _Reached:
    def wait(self) -> None:
        pass

    def order(self) -> None:
        pass


class LateStream:
    """Copies as late as a device may: when somebody waits for a mark behind them.

    Args:
        fifo: Whether a stream that waits for a mark stays behind as well, with work of its own in the same queue; else
            what is given to it is done at once, so that the mark must have been reached.
    """

    def __init__(self, *, fifo: bool = False) -> None:
        self.fifo = fifo
        self.device = torch.device("cpu")
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.held: list[Tensor] = []

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_buffer(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def copy(self, into: Tensor, source: Tensor) -> None:
        self.pending.append((into, source))

    def mark(self) -> Mark:
        return LateMark(self, self.done + len(self.pending))

    def hold(self, tensors: Iterable[Tensor]) -> None:
        self.held.extend(tensors)

    def reach(self, place: int) -> None:
        """Do the copies up to a place, in order."""
        while self.done < place:
            into, source = self.pending.pop(0)
            into.copy_(source)
            self.done += 1


@dataclass(frozen=True)
class LateMark:
    stream: LateStream
    place: int

    def wait(self) -> None:
        self.stream.reach(self.place)

    def order(self) -> None:
        if not self.stream.fifo:
            self.stream.reach(self.place)


@dataclass
class HostAsDevice:
    """What came to the device that the host stands for: sizes of uploads, and the feeds."""

    uploads: list[torch.dtype] = field(default_factory=list)
    feeds: list[DeviceFeed] = field(default_factory=list)


def host_as_device(monkeypatch: pytest.MonkeyPatch) -> HostAsDevice:
    """Have runs and predict_volume take the host for a device with streams, and count what comes to it."""
    seen = HostAsDevice()
    upload, make = Staging.upload, DeviceFeed.__init__

    def count(staging: Staging, voxels: Tensor) -> Tensor:
        seen.uploads.append(voxels.dtype)
        return upload(staging, voxels)

    def note(feed: DeviceFeed, *arguments: object, **options: object) -> None:
        make(feed, *arguments, **options)  # pyright: ignore[reportArgumentType]
        seen.feeds.append(feed)

    monkeypatch.setattr(Staging, "upload", count)
    monkeypatch.setattr(DeviceFeed, "__init__", note)
    for module in ("voxquilt.predict", "voxquilt.prediction.datamodule"):
        monkeypatch.setattr(f"{module}.copy_stream", lambda device, **_: ImmediateStream())
    return seen
