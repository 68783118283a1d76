"""Measures the outputs and the memory of a network's forward pass without computing a voxel.

The forward pass runs on tensors that have shapes but no data, while the bytes of those that are alive are counted.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.jit._recursive import wrap_cpp_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from voxquilt.data.batch import named_outputs
from voxquilt.geometry.frame import Triple
from voxquilt.planning.convolution_workspace import cpu_workspace, cuda_workspace, tensor_bytes

Shape = tuple[int, ...]

_Workspace = Callable[[Any, tuple[Any, ...], Any], int]


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
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    size = (batch_size, channels, *patch_size)
    # It prints a traceback of every error, and statistics when the process ends.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level or logging.WARNING
    log.setLevel(logging.CRITICAL)
    kind = torch.device(device).type
    workspace = {"cpu": cpu_workspace, "cuda": cuda_workspace}.get(kind, _no_workspace)
    try:
        with torch.inference_mode():
            # In a tenth of the time, most of which FakeTensorMode takes to be imported. It has the last word, since it
            # knows what a device does, and has the network's own error.
            with suppress(Exception):
                if autocast is None:
                    return _run(network, size, dtype, _MetaCounter(workspace))
            # The batch is the host's, whatever the device.
            types = _CudaAutocast() if kind == "cuda" and autocast is not None else nullcontext()
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                torch.autocast("cpu", autocast, enabled=bool(autocast)),
                types,
            ):
                return _run(network, size, dtype, _Counter(workspace))
    finally:
        log.setLevel(level)


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Give a network's modules their attributes back: some keep tensors that they make in their first forward pass."""
    training = [module for module in network.modules() if module.training]
    kept = [(vars(module), dict(vars(module))) for module in network.modules()]
    values = [value for _, attributes in kept for value in attributes.values()]
    kept += [(value, dict(value)) for value in values if isinstance(value, dict)]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for value, before in lists:
            value[:] = before
        for module in training:  # TorchScript's are no attributes of Python's
            module.training = True


def _with_copied_scripts(network: nn.Module) -> nn.Module:
    """A network whose TorchScript modules are copies that share their weights, since their attributes are C++'s."""
    if isinstance(network, torch.jit.RecursiveScriptModule):  # type: ignore[reportPrivateImportUsage]
        return wrap_cpp_module(_copied_script(network._c))
    for name, child in list(network._modules.items()):
        network._modules[name] = child and _with_copied_scripts(child)
    return network


def _copied_script(script: Any) -> Any:
    copied = script._replicate_for_data_parallel()  # which copies only this module, none that are in it
    for name, child in torch._C.ModuleDict(script).items():
        copied.setattr(name, _copied_script(child))
    return copied


def _run(network: nn.Module, size: Shape, dtype: torch.dtype, counter: "_Counter") -> Probe:
    batch = torch.zeros(size, dtype=dtype, device=counter.device)
    with _unchanged(network):
        network.eval()
        network = _with_copied_scripts(network)
        with counter:
            outputs = network(batch)
    return _to_probe(outputs, size[0], counter.peak)


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

    device = torch.device("cpu")

    def __init__(self, workspace: _Workspace) -> None:
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


class _MetaCounter(_Counter):
    """Counts while everything is computed on the device `meta`, which has no data; weights stay where they are."""

    device = torch.device("meta")

    def __init__(self, workspace: _Workspace) -> None:
        super().__init__(workspace)
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, options = tree_map_only(Tensor, self._twin, (args, dict(kwargs or {})))
        names = [argument.name for argument in func._schema.arguments]
        if "device" in names[len(args) :]:
            options["device"] = self.device
        args = tuple(self.device if name == "device" else value for name, value in zip(names, args, strict=False))
        return super().__torch_dispatch__(func, types, args, options)

    def _twin(self, tensor: Tensor) -> Tensor:
        """A tensor of the same form without data, in the place of a weight or of another tensor with data."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._twins:
            with torch.inference_mode(tensor.is_inference()):
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
            self._twins[id(tensor)] = tensor, twin  # both, so that no other tensor gets this id
        return self._twins[id(tensor)][1]


def _no_workspace(func: Any, args: tuple[Any, ...], output: Any) -> int:
    return 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
