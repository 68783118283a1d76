"""Normalises intensities as nnU-Net does, and finds the voxels that it counts as inside.

Each normalisation takes a float32 (C, I, J, K) tensor on any device, which it does not change; channels are normalised
by themselves. After nnU-Net 2.8.1, preprocessing/normalization/default_normalization_schemes.py and
preprocessing/cropping/cropping.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped
from torch import Tensor

from voxquilt.errors import InputError

LEAST_SCALE = 1e-8
"""What is divided by, at least."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel, and the one after the last, along each axis."""


@dataclass(frozen=True)
class CTNormalization:
    """Cuts intensities off, and scales them by the mean and deviation of the training's foreground.

    >>> CTNormalization(lower=-100, upper=300, mean=100, std=50)(torch.tensor([-1000.0, 150]).view(1, 1, 1, 2))
    tensor([[[[-4.,  1.]]]])

    Args:
        lower: Lower values become this.
        upper: Higher values become this.
        mean: What is subtracted then.
        std: What is divided by then.
    """

    lower: float
    upper: float
    mean: float
    std: float

    uses_inside = False

    def __call__(
        self, data: Float32[Tensor, "c i j k"], inside: Bool[Tensor, "i j k"] | None = None
    ) -> Float32[Tensor, "c i j k"]:
        return _divide(data.clamp(self.lower, self.upper).sub_(self.mean), max(self.std, LEAST_SCALE))


@dataclass(frozen=True)
class ZScoreNormalization:
    """Subtracts each channel's mean, and divides by its standard deviation.

    Args:
        use_mask: Whether only voxels inside count and change; others keep their value, which is 0.
    """

    use_mask: bool = False

    @property
    def uses_inside(self) -> bool:
        """Whether calls need `inside`."""
        return self.use_mask

    def __call__(
        self, data: Float32[Tensor, "c i j k"], inside: Bool[Tensor, "i j k"] | None = None
    ) -> Float32[Tensor, "c i j k"]:
        """Normalise.

        Raises:
            InputError: `inside` is missing, but `use_mask` is set.
        """
        if not self.use_mask:
            return torch.stack([_standardised(channel) for channel in data])
        if inside is None:
            raise InputError("ZScoreNormalization(use_mask=True) needs the mask of voxels inside; see inside_mask.")
        result = data.clone()
        if inside.any():
            for channel in result:
                channel[inside] = _standardised(channel[inside])
        return result


@dataclass(frozen=True)
class RescaleTo01Normalization:
    """Takes each channel's minimum to 0 and its maximum to 1."""

    uses_inside = False

    def __call__(
        self, data: Float32[Tensor, "c i j k"], inside: Bool[Tensor, "i j k"] | None = None
    ) -> Float32[Tensor, "c i j k"]:
        result = data - data.amin((1, 2, 3), keepdim=True)
        return result.div_(result.amax((1, 2, 3), keepdim=True).clamp_(min=LEAST_SCALE))


@dataclass(frozen=True)
class RGBTo01Normalization:
    """Divides intensities from 0 to 255 by 255."""

    uses_inside = False

    def __call__(
        self, data: Float32[Tensor, "c i j k"], inside: Bool[Tensor, "i j k"] | None = None
    ) -> Float32[Tensor, "c i j k"]:
        """Normalise.

        Raises:
            InputError: intensities are outside of 0 to 255.
        """
        least, most = map(float, data.aminmax())
        if not 0 <= least <= most <= 255:
            raise InputError(f"RGBTo01Normalization wants intensities from 0 to 255; these are {least:g} to {most:g}.")
        return _divide(data.clone(), 255)


@dataclass(frozen=True)
class NoNormalization:
    """Leaves intensities as they are."""

    uses_inside = False

    def __call__(
        self, data: Float32[Tensor, "c i j k"], inside: Bool[Tensor, "i j k"] | None = None
    ) -> Float32[Tensor, "c i j k"]:
        return data


def inside_mask(channels: Sequence[Shaped[Tensor, "_ i j k"]]) -> tuple[Bool[Tensor, "i j k"], Box]:
    """Voxels at which a channel is not 0, holes filled, and the box around them.

    Where all is 0, no voxel is inside and the box is the whole volume. A NaN counts as not 0.

    Args:
        channels: Images on one grid, each with any number of channels.
    """
    mask = _nonzero(channels)
    box = _box(mask)
    crop = mask[_slices(box)]
    if not crop.all():
        crop.copy_(_without_holes(crop))
    return mask, box


def nonzero_box(channels: Sequence[Shaped[Tensor, "_ i j k"]]) -> Box:
    """The box of `inside_mask`, which filling holes does not change."""
    return _box(_nonzero(channels))


def _nonzero(channels: Sequence[Tensor]) -> Tensor:
    mask = torch.zeros(channels[0].shape[1:], dtype=torch.bool, device=channels[0].device)
    for image in channels:
        for channel in image:
            mask |= channel != 0
    return mask


def _box(mask: Tensor) -> Box:
    ranges: list[tuple[int, int]] = []
    for axis, size in enumerate(mask.shape):
        others = [other for other in range(mask.ndim) if other != axis]
        present = mask.any(others[0]).any(others[1] - 1).nonzero()
        ranges.append((int(present[0]), int(present[-1]) + 1) if len(present) else (0, size))
    i, j, k = ranges
    return i, j, k


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in box)


def _without_holes(mask: Tensor) -> Tensor:
    """What scipy.ndimage.binary_fill_holes makes of a mask that its box has been cut out of.

    Outside are the components of its background that touch a face of the box: beyond each face nothing is inside, or
    the volume ends. Labelling takes seconds where binary_fill_holes, which goes from voxel to voxel, takes minutes.
    """
    from scipy import ndimage  # takes long to import, and only some models need it

    components = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(~mask.cpu().numpy(), output=components)
    is_outside = np.zeros(components.max() + 1, dtype=bool)
    for axis in range(components.ndim):
        for end in (0, -1):
            is_outside[components.take(end, axis)] = True
    is_outside[0] = False  # the mask itself
    return torch.from_numpy(~is_outside[components]).to(mask.device)


def _standardised(values: Tensor) -> Tensor:
    mean, std = _mean_and_std(values)
    return values.sub(mean).div_(std.clamp(min=LEAST_SCALE))


def _mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, as 0-d tensors on the values' device.

    On the host they are NumPy's, as nnU-Net's are, so that they have the same last bit where voxels lie in the same
    order in memory. On other devices they differ from these by rounding, of 3e-7 of their size or less.
    """
    if values.device.type != "cpu":
        return accurate_mean_and_std(values)
    array = values.numpy()
    return torch.tensor(array.mean()), torch.tensor(array.std())


def accurate_mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, with sums in float64 and without a copy in it."""
    mean = (values.sum(dtype=torch.float64) / values.numel()).float()
    variance = (values - mean).square_().sum(dtype=torch.float64) / values.numel()
    return mean, variance.sqrt().float()


def _divide(data: Tensor, divisor: float) -> Tensor:
    # By a tensor on the device: by a number, CUDA multiplies with the reciprocal, which rounds twice.
    return data.div_(torch.full((), divisor, dtype=data.dtype, device=data.device))
