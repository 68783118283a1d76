"""What does the network see of a subject? Its images in model space, with their intensities changed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from voxquilt.data.subject import Image, LabelMap, ScalarImage, Subject
from voxquilt.errors import InputError
from voxquilt.geometry.frame import parse_axcodes, to_spacing
from voxquilt.geometry.resample import resample
from voxquilt.geometry.space import Space, inverse, make_space
from voxquilt.vocabulary import NONFINITE, check_name

Transform = Callable[[Tensor], Tensor]


class Prepared(NamedTuple):
    """A subject in model space, and the way back."""

    subject: Subject
    space: Space


@dataclass(frozen=True)
class Preprocess:
    """Takes subjects to model space.

    Args:
        orientation: Axis codes such as 'RAS'; None keeps the file's axes.
        spacing: mm, one number or three along the model's axes, None where the file's are kept. Images are interpolated
            linearly, label maps by nearest neighbour.
        intensity: Callables on a (C, I, J, K) float32 tensor, applied in turn to each image by itself; or a mapping
            from image name to such a list. MONAI's array transforms are such callables.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.

    Raises:
        ConfigError: one of these is wrong.
    """

    orientation: str | None = "RAS"
    spacing: float | Iterable[float | None] | None = None
    intensity: Sequence[Transform] | Mapping[str, Sequence[Transform]] | None = None
    nonfinite: str = "error"

    def __post_init__(self) -> None:
        if self.orientation is not None:
            parse_axcodes(self.orientation)
        object.__setattr__(self, "spacing", to_spacing(self.spacing))
        check_name(self.nonfinite, NONFINITE, "nonfinite")

    def space(self, subject: Subject) -> Space:
        """The mapping between a subject's native frame and model space; reads headers only.

        Raises:
            InputError: images on different grids.
        """
        return make_space(subject.frame, self.orientation, self.spacing)

    def __call__(self, subject: Subject) -> Prepared:
        """Read a subject and take it to model space; the subject itself keeps nothing.

        Raises:
            InputError: a file that cannot be read, images on different grids, or voxels that are not finite.
            ConfigError: `intensity` names an image that the subject does not have.
        """
        space = self.space(subject)
        for name in self.intensity if isinstance(self.intensity, Mapping) else ():
            check_name(name, subject.images, "a name in preprocess.intensity")
        maps = inverse(space.maps, space.model.shape)
        images: dict[str, Image] = {}
        for name, image in subject.images.items():
            stored = self._finite(image.stored(), f"image {name!r} ({image.path or 'a tensor'})")
            if isinstance(image, LabelMap):
                images[name] = LabelMap(tensor=resample(stored, maps, linear=False), affine=space.model.affine)
                continue
            data = self._transformed(name, resample(stored, maps).contiguous())
            images[name] = ScalarImage(tensor=data, affine=space.model.affine)
        return Prepared(Subject(dict(images)), space)

    def _finite(self, data: Tensor, what: str) -> Tensor:
        if _all_finite(data):
            return data
        # In float32, as the network sees them: what float64 can hold may be too large.
        bad = ~data.float().isfinite()
        count = int(bad.sum())
        large = int(data[bad].isfinite().sum())
        if count and self.nonfinite == "error":
            which = f"NaN or infinite{f', or too large for float32 ({large} of them)' if large else ''}"
            raise InputError(f"{what} has {count} voxels that are {which}; set data.nonfinite=zero to read them as 0.")
        return data.masked_fill(bad, 0) if count else data

    def _transformed(self, name: str, data: Tensor) -> Tensor:
        transforms = self.intensity.get(name, ()) if isinstance(self.intensity, Mapping) else self.intensity
        if not transforms:
            return data  # in the file's type, which is small; patches become float32 when they are cut
        # A copy in any case: transforms may work in place, and the subject's tensor is the caller's.
        data = data.to(torch.float32, copy=True)
        for transform in transforms:
            # MONAI returns its MetaTensor, numpy functions an array.
            new = torch.as_tensor(transform(data)).as_subclass(Tensor)
            if new.shape[1:] != data.shape[1:]:
                raise InputError(
                    f"intensity transform {transform!r} turned image {name!r} from shape {tuple(data.shape)} into "
                    f"{tuple(new.shape)}; transforms may not change the grid."
                )
            data = new.float()
            if not _all_finite(data):
                bad = int((~data.isfinite()).sum())
                raise InputError(
                    f"intensity transform {transform!r} made {bad} voxels of image {name!r} NaN or infinite, out of "
                    f"finite ones. Is the image constant, or 0 where it takes a logarithm?"
                )
        return data


def _all_finite(data: Tensor) -> bool:
    """Whether all voxels are, in float32, as far as can be told without looking at each."""
    if not data.is_floating_point():
        return True
    if data.dtype == torch.float64:
        least, most = data.aminmax()  # NaN if one is
        return bool(torch.stack([least, most]).float().isfinite().all())
    # The sum is finite if all are, and needs no memory; if it is not, look closer (sums can overflow).
    return bool(data.sum(dtype=torch.float64).isfinite())
