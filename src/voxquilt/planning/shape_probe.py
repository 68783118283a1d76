"""Measures the outputs and the memory of a network's forward pass without computing a voxel.

The forward pass runs on tensors that have shapes but no data, while the bytes of those that are alive are counted.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # loaded in any case: Lightning imports torch._dynamo
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxquilt.data.batch import named_outputs
from voxquilt.geometry.frame import Triple
from voxquilt.planning.convolution_workspace import cpu_workspace, cuda_workspace, tensor_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """What a forward pass makes and takes.

    Args:
        outputs: Shapes (B, C, I, J, K) by output name; '' for the only output of a network.
        peak_bytes: The most memory at any time besides the weights and the batch, including outputs.
        output_bytes: Bytes of the outputs.
        types: Type of each output, such as torch.float32.
        guessed: Whether this is only a guess, for a network that cannot be probed.
    """

    outputs: dict[str, Shape]
    peak_bytes: int
    output_bytes: int
    types: dict[str, torch.dtype]
    guessed: bool = False


def probe(
    network: nn.Module,
    channels: int,
    patch_size: Triple,
    batch_size: int = 1,
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> Probe:
    """Run a network on a batch without data.

    Args:
        network: A PatchNetwork, or a module that maps (B, C, I, J, K) to a tensor or to tensors by name.
        channels: Channels of the batch.
        patch_size: Voxels along i, j, k.
        batch_size: Patches of the batch.
        device: Where it will run, for the memory that its kernels use; nothing is allocated there.
        autocast: The type that trainer.precision='16-mixed' or 'bf16-mixed' uses.

    Raises:
        Exception: whatever the network raises for such a batch, such as another number of channels; and what torch
            raises for a network that branches on values and so cannot run without data.
    """
    kind = torch.device(device).type
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    training = [module for module in network.modules() if module.training]
    network.eval()
    counter = _Counter({"cpu": cpu_workspace, "cuda": cuda_workspace}.get(kind, lambda *_: 0))
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which prints a traceback of every error
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
            batch = torch.empty(batch_size, channels, *patch_size, dtype=dtype)
            # The batch is the host's, whatever the device.
            types = _CudaAutocast() if kind == "cuda" and autocast is not None else nullcontext()
            with torch.autocast("cpu", autocast, enabled=autocast is not None), types, counter:
                outputs = network(batch)
            return _to_probe(outputs, batch_size, counter.peak)
    finally:
        log.setLevel(level)
        for module in training:
            module.training = True


def _to_probe(outputs: Any, batch_size: int, peak: int) -> Probe:
    named = named_outputs(outputs, batch_size)
    return Probe(
        {name: tuple(tensor.shape) for name, tensor in named.items()},
        peak,
        sum(map(tensor_bytes, named.values())),
        {name: tensor.dtype for name, tensor in named.items()},
    )


class _CudaAutocast(TorchFunctionMode):
    """Makes the host's autocast what CUDA's is for normalisation over groups, which is in single precision there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.group_norm, nn.functional.group_norm):
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, while these are alive.

    Args:
        workspace: The bytes that an operation uses besides, of the operation, its arguments and its output.
    """

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...], Any], int]) -> None:
        super().__init__()
        self.peak = 0
        self._workspace = workspace
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Not allocated here: parameters, the batch, and tensors that an operation returns a view of.
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if _key(tensor) not in given | self._known:
                self._add(tensor)
        self.peak = max(self.peak, self._live + self._workspace(func, args, result))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self._live += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
