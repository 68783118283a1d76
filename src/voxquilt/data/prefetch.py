"""Streams the batches of a run subject by subject, while threads load the next subjects."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from voxquilt.data.batch import PatchBatch, cut_batches
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.subject_task import LoadedSubject, SubjectTask
from voxquilt.errors import VoxquiltError


@dataclass(frozen=True)
class LoadFailure:
    """A subject that could not be read or preprocessed."""

    task: SubjectTask
    error: Exception
    seconds: float


def never_dropped(task: SubjectTask) -> bool:
    """That every subject is loaded."""
    return False


@dataclass(frozen=True)
class PatchStream:
    """The batches of a run.

    An iterable without a length: Lightning would rebuild and re-sample a DataLoader, and silently drop batches
    beyond an announced length.

    Args:
        tasks: The subjects, in order.
        load: Reads a subject.
        batch_size: Patches per batch.
        num_workers: Threads that load subjects ahead, each one subject; 0 loads in the main thread.
        failed: Called with each subject that cannot be loaded, in any thread.
        stopped: Tells whether to end before the next batch.
        feed: The device that batches lie on; None for the host.
        is_dropped: Tells whether a subject need not be loaded any more.
    """

    tasks: Sequence[SubjectTask]
    load: Callable[[SubjectTask], LoadedSubject]
    batch_size: int
    num_workers: int
    failed: Callable[[LoadFailure], None]
    stopped: Callable[[], bool]
    feed: DeviceFeed | None = None
    is_dropped: Callable[[SubjectTask], bool] = never_dropped

    def __iter__(self) -> Iterator[PatchBatch]:
        for batch in cut_batches(self._subjects(), self.batch_size, self.feed):
            if self.stopped():
                return
            yield batch

    def _subjects(self) -> Iterator[LoadedSubject]:
        if self.num_workers == 0:
            yield from filter(None, map(self._load, self.tasks))
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="voxquilt-loader") as pool:
            ahead: deque[Future[LoadedSubject | None]] = deque()
            try:
                for task in self.tasks:
                    ahead.append(pool.submit(self._load, task))
                    if len(ahead) > self.num_workers:
                        # No variable holds the subject here, so its volume is freed once it is cut.
                        yield from filter(None, [ahead.popleft().result()])
                while ahead:
                    yield from filter(None, [ahead.popleft().result()])
            finally:
                for future in ahead:
                    future.cancel()

    def _load(self, task: SubjectTask) -> LoadedSubject | None:
        if self.stopped() or self.is_dropped(task):
            return None
        started = perf_counter()
        try:
            return self.load(task)
        except Exception as error:
            described = RuntimeError(f"loading failed: {type(error).__name__}: {error}")
            reported = error if isinstance(error, VoxquiltError) else described
            self.failed(LoadFailure(task, reported, perf_counter() - started))
            return None
