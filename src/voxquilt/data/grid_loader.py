"""Reads subjects and lays their grids of patches, for predicting and for validating alike."""

from dataclasses import dataclass
from math import prod
from time import perf_counter

from voxquilt.data.discovery import SubjectFiles, check_id
from voxquilt.data.foreground import patches_to_skip, to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.data.subject_size import SubjectCost, outline
from voxquilt.data.subject_task import LoadedSubject, SubjectTask, SubjectWork
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Padding, Triple, described
from voxquilt.geometry.padding import NO_PADDING, lay_grid
from voxquilt.geometry.slab_split import split
from voxquilt.geometry.space import Space
from voxquilt.text import reason_of

# Voxels of model space that no machine has memory for, and along an axis: their patches could not even be counted.
_MOST_VOXELS, _MOST_ALONG = 2**40, 2**20


@dataclass(frozen=True)
class GridLoader:
    """How every subject of a run is read and cut.

    Args:
        patch_size: Voxels in model space along i, j, k.
        patch_overlap: Voxels that neighbours share along i, j, k.
        preprocess: To model space.
        padding_mode: See GridSampler.
        divisible_by: Model space is padded to a multiple of so many voxels along i, j, k.
        skip: See `voxquilt.data.foreground`: a number, a pattern of mask files with `{subject}`, or None.
        halo: Voxels before and after along i, j, k that the network's outputs lack of a patch.
    """

    patch_size: Triple
    patch_overlap: Triple
    preprocess: Preprocess
    padding_mode: str | float | None = None
    divisible_by: Triple = (1, 1, 1)
    skip: float | str | None = None
    halo: Padding = NO_PADDING

    def cost(self, files: SubjectFiles, ranks: int = 1) -> SubjectCost:
        """What a subject takes, in patches, from its headers alone; reading and writing count as one.

        What is wrong with its files costs this subject only, whatever it is.

        Args:
            files: The subject.
            ranks: Among how many processes its grid might be divided.
        """
        try:
            check_id(files)
            subject = _subject_of(files)
            space = self.preprocess.space(subject)
            check_model_space(space)
            grid, padding = lay_grid(
                space.model.shape,
                self.patch_size,
                self.patch_overlap,
                border=self.padding_mode is not None,
                fit=True,
                divisible_by=self.divisible_by,
                halo=self.halo,
            )
            transformed = bool(self.preprocess.intensity)
            size = outline(subject, space, grid, padding, transformed=transformed, halo=self.halo)
            return SubjectCost(len(grid) + 1, len(split(grid, ranks)), size)
        except Exception as error:  # numbers that are too large may be of many kinds
            return SubjectCost(1, problem=_with_files(reason_of(error), files))

    def load(self, task: SubjectTask, rank: int = 0) -> LoadedSubject:
        """Read a subject, take it to model space and lay the grid.

        Args:
            task: The subject.
            rank: This process, of which only the part of the grid is predicted where several share it.

        Raises:
            VoxquiltError: of the kind that says what is wrong with the subject.
        """
        if task.problem:
            raise InputError(task.problem)
        started = perf_counter()
        subject = _subject_of(task.case)
        file = next(iter(subject.images.values())).file
        model_subject, space = self.preprocess(subject)
        sampler = GridSampler(
            model_subject,
            self.patch_size,
            self.patch_overlap,
            self.padding_mode,
            fit=True,
            divisible_by=self.divisible_by,
            halo=self.halo,
        )
        for name in model_subject.images:
            sampler.volume(name)  # pads, here rather than between two batches
        mask = self.skip
        if isinstance(mask, str):
            mask = LabelMap(mask.replace("{subject}", task.case.subject))
        skipped = patches_to_skip(mask, sampler, subject, space)
        part = split(sampler.grid, len(task.team))[task.team.index(rank)] if task.team else None
        numbers = to_predict(sampler, skipped, part)
        seconds = perf_counter() - started
        work = SubjectWork(task, file, sampler.grid, sampler.padding, space, numbers, skipped, part, seconds)
        return LoadedSubject(work, sampler)


def check_model_space(space: Space) -> None:
    """Refuse a model space of more voxels than a machine can hold, before anything is made as long as it, or of none.

    Raises:
        InputError: the file's voxel size is another than somebody meant.
    """
    native, model = space.native, space.model
    view = max(n * mm for n, mm in zip(native.shape, native.spacing, strict=True))
    if max(model.shape) > _MOST_ALONG or prod(model.shape) > _MOST_VOXELS or view < min(model.spacing) / 2:
        raise InputError(
            f"the file has {described(native)}, and model space would have {described(model)}. Is that right?"
        )


def _subject_of(files: SubjectFiles) -> Subject:
    return Subject({name: ScalarImage(path) for name, path in files.images.items()})


def _with_files(reason: str, files: SubjectFiles) -> str:
    """A reason that names a file of the subject."""
    paths = [str(path) for path in files.images.values()]
    return reason if any(path in reason for path in paths) else f"{', '.join(paths)}: {reason}"
