"""Copies tensors to a device on a stream of its own; the one module of the input's way that calls CUDA."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Mark(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Keep the host until the work before the mark is done."""
        ...

    def order(self) -> None:
        """Have this thread's current stream begin nothing more before that work is done, while the host goes on."""
        ...


@runtime_checkable
class CopyStream(Protocol):
    """A stream of a device on which volumes are copied and prepared while the network runs on another."""

    device: torch.device

    def active(self) -> AbstractContextManager[object]:
        """Within the block, work that this thread gives the device belongs to this stream."""
        ...

    def host_buffer(self, like: Tensor) -> Tensor:
        """Host memory of the shape, type and strides of a dense tensor, from which `copy` need not wait."""
        ...

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy from a host buffer to the device in this thread's current stream, while the host goes on."""
        ...

    def mark(self) -> Mark:
        """The point that this thread's current stream has come to."""
        ...

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors that were made on another stream until this thread's current one is done."""
        ...


class CudaStream:
    """A CUDA stream beside the network's.

    Args:
        device: The device.
        beside: False for the stream that is current when this is made, where nothing runs meanwhile.
    """

    def __init__(self, device: torch.device, *, beside: bool = True) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if beside else torch.cuda.current_stream(device)

    def active(self) -> AbstractContextManager[object]:
        """See CopyStream; the current stream is each thread's own, and so is the current device that comes with it."""
        context = ExitStack()
        # First the device: a stream's end makes the device current that was before, in a new thread always the first.
        context.enter_context(torch.cuda.device(self.device))
        context.enter_context(torch.cuda.stream(self._stream))
        return context

    def host_buffer(self, like: Tensor) -> Tensor:
        """Pinned memory."""
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy without waiting."""
        into.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """An event."""
        return _CudaMark(self.device)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator, which knows only the stream that a tensor was made on."""
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(stream)


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        # Waiting for a blocking event leaves the core to other threads.
        self._device, self._event = device, torch.cuda.Event(blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()  # other threads of Python go on

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


def copy_stream(device: torch.device, *, beside: bool = True) -> CopyStream | None:
    """A stream for copies to a device; None for devices that share the host's memory or have no such streams."""
    return CudaStream(device, beside=beside) if device.type == "cuda" else None
