"""Makes the normalisations that a model folder names."""

from collections.abc import Callable
from dataclasses import astuple

from torch import Tensor

from voxquilt.data.normalisation import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from voxquilt.models.nnunet.plans import Normalisation


def make_normalisation(given: Normalisation) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The callable for one channel; its attribute `uses_inside` says whether it needs the mask of voxels inside."""
    if given.intensities is not None:
        return CTNormalization(*astuple(given.intensities))
    if given.scheme == ZScoreNormalization.__name__:
        return ZScoreNormalization(given.use_mask)
    others = (NoNormalization, RescaleTo01Normalization, RGBTo01Normalization)
    return {cls.__name__: cls for cls in others}[given.scheme]()
