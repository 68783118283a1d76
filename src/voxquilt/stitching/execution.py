"""Chooses how patches are stitched on a device."""

from dataclasses import dataclass

import torch

from voxquilt.stitching.kernels.loading import kernels_run_on


@dataclass(frozen=True)
class Execution:
    """How sums and products are computed.

    Args:
        deferred: Whether nothing waits for the device before a subject is finished: products may stay there until then,
            and scores that are not finite are an error only then.
        kernels: Whether Triton kernels add patches and make labels, where they can.
    """

    deferred: bool = False
    kernels: bool = False


ON_HOST = Execution()


def execution_on(device: torch.device) -> Execution:
    """How sums and products are computed on a device."""
    return Execution(True, kernels_run_on(device)) if device.type == "cuda" else ON_HOST
