"""Brings subjects to the device that predicts them, and leaves them on the host where its memory is too small."""

import logging
from collections.abc import Callable
from threading import Lock
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from voxquilt.data.copy_stream import CopyStream
from voxquilt.data.patch_source import PatchSource
from voxquilt.data.staging import Staging
from voxquilt.errors import InputError, VoxquiltError

log = logging.getLogger("voxquilt")

T = TypeVar("T")

_WAYS = "scale them by preprocess.intensity, or set trainer.precision=bf16-true"
BEYOND_HALF = f"voxels beyond 65504 are infinite in float16: {_WAYS}."
"""What is wrong with voxels that float16 does not hold."""


class DeviceFeed:
    """Knows which subjects are on the device, and what cannot be done there; safe to call from several threads.

    Args:
        stream: The device and the stream on which subjects come to it.
        takes_volumes: Whether volumes are to lie on the device; else only batches come to it.
        channels_last: Whether batches are channels last in memory there.
        precision: The trainer's, such as '16-true', for which large voxels are refused.
    """

    def __init__(
        self, stream: CopyStream, *, takes_volumes: bool = True, channels_last: bool = False, precision: str = "32-true"
    ) -> None:
        self.stream, self.channels_last = stream, channels_last
        self._is_half = precision == "16-true"
        self.takes_volumes = takes_volumes
        """Whether volumes come to the device: False from the time at which it is full."""
        self._staging = Staging(stream) if takes_volumes else None
        self._sources: WeakSet[PatchSource] = WeakSet()
        self._on_host: set[int] = set()
        self._noted: set[str] = set()
        self._lock = Lock()

    def upload(self, voxels: Tensor) -> Tensor:
        """A copy of voxels on the device, in this thread's current stream.

        Raises:
            torch.OutOfMemoryError: the device has too little memory.
        """
        assert self._staging is not None, "only within try_on_device"
        return self._staging.upload(voxels)

    def try_on_device(self, load: Callable[[], T]) -> T | None:
        """What `load` returns, which runs on the feed's stream; None where it has to run on the host instead.

        Raises:
            VoxquiltError: the subject cannot be used, wherever it is loaded.
        """
        if not self.takes_volumes:
            return None
        try:
            with self.stream.active():
                return load()
        except VoxquiltError:
            raise
        except torch.OutOfMemoryError:
            self._note("the device's memory is too small for a subject's images: they are prepared on the host.")
        except Exception as error:  # what only the host can do; if it cannot either, that error is the subject's
            self._note(
                f"a subject's images cannot be prepared on the device ({type(error).__name__}: {error}): they are "
                f"prepared on the host."
            )
        return None

    def check_range(self, source: PatchSource) -> None:
        """Refuse voxels that the network's type cannot hold, here rather than batch by batch in the predict loop.

        Raises:
            InputError: such voxels.
        """
        with self.stream.active():
            if self._is_half and not all(map(_fits_half, source.volumes)):
                raise InputError(BEYOND_HALF)

    def keep(self, source: PatchSource) -> PatchSource:
        """Remember volumes on the device, so that they leave it when its memory is full."""
        with self._lock:
            if self.takes_volumes:
                self._sources.add(source)
                return source
        source.to_host()  # the memory was found to be full while they were loaded
        return source

    def to_host(self) -> bool:
        """Bring all volumes to the host, and leave those to come there; False if they are there already."""
        with self._lock:
            moved, self.takes_volumes = self.takes_volumes, False
            sources = list(self._sources)
            self._sources.clear()
        for source in sources:
            source.to_host()
        if moved:
            log.warning("the device's memory is too small: images are kept on the host from here on.")
        return moved

    def apply(self, transform: Callable[[Tensor], T], data: Tensor, again: Callable[[], Tensor]) -> T:
        """A transform's result for a tensor on the device, where it can be computed there, else of a copy on the host.

        Args:
            transform: The transform, which may change the tensor.
            data: The tensor.
            again: Computes the tensor again, since a transform that fails may have changed it.

        Raises:
            torch.OutOfMemoryError: the device has too little memory.
            Exception: what the transform raises on the host, too.
        """
        if id(transform) in self._on_host:
            return transform(data.cpu())
        try:
            return transform(data)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        result = transform(again().cpu())
        self._on_host.add(id(transform))
        self._note(f"preprocess.intensity: {transform!r} runs on the host, since it fails on the device ({reason}).")
        return result

    def _note(self, message: str) -> None:
        """Log a message once."""
        with self._lock:
            is_new = message not in self._noted
            self._noted.add(message)
        if is_new:
            log.warning("%s", message)


def _fits_half(volume: Tensor) -> bool:
    least, most = volume.aminmax()
    return bool(torch.stack([least, most]).half().isfinite().all())
