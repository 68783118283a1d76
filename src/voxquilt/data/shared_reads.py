"""Reads and resamples a subject once for several models that predict it one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.preprocess import Prepared, Preprocess
from voxquilt.data.series import SeriesReads
from voxquilt.data.subject import Subject
from voxquilt.data.subject_task import SubjectTask
from voxquilt.geometry.space import Box


@dataclass
class _Kept:
    """The files of a subject, and what was prepared of them, by the model that asked for it first."""

    subject: Subject
    prepared: dict[tuple[int, bool], Prepared] = field(default_factory=dict)


class SharedReads:
    """Keeps a subject while models that are still to come need its voxels as they are stored, or in a model space.

    Args:
        preprocesses: How each model's subjects are prepared, in the order of the models.
    """

    def __init__(self, preprocesses: Sequence[Preprocess]) -> None:
        self._preprocesses = list(preprocesses)
        # The first model whose subjects are prepared as each model's are.
        self._first = [self._preprocesses.index(preprocess) for preprocess in self._preprocesses]
        self._kept: dict[str, _Kept] = {}
        self._lock = Lock()
        self.series = SeriesReads(len(self._preprocesses))
        """Reads subjects that are series of volumes."""

    def prepare(
        self,
        task: SubjectTask,
        open_subject: Callable[[], Subject],
        feed: DeviceFeed | None,
        box: Box | None = None,
    ) -> tuple[Subject, Prepared]:
        """A subject, and what the task's model sees of it.

        Args:
            task: The subject and the model.
            open_subject: Opens its files.
            feed: The device to prepare it on; None for the host.
            box: The native voxels that all models see; None for all.

        Raises:
            Exception: it cannot be read or prepared.
        """
        model, name = task.model, f"{task.case.subject} {task.volume}"
        if len(self._preprocesses) == 1:
            subject = open_subject()
            return subject, self._preprocesses[0](subject, feed, box)
        with self._lock:
            kept = self._kept.pop(name, None) or _Kept(open_subject())
            later = self._first[model + 1 :]
            key = self._first[model], feed is None
            if any(first not in (key[0], *(n for n, _ in kept.prepared)) for first in later):
                for image in kept.subject.images.values():
                    image.hold()
            prepared = kept.prepared.get(key) or self._preprocesses[model](kept.subject, feed, box)
            kept.prepared[key] = prepared
            kept.prepared = {key: one for key, one in kept.prepared.items() if key[0] in later}
            if later:
                self._kept = {name: kept}
            return kept.subject, prepared
