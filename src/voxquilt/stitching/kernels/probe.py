"""Launches a kernel that does next to nothing, to see whether Triton works on a machine."""

# Triton exists on Linux only, and its kernels are launched by an index.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl

from voxquilt.stitching.device_transfer import on_device


def launch(device: torch.device) -> torch.Tensor:
    """Launch a kernel that writes 1 to the only value of a tensor on a device, which is returned.

    Raises:
        Exception: Triton misses something, such as a C compiler.
    """
    value = torch.zeros(1, dtype=torch.int32, device=device)
    with on_device(device):
        _write_one[(1,)](value)
    return value


@triton.jit
@no_type_check
def _write_one(value):
    tl.store(value, 1)
