"""Makes a Subject of what users have: paths, arrays, tensors, MONAI's MetaTensors, TorchIO's images and subjects.

Other packages' classes are known by what they have, so that none of these packages is imported.
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
    """A Subject; of a single image, it is called 'image'.

    Args:
        volume: A Subject; an image, or the path of one; a (C, I, J, K) or (I, J, K) tensor or array, whose affine is
            its own (MONAI's MetaTensor) or else the identity; TorchIO's Subject or Image; or images by name. Label maps
            stay label maps, and what is no image is kept as it is.

    Raises:
        InputError: anything else, or a tensor of another shape.
    """
    if isinstance(volume, Subject):
        return volume
    image = ScalarImage(volume) if isinstance(volume, str) else _to_image(volume)
    if image is not None:
        return Subject(image=image)
    if isinstance(volume, Mapping):
        # TorchIO's subjects say themselves which of their values are images.
        plain = not hasattr(volume, "get_images_dict")
        images = {name: _to_image(value, tensors=plain) for name, value in volume.items()}
        if any(images.values()):
            return Subject({str(name): images[name] or value for name, value in volume.items()})
    raise InputError(
        f"wanted is a Subject, an image, the path of one, a (C, I, J, K) tensor or array, TorchIO's Subject, or images "
        f"by name; this is {_described(volume)}."
    )


def to_mask(mask: SubjectLike) -> LabelMap:
    """A LabelMap of whatever a single image can be made of.

    Raises:
        InputError: it is none, or has several images.
    """
    image, *others = to_subject(mask).images.values()
    if others:
        raise InputError(f"a mask is one image; this is {_described(mask)}.")
    if isinstance(image, LabelMap):
        return image
    return LabelMap(tensor=image[DATA], affine=image.affine) if DATA in image else LabelMap(image.path)


def _to_image(value: Any, *, tensors: bool = True) -> Image | None:
    """An Image, or None of what is none."""
    if isinstance(value, Image):
        return value
    if isinstance(value, Path):
        return ScalarImage(value)
    if isinstance(value, (Tensor, np.ndarray)):
        # In a dictionary other tensors may stand beside images, such as a patch's location.
        return ScalarImage(tensor=value) if tensors and (value.ndim >= 3 or hasattr(value, "affine")) else None
    if isinstance(value, Mapping) and {DATA, AFFINE} <= value.keys():
        found = value[DATA], value[AFFINE], value.get(TYPE)
    elif hasattr(value, DATA) and hasattr(value, AFFINE):
        found = getattr(value, DATA), getattr(value, AFFINE), getattr(value, TYPE, None)
    else:
        return None
    data, affine, kind = found
    return (LabelMap if kind == LABEL else ScalarImage)(tensor=data, affine=affine)


def _described(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {list(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
