"""Reads a series, several volumes in one file, once, and gives its volumes one after the other."""

from collections.abc import Callable
from threading import Lock

from voxquilt.data.subject import Subject
from voxquilt.data.subject_task import SubjectTask
from voxquilt.errors import InputError

# Series that are kept beside each other: one whose last volumes are being predicted, and the next.
_KEPT = 2


def count_volumes(subject: Subject) -> int:
    """The number of volumes of a subject's images, of which those with one volume belong to each of the others'.

    Raises:
        InputError: two images are series of different lengths.
    """
    counts = {name: image.shape[0] for name, image in subject.images.items()}
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        lengths = ", ".join(f"{name!r} has {count}" for name, count in several.items())
        raise InputError(f"data.time=volumes: images of one subject have as many volumes as each other; {lengths}.")
    return max(counts.values())


def volume_of(subject: Subject, index: int) -> Subject:
    """One of the volumes of a subject whose images are series."""
    return Subject({name: image.at(index if image.shape[0] > 1 else 0) for name, image in subject.images.items()})


class SeriesReads:
    """Keeps the voxels of a series, as they are stored, until each of its volumes has been taken by each model.

    Args:
        models: Number of models.
    """

    def __init__(self, models: int) -> None:
        self._models = models
        self._lock = Lock()
        # Subjects whose voxels are held, and how often these will still be taken.
        self._kept: dict[str, tuple[Subject, int]] = {}

    def take(self, task: SubjectTask, open_subject: Callable[[], Subject]) -> Subject:
        """The volume of a task.

        Args:
            task: The subject, and the number of the volume.
            open_subject: Opens its files.

        Raises:
            InputError: a file cannot be read.
        """
        name = task.case.subject
        with self._lock:
            subject, left = self._kept.pop(name, None) or (open_subject(), task.volumes * self._models)
            _ = subject.frame  # that of all images, before any is read
            for image in subject.images.values():
                image.hold()
            if left > 1:
                self._kept[name] = subject, left - 1
            while len(self._kept) > _KEPT:  # of subjects that failed
                del self._kept[next(iter(self._kept))]
        return volume_of(subject, task.volume)
