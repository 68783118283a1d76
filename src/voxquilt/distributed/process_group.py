"""Exchanges objects and tensors between the processes of a run by torch.distributed."""

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

# Unreceived messages that a process may have sent: each holds its tensors until the receiver has taken them.
_PENDING = 6


class Group:
    """The processes of a trainer, with a gloo group of their own.

    The trainer's own group may be NCCL, which would pass objects and sums of the host through the GPU, end the process
    when a subject takes longer than its timeout, and keep part of a GPU busy with every waiting send.

    Args:
        trainer: Its process group, if it has one, has been set up; every process creates a Group at the same point.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self.rank = trainer.global_rank if trainer else 0
        self.size = trainer.world_size if trainer else 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.size > 1 else None
        self._sent: list[tuple[list[Any], list[Tensor]]] = []
        self._lock = threading.Lock()

    def first(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns on rank 0; a VoxquiltError is raised in every process, too."""
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
        """Return in every process the values of all processes, in the order of ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, to: int, tag: int, header: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send tensors on the host to another rank, which calls `receive` with the same tag.

        Returns before they have been received, unless too many messages are pending.
        """
        packed = [tensor.contiguous() for tensor in tensors]
        content = {**header, "tensors": [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in packed]}
        text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        parts = [torch.tensor([len(text)]), text, *(t.reshape(-1).view(torch.uint8) for t in packed if t.numel())]
        with self._lock:
            while len(self._sent) >= _PENDING:
                works, _ = self._sent.pop(0)
                # A message to a process that has died is lost, but others wait for this one.
                with contextlib.suppress(RuntimeError):
                    for work in works:
                        work.wait()
            with _dead_process_as_run_error():
                self._sent.append(([dist.isend(part, to, self._group, tag) for part in parts], parts))

    def receive(self, source: int, tag: int) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait for the header and the tensors that a rank sends with this tag.

        Raises:
            RunError: the other process has died.
        """
        tensors = []
        with torch.inference_mode(False), _dead_process_as_run_error():
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
def _dead_process_as_run_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no error class of its own
        raise RunError(f"another process of the run died: {str(error).splitlines()[0]}") from error
