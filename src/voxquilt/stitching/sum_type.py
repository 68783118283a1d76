"""Chooses the types in which patches are accumulated and finished planes are handed over."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from voxquilt.errors import BatchError
from voxquilt.stitching.blend import Blend


@dataclass(frozen=True)
class SumType:
    """The types that patches of one type are accumulated in.

    Args:
        sums: Type in which sums are kept.
        output: Type of finished planes.
        rounds: Whether means that differ from an integer only by rounding errors become that integer, so that where all
            integer patches agree on a voxel, their mean is exact.
        wanted: The type of sums that the user chose, for any patches.
    """

    sums: torch.dtype
    output: torch.dtype
    rounds: bool
    wanted: torch.dtype | None = None

    @classmethod
    def of_patches(
        cls, patches: torch.dtype, blend: Blend, wanted: torch.dtype | None, fill: float | Sequence[float] | None
    ) -> "SumType":
        """The types for patches of a type.

        Args:
            patches: Type of the patches.
            blend: The weights of patches.
            wanted: Type in which sums are kept; None is float32, or float64 for patches of float64 or integers, or the
                patches' own where each voxel is copied from one of them.
            fill: Values of voxels that no patch covers; None where there are no such voxels.

        Raises:
            BatchError: (a ValueError) complex numbers.
        """
        if patches.is_complex:
            raise BatchError(f"patches are {patches}; complex numbers cannot be quilted; use two channels.")
        if not blend.averages:
            kept = wanted or _type_for_fill(patches, fill)
            return cls(kept, kept, rounds=False, wanted=wanted)
        integers = not patches.is_floating_point
        # Rounding errors of float32 sums of integers from about 2^20 on are larger than their differences.
        sums = wanted or (torch.float64 if patches == torch.float64 or integers else torch.float32)
        # Nobody expects a mask to become a file of float64.
        output = torch.float32 if integers and wanted is None else sums
        return cls(sums, output, rounds=integers and sums in (torch.float32, torch.float64), wanted=wanted)


def _type_for_fill(dtype: torch.dtype, fill: float | Sequence[float] | None) -> torch.dtype:
    """The patches' type if it holds the fill, else a floating-point type that holds every integer of the patches."""
    fills = fill if isinstance(fill, Sequence) else [] if fill is None else [fill]
    if dtype.is_floating_point or all(_holds(dtype, value) for value in fills):
        return dtype
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether an integer or bool type can hold the value."""
    limits = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return float(value).is_integer() and limits[0] <= value <= limits[1]
