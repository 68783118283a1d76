"""Checks that scores are finite, without waiting for a device."""

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.stitching.device_transfer import Progress
from voxquilt.stitching.products.base import NOT_FINITE, Scores, check_finite


class FiniteCheck:
    """Refuses scores that are NaN or infinite: at once on the host; on a device only when a subject is finished.

    Args:
        device: The device.
        deferred: Whether nothing may wait for the device.
    """

    def __init__(self, device: torch.device, *, deferred: bool) -> None:
        self._deferred = deferred
        with torch.inference_mode(False):
            self.mark: Float32[Tensor, "1"] = torch.zeros(1, device=device)
            """0, or NaN once scores are not finite; kernels write it too."""

    def __call__(self, scores: Scores) -> None:
        """Check scores.

        Raises:
            OutputError: they are not finite, and the check is not deferred.
        """
        if not self._deferred:
            check_finite(scores)
            return
        # Sums of single precision cannot overflow in double precision; a product with 0 is NaN unless all are finite.
        total = (scores * 0).sum() if scores.dtype == torch.float64 else scores.sum(dtype=torch.float64) * 0
        self.mark += total

    def verify(self, progress: Progress) -> None:
        """Raises OutputError if scores were not finite in the work that is marked, which is waited for."""
        mark = np.zeros(1, dtype=np.float32)
        progress.download([self.mark], [mark])
        if np.isnan(mark[0]):
            raise OutputError(NOT_FINITE)

    def to_host(self) -> None:
        """Keep the mark on the host, for scores that come from there."""
        self.mark = self.mark.cpu()
