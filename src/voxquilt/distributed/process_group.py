"""What do the processes of a run agree on, and how do tensors get from one to another? By torch.distributed."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from voxquilt.errors import RunError, VoxquiltError

T = TypeVar("T")

# Messages of a process that may be under way: each holds its tensors until the other side has taken them.
_UNDER_WAY = 6


class Group:
    """The processes of a trainer, with a gloo group of their own.

    Of their own, since the trainer's may be NCCL: it would have objects and sums of the host pass through the GPU, end
    the process when a subject takes longer than its timeout, and keep part of a GPU busy with every waiting send.

    Args:
        trainer: Whose process group, if there is one, has been set up; every process makes a Group at the same point.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self.rank = trainer.global_rank if trainer else 0
        self.size = trainer.world_size if trainer else 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.size > 1 else None
        self._sent: list[tuple[list[Any], list[Tensor]]] = []
        self._lock = threading.Lock()

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, in every process; an error of ours is raised in every process too."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except VoxquiltError as error:
                outcome[1] = error
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank, in every process."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, to: int, tag: int, header: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Give tensors on the host to another rank, which calls `receive` with the same tag.

        Returns before they have been taken, unless several others are under way.
        """
        packed = [tensor.contiguous() for tensor in tensors]
        content = {**header, "tensors": [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in packed]}
        text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        parts = [torch.tensor([len(text)]), text, *(t.reshape(-1).view(torch.uint8) for t in packed if t.numel())]
        with self._lock:
            while len(self._sent) >= _UNDER_WAY:
                with _of_the_living():
                    for work in self._sent[0][0]:
                        work.wait()
                del self._sent[0]
            with _of_the_living():
                self._sent.append(([dist.isend(part, to, self._group, tag) for part in parts], parts))

    def receive(self, source: int, tag: int) -> tuple[dict[str, Any], list[Tensor]]:
        """The header and the tensors that a rank sends with this tag; waits for them.

        Raises:
            RunError: the other process died.
        """
        tensors = []
        with torch.inference_mode(False), _of_the_living():
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, source, self._group, tag)
            text = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(text, source, self._group, tag)
            header = json.loads(text.numpy().tobytes())
            for dtype, shape in header.pop("tensors"):
                tensors.append(torch.empty(shape, dtype=getattr(torch, dtype)))
                if tensors[-1].numel():
                    dist.recv(tensors[-1].view(-1).view(torch.uint8), source, self._group, tag)
        return header, tensors


@contextlib.contextmanager
def _of_the_living() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, which has no kind of its own
        raise RunError(f"another process of the run died: {str(error).splitlines()[0]}") from error
