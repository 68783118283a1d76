"""Makes a network of an exported program: for any number of patches, on any device, never in training."""

import io
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from voxquilt.models.chunking import check_sizes, in_chunks


class ExportedNetwork(nn.Module):
    """Runs an exported program on batches of any size, in chunks of the size that it was exported for.

    Args:
        program: A program with one input (B, C, I, J, K), or (B, C, I, J) for a 2-D network.

    Raises:
        ValueError: the program has several inputs, or none.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        if len(program.graph_signature.user_inputs) != 1:
            raise ValueError(f"its inputs are {program.graph_signature.user_inputs}; wanted is one, the patches")
        (name,) = program.graph_signature.user_inputs
        shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
        self._sizes = tuple(size if isinstance(size, int) else None for size in shape)
        """Sizes of the input along every axis; None where any size will do."""
        self._least, self._most = _range(program, shape[0])
        self._program = program
        self._module = program.module()

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Sizes of the input, (B, C, I, J, K); None where any size will do."""
        return self._sizes

    def forward(self, patches: Shaped[Tensor, "b c *spatial"]) -> Any:
        """The program's outputs.

        Raises:
            OutputError: the program was exported for patches of another size, or with other channels.
        """
        check_sizes("the program", self._sizes, patches.shape)
        return in_chunks(self._module, patches, most=self._most, least=self._least)

    def train(self, mode: bool = True) -> "ExportedNetwork":
        """Do nothing: a program stays as it was exported, and torch raises an error if it is asked to change."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "ExportedNetwork":
        super()._apply(fn, recurse)
        _move_constants(self._module, fn(torch.empty(0)).device)
        return self

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        # ddp_spawn pickles the network for its processes, which torch's modules of programs refuse.
        buffer = io.BytesIO()
        torch.export.save(self._program, buffer)
        return _from_bytes, (buffer.getvalue(),)


def _from_bytes(content: bytes) -> ExportedNetwork:
    return ExportedNetwork(torch.export.load(io.BytesIO(content)))


def _range(program: ExportedProgram, size: Any) -> tuple[int, int]:
    """The smallest and the largest number of patches in a batch."""
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return 1, 2**31
    # torch writes 2 as the smallest where it does not know, and does not check it.
    least = int(limits.lower)
    return 1 if least <= 2 else least, int(limits.upper) if limits.upper.is_Integer else 2**31


def _move_constants(module: nn.Module, device: torch.device) -> None:
    """Have the program make its own tensors on the device where it runs, not where it was exported."""
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        elsewhere = [node for node in part.graph.nodes if node.kwargs.get("device") not in (None, device)]
        for node in elsewhere:
            node.kwargs = {**node.kwargs, "device": device}
        if elsewhere:
            part.recompile()
