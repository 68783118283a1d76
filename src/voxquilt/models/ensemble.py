"""Keeps the networks of an ensemble on the device, or on the host until their turn where they do not fit."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from voxquilt.models.weights.onnx_network import OnnxNetwork

log = logging.getLogger("voxquilt")


class Ensemble(nn.ModuleList):
    """Networks that run one after the other.

    Args:
        networks: The members.
        offload: Whether they wait on the host: True for all of them, False for none, 'auto' for those that do not fit
            into half of the device's free memory when they are moved there. It has no effect on the host.
    """

    def __init__(self, networks: Sequence[nn.Module], offload: bool | str = False) -> None:
        super().__init__(networks)
        self.offload = offload
        self._device = torch.device("cpu")
        self.waiting: frozenset[int] = frozenset()
        """Numbers of the members that wait on the host."""

    @contextmanager
    def ready(self, n: int) -> Iterator[nn.Module]:
        """Member n, which is on the device until the block ends."""
        if n not in self.waiting:
            yield self[n]
            return
        tensors = [*self[n].parameters(), *self[n].buffers()]
        kept = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = copy_to_device(tensor.data, self._device)
            yield self[n]
        finally:
            # Weights do not change, so nothing is copied back.
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ensemble":
        # nn.Module.to, .half and the like apply fn to every tensor; an empty one shows the device that fn moves to.
        device = fn(torch.empty(0, device=self._device)).device
        if device != self._device:
            self._device, self.waiting = device, self._members_that_wait(device)
        for n, network in enumerate(self):
            network._apply(self._on_host(fn) if n in self.waiting else fn)
        return self

    def _members_that_wait(self, device: torch.device) -> frozenset[int]:
        if device.type == "cpu" or self.offload is False:
            return frozenset()
        everyone = frozenset(range(len(self)))
        budget = free_bytes(device) // 2
        numbers = everyone if self.offload is True else waiting([size_of(member) for member in self], budget)
        # Weights of ONNX files are onnxruntime's, and stay where they are.
        numbers -= {n for n, member in enumerate(self) if isinstance(member, OnnxNetwork)}
        if numbers:
            log.info(
                "%d of %d networks wait on the host and are moved to the device for each batch (model.offload).",
                len(numbers),
                len(self),
            )
        return numbers

    def _on_host(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def move(tensor: Tensor) -> Tensor:
            host = tensor.to("cpu", fn(tensor.new_empty(0)).dtype)  # only the type is fn's
            return host.pin_memory() if self._device.type == "cuda" else host  # pinned: copied without waiting

        return move


def waiting(sizes: Sequence[int], budget: int) -> frozenset[int]:
    """Numbers of the members that wait on the host.

    Args:
        sizes: Bytes of each member.
        budget: Bytes for those on the device, and for the largest of the others during its turn.
    """
    for stay in range(len(sizes), 0, -1):
        held = list(accumulate(sizes))[stay - 1]
        if held + max(sizes[stay:], default=0) <= budget:
            return frozenset(range(stay, len(sizes)))
    return frozenset(range(len(sizes)))


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on a device; a pinned tensor is copied while the host goes on."""
    return tensor.to(device, non_blocking=True)


def size_of(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    if isinstance(network, OnnxNetwork):
        return network.weight_bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def free_bytes(device: torch.device) -> int:
    """Free bytes of a device's memory; 2^63 where they are not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**63
