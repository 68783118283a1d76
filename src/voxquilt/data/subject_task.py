"""Provides what a run knows of a subject: its task, its work and its volumes in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import ImageFile
from voxquilt.data.image import Image
from voxquilt.data.patch_source import PatchSource
from voxquilt.geometry.frame import Padding
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part
from voxquilt.geometry.space import Space


@dataclass(frozen=True)
class SubjectTask:
    """A subject of a run.

    Args:
        case: Its id and files.
        fingerprint: See `voxquilt.reporting.manifest.Row`.
        number: Its number among the subjects of the run.
        team: The ranks that share its grid, in the order of their parts; the first collects and writes. Empty for a
            subject that one process predicts by itself.
        problem: Why it will fail, where that is known beforehand.
        model: Which of several models is to predict it.
        volumes: The number of volumes of a series, of which each is predicted by itself; 1 for a volume.
        volume: Which of them this is.
    """

    case: SubjectFiles
    fingerprint: str = ""
    number: int = 0
    team: tuple[int, ...] = ()
    problem: str = ""
    model: int = 0
    volumes: int = 1
    volume: int = 0

    def by_models(self, count: int) -> "list[SubjectTask]":
        """The task of each volume and of each of several models, which have numbers of their own."""
        return [
            replace(self, number=(self.number + volume) * count + model, model=model, volume=volume)
            for volume in range(self.volumes)
            for model in range(count)
        ]


@dataclass(eq=False)
class SubjectWork:
    """A subject on its way through a run; compared and hashed by identity.

    Args:
        task: The subject's id and files, and the processes that predict it.
        file: The first image's file, whose header is copied to outputs.
        grid, padding: Where its patches lie.
        space: The mapping back to native space.
        numbers: The patches to predict, in streaming order.
        skipped: The patches without foreground.
        part: This process's part of the grid, where several share it; `numbers` are the patches of that part.
        seconds: Time spent so far on loading, its share of forward passes, and adding its patches; without waiting.
        failed: Set once; the rest of the subject is then skipped.
        images: Its images, without label maps, for statistics of what they hold where labels are; they may have kept
            their voxels.
    """

    task: SubjectTask
    file: ImageFile
    grid: Grid
    padding: Padding
    space: Space
    numbers: list[int]
    skipped: list[int]
    part: Part | None = None
    seconds: float = 0.0
    failed: bool = False
    images: Mapping[str, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedSubject:
    """A subject whose volumes are in memory."""

    work: SubjectWork
    source: PatchSource
