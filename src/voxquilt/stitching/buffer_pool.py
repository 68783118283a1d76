"""Where does memory for sums come from? From the volume before, if it was large enough."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def choose_device(device: torch.device, size: int) -> torch.device:
    """Where `size` bytes of sums are kept: on the device, or on the host if a GPU would have too little left."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return device if size <= free / 2 else torch.device("cpu")


class BufferPool:
    """Memory that finished volumes leave to the next: the first touch of fresh memory costs more than the sums."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, " n"]:
        """Room for at least `count` values, of unknown content."""
        fitting = [t for t in self._free if len(t) >= count and t.dtype == dtype and t.device == device]
        if fitting:
            best = min(fitting, key=len)
            self._free = [t for t in self._free if t is not best]
            return best
        # What is too small now would stay so: sizes differ little within a cohort, and memory must not add up.
        self._free = [t for t in self._free if t.dtype != dtype or t.device != device]
        # Not an inference tensor, since those can be changed neither outside inference mode nor in another thread.
        with torch.inference_mode(False):
            return torch.empty(count, dtype=dtype, device=device)

    def give(self, memory: Shaped[Tensor, " n"]) -> None:
        """Leave what `take` gave to the next that asks."""
        self._free.append(memory)
