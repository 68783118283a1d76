"""Provides memory for sums, which is reused from volume to volume."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def choose_device(device: torch.device, size: int, pooled: int = 0) -> torch.device:
    """The device that keeps `size` bytes of sums: the given one, or the host if a GPU would have too little left.

    Args:
        device: The device.
        size: Bytes of the sums.
        pooled: Bytes that are allocated on the device, but free for sums.
    """
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    # Not by memory_reserved and memory_allocated, which together take a millisecond to sort what they do not return.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    free += stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"] + pooled
    return device if size <= free / 2 else torch.device("cpu")


class BufferPool:
    """Keeps the memory of finished volumes for the next: first use of new memory takes longer than summing."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, " n"]:
        """Memory for at least `count` values, of unknown content."""
        device = torch.empty(0, device=device).device  # with the index that a tensor's device has
        large_enough = [t for t in self._free if len(t) >= count and t.dtype == dtype and t.device == device]
        if large_enough:
            best = min(large_enough, key=len)
            self._free = [t for t in self._free if t is not best]
            return best
        # Memory that is too small now is released: sizes differ little within a cohort, and it must not accumulate.
        self._free = [t for t in self._free if t.dtype != dtype or t.device != device]
        # Not an inference tensor, which cannot be modified outside inference mode or in another thread.
        with torch.inference_mode(False):
            return torch.empty(count, dtype=dtype, device=device)

    def held(self, device: torch.device) -> int:
        """Bytes on a device that are free for the next volume."""
        device = torch.empty(0, device=device).device
        return sum(t.nbytes for t in self._free if t.device == device)

    def release(self, device: torch.device) -> None:
        """Give up the memory on a device that is free here."""
        device = torch.empty(0, device=device).device
        self._free = [t for t in self._free if t.device != device]

    def give(self, memory: Shaped[Tensor, " n"]) -> None:
        """Return memory that `take` gave, for the next call."""
        self._free.append(memory)
