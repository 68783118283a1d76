"""Reads subjects and lays their grids of patches, for prediction and validation."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from time import perf_counter

from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.discovery import SubjectFiles, check_id
from voxquilt.data.foreground import box_of_mask, patches_to_predict, patches_to_skip
from voxquilt.data.freed_memory import return_freed_memory
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.series import count_volumes, volume_of
from voxquilt.data.shared_reads import SharedReads
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.data.subject_size import SubjectCost, measure_subject
from voxquilt.data.subject_task import LoadedSubject, SubjectTask, SubjectWork
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Padding, Triple, described, to_triple
from voxquilt.geometry.padding import NO_PADDING, lay_grid, pads_border, to_padding
from voxquilt.geometry.slab_split import split_rows
from voxquilt.geometry.space import Box, Space
from voxquilt.text import reason_of
from voxquilt.vocabulary import CHANNELS, VOLUMES

# Limits of model space, in all and along an axis: no machine has memory for more, and patches could not be counted.
_MOST_VOXELS, _MOST_ALONG = 2**40, 2**20
# Voxels from which on freed memory is worth the milliseconds that it takes to return it.
_LARGE = 2**22


@dataclass(frozen=True)
class GridLoader:
    """How every subject of a run is read and cut.

    Args:
        patch_size: Voxels in model space along i, j, k.
        patch_overlap: Voxels that neighbours share along i, j, k.
        preprocess: Takes subjects to model space.
        padding_mode: See GridSampler.
        divisible_by: Model space is padded to a multiple of so many voxels along i, j, k.
        skip: See `voxquilt.data.foreground`: a number, a pattern of mask files with `{subject}`, or None.
        halo: Voxels before and after along i, j, k by which the network's outputs are smaller than a patch.
        placement, step: See GridSampler.
        within: A pattern of mask files with `{subject}`: only the bounding box of what is above 0 is predicted.
        margin: mm around that box.
        layout: How the network's outputs lie in patches; see `voxquilt.geometry.output_layout.factor_of`.
        time: 'channels' takes a 4-D file for channels of one volume, 'volumes' for a series, each predicted by itself.
        keeps: Bytes; the images of a subject that take no more, as their files store them, keep their voxels until its
            outputs are written, for which its work has the images. None keeps neither.
    """

    patch_size: Triple
    patch_overlap: Triple
    preprocess: Preprocess
    padding_mode: str | float | None = None
    divisible_by: Triple = (1, 1, 1)
    skip: float | str | None = None
    halo: Padding = NO_PADDING
    placement: str = "regular"
    step: float | None = None
    within: str | None = None
    margin: float = 0.0
    layout: str = "auto"
    time: str = CHANNELS
    keeps: float | None = None

    def cost(self, files: SubjectFiles, ranks: int = 1) -> SubjectCost:
        """The cost of a subject, from its headers alone.

        An error in its files, of any kind, becomes the problem of this subject only.

        Args:
            files: The subject.
            ranks: The number of processes among which its grid may be divided.
        """
        try:
            check_id(files)
            volumes = self.volumes_of(self.subject_of(files))
            subject = volumes[0]
            space = self.preprocess.space(subject)
            check_model_space(space)
            if ranks > 1 and (self.preprocess.crop or self.within):
                # How many slabs there are for the processes depends on what is left out.
                space = self.preprocess.space(subject, self.preprocess.box(subject, self._box(files, subject)[0]))
            grid, padding = lay_grid(
                space.model.shape,
                self.patch_size,
                self.patch_overlap,
                border=pads_border(self.padding_mode),
                fit=True,
                divisible_by=self.divisible_by,
                halo=self.halo,
                placement=self.placement,
                step=self.step,
            )
            transformed = bool(self.preprocess.intensity)
            size = measure_subject(
                subject, space, grid, padding, transformed=transformed, halo=self.halo,
                order=self.preprocess.interpolation, one_hot=self.preprocess.one_hot,
            )  # fmt: skip
            size = size.as_series(len(volumes))
            return SubjectCost(size.patches + 1, len(split_rows(grid, ranks)), size, volumes=len(volumes))
        except Exception as error:  # too large numbers raise many kinds of errors
            return SubjectCost(1, problem=_with_files(reason_of(error), files))

    def load(
        self, task: SubjectTask, rank: int = 0, feed: DeviceFeed | None = None, reads: SharedReads | None = None
    ) -> LoadedSubject:
        """Read a subject, take it to model space and lay the grid.

        Args:
            task: The subject.
            rank: The rank of this process, which predicts only its part of a grid that several share.
            feed: The device that its volumes are prepared and kept on, if that is possible; None for the host.
            reads: Reads subjects for several models; None reads them for this one alone.

        Raises:
            VoxquiltError: the subject cannot be read or preprocessed.
        """
        if task.problem:
            raise InputError(task.problem)
        reads = reads or SharedReads([self.preprocess])
        loaded = None if feed is None else feed.try_on_device(lambda: self._load(task, rank, feed, reads))
        return loaded or self._load(task, rank, None, reads)

    def _load(self, task: SubjectTask, rank: int, feed: DeviceFeed | None, reads: SharedReads) -> LoadedSubject:
        started = perf_counter()
        box, is_empty = self._box(task.case, self.subject_of(task.case))
        keeps = self.keeps if not task.team or task.team[0] == rank else None  # the first of a team writes
        open_subject = partial(self._open, task.case, keeps or 0)
        if task.volumes > 1:
            open_subject = partial(reads.series.take, task, partial(self.subject_of, task.case))
        subject, (model_subject, space) = reads.prepare(task, open_subject, feed, box)
        opened = self.subject_of(task.case) if task.volumes > 1 else subject
        file = next(image.file for image in opened.images.values() if task.volumes in (1, image.shape[0]))
        sampler = GridSampler(
            model_subject,
            self.patch_size,
            self.patch_overlap,
            self.padding_mode,
            fit=True,
            divisible_by=self.divisible_by,
            halo=self.halo,
            placement=self.placement,
            step=self.step,
        )
        source = sampler.source(None if feed is None else feed.stream)  # pads, here rather than between two batches
        mask = self.skip
        if isinstance(mask, str):
            mask = LabelMap(mask.replace("{subject}", task.case.subject))
        skipped = list(range(len(sampler))) if is_empty else patches_to_skip(mask, sampler, subject, space)
        part = split_rows(sampler.grid, len(task.team))[task.team.index(rank)] if task.team else None
        numbers = patches_to_predict(sampler, skipped, part)
        seconds = perf_counter() - started
        work = SubjectWork(task, file, sampler.grid, sampler.padding, space, numbers, skipped, part, seconds)
        work.images = {} if keeps is None else subject.get_images_dict()
        if prod(space.native.shape) > _LARGE:
            return_freed_memory()
        return LoadedSubject(work, source if feed is None else feed.keep(source))

    def _box(self, files: SubjectFiles, subject: Subject) -> tuple[Box | None, bool]:
        """The native voxels that `within` leaves, None for all, and whether there is nothing to predict in them."""
        if self.within is None:
            return None, False
        mask = LabelMap(self.within.replace("{subject}", files.subject))
        box = box_of_mask(mask, subject, self.margin)
        return (box, False) if box is not None else (((0, 1), (0, 1), (0, 1)), True)

    def _open(self, files: SubjectFiles, keeps: float) -> Subject:
        """A subject, whose images keep their voxels if these take no more bytes than `keeps`."""
        subject = self.subject_of(files)
        _ = subject.frame  # that of all images, before any is read
        images = subject.get_images()
        if sum(prod(image.shape) * image.file.voxel_bytes for image in images) <= keeps:
            for image in images:
                image.hold()
        return subject

    def volumes_of(self, subject: Subject) -> list[Subject]:
        """The volumes of a series; of any other subject the subject itself.

        Raises:
            InputError: two images are series of different lengths.
        """
        count = count_volumes(subject) if self.time == VOLUMES else 1
        return [subject] if count == 1 else [volume_of(subject, n) for n in range(count)]

    def subject_of(self, files: SubjectFiles) -> Subject:
        """A subject, of which nothing has been read."""
        labels = self.preprocess.one_hot or ()
        return Subject({n: LabelMap(path) if n in labels else ScalarImage(path) for n, path in files.images.items()})


def make_grids(
    preprocess: Preprocess,
    patch_size: int | Iterable[int],
    patch_overlap: int | Iterable[int] = 0,
    padding_mode: str | float | None = None,
    divisible_by: int | Iterable[int] = 1,
    placement: str = "regular",
    step: float | None = None,
) -> GridLoader:
    """A GridLoader from settings of a user.

    Raises:
        GridError: (a ValueError) a size that is not an integer or three.
    """
    to_padding(0 if padding_mode is None else padding_mode)
    return GridLoader(
        to_triple(patch_size, "data.patch_size", minimum=1),
        to_triple(patch_overlap, "data.patch_overlap"),
        preprocess,
        padding_mode,
        to_triple(divisible_by, "data.divisible_by", minimum=1),
        placement=placement,
        step=step,
    )


def check_model_space(space: Space) -> None:
    """Refuse a model space of more voxels than a machine can hold, or of none, before memory is allocated for it.

    Raises:
        InputError: the model space is too large or too small, as a wrong voxel size in the file makes it.
    """
    native, model = space.native, space.model
    view = max(n * mm for n, mm in zip(native.shape, native.spacing, strict=True))
    if max(model.shape) > _MOST_ALONG or prod(model.shape) > _MOST_VOXELS or view < min(model.spacing) / 2:
        raise InputError(
            f"the file has {described(native)}, and model space would have {described(model)}. Is the voxel size right?"
        )


def _with_files(reason: str, files: SubjectFiles) -> str:
    """A reason that names a file of the subject."""
    paths = [str(path) for path in files.images.values()]
    return reason if any(path in reason for path in paths) else f"{', '.join(paths)}: {reason}"
