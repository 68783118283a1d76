"""Which patches hold nothing to predict? Those without foreground: above a threshold, or in a mask."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.subject import LabelMap, Subject
from voxquilt.geometry.resample import resample
from voxquilt.geometry.slab_split import Part
from voxquilt.geometry.space import Space, inverse


def empty_patches(sampler: GridSampler, foreground: Bool[Tensor, "i j k"]) -> list[int]:
    """Numbers of the patches in which no voxel is foreground.

    Args:
        sampler: Cuts the patches.
        foreground: Of its subject, without padding, which is never foreground.
    """
    around = [voxels for pair in reversed(sampler.padding) for voxels in pair]
    found = torch.nn.functional.pad(foreground, around)
    # A patch is a box, so whether it holds a voxel can be asked one axis after the other.
    for axis, (starts, size) in enumerate(zip(sampler.grid.starts, sampler.grid.patch_size, strict=True)):
        found = torch.stack([found.narrow(axis, start, size).any(axis) for start in starts], axis)
    return (~found.flatten()).nonzero().flatten().tolist()


def above(threshold: float, model_subject: Subject) -> Bool[Tensor, "i j k"]:
    """Where the first image is above a threshold, in model space and as the network sees it."""
    return (next(iter(model_subject.images.values())).data > threshold).any(0)


def inside(mask: LabelMap, subject: Subject, space: Space) -> Bool[Tensor, "i j k"]:
    """Where a mask of the subject is above 0, in model space.

    Every model voxel that is nearest to a voxel of the mask, and every one whose nearest is in the mask: no single
    voxel gets lost where model space is coarser, and there are no gaps where it is finer.

    Raises:
        InputError: the mask does not lie on the subject's grid, or cannot be read.
    """
    _ = Subject({**subject.images, "the mask of skip": mask}).frame
    native = (mask.stored() > 0).any(0)
    model = resample(native[None], inverse(space.maps, space.model.shape), linear=False)[0].clone()
    voxels = native.nonzero()
    where: dict[int, Tensor] = {}
    for n, m in enumerate(space.maps):
        below, upper, share = m.neighbours(space.model.shape[m.axis])
        where[m.axis] = torch.where(share > 0.5, upper, below)[voxels[:, n]]
    model[where[0], where[1], where[2]] = True
    return model


def patches_to_skip(skip: float | LabelMap | None, sampler: GridSampler, subject: Subject, space: Space) -> list[int]:
    """Numbers of the patches that are not predicted.

    Args:
        skip: A threshold, a mask in native space, or None to predict all.
        sampler: Of the subject in model space.
        subject: In native space.
        space: Between the two.
    """
    if skip is None:
        return []
    if isinstance(skip, LabelMap):
        return empty_patches(sampler, inside(skip, subject, space))
    return empty_patches(sampler, above(skip, sampler.subject))


def to_predict(sampler: GridSampler, skipped: Iterable[int], part: Part | None = None) -> list[int]:
    """Numbers of the patches that are predicted, all or those of a part, in streaming order.

    Where there is no foreground at all one patch is predicted nonetheless: it tells which outputs there are.
    """
    order = (sampler.grid.streaming_order if part is None else part.patches(sampler.grid)).tolist()
    left_out = frozenset(skipped)
    return [number for number in order if number not in left_out] or order[:1]
