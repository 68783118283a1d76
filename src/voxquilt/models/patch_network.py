"""Combines the members of an ensemble, flipped patches, named outputs and 2-D networks into one network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from voxquilt.errors import ConfigError, OutputError
from voxquilt.geometry.frame import AXES
from voxquilt.models.ensemble import Ensemble
from voxquilt.models.flip_augmentation import flip_back, flip_combinations, flip_copy
from voxquilt.models.weights.onnx_network import NamedByFile, OnnxNetwork
from voxquilt.vocabulary import ACTIVATIONS, AVERAGES, OFFLOAD, OUTPUTS, check_name

Named = dict[str, Tensor]


class PatchNetwork(nn.Module):
    """Runs networks on a patch batch and averages their outputs, in float32.

    Args:
        networks: The members, each (B, C, I, J, K) to a tensor, a tuple of tensors, or tensors by name.
        outputs: Names for a tuple's outputs, None for an output to drop; for a mapping, the names to keep. By default
            all are kept, and a tuple's outputs are named out0, out1, ...
        flips: Axes (0, 1, 2 of the model's i, j, k) along which patches are also predicted flipped, in every
            combination: test-time augmentation.
        average: 'logits' averages outputs as they are, 'probabilities' after the activation.
        activation: With average='probabilities': 'softmax', 'sigmoid', 'none'; None is soft-max over several channels.
        squeeze_axis: The axis, of one voxel, that is removed for a 2-D network: with 2 it takes (B, C, I, J).
        output: How outputs lie in patches, 'auto', 'resampled' or 'cropped'; see
            `voxquilt.geometry.output_layout.factor_of`.
        offload: Whether members stay on the host while others run; see `voxquilt.models.ensemble.Ensemble`.
        compile: Whether `compile_members`, which each process must call, compiles the members.
        channels_last: Whether weights and patches are channels last in memory, which is faster on some devices.

    Raises:
        ConfigError: one of these is wrong.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        outputs: Sequence[str | None] | None = None,
        flips: Sequence[int] = (),
        average: str = "logits",
        activation: str | None = None,
        squeeze_axis: int | None = None,
        output: str = "auto",
        offload: bool | str = "auto",
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._flips = flip_combinations(flips)
        if squeeze_axis not in (None, 0, 1, 2):
            raise ConfigError(f"squeeze_axis must be null, 0, 1 or 2; it is {squeeze_axis!r}.")
        if not isinstance(offload, bool):
            check_name(offload, OFFLOAD, "offload (true, false)")
        if compile and any(isinstance(network, (torch.jit.ScriptModule, OnnxNetwork)) for network in networks):
            raise ConfigError(
                "compile=true has no effect on TorchScript and ONNX, which are compiled already; leave it out."
            )
        self.networks = Ensemble(networks, offload)
        self.compiled = compile
        self._calls: list[Callable[[Tensor], object]] = []
        self._graphs: list[Callable[[Tensor], object]] = []
        self.channels_last = channels_last
        if channels_last:
            for parameter in self.parameters():
                parameter.data = _channels_last(parameter.data)
        self.layout = check_name(output, OUTPUTS, "output")
        self.flips = tuple(flips)
        self.squeeze_axis = squeeze_axis
        self.average, self.activation = average, activation
        self._outputs = outputs
        self._squeeze = None if squeeze_axis is None else squeeze_axis + 2
        check_name(activation or "none", ACTIVATIONS, "activation")
        probabilities = check_name(average, AVERAGES, "average") == "probabilities"
        self._activate = to_activation(activation) if probabilities else _unchanged

    def forward(self, patches: Shaped[Tensor, "b c i j k"]) -> Named:
        """Outputs (B, C', ...) by name; the only output of a network is named ''.

        Raises:
            OutputError: the network's outputs are not tensors, or their number differs from that of the names.
        """
        runs = self._runs(patches)
        total = next(runs)
        count = len(self.networks) * len(self._flips)
        if count == 1:
            return total
        # A CUDA graph's outputs are overwritten when it, or another one, runs again.
        total = {name: tensor.to(torch.float32, copy=self.reuses_outputs) for name, tensor in total.items()}
        for outputs in runs:
            if outputs.keys() != total.keys():
                raise OutputError(f"members of the ensemble give outputs {list(total)} and {list(outputs)}.")
            total = {name: total[name] + outputs[name] for name in total}
        return {name: tensor / count for name, tensor in total.items()}

    def compile_members(self, device: torch.device | str = "cpu") -> None:
        """Have torch compile every member when it first runs, if `compile` is set.

        Args:
            device: Where the members will run. On CUDA they become CUDA graphs, which need batches of one size; except
                members that wait on the host, whose weights have another address each time.
        """
        # Not nn.Module.compile, which does not compile networks of torch.nn's own modules, such as nn.Sequential.
        members = list(self.networks) if self.compiled else []
        self._calls = [torch.compile(member) for member in members]
        is_cuda = torch.device(device).type == "cuda"
        self._graphs = [torch.compile(member, mode="reduce-overhead") for member in members] if is_cuda else []

    def leave_out_flips(self) -> None:
        """Predict patches as they are from here on."""
        self.flips, self._flips = (), [()]

    @property
    def reuses_outputs(self) -> bool:
        """Whether a forward pass overwrites the outputs of the one before, unless they were averaged."""
        return bool(self._graphs)

    def _runs(self, patches: Tensor) -> Iterator[Named]:
        is_single = len(self.networks) * len(self._flips) == 1
        for n in range(len(self.networks)):
            with self.networks.ready(n) as member:
                calls = self._graphs if self._graphs and n not in self.networks.waiting else self._calls
                network = calls[n] if calls else member
                for axes in self._flips:
                    # A copy for each run, since networks may work in place.
                    inputs = self._squeeze_axis(patches if is_single else flip_copy(patches, axes))
                    if calls is self._graphs:
                        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last run are no longer needed
                    outputs = self._name_outputs(network(_channels_last(inputs) if self.channels_last else inputs))
                    unsqueezed = {name: self._unsqueeze_axis(name, output) for name, output in outputs.items()}
                    yield {name: self._activate(flip_back(output, axes)) for name, output in unsqueezed.items()}

    def _squeeze_axis(self, patches: Tensor) -> Tensor:
        if self._squeeze is None:
            return patches
        if patches.shape[self._squeeze] != 1:
            axis = AXES[self._squeeze - 2]
            raise OutputError(
                f"model.squeeze_axis={self._squeeze - 2} needs patches of one voxel along {axis}; they have "
                f"{patches.shape[self._squeeze]}. Set data.patch_size to 1 there."
            )
        return patches.squeeze(self._squeeze)

    def _unsqueeze_axis(self, name: str, output: Tensor) -> Tensor:
        if output.ndim != (5 if self._squeeze is None else 4):
            wanted = "(B, C, I, J, K)" if self._squeeze is None else "(B, C) and two spatial axes"
            stacked = output.ndim == (6 if self._squeeze is None else 5)
            hint = " Is it stacked for deep supervision? Build the network without it." if stacked else ""
            raise OutputError(
                f"the network's output {name!r} has shape {tuple(output.shape)}; wanted is {wanted}.{hint}"
            )
        return output if self._squeeze is None else output.unsqueeze(self._squeeze)

    def _name_outputs(self, output: object) -> Named:
        if isinstance(output, Tensor):
            return {"": output}
        if isinstance(output, Mapping):
            named = {str(name): tensor for name, tensor in output.items()}
            unknown = set(self._outputs or ()) - named.keys()
            if unknown:
                raise OutputError(f"model.outputs names {sorted(map(str, unknown))}; the network gives {list(named)}.")
            if isinstance(output, NamedByFile):
                self._check_pyramid(list(named.values()), f"[{next(iter(named))}]")
        elif isinstance(output, (tuple, list)):
            named = self._name_tuple(output)
        else:
            raise OutputError(f"the network gave {type(output).__name__}; wanted are a tensor, or several of them.")
        kept = {name: tensor for name, tensor in named.items() if self._outputs is None or name in self._outputs}
        invalid = [name for name, tensor in kept.items() if not isinstance(tensor, Tensor)]
        if invalid or not kept:
            example = f", such as model.outputs={_first_named(output)}" if isinstance(output, (tuple, list)) else ""
            problem = (
                f"the network's outputs {invalid} are not tensors" if invalid else "no tensors are left of outputs"
            )
            raise OutputError(f"{problem}; choose others by model.outputs{example}.")
        return kept

    def _name_tuple(self, output: Sequence[object]) -> dict[str, Any]:
        names = self._outputs or [f"out{n}" for n in range(len(output))]
        if len(names) != len(output):
            raise OutputError(
                f"model.outputs has {len(names)} names and the network {len(output)} outputs; name each, with null for "
                f"those to drop, such as model.outputs={_first_named(output)}."
            )
        self._check_pyramid(output, _first_named(output))
        return {name: tensor for name, tensor in zip(names, output, strict=True) if name is not None}

    def _check_pyramid(self, outputs: Sequence[object], first: str) -> None:
        if self._outputs is None and _is_pyramid(outputs):
            raise OutputError(
                f"the network gives {len(outputs)} outputs of the same channels and of fewer and fewer voxels: deep "
                f"supervision? Set model.outputs={first} to keep the first, or name all to keep."
            )


def _first_named(output: Sequence[object]) -> str:
    """A value of model.outputs that keeps only the first tensor."""
    first = next((n for n, tensor in enumerate(output) if isinstance(tensor, Tensor)), 0)
    return f"[{','.join('seg' if n == first else 'null' for n in range(len(output)))}]"


def _is_pyramid(output: Sequence[object]) -> bool:
    """Whether outputs are the same scores at coarser and coarser resolutions, as with deep supervision."""
    shapes = [tuple(tensor.shape) for tensor in output if isinstance(tensor, Tensor)]
    if len(shapes) < max(2, len(output)) or len({shape[:2] for shape in shapes}) > 1:
        return False
    pairs = list(pairwise(shapes))
    return shapes[0] != shapes[-1] and all(x >= y for a, b in pairs for x, y in zip(a, b, strict=True))


def to_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """A function on (B, C, ...) batches; None is soft-max for several channels and nothing for one."""
    if name is None:
        return lambda batch: batch.float().softmax(1) if batch.shape[1] > 1 else batch
    functions = {"softmax": lambda batch: batch.float().softmax(1), "sigmoid": lambda batch: batch.float().sigmoid()}
    return functions.get(name, _unchanged)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim not in (4, 5):
        return tensor
    memory_format = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    tensor = tensor.contiguous(memory_format=memory_format)
    # Along an axis of size 1, such as a single channel, any stride will do; with another one than before, a compiled
    # network would be compiled again.
    strides = torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _unchanged(batch: Tensor) -> Tensor:
    return batch
