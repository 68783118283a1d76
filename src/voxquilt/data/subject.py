"""Provides subjects: co-registered images by name, which are read when they are used."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from voxquilt.data.image import AFFINE, DATA, INTENSITY, LABEL, PATH, STEM, TYPE, Image, LabelMap, ScalarImage
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Frame, Triple

__all__ = [
    "AFFINE", "CHANNELS_DIMENSION", "DATA", "INTENSITY", "LABEL", "LOCATION", "PATH", "STEM", "TYPE",
    "Image", "LabelMap", "ScalarImage", "Subject",
]  # fmt: skip

LOCATION = "location"
CHANNELS_DIMENSION = 1
"""The channel axis of a batch (B, C, I, J, K)."""


class Subject(dict[str, Any]):
    """Images that share one frame, and any other values: `Subject(t1=ScalarImage('t1.nii.gz'), age=42)`.

    `subject['t1']` is also `subject.t1`, unless dictionaries or subjects have an attribute of that name.

    Raises:
        InputError: there is no image among the values.
    """

    def __init__(self, mapping: Mapping[str, Any] | None = None, /, **values: Any) -> None:
        super().__init__({**(mapping or {}), **values})
        if not self.images:
            raise InputError("a Subject needs at least one image, such as t1=ScalarImage('t1.nii.gz').")

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"a Subject has no attribute and no key {name!r}; its keys are {list(self)}")

    @property
    def images(self) -> dict[str, Image]:
        """The images by name."""
        return {name: value for name, value in self.items() if isinstance(value, Image)}

    def get_images_dict(self, intensity_only: bool = True) -> dict[str, Image]:
        """The images by name; with `intensity_only`, without label maps."""
        return {n: image for n, image in self.images.items() if not (intensity_only and isinstance(image, LabelMap))}

    def get_images(self, intensity_only: bool = True) -> list[Image]:
        """The images; with `intensity_only`, without label maps."""
        return list(self.get_images_dict(intensity_only).values())

    def get_images_names(self) -> list[str]:
        """The names of all images."""
        return list(self.images)

    def get_first_image(self) -> Image:
        """The first image."""
        return next(iter(self.images.values()))

    def add_image(self, image: Image, image_name: str) -> None:
        """Add an image, such as a prediction."""
        self[image_name] = image

    def load(self) -> None:
        """Read all images, and keep them."""
        for image in self.images.values():
            image.load()

    @property
    def frame(self) -> Frame:
        """The frame that all images share.

        Raises:
            InputError: two images differ in shape or affine; both are named.
        """
        (first, reference), *others = self.images.items()
        for name, image in others:
            if not reference.frame.matches(image.frame):
                affine = (
                    reference.spatial_shape == image.spatial_shape
                )  # with different shapes, affines are not of interest
                raise InputError(
                    f"images {first!r} and {name!r} of one subject lie on different grids: "
                    f"{_geometry_text(reference, affine=affine)}; {_geometry_text(image, affine=affine)}. "
                    f"Resample one onto the other."
                )
        return reference.frame

    @property
    def spatial_shape(self) -> Triple:
        """(I, J, K), which all images share."""
        return self.frame.shape

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K) of the first image."""
        return (self.get_first_image().shape[0], *self.frame.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along i, j, k in mm, which all images share."""
        return self.frame.spacing

    def __repr__(self) -> str:
        return f"{type(self).__name__}(Keys: {tuple(self.keys())}; images: {len(self.images)})"


def _geometry_text(image: Image, *, affine: bool) -> str:
    spacing = ", ".join(f"{mm:.5g}" for mm in image.spacing)
    rows = f", affine {np.round(image.affine[:3], 4).tolist()}" if affine else ""
    return f"{image.path or 'a tensor'} has shape {image.spatial_shape}, spacing ({spacing}) mm{rows}"
