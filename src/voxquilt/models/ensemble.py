"""Where are the networks of an ensemble? On the device, or where they do not fit on the host, until their turn."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("voxquilt")


class Ensemble(nn.ModuleList):
    """Networks that run one after the other.

    Args:
        networks: The members.
        offload: Whether they wait on the host: True for all of them, False for none, 'auto' for those that do not fit
            into half of the device's free memory at the time when they are moved there. On the host it means nothing.
    """

    def __init__(self, networks: Sequence[nn.Module], offload: bool | str = False) -> None:
        super().__init__(networks)
        self.offload = offload
        self._device = torch.device("cpu")
        self.waiting: frozenset[int] = frozenset()
        """Numbers of the members that wait on the host."""

    @contextmanager
    def ready(self, n: int) -> Iterator[nn.Module]:
        """Member n, on the device as long as it is needed."""
        if n not in self.waiting:
            yield self[n]
            return
        tensors = [*self[n].parameters(), *self[n].buffers()]
        kept = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = fetched(tensor.data, self._device)
            yield self[n]
        finally:
            # Weights do not change, so that nothing need come back.
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ensemble":
        # What nn.Module.to, .half and the like do to every tensor; the device is seen by what becomes of one.
        device = fn(torch.empty(0, device=self._device)).device
        if device != self._device:
            self._device, self.waiting = device, self._who_waits(device)
        for n, network in enumerate(self):
            network._apply(self._on_host(fn) if n in self.waiting else fn)
        return self

    def _who_waits(self, device: torch.device) -> frozenset[int]:
        if device.type == "cpu" or self.offload is False:
            return frozenset()
        everyone = frozenset(range(len(self)))
        found = everyone if self.offload is True else waiting([size_of(n) for n in self], free_bytes(device) // 2)
        if found:
            log.info(
                "%d of %d networks wait on the host and are moved to the device for each batch (model.offload).",
                len(found),
                len(self),
            )
        return found

    def _on_host(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def moved(tensor: Tensor) -> Tensor:
            host = tensor.to("cpu", fn(tensor.new_empty(0)).dtype)  # only the type is taken over
            return host.pin_memory() if self._device.type == "cuda" else host  # pinned: copied without waiting

        return moved


def waiting(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Which of the members wait on the host.

    Args:
        sizes: Bytes of each.
        room: Bytes for those on the device, and for the largest of the others as it takes its turn.
    """
    for stay in range(len(sizes), 0, -1):
        held = list(accumulate(sizes))[stay - 1]
        if held + max(sizes[stay:], default=0) <= room:
            return frozenset(range(stay, len(sizes)))
    return frozenset(range(len(sizes)))


def fetched(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one that is pinned is copied while the host goes on."""
    return tensor.to(device, non_blocking=True)


def size_of(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def free_bytes(device: torch.device) -> int:
    """Of a device's memory, as far as it is known."""
    found: Any = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    return found[0] if found else 2**63
