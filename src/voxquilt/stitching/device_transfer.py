"""Moves data between the host and a CUDA device without making the predict loop wait; on the host it only copies.

This is the only module of stitching that knows streams, events and pinned memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Bytes of each of the two pinned buffers through which volumes travel to the host.
_STAGE = 2**24


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the one on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def beside_the_network(device: torch.device) -> Iterator[None]:
    """Lets a thread compute what the network does not wait for, on a stream that it does not use."""
    with on_device(device), torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext():
        yield


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device, contiguous as kernels read it; the device's queue is not waited for."""
    # CUDA has taken the bytes of pageable memory when the call returns, so the tensor may be changed or released.
    return tensor.contiguous().to(device, non_blocking=True)


class Progress:
    """Marks how far the work on a device has come, so that another thread can wait for just that.

    Args:
        device: The device; on the host, work is done when calls return, and nothing is marked.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event()] if device.type == "cuda" else []

    def mark(self) -> None:
        """Mark the work that the calling thread has queued so far; earlier marks are forgotten."""
        for event in self._events:
            event.record(torch.cuda.current_stream(self._device))

    def download(self, sources: Sequence[Tensor], targets: Sequence[np.ndarray]) -> None:
        """Copy tensors to arrays on the host, once the marked work is done; wait only for that.

        Args:
            sources: Contiguous tensors.
            targets: Contiguous arrays of the same types and as many values.
        """
        for source, target in zip(sources, targets, strict=True):
            flat = torch.from_numpy(target.reshape(-1).view(np.uint8))
            values = source.reshape(-1).view(torch.uint8)
            if source.device.type == "cuda":
                self._stream_out(values, flat)
            else:
                flat.copy_(values)

    def _stream_out(self, source: Tensor, target: Tensor) -> None:
        """Copy bytes through pinned buffers by turns: one is filled by the device while the other is emptied."""
        stream = _download_stream(source.device)
        for event in self._events:
            stream.wait_event(event)
        size = min(_STAGE, len(source))
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        pending: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        for n, first in enumerate(range(0, len(source), _STAGE)):
            chunk = source[first : first + _STAGE]
            buffer, filled = buffers[n % 2][: len(chunk)], torch.cuda.Event(blocking=True)
            # First the device: a stream's end makes the device current that was before, in a new thread the first.
            with on_device(source.device), torch.cuda.stream(stream):
                buffer.copy_(chunk, non_blocking=True)
                filled.record(stream)
            pending.append((target[first : first + _STAGE], buffer, filled))
            if len(pending) == 2:
                _empty(*pending.pop(0))
        for chunk in pending:
            _empty(*chunk)


@cache
def _download_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all volumes: torch hands out its streams in a circle, and another could be the one for uploads."""
    return torch.cuda.Stream(device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Likewise; and memory that torch keeps for it is used again for the next volume. Its many small kernels go before
    those of the network, behind each of which they would wait."""
    return torch.cuda.Stream(device, priority=-1)


def _empty(target: Tensor, buffer: Tensor, filled: torch.cuda.Event) -> None:
    filled.synchronize()
    target.copy_(buffer)
