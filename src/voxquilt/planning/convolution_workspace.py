"""Estimates the memory that a convolution uses, besides its input and output, while it runs."""

from math import prod
from typing import Any

from torch import Tensor

# Channels that oneDNN, which computes convolutions on a CPU, keeps beside each other.
_BLOCK = 16
# The product of channels and two axes up to which torch convolves a single patch without oneDNN.
_SMALL = 20480


def cpu_workspace(func: Any, args: tuple[Any, ...], output: Any) -> int:
    """Bytes that an operation uses on a CPU if it is a convolution, else 0: measured, with AVX-512.

    Args:
        func: The operation of torch.
        args: Its arguments.
        output: What it returned.
    """
    if not _is_convolution(func, output):
        return 0
    batch, weight, out = args[0], args[1], tensor_bytes(output)
    transposed = _is_transposed(func, args)
    groups = not transposed and weight.shape[1] != batch.shape[1]
    if transposed or groups:  # the output is copied twice
        return max(tensor_bytes(batch), 2 * out)
    if len(batch) == 1 and max(weight.shape[2:]) <= 3 and prod(batch.shape[1:4]) <= _SMALL:
        # torch does not use oneDNN for so few voxels: it copies a row of voxels for each place of the kernel.
        each = prod(weight.shape[1:])
        return 0 if prod(weight.shape[2:]) == 1 else each * out // output.shape[1]
    # Copies of the input and of the output; the output itself is written when the input's copy is freed.
    return _padded(output, _BLOCK) + max(_padded(batch, _BLOCK) if batch.shape[1] >= _BLOCK else 0, out) - out


def cuda_workspace(func: Any, args: tuple[Any, ...], output: Any) -> int:
    """Bytes that an operation uses on a GPU if it is a convolution, else 0: measured on an H100 with cuDNN 9.19.

    cuDNN convolves with channels last: it copies weights, input and output, and pads channels to whole 16 bytes. One
    input channel, a kernel of one voxel and a kernel per channel need nothing. Nothing is copied of what is channels
    last already, which is not counted on: after many a layer it is not.

    Args:
        func, args, output: See `cpu_workspace`.
    """
    if not _is_convolution(func, output):
        return 0
    batch, weight = args[0], args[1]
    transposed = _is_transposed(func, args)
    grouped = not transposed and weight.shape[1] != batch.shape[1]
    if batch.shape[1] == 1 or prod(weight.shape[2:]) == 1 or grouped:
        return 0
    multiple = 16 // batch.element_size()
    return _padded(batch, multiple) + _padded(output, multiple) + tensor_bytes(weight)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _is_convolution(func: Any, output: Any) -> bool:
    return "conv" in str(func) and isinstance(output, Tensor)


def _is_transposed(func: Any, args: tuple[Any, ...]) -> bool:
    return "transpose" in str(func) or (len(args) > 6 and args[6] is True)


def _padded(tensor: Tensor, multiple: int) -> int:
    """Bytes of a tensor whose channels are filled up to a multiple."""
    return tensor_bytes(tensor) // tensor.shape[1] * (-(-tensor.shape[1] // multiple) * multiple)
