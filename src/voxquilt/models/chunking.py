"""Runs batches through a network that takes only certain sizes: checks them, and divides batches into chunks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils._pytree import tree_map

from voxquilt.errors import OutputError


def in_chunks(
    run: Callable[[Tensor], Any],
    patches: Shaped[Tensor, "b ..."],
    *,
    most: int,
    least: int | None = None,
    copies: bool = False,
) -> Any:
    """The outputs of a network for a batch, run on at most `most` and at least `least` patches at a time.

    A chunk that is too small is filled up with copies of its last patch, whose outputs are dropped.

    Args:
        run: The network: a batch to a tensor, or to several in tuples, lists or dicts, each with the batch first.
        patches: At least one patch.
        most: The largest number of patches that the network takes.
        least: The smallest; without it no copies are added.
        copies: Whether the outputs of a chunk must be copied, since those of the next one overwrite them.
    """
    chunks = patches.split(most)
    # What is not a tensor, or not of the batch's size, is left for the check of the outputs.
    if len(chunks) == 1:
        return _run_filled(run, chunks[0], least or 0)
    outputs = [tree_map(partial(_kept, copy=copies), _run_filled(run, chunk, least or 0)) for chunk in chunks]
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)


def check_sizes(what: str, wanted: Sequence[int | None], sizes: Sequence[int]) -> None:
    """Raises OutputError of a batch that an exported network cannot take, whatever the number of its patches.

    Args:
        what: The network, for the message.
        wanted: Sizes of its input, (B, C, I, J, K); None where any size will do.
        sizes: Sizes of the batch.
    """
    if len(wanted) == len(sizes) and all(a in (None, b) for a, b in zip(wanted[1:], sizes[1:], strict=True)):
        return
    shown = " x ".join("any" if size is None else str(size) for size in wanted[1:])
    advice = "Set data.patch_size, or export it with dynamic shapes."
    if len(wanted) != len(sizes):
        advice = f"Set model.squeeze_axis{'=null' if len(wanted) > len(sizes) else ', since it is a 2-D network'}."
    given = " x ".join(map(str, sizes[1:]))
    raise OutputError(f"{what} was exported for inputs of {shown} (channels first); these are {given}. {advice}")


def _run_filled(run: Callable[[Tensor], Any], chunk: Tensor, least: int) -> Any:
    if len(chunk) >= least:
        return run(chunk)
    full = torch.cat([chunk, chunk[-1:].expand(least - len(chunk), *chunk.shape[1:])])
    return tree_map(partial(_drop_copies, count=len(chunk), filled=least), run(full))


def _kept(output: Any, copy: bool) -> Any:
    return output.clone() if copy and isinstance(output, Tensor) else output


def _drop_copies(output: Any, count: int, filled: int) -> Any:
    return output[:count] if isinstance(output, Tensor) and output.ndim > 0 and len(output) == filled else output
