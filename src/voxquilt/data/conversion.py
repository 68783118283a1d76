"""Converts paths, arrays, tensors, MONAI's MetaTensors, and TorchIO's images and subjects to a Subject.

Other packages' classes are recognised by their attributes, so that none of these packages is imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from voxquilt.data.subject import AFFINE, DATA, LABEL, TYPE, Image, LabelMap, ScalarImage, Subject
from voxquilt.errors import InputError

SubjectLike = Subject | Image | Tensor | np.ndarray | str | Path | Mapping[str, Any]
"""What `to_subject` takes; TorchIO's Subject and Image are mappings."""


def to_subject(volume: SubjectLike) -> Subject:
    """Convert to a Subject; a single image gets the name 'image'.

    Args:
        volume: A Subject; an image, or the path of one; a (C, I, J, K) or (I, J, K) tensor or array, whose affine is
            its own (MONAI's MetaTensor) or the identity; TorchIO's Subject or Image; or images by name. Label maps stay
            label maps, and values that are not images are kept.

    Raises:
        InputError: anything else, or a tensor of another shape.
    """
    if isinstance(volume, Subject):
        return volume
    image = ScalarImage(volume) if isinstance(volume, str) else _to_image(volume)
    if image is not None:
        return Subject(image=image)
    if isinstance(volume, Mapping):
        # TorchIO's subjects know which of their values are images, so that tensors beside them are not.
        plain = not hasattr(volume, "get_images_dict")
        images = {name: _to_image(value, tensors=plain) for name, value in volume.items()}
        if any(images.values()):
            return Subject({str(name): images[name] or value for name, value in volume.items()})
    raise InputError(
        f"a volume is a Subject, an image, the path of one, a (C, I, J, K) tensor or array, TorchIO's Subject, or "
        f"images by name; this is {_kind_of(volume)}."
    )


def to_mask(mask: SubjectLike) -> LabelMap:
    """Convert a single image to a LabelMap.

    Raises:
        InputError: it is not an image, or has several images.
    """
    image, *others = to_subject(mask).images.values()
    if others:
        raise InputError(f"a mask is one image; this is {_kind_of(mask)}.")
    if isinstance(image, LabelMap):
        return image
    return LabelMap(tensor=image[DATA], affine=image.affine) if DATA in image else LabelMap(image.path)


def _to_image(value: Any, *, tensors: bool = True) -> Image | None:
    """An Image, or None if the value is not an image."""
    if isinstance(value, Image):
        return value
    if isinstance(value, Path):
        return ScalarImage(value)
    if isinstance(value, (Tensor, np.ndarray)):
        # A dictionary may hold other tensors beside images, such as a patch's location.
        return ScalarImage(tensor=value) if tensors and (value.ndim >= 3 or hasattr(value, "affine")) else None
    if isinstance(value, Mapping) and {DATA, AFFINE} <= value.keys():
        data, affine, kind = value[DATA], value[AFFINE], value.get(TYPE)
    elif hasattr(value, DATA) and hasattr(value, AFFINE):
        data, affine, kind = getattr(value, DATA), getattr(value, AFFINE), getattr(value, TYPE, None)
    else:
        return None
    return (LabelMap if kind == LABEL else ScalarImage)(tensor=data, affine=affine)


def _kind_of(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {list(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
