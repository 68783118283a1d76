"""Takes volumes to a device through two buffers of pinned memory."""

from itertools import cycle
from threading import Lock

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.data.copy_stream import CopyStream

_CHUNK = 2**25
STAGED = 2 * _CHUNK
"""Bytes of pinned memory."""


class Staging:
    """Copies tensors of any size to a device, in the thread's current stream, while only the calling thread waits.

        host memory   |  1  |  2  |  3  |  4  |
        buffers       [  1  ]     [  3  ]            a buffer is filled again once its last copy is done
                            [  2  ]     [  4  ]
        device        |  1  |  2  |  3  |  4  |

    All of a volume in pinned memory would be a second volume on the host, and pinning takes longer than copying.

    Args:
        stream: The device and its stream.
        chunk: Bytes of a buffer.
    """

    def __init__(self, stream: CopyStream, chunk: int = _CHUNK) -> None:
        self._stream, self._chunk = stream, chunk
        with torch.inference_mode(False):  # an inference tensor could not be filled by the threads that load subjects
            like = torch.empty(chunk, dtype=torch.uint8)
            self._buffers = [stream.host_buffer(like) for _ in range(2)]
        self._copied = [stream.mark() for _ in range(2)]
        self._turns = cycle(range(2))
        self._lock = Lock()  # several threads load subjects

    def upload(self, voxels: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A copy on the device, with its voxels in the order in which they are in memory on the host.

        Raises:
            torch.OutOfMemoryError: the device has too little memory.
        """
        if voxels.device.type != "cpu":
            return voxels.to(self._stream.device)
        # From the slowest axis to the fastest: files have i as the fastest, and need not be transposed on the host.
        order = sorted(range(voxels.ndim), key=lambda axis: -voxels.stride(axis))
        dense = voxels.permute(order).contiguous()
        made = torch.empty(dense.shape, dtype=dense.dtype, device=self._stream.device)
        # Not reshape, which keeps a single voxel's stride, and that may be any.
        source, into = (t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (dense, made))
        with self._lock:
            for start in range(0, len(source), self._chunk):
                part, turn = source[start : start + self._chunk], next(self._turns)
                self._copied[turn].wait()
                buffer = self._buffers[turn][: len(part)].copy_(part)
                self._stream.copy(into[start : start + len(part)], buffer)
                self._copied[turn] = self._stream.mark()
        return made.permute([order.index(axis) for axis in range(voxels.ndim)])
