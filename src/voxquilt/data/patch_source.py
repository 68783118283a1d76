"""Provides a subject's padded volumes in memory, of the host or of a device, from which its patches are cut."""

from collections.abc import Sequence

from jaxtyping import Shaped
from torch import Tensor

from voxquilt.data.copy_stream import CopyStream
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.grid import Grid


class PatchSource:
    """The volumes of a subject.

    Args:
        volumes: (C, I, J, K) of each image, with padding and halo.
        grid: Where the outputs of patches lie in the padded volume.
        patch_size: Voxels of a patch along i, j, k, with the halo, which lies before and behind its output.
        stream: The stream on which the volumes come to a device, as far as it has got; None for volumes on the host.
    """

    def __init__(
        self, volumes: Sequence[Shaped[Tensor, "_ i j k"]], grid: Grid, patch_size: Triple, stream: CopyStream | None
    ) -> None:
        self.volumes = list(volumes)
        self.patch_size = patch_size
        self.channels = sum(map(len, self.volumes))
        """Number of channels of all images."""
        self._grid, self._stream = grid, stream
        self._arrived = None if stream is None else stream.mark()

    @property
    def is_on_device(self) -> bool:
        """Whether the volumes are on the device that predicts them."""
        return self._stream is not None

    def fill(self, out: Shaped[Tensor, "c pi pj pk"], index: int) -> None:
        """Copy a patch of all images, concatenated along channels, into an existing tensor."""
        # The volume includes the halo, so that a patch begins at its output's location, and is longer.
        i, j, k = (slice(s, s + n) for s, n in zip(self._grid.location(index)[:3], self.patch_size, strict=True))
        channel = 0
        for volume in self.volumes:
            out[channel : channel + len(volume)].copy_(volume[:, i, j, k])
            channel += len(volume)

    def hand_over(self) -> None:
        """Let this thread's current stream use the volumes, once they have arrived."""
        if self._stream is not None and self._arrived is not None:
            self._arrived.order()
            self._stream.hold(self.volumes)

    def to_host(self) -> None:
        """Bring the volumes to the host."""
        self.hand_over()
        self.volumes = [volume.cpu() for volume in self.volumes]
        self._stream = self._arrived = None
