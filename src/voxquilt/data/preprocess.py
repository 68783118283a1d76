"""Takes the images of a subject to model space and changes their intensities, as the network needs them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.subject import Image, LabelMap, ScalarImage, Subject
from voxquilt.errors import InputError
from voxquilt.geometry.frame import parse_axcodes, to_spacing
from voxquilt.geometry.resample import resample
from voxquilt.geometry.space import Space, inverse, make_space
from voxquilt.vocabulary import DEVICES, NONFINITE, check_name

Transform = Callable[[Tensor], Tensor]


class Prepared(NamedTuple):
    """A subject in model space, and the mapping back to native space."""

    subject: Subject
    space: Space


@dataclass(frozen=True)
class Preprocess:
    """Takes subjects to model space.

    Args:
        orientation: Axis codes such as 'RAS'; None keeps the file's axes.
        spacing: Voxel size in mm, one number or three along the model's axes; None keeps the file's. Images are
            interpolated linearly, label maps by nearest neighbour.
        intensity: Callables on a (C, I, J, K) float32 tensor, applied in turn to each image separately; or a mapping
            from image names to such lists. MONAI's array transforms are such callables.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.
        device: Where images are taken to model space and kept while patches are cut from them: 'auto' is the device of
            the network that predicts them, as far as its memory allows, and 'cpu' the host.

    Raises:
        ConfigError: an argument is invalid.
    """

    orientation: str | None = "RAS"
    spacing: float | Iterable[float | None] | None = None
    intensity: Sequence[Transform] | Mapping[str, Sequence[Transform]] | None = None
    nonfinite: str = "error"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.orientation is not None:
            parse_axcodes(self.orientation)
        object.__setattr__(self, "spacing", to_spacing(self.spacing))
        check_name(self.nonfinite, NONFINITE, "nonfinite")
        check_name(self.device, DEVICES, "device")

    def space(self, subject: Subject) -> Space:
        """The mapping between a subject's native frame and model space; reads headers only.

        Raises:
            InputError: images on different grids.
        """
        return make_space(subject.frame, self.orientation, self.spacing)

    def __call__(self, subject: Subject, feed: DeviceFeed | None = None) -> Prepared:
        """Read a subject and take it to model space; the subject does not keep the voxels.

        Args:
            subject: The subject.
            feed: The device to do so on, in the thread's current stream; None for where the voxels are.

        Raises:
            InputError: a file that cannot be read, images on different grids, or voxels that are not finite.
            ConfigError: `intensity` names an image that the subject does not have.
            torch.OutOfMemoryError: the device has too little memory.
        """
        space = self.space(subject)
        for name in self.intensity if isinstance(self.intensity, Mapping) else ():
            check_name(name, subject.images, "a name in preprocess.intensity")
        maps = inverse(space.maps, space.model.shape)
        images: dict[str, Image] = {}
        for name, image in subject.images.items():
            voxels = image.stored() if feed is None else feed.upload(image.stored())
            stored = self._without_nonfinite(voxels, f"image {name!r} ({image.path or 'a tensor'})")
            if isinstance(image, LabelMap):
                images[name] = LabelMap(tensor=resample(stored, maps, linear=False), affine=space.model.affine)
                continue
            data = self._transformed(name, resample(stored, maps).contiguous(), feed)
            images[name] = ScalarImage(tensor=data, affine=space.model.affine)
        return Prepared(Subject(dict(images)), space)

    def _without_nonfinite(self, data: Tensor, what: str) -> Tensor:
        if _all_finite(data):
            return data
        # In float32, which the network gets: values of float64 may be too large for it.
        bad = ~data.float().isfinite()
        count = int(bad.sum())
        large = int(data[bad].isfinite().sum())
        if count and self.nonfinite == "error":
            which = f"NaN or infinite{f', or too large for float32 ({large} of them)' if large else ''}"
            raise InputError(f"{what} has {count} voxels that are {which}; set data.nonfinite=zero to read them as 0.")
        return data.masked_fill(bad, 0) if count else data

    def _transformed(self, name: str, data: Tensor, feed: DeviceFeed | None) -> Tensor:
        transforms = self.intensity.get(name, ()) if isinstance(self.intensity, Mapping) else self.intensity
        if not transforms:
            return data  # in the file's type, which takes little memory; patches become float32 when they are cut
        return _apply(transforms, name, data, feed)


def _apply(transforms: Sequence[Transform], name: str, source: Tensor, feed: DeviceFeed | None) -> Tensor:
    # Always a copy: transforms may work in place, and the subject's tensor belongs to the caller.
    data = source.to(torch.float32, copy=True)
    for n, transform in enumerate(transforms):
        if feed is None:
            result = transform(data)
        else:
            result = feed.apply(transform, data, lambda n=n: _apply(transforms[:n], name, source, feed))
        # MONAI returns its MetaTensor, numpy functions an array.
        new = torch.as_tensor(result).as_subclass(Tensor)
        if new.shape[1:] != data.shape[1:]:
            raise InputError(
                f"intensity transform {transform!r} turned image {name!r} from shape {tuple(data.shape)} into "
                f"{tuple(new.shape)}; transforms may not change the grid."
            )
        data = new.to(data.device, torch.float32)
        if not _all_finite(data):
            bad = int((~data.isfinite()).sum())
            raise InputError(
                f"intensity transform {transform!r} turned {bad} finite voxels of image {name!r} into NaN or "
                f"infinity. Is the image constant, or 0 where the transform takes a logarithm?"
            )
    return data


def _all_finite(data: Tensor) -> bool:
    """Whether all voxels are finite in float32; False where a fast check is not certain."""
    if not data.is_floating_point():
        return True
    if data.dtype == torch.float64:
        least, most = data.aminmax()  # NaN if a voxel is
        return bool(torch.stack([least, most]).float().isfinite().all())
    # If the sum is finite, all voxels are. It needs no memory, but can overflow.
    return bool(data.sum(dtype=torch.float64).isfinite())
