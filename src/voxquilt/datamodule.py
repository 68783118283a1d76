"""Which patches does a predict run see? A grid sampler per subject, loaded ahead, and batches across subjects."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue
from time import perf_counter

from lightning.pytorch import LightningDataModule

from voxquilt.batch import Loaded, PatchBatch, Work, batches
from voxquilt.cases import Case, find_cases
from voxquilt.dealing import deal
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry import to_triple
from voxquilt.preprocess import Preprocess
from voxquilt.sampler import GridSampler, lay_grid, to_padding
from voxquilt.skip import patches_to_skip, to_predict
from voxquilt.subject import LabelMap, ScalarImage, Subject


@dataclass(frozen=True)
class LoadFailure:
    """A subject that could not be read or preprocessed."""

    case: Case
    error: Exception
    seconds: float


class GridDataModule(LightningDataModule):
    """Wraps a GridSampler around each subject and serves their patches for `Trainer.predict`.

    Args:
        inputs, images: See `voxquilt.cases.find_cases`.
        patch_size: Voxels in model space, an integer or three.
        patch_overlap: Voxels that neighbours share, even, an integer or three.
        padding_mode: See GridSampler; volumes smaller than a patch are padded in any case.
        divisible_by: Pad model space to a multiple of so many voxels.
        batch_size: Patches a batch.
        num_workers: Threads that load subjects ahead, each one subject; 0 loads in the main thread.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.
        skip: Patches without foreground are not predicted and count as background. Foreground is what is above a
            number in the first image, in model space and as the network sees it; or above 0 in a mask file on that
            image's grid, given by a pattern with `{subject}`.
        preprocess: To model space; RAS with the file's spacing by default.
        shard: (index, count): predict one of `count` parts of the subjects, of about as many patches each. Every part
            deals alike, from headers.

    Raises:
        ConfigError, GridError: one of these is wrong.
    """

    def __init__(
        self,
        inputs: object,
        patch_size: int | Iterable[int],
        patch_overlap: int | Iterable[int] = 0,
        *,
        images: Mapping[str, str] | None = None,
        padding_mode: str | float | None = None,
        divisible_by: int | Iterable[int] = 1,
        batch_size: int = 1,
        num_workers: int = 1,
        nonfinite: str = "error",
        skip: float | str | None = None,
        preprocess: Preprocess | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.cases = find_cases(inputs, images)
        self.patch_size = to_triple(patch_size, "data.patch_size", minimum=1)
        self.patch_overlap = to_triple(patch_overlap, "data.patch_overlap")
        self.padding_mode = padding_mode
        to_padding(0 if padding_mode is None else padding_mode)
        self.divisible_by = to_triple(divisible_by, "data.divisible_by", minimum=1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skip = skip
        self.preprocess = replace(preprocess or Preprocess(), nonfinite=nonfinite)
        self.shard = shard
        self.failures: SimpleQueue[LoadFailure] = SimpleQueue()
        """Subjects that could not be loaded; the callback that keeps the manifest empties it."""

    def setup(self, stage: str) -> None:
        """Refuses what this version cannot do right: several processes would each predict every subject."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ConfigError(f"voxquilt predicts in one process so far; the trainer has {self.trainer.world_size}.")

    @cached_property
    def dealt(self) -> list[Case]:
        """The subjects of this shard, in the order of their ids."""
        index, count = self.shard
        if count == 1:
            return self.cases
        return [self.cases[n] for n in deal([self.cost(case) for case in self.cases], count)[index]]

    def cost(self, case: Case) -> int:
        """What a subject takes, in patches, from its headers alone; reading and writing count as one.

        A header that cannot be read costs that only: whoever has the subject finds out.
        """
        try:
            space = self.preprocess.space(Subject({name: ScalarImage(path) for name, path in case.images.items()}))
            grid, _ = lay_grid(
                space.model.shape,
                self.patch_size,
                self.patch_overlap,
                border=self.padding_mode is not None,
                fit=True,
                divisible_by=self.divisible_by,
            )
        except VoxquiltError:
            return 1
        return len(grid) + 1

    def predict_dataloader(self) -> "PatchStream":
        """All patches of all subjects, subject by subject.

        A plain iterable without a length: Lightning would rebuild and re-sample a DataLoader, and silently drop what
        comes after an announced length.
        """
        return PatchStream(self)

    def load(self, case: Case) -> Loaded:
        """Read a subject, take it to model space and lay the grid.

        Raises:
            VoxquiltError: of the kind that tells what is wrong with the subject.
        """
        started = perf_counter()
        subject = Subject({name: ScalarImage(path) for name, path in case.images.items()})
        file = next(iter(subject.images.values())).file
        model_subject, space = self.preprocess(subject)
        sampler = GridSampler(
            model_subject, self.patch_size, self.patch_overlap, self.padding_mode,
            fit=True, divisible_by=self.divisible_by,
        )  # fmt: skip
        for name in model_subject.images:
            sampler.volume(name)  # pads, here rather than between two batches
        skip = LabelMap(self.skip.replace("{subject}", case.subject)) if isinstance(self.skip, str) else self.skip
        skipped = patches_to_skip(skip, sampler, subject, space)
        numbers = to_predict(sampler, skipped)
        return Loaded(Work(case, file, sampler.grid, sampler.padding, space, numbers, skipped, started), sampler)


class PatchStream:
    """The batches of a run, while `num_workers` threads load the subjects to come."""

    def __init__(self, data: GridDataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[PatchBatch]:
        return batches(self._subjects(), self._data.batch_size)

    def _subjects(self) -> Iterator[Loaded]:
        if self._data.num_workers == 0:
            yield from filter(None, map(self._load, self._data.dealt))
            return
        cases = iter(self._data.dealt)
        with ThreadPoolExecutor(self._data.num_workers, thread_name_prefix="voxquilt-loader") as pool:
            ahead: deque[Future[Loaded | None]] = deque()
            try:
                for case in cases:
                    ahead.append(pool.submit(self._load, case))
                    if len(ahead) > self._data.num_workers:
                        # No name holds the subject here: its volume is free once it is cut.
                        yield from filter(None, [ahead.popleft().result()])
                while ahead:
                    yield from filter(None, [ahead.popleft().result()])
            finally:
                for future in ahead:
                    future.cancel()

    def _load(self, case: Case) -> Loaded | None:
        started = perf_counter()
        try:
            return self._data.load(case)
        except Exception as error:
            reported = error if isinstance(error, VoxquiltError) else _described(error)
            self._data.failures.put(LoadFailure(case, reported, perf_counter() - started))
            return None


def _described(error: Exception) -> Exception:
    return RuntimeError(f"loading failed: {type(error).__name__}: {error}")
