"""Finds the patches without foreground, by a threshold or a mask, which need not be predicted."""

from collections.abc import Iterable
from math import ceil

import torch
from jaxtyping import Bool
from torch import Tensor

from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.subject import LabelMap, Subject
from voxquilt.geometry.resample import resample
from voxquilt.geometry.slab_split import Part
from voxquilt.geometry.space import Box, Space, inverse


def empty_patches(sampler: GridSampler, foreground: Bool[Tensor, "i j k"]) -> list[int]:
    """Numbers of the patches in which no voxel is foreground.

    Args:
        sampler: Cuts the patches.
        foreground: The foreground of its subject, without padding; padding is never foreground.
    """
    around = [voxels for pair in reversed(sampler.padding) for voxels in pair]
    present = torch.nn.functional.pad(foreground, around)
    # A patch is a box, so that its foreground can be reduced one axis after the other.
    for axis, (starts, size) in enumerate(zip(sampler.grid.starts, sampler.grid.patch_size, strict=True)):
        present = torch.stack([present.narrow(axis, start, size).any(axis) for start in starts], axis)
    return (~present.flatten()).cpu().nonzero().flatten().tolist()  # waits for a device once


def threshold_foreground(threshold: float, model_subject: Subject) -> Bool[Tensor, "i j k"]:
    """Where the first image of a subject in model space is above a threshold."""
    return (next(iter(model_subject.images.values())).data > threshold).any(0)


def mask_foreground(mask: LabelMap, subject: Subject, space: Space) -> Bool[Tensor, "i j k"]:
    """Where a mask of the subject is above 0, in model space.

    These are the model voxels that are nearest to a voxel of the mask, and those whose nearest voxel is in the mask: no
    voxel is lost where model space is coarser, and there are no gaps where it is finer.

    Raises:
        InputError: the mask is not on the subject's grid, or cannot be read.
    """
    _ = Subject({**subject.images, "the mask of skip": mask}).frame
    native = (mask.stored() > 0).any(0)[space.where]
    model = resample(native[None], inverse(space.maps, space.model.shape), linear=False)[0].clone()
    voxels = native.nonzero()
    positions: dict[int, Tensor] = {}
    for n, m in enumerate(space.maps):
        below, upper, share, _ = m.neighbours(space.model.shape[m.axis])
        positions[m.axis] = torch.where(share > 0.5, upper, below)[voxels[:, n]]
    model[positions[0], positions[1], positions[2]] = True
    return model


def box_of_mask(mask: LabelMap, subject: Subject, margin: float = 0.0) -> Box | None:
    """The bounding box of a mask and of some mm around it, within the volume; None if nothing is above 0.

    Raises:
        InputError: the mask is not on the subject's grid, or cannot be read.
    """
    frame = Subject({**subject.images, "the mask of within": mask}).frame
    inside = (mask.stored() > 0).any(0)
    box = []
    for axis, (size, mm) in enumerate(zip(frame.shape, frame.spacing, strict=True)):
        others = [other for other in range(3) if other != axis]
        along = inside.any(others[1]).any(others[0]).nonzero().flatten()
        if not len(along):
            return None
        more = ceil(margin / mm - 1e-6)
        box.append((max(0, int(along[0]) - more), min(size, int(along[-1]) + 1 + more)))
    return box[0], box[1], box[2]


def patches_to_skip(skip: float | LabelMap | None, sampler: GridSampler, subject: Subject, space: Space) -> list[int]:
    """Numbers of the patches that need not be predicted.

    Args:
        skip: A threshold, a mask in native space, or None to predict all.
        sampler: The sampler of the subject in model space.
        subject: The subject in native space.
        space: The mapping between the two.
    """
    if skip is None:
        return []
    if isinstance(skip, LabelMap):
        return empty_patches(sampler, mask_foreground(skip, subject, space))
    return empty_patches(sampler, threshold_foreground(skip, sampler.subject))


def patches_to_predict(sampler: GridSampler, skipped: Iterable[int], part: Part | None = None) -> list[int]:
    """Numbers of the patches to predict, of the grid or of a part of it, in streaming order.

    If there is no foreground, one patch is predicted nonetheless, since it shows which outputs the network has.
    """
    order = (sampler.grid.streaming_order if part is None else part.patches(sampler.grid)).tolist()
    left_out = frozenset(skipped)
    return [number for number in order if number not in left_out] or order[:1]
