"""Launches a kernel again and again in as little time as Triton takes."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor


def kind_of(tensor: Tensor) -> Hashable:
    """What of a tensor whose alignment is not specialised on can lead to another compiled kernel.

    For a GPU of AMD, one for tensors whose memory 32 bits count is compiled in another way.
    """
    return tensor.dtype, tensor.stride(), tensor.untyped_storage().nbytes() < 2**31


class Launcher:
    """Launches one kernel; what Triton has compiled for the first launch of a kind is used for all others of it.

    Else Triton looks at every argument at every launch to tell which of its compiled kernels to take. On the host of an
    H100, with a profiler on, a launch with 40 arguments took 120 us so, and takes 47.

    Args:
        kernel: A function that `triton.jit` decorates.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, kind: Hashable, programs: tuple[int, int, int], *arguments: object) -> None:
        """Launch.

        Args:
            kind: Equal for launches whose arguments Triton compiles one kernel for: types of tensors and integers,
                constants, and what it specialises on (`do_not_specialize`).
            programs: Number of programs along each axis.
            arguments: All arguments of the kernel, constants too, in its order.
        """
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[programs](*arguments)
            return
        # Without fused multiplications and additions, whose results are not those of torch.
        self._compiled[kind] = self._kernel[programs](*arguments, enable_fp_fusion=False)  # None if it is interpreted
