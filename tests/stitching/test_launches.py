"""Tests that Triton compiles one kernel for all launches of a kind: it does not look at the arguments of the others."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# All launches of a volume, with what Triton would specialise their kernels on, for both makers of GPUs.
LAUNCH = """
import itertools
import sys

import torch
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from voxquilt.geometry.axis_map import AxisMap
from voxquilt.geometry.grid import make_grid
from voxquilt.geometry.streamed_resample import Restorer
from voxquilt.stitching.blend import HANN
from voxquilt.stitching.kernels import blend_add, restore_labels
from voxquilt.stitching.kernels.label_rule import ARG_MAX, LabelRule
from voxquilt.stitching.patch_shares import patch_shares

META = torch.device("meta")
BACKENDS = CUDABackend(GPUTarget("cuda", 90, 32)), HIPBackend(GPUTarget("hip", "gfx942", 64))
kinds = {}


class Recorder:
    def __init__(self, kernel):
        self.names = [p.name for p in kernel.params]
        self.look = [create_function_from_signature(kernel.signature, kernel.params, backend) for backend in BACKENDS]
        self.seen = {}

    def __call__(self, kind, programs, *arguments):
        for look in self.look:
            bound, found, _ = look(*arguments)
            found = {n: (s, v if s[0] == "constexpr" else None) for n, s, v in zip(self.names, found, bound.values())}
            first = self.seen.setdefault((kind, look), found)
            differ = {name: (first[name], found[name]) for name in found if first[name] != found[name]}
            kinds.setdefault(self.names[0], set()).add(kind)
            assert not differ, differ


def views(*shape):
    for dtype in (torch.float16, torch.float32):
        tensor = torch.zeros(shape, dtype=dtype)
        yield tensor
        yield tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor.movedim(0, -1).clone()
        yield torch.zeros(tensor.numel() + 3, dtype=dtype)[3:].view(shape)
        yield tensor.mT.contiguous().mT
        yield torch.zeros([2 * n for n in shape], dtype=dtype)[tuple(slice(None, None, 2) for _ in shape)]
        yield torch.zeros(1, dtype=dtype).expand(shape)
        for far in (2**30, 2**31, 2**33 + 1):  # memory and strides that 32 bits count or not
            yield torch.empty_strided(shape, (far,) + tensor.stride()[1:], dtype=dtype, device=META)
            yield torch.empty_strided(shape, tensor.stride()[:-1] + (far,), dtype=dtype, device=META)


blend_add.Launcher = restore_labels.Launcher = Recorder
for shape, patch in (((20, 18, 33), (8, 8, 16)), ((9, 16, 17), (1, 16, 1))):
    grid = make_grid(shape, patch, 0)
    for axis, channels, covers in itertools.product(range(3), (1, 16), (False, True)):
        ring = [patch[n] if n == axis else shape[n] for n in range(3)]
        planes = [torch.zeros(n, *ring, device=META) for n in (channels, 1)[: 1 + covers]]
        kernel = blend_add.BlendAdd(grid, axis, patch_shares(HANN, grid, torch.float32, META).weights, planes)
        for position, count in ((0, 1), (0, 2), (1, 3), (len(grid) - 1, 1)):
            for batch in views(count, channels, *patch):
                kernel._launch(batch, position)
shape = (9, 16, 20)
for order in itertools.permutations(range(3)):
    maps = tuple(AxisMap(axis, n, shape[axis] / n, 0.1) for axis, n in zip(order, (7, 16, 33)))
    tables = Restorer(maps, 0, shape).tables
    kernel = restore_labels.RestoreLabels(LabelRule(ARG_MAX), maps, tables, torch.zeros(1, device=META))
    for scores, dtype in itertools.product(views(3, *shape), (torch.uint8, torch.int32)):
        for stops, labels in zip(((7, 16, 33), (1, 1, 1), (6, 2, 16)), itertools.islice(views(1, 7, 16, 33), 3)):
            kernel(scores, (0, 1, 0), [slice(0, n) for n in stops], labels.to(dtype))
print(*(len(found) > 10 for found in kinds.values()))
"""


def test_triton_compiles_one_kernel_for_launches_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the types, strides and places of batches are; what it would tell apart is looked up without a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["True", "True"], result.stderr
