"""Provides the overlapping patches of a subject as a Dataset."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from voxquilt.data.conversion import SubjectLike, to_subject
from voxquilt.data.copy_stream import CopyStream
from voxquilt.data.patch_source import PatchSource
from voxquilt.data.subject import AFFINE, LOCATION, Image, Subject
from voxquilt.errors import GridError
from voxquilt.geometry.frame import Padding, Triple
from voxquilt.geometry.padding import NO_PADDING, lay_grid, pads_border, to_padding


class GridSampler(Dataset[Subject]):
    """A map-style Dataset of the overlapping patches of one subject, with the interface of TorchIO 1.x.

    Patch n is a Subject: each image with 'data' (C, pi, pj, pk) and 'affine' (4, 4), the 'location' (6,), and those of
    the subject's other values that a DataLoader can collate. A DataLoader returns plain dictionaries of batches:
    `batch['t1']['data']` is (B, C, pi, pj, pk), `batch['location']` is (B, 6). The subject is not changed.

    >>> sampler = GridSampler(torch.zeros(1, 20, 16, 16), patch_size=16, patch_overlap=12)
    >>> len(sampler), sampler[1]["image"]["data"].shape, sampler[1]["location"].tolist()
    (2, torch.Size([1, 16, 16, 16]), [4, 0, 0, 20, 16, 16])

    Args:
        subject: Images on one grid, or anything that `voxquilt.data.conversion.to_subject` converts.
        patch_size: Voxels, an integer or three.
        patch_overlap: Voxels that neighbours share, even, an integer or three.
        padding_mode: None, or the padding by half of the overlap on every side: a mode of `numpy.pad` (statistics
            such as 'mean' are per line of voxels) or a number. Locations then refer to the padded volume. 'fit_edge',
            'fit_reflect' and 'fit_wrap' add no such border, and are the modes of `fit`.
        fit: Pad volumes that are smaller than a patch, with `padding_mode` or zeros.
        divisible_by: With `fit`, pad to a multiple of so many voxels, an integer or three.
        halo: Voxels before and after along i, j, k by which the network's outputs are smaller than patches (see
            `voxquilt.geometry.output_layout`). The grid and locations are those of outputs; patches include the halo,
            which is padding beyond the volume's edge.
        placement: How patches are placed along an axis, 'regular', 'even', 'monai'; see `voxquilt.geometry.placement`.
        step: Distance between patches as a share of their size, in place of `patch_overlap`.

    Raises:
        GridError: (a ValueError) the sizes do not form a grid.
        PaddingModeError: (a ValueError and KeyError) an unknown padding mode.
        InputError: images on different grids, or a file that cannot be read.
    """

    def __init__(
        self,
        subject: SubjectLike,
        patch_size: int | Iterable[int],
        patch_overlap: int | Iterable[int] = 0,
        padding_mode: str | float | None = None,
        *,
        fit: bool = False,
        divisible_by: int | Iterable[int] = 1,
        halo: Padding = NO_PADDING,
        placement: str = "regular",
        step: float | None = None,
    ) -> None:
        self.padding_mode = padding_mode
        self._pad = to_padding(0 if padding_mode is None else padding_mode)
        self._sizes = {
            "patch_size": patch_size,
            "patch_overlap": patch_overlap,
            "divisible_by": divisible_by,
            "fit": fit,
            "halo": halo,
            "placement": placement,
            "step": step,
        }
        self.halo = halo
        self._set_subject(subject if isinstance(subject, Subject) else to_subject(subject))

    def _set_subject(self, subject: Subject) -> None:
        self.subject = subject
        border = pads_border(self.padding_mode)
        self.grid, self.padding = lay_grid(subject.spatial_shape, border=border, **self._sizes)
        i, j, k = ((before + b, after + a) for (before, after), (b, a) in zip(self.padding, self.halo, strict=True))
        self._around: Padding = (i, j, k)
        self._volumes: dict[str, Tensor] = {}
        self._padded: Subject | None = None

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def locations(self) -> np.ndarray:
        """(n, 6) int64: i0, j0, k0, i1, j1, k1 of every patch, end exclusive."""
        return self.grid.locations

    @property
    def patch_size(self) -> Triple:
        """Voxels of a patch along i, j, k, with the halo."""
        i, j, k = (n + sum(around) for n, around in zip(self.grid.patch_size, self.halo, strict=True))
        return i, j, k

    @property
    def patch_overlap(self) -> Triple:
        """Voxels that neighbouring patches share along i, j, k."""
        return self.grid.patch_overlap

    def volume(self, name: str) -> Shaped[Tensor, "c i j k"]:
        """An image's voxels with padding and halo, computed once."""
        if name not in self._volumes:
            data = self.subject.images[name].data
            self._volumes[name] = self._pad(data, self._around) if self._around != NO_PADDING else data
        return self._volumes[name]

    def cut(self, name: str, index: int) -> Shaped[Tensor, "c pi pj pk"]:
        """A patch of one image, as a view of its volume."""
        # The volume includes the halo, so that a patch begins at its output's location, and is longer.
        i, j, k = (slice(s, s + n) for s, n in zip(self.grid.location(index)[:3], self.patch_size, strict=True))
        return self.volume(name)[:, i, j, k]

    def source(self, stream: CopyStream | None = None) -> PatchSource:
        """All volumes with padding and halo, from which patches are cut into batches.

        Args:
            stream: The stream on which they were prepared on a device; None for volumes on the host.
        """
        return PatchSource([self.volume(name) for name in self.subject.images], self.grid, self.patch_size, stream)

    def __getitem__(self, index: int) -> Subject:
        if not -len(self) <= index < len(self):
            raise IndexError(f"patch {index} of {len(self)}")
        if self._padded is None:
            self._padded = self._with_padding()
        location = self.grid.location(index % len(self))
        patch = self.crop(self._padded, location[:3], self.patch_size)
        if self.halo != NO_PADDING:
            patch[LOCATION] = torch.tensor(location)  # the location of its output
        return patch

    def __iter__(self) -> Iterator[Subject]:
        return (self[index] for index in range(len(self)))

    def __call__(self, subject: SubjectLike | None = None, num_patches: int | None = None) -> Iterator[Subject]:
        """All patches in grid order, of this subject or of another.

        Raises:
            GridError: (a ValueError) a number of patches was given: a grid has a fixed number of patches.
        """
        if num_patches is not None:
            raise GridError("GridSampler does not support limiting the number of patches; a grid covers its volume.")
        if subject is None:
            return iter(self)
        other = copy(self)
        other._set_subject(to_subject(subject))
        return iter(other)

    def crop(self, subject: Subject, index_ini: Triple, patch_size: Triple) -> Subject:
        """Cut a patch; a subclass may override how.

        Args:
            subject: The images with padding.
            index_ini: The patch's first voxel.
            patch_size: Voxels along i, j, k.
        """
        (i0, j0, k0), (i1, j1, k1) = index_ini, np.add(index_ini, patch_size).tolist()
        kept = (bool, int, float, str, Tensor, np.ndarray)
        patch: dict[str, Any] = {k: v for k, v in subject.items() if isinstance(v, kept)}
        for name, image in subject.images.items():
            # Copies, so that changing a patch in place changes neither the volume nor neighbouring patches.
            data = image.data[:, i0:i1, j0:j1, k0:k1].clone(memory_format=torch.contiguous_format)
            patch[name] = image.part(data, _moved(image[AFFINE], index_ini))
        return Subject(patch, **{LOCATION: torch.tensor([i0, j0, k0, i1, j1, k1])})

    def _with_padding(self) -> Subject:
        first = [-before for before, _ in self._around]
        volumes = {
            n: image.part(self.volume(n), _moved(image.affine, first)) for n, image in self.subject.images.items()
        }
        return Subject({**self.subject, **volumes})


def _moved(affine: np.ndarray, first: Sequence[int]) -> np.ndarray:
    """The affine of a part of a volume whose first voxel is `first`."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    return moved


def _collate_images(images: list[Image], *, collate_fn_map: Any = None) -> dict[str, Any]:
    for image in images:
        image.load()
    return _collate_values(images, collate_fn_map=collate_fn_map)


def _collate_values(mappings: Sequence[Mapping[str, Any]], *, collate_fn_map: Any = None) -> dict[str, Any]:
    return {key: collate([m[key] for m in mappings], collate_fn_map=collate_fn_map) for key in mappings[0]}


# Torch's documented way to define how a DataLoader collates a class. Otherwise a batch would become a Subject.
default_collate_fn_map.update({Image: _collate_images, Subject: _collate_values})
