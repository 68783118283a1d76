"""Takes the images of a subject to model space and changes their intensities, as the network needs them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.normalisation import inside_mask
from voxquilt.data.subject import Image, LabelMap, ScalarImage, Subject
from voxquilt.errors import InputError
from voxquilt.geometry.axis_map import AxisMaps
from voxquilt.geometry.frame import parse_axcodes, to_axis_order, to_spacing
from voxquilt.geometry.label_resampling import resample_labels
from voxquilt.geometry.model_grids import GRIDS
from voxquilt.geometry.resample import resample, resample_image
from voxquilt.geometry.space import Box, Space, make_space
from voxquilt.vocabulary import (
    CROPS,
    DEVICES,
    HALF,
    NONFINITE,
    check_label_interpolation,
    check_name,
    check_order,
    check_per_slice,
)

Transform = Callable[..., Tensor]


class Prepared(NamedTuple):
    """A subject in model space, and the mapping back to native space."""

    subject: Subject
    space: Space


@dataclass(frozen=True)
class Preprocess:
    """Takes subjects to model space.

    Args:
        orientation: Axis codes such as 'RAS'; None keeps the file's axes.
        spacing: Voxel size in mm, one number or three along the model's axes; None keeps the file's. Label maps are
            interpolated by nearest neighbour.
        intensity: Callables on a (C, I, J, K) float32 tensor, applied in turn to each image separately; or a mapping
            from image names, or from the numbers 0, 1, ... of channels, to such lists. MONAI's array transforms are
            such callables. One that has a true attribute `uses_inside` is also given where the volume is inside: a
            (I, J, K) bool tensor, or None without `crop`.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.
        device: Where images are taken to model space and kept while patches are cut from them: 'auto' is the device of
            the network that predicts them, as far as its memory allows, and 'cpu' the host.
        transpose: The oriented axis (0, 1, 2) that each model axis is, such as (2, 1, 0); None keeps their order.
        grid: Where model voxels of another spacing lie; see `voxquilt.geometry.model_grids`.
        crop: 'nonzero' leaves out what is 0 in all images around the volume; predictions there are background.
        interpolation: Order by which images are interpolated: 0 takes the nearest voxel, 1 is linear, 3 a cubic spline
            whose values stay within the image's.
        per_slice: Where the largest voxel size is more than so many times the smallest, slices across that axis are
            interpolated each by itself, and the nearest is taken between them; True always does so, None never.
        intensity_first: Whether intensities are changed before images are resampled, or after.
        one_hot: Images that are label maps, such as an earlier stage's: a channel for each of the labels that are given
            by the image's name, 1 where a voxel has it.
        one_hot_interpolation: How these are resampled: 0, 1 or 'half'; see `voxquilt.geometry.label_resampling`.

    Raises:
        ConfigError: an argument is invalid.
    """

    orientation: str | None = "RAS"
    spacing: float | Iterable[float | None] | None = None
    intensity: Sequence[Transform] | Mapping[str | int, Sequence[Transform]] | None = None
    nonfinite: str = "error"
    device: str = "auto"
    transpose: Iterable[int] | None = None
    grid: str = "centre"
    crop: str | None = None
    interpolation: int = 1
    per_slice: float | bool | None = None
    intensity_first: bool = False
    one_hot: Mapping[str, Sequence[int]] | None = None
    one_hot_interpolation: int | str = 1

    def __post_init__(self) -> None:
        if self.orientation is not None:
            parse_axcodes(self.orientation)
        object.__setattr__(self, "spacing", to_spacing(self.spacing))
        object.__setattr__(self, "transpose", to_axis_order(self.transpose))
        GRIDS.check(self.grid, "preprocess.grid")
        check_name(self.nonfinite, NONFINITE, "nonfinite")
        check_name(self.device, DEVICES, "device")
        if self.crop is not None:
            check_name(self.crop, CROPS, "crop")
        if isinstance(self.intensity, Mapping):
            # JSON, as settings in ONNX files have it, knows no numbers as keys.
            by_name = {int(k) if str(k).isdecimal() and str(int(k)) == k else k: v for k, v in self.intensity.items()}
            object.__setattr__(self, "intensity", by_name)
        check_order(self.interpolation, "preprocess.interpolation")
        check_per_slice(self.per_slice, "preprocess.per_slice")
        check_label_interpolation(self.one_hot_interpolation, "preprocess.one_hot_interpolation")

    def space(self, subject: Subject, box: Box | None = None) -> Space:
        """The mapping between a subject's native frame and model space; reads headers only.

        Args:
            subject: The subject.
            box: The native voxels that model space covers; None for all, the most that `crop` may leave.

        Raises:
            InputError: images on different grids.
        """
        return make_space(
            subject.frame, self.orientation, self.spacing, grid=self.grid, transpose=self.transpose, box=box
        )

    def __call__(
        self,
        subject: Subject,
        feed: DeviceFeed | None = None,
        box: Box | None = None,
        labels: Collection[str] = (),
    ) -> Prepared:
        """Read a subject and take it to model space; the subject does not keep the voxels.

        Args:
            subject: The subject.
            feed: The device to do so on, in the thread's current stream; None for where the voxels are.
            box: The native voxels that model space may cover; None for all. `crop` is applied to these.
            labels: Names of label maps of which each label is interpolated linearly, by `resample_labels`, and which
                do not decide what `crop` leaves; others take the nearest voxel.

        Raises:
            InputError: a file that cannot be read, images on different grids, or voxels that are not finite.
            ConfigError: `intensity` names an image that the subject does not have.
            torch.OutOfMemoryError: the device has too little memory.
        """
        _ = subject.frame  # that of all images, before any is read
        self._check_names(subject)
        stored = self._stored(subject)
        inside = None
        if stored:
            box, inside = self._cropped({name: stored[name] for name in stored if name not in labels}, box)
            # Which takes a quarter of the memory of a float32 image.
            inside = inside if labels or self._uses_inside() else None
        space = self.space(subject, box)
        if feed is not None and inside is not None:
            inside = feed.upload(inside)
        maps = space.to_model(self.interpolation, self.per_slice)
        images: dict[str, Image] = {}
        channels = 0
        for name, image in subject.images.items():
            voxels = stored.pop(name) if stored else image.stored()
            voxels = voxels[:, *space.where]
            voxels = voxels if feed is None else feed.upload(voxels)
            voxels = self._without_nonfinite(voxels, f"image {name!r} ({image.path or 'a tensor'})")
            if self.one_hot is not None and name in self.one_hot:
                to_model = space.to_model(0 if self.one_hot_interpolation == 0 else 1, self.per_slice)
                voxels = _one_hot(voxels, self.one_hot[name], inside, to_model, half=self.one_hot_interpolation == HALF)
                images[name] = ScalarImage(tensor=voxels, affine=space.model.affine)
                continue
            if name in labels:
                voxels = _resampled_labels(voxels, inside, space.to_model(1, self.per_slice))
                images[name] = LabelMap(tensor=voxels.clamp(min=0), affine=space.model.affine)
                continue
            if isinstance(image, LabelMap):
                images[name] = LabelMap(tensor=resample(voxels, maps, linear=False), affine=space.model.affine)
                continue
            change = partial(self._transformed, name, range(channels, channels + len(voxels)), inside, feed)
            channels += len(voxels)
            if self.intensity_first:
                data = resample_image(change(voxels), maps).contiguous()
            else:
                data = change(resample_image(voxels, maps).contiguous())
            images[name] = ScalarImage(tensor=data, affine=space.model.affine)
        return Prepared(Subject(dict(images)), space)

    def box(self, subject: Subject, box: Box | None = None) -> Box | None:
        """The native voxels that `crop` leaves of a box, for which the images are read; None for all.

        Raises:
            InputError: a file that cannot be read.
        """
        stored = self._stored(subject)
        return self._cropped(stored, box)[0] if stored else box

    def _stored(self, subject: Subject) -> dict[str, Tensor]:
        """The voxels of all images, if what `crop` leaves depends on them."""
        return {name: image.stored() for name, image in subject.images.items()} if self.crop else {}

    def _cropped(self, stored: Mapping[str, Tensor], within: Box | None) -> tuple[Box, Tensor]:
        """What `crop` leaves of a box: a smaller one, and where the volume is inside."""
        images = [voxels for name, voxels in stored.items() if name not in (self.one_hot or {})]
        if within is not None:
            images = [voxels[:, *(slice(*ends) for ends in within)] for voxels in images]
        inside, box = inside_mask(images)
        inside = inside[tuple(slice(*ends) for ends in box)]
        starts = [0, 0, 0] if within is None else [first for first, _ in within]
        i, j, k = ((first + start, stop + start) for (first, stop), start in zip(box, starts, strict=True))
        return (i, j, k), inside

    def _uses_inside(self) -> bool:
        """Whether anything depends on where the volume is inside."""
        lists = self.intensity.values() if isinstance(self.intensity, Mapping) else [self.intensity or ()]
        return bool(self.one_hot) or any(getattr(t, "uses_inside", False) for transforms in lists for t in transforms)

    def _check_names(self, subject: Subject) -> None:
        """Refuse intensities of images that the subject does not have."""
        for name in self.intensity if isinstance(self.intensity, Mapping) else ():
            if not isinstance(name, int):
                check_name(name, subject.images, "a name in preprocess.intensity")

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

    def _transformed(
        self, name: str, channels: range, inside: Tensor | None, feed: DeviceFeed | None, data: Tensor
    ) -> Tensor:
        """An image whose intensities are changed; `channels` are the numbers of its channels in the network's input."""
        if not isinstance(self.intensity, Mapping) or name in self.intensity:
            transforms = self.intensity[name] if isinstance(self.intensity, Mapping) else self.intensity
            # Without any it stays in the file's type, which takes little memory; patches become float32 when they are
            # cut.
            return _apply(transforms, name, data, inside, feed) if transforms else data
        parts = [self.intensity.get(channel, ()) for channel in channels]
        if not any(parts):
            return data
        each = zip(parts, data.split(1), strict=True)
        changed = [_apply(transforms, name, part, inside, feed) for transforms, part in each]
        return torch.cat(changed) if len(changed) > 1 else changed[0]


