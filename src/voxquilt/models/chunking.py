"""How does a batch of any size go through a network that takes only some? In chunks, the last one padded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils._pytree import tree_map


def in_chunks(
    run: Callable[[Tensor], Any], patches: Shaped[Tensor, "b ..."], *, most: int, least: int | None = None
) -> Any:
    """What a network gives for a batch, run on at most `most` and at least `least` patches at a time.

    A chunk that is too small is filled up with copies of its last patch, whose outputs are dropped.

    Args:
        run: The network: a batch to a tensor, or to several in tuples, lists or dicts, each with the batch first.
        patches: One at least.
        most, least: Patches; without `least` none are added.
    """
    chunks = patches.split(most)
    # What is no tensor, or none of the batch, is left for whoever checks outputs.
    made = [_run(run, chunk, least or 0) for chunk in chunks]
    if len(made) == 1:
        return made[0]
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *made)


def _run(run: Callable[[Tensor], Any], chunk: Tensor, least: int) -> Any:
    if len(chunk) >= least:
        return run(chunk)
    full = torch.cat([chunk, chunk[-1:].expand(least - len(chunk), *chunk.shape[1:])])
    return tree_map(partial(_cut, count=len(chunk), of=least), run(full))


def _cut(output: Any, count: int, of: int) -> Any:
    return output[:count] if isinstance(output, Tensor) and output.ndim > 0 and len(output) == of else output