def _apply(
    transforms: Sequence[Transform], name: str, source: Tensor, inside: Tensor | None, feed: DeviceFeed | None
) -> Tensor:
    # Always a copy: transforms may work in place, and the subject's tensor belongs to the caller.
    data = source.to(torch.float32, copy=True)
    for n, transform in enumerate(transforms):
        if getattr(transform, "uses_inside", False):
            result = transform(data, inside)  # type: ignore[call-arg]
        elif feed is None:
            result = transform(data)
        else:
            result = feed.apply(transform, data, lambda n=n: _apply(transforms[:n], name, source, inside, feed))
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


def _one_hot(voxels: Tensor, labels: Sequence[int], inside: Tensor | None, maps: AxisMaps, *, half: bool) -> Tensor:
    """A channel for each label, in model space."""
    found = _resampled_labels(voxels[:1], inside, maps, half=half)
    return torch.cat([found == label for label in labels]).float().to(voxels.device)


def _resampled_labels(voxels: Tensor, inside: Tensor | None, maps: AxisMaps, *, half: bool = False) -> Tensor:
    """Labels in model space; outside of a cropped volume 0 is a label of its own, -1, as in nnU-Net."""
    found = voxels.cpu().to(torch.int64)
    if inside is not None:
        found = found.masked_fill((found == 0) & ~inside.cpu(), -1)
    return resample_labels(found, maps, half=half)


def _all_finite(data: Tensor) -> bool:
    """Whether all voxels are finite in float32."""
    if not data.is_floating_point():
        return True
    # Ends are NaN if a voxel is. Of each by itself torch makes no copy, as it does of both, and of sums in float64.
    ends = torch.stack([torch.amin(data), torch.amax(data)])
    return bool(ends.float().isfinite().all())
