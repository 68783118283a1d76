"""Which patches does a predict run see? A grid sampler per subject, and the subjects dealt to the processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningDataModule

from voxquilt.agreed import agreed
from voxquilt.batch import Loaded, Work
from voxquilt.cases import Case, find_cases
from voxquilt.dealing import deal
from voxquilt.errors import VoxquiltError
from voxquilt.fingerprint import digest
from voxquilt.fits import check_overlap, find_halo
from voxquilt.geometry import Padding, to_triple
from voxquilt.group import Group, check_world
from voxquilt.launch import is_external, is_first
from voxquilt.loader import LoadFailure, PatchStream
from voxquilt.manifest import Row
from voxquilt.module import PatchPredictor
from voxquilt.names import DISTRIBUTE, check_name
from voxquilt.outline import Extent, extent, outline, together
from voxquilt.parts import split
from voxquilt.preprocess import Preprocess
from voxquilt.resume import Resume, Todo
from voxquilt.sampler import NO_PADDING, GridSampler, lay_grid, to_padding
from voxquilt.skip import patches_to_skip, to_predict
from voxquilt.subject import LabelMap, ScalarImage, Subject
from voxquilt.tasks import Size, Task, distributed


@dataclass(frozen=True)
class Plan:
    """What a run does, as this process sees it.

    Args:
        group: The processes of the run.
        tasks: Of this process, shared volumes first.
        cases: Every subject there is, also of other shards.
        everything: Ids of all subjects of the run, or of its shard, that are not done.
        done: Rows of those that were done before.
        settings: What made them, for the record; empty without `resume`.
        sizes: On rank 0, of `everything`; with outlines where `GridDataModule.detailed` is set.
        extent: Of `everything`.
        loads: Patches of each rank, a subject's reading and writing counted as one.
        counts: Subjects of each rank.
    """

    group: Group
    tasks: list[Task]
    cases: list[Case]
    everything: list[str]
    done: list[Row]
    settings: Mapping[str, Any]
    sizes: list[Size] = field(default_factory=list)
    extent: Extent = field(default_factory=Extent)
    loads: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class GridDataModule(LightningDataModule):
    """Wraps a GridSampler around each subject and serves their patches for `Trainer.predict`.

    Args:
        inputs, images: See `voxquilt.cases.find_cases`.
        patch_size: Voxels in model space, an integer or three.
        patch_overlap: Voxels that neighbours share, even, an integer or three.
        padding_mode: See GridSampler; volumes smaller than a patch are padded in any case.
        divisible_by: Pad model space to a multiple of so many voxels.
        batch_size: Patches a batch; 'auto' is settled by `voxquilt.settle.settled`, which VolumeWriter calls.
        num_workers: Threads that load subjects ahead, each one subject; 0 loads in the main thread.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.
        skip: Patches without foreground are not predicted and count as background. Foreground is what is above a
            number in the first image, in model space and as the network sees it; or above 0 in a mask file on that
            image's grid, given by a pattern with `{subject}`.
        labels: For `voxquilt.evaluation`: where true labels are, a path with `{subject}`, or one for each channel. By
            default those of a table's column `label`, which is no image.
        preprocess: To model space; RAS with the file's spacing by default.
        shard: (index, count): predict one of `count` parts of the subjects, of about as many patches each. Every part
            deals alike, from headers; with `resume` one of them reads these for all.
        distribute: With several processes, 'subject' gives each subject to one of them, 'slab' divides every volume's
            grid between all, 'auto' does so where there are fewer subjects than processes or one outweighs its share.
        resume: Finds what is done already; None predicts everything.

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
        batch_size: int | str = 1,
        num_workers: int = 1,
        nonfinite: str = "error",
        skip: float | str | None = None,
        labels: str | Mapping[str, str] | None = None,
        preprocess: Preprocess | None = None,
        shard: tuple[int, int] = (0, 1),
        distribute: str = "subject",
        resume: Resume | None = None,
    ) -> None:
        super().__init__()
        self._inputs = inputs, images
        if is_first() and not is_external():
            _ = self.cases  # what is wrong with them is said at once, or when all processes can hear it
        self.patch_size = to_triple(patch_size, "data.patch_size", minimum=1)
        self.patch_overlap = to_triple(patch_overlap, "data.patch_overlap")
        self.padding_mode = padding_mode
        to_padding(0 if padding_mode is None else padding_mode)
        self.divisible_by = to_triple(divisible_by, "data.divisible_by", minimum=1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skip, self.labels = skip, labels
        self.preprocess = replace(preprocess or Preprocess(), nonfinite=nonfinite)
        self.shard = shard
        self.distribute = check_name(distribute, DISTRIBUTE, "run.distribute")
        self._resume = resume
        self._plan: Plan | None = None
        self._stopped: Callable[[], bool] = bool
        self._failures: list[LoadFailure] = []
        self._known: dict[str, Size] = {}
        self.layout: str = "auto"
        """How outputs lie in patches (`voxquilt.output_layout`), and what they lack there; `setup` asks the network."""
        self.halo: Padding = NO_PADDING
        self.detailed = False
        """Whether `plan.sizes` is to have outlines; set before `setup`."""

    @cached_property
    def cases(self) -> list[Case]:
        """Every subject, in the order of their ids; with several processes only rank 0 looks for them."""
        return find_cases(*self._inputs)

    @property
    def plan(self) -> Plan:
        """What `setup` decided."""
        assert self._plan is not None, "Lightning calls setup first"
        return self._plan

    def setup(self, stage: str) -> None:
        """Decide what is to be done and by which process, alike in all of them.

        Raises:
            ConfigError: the processes do not belong together; or outputs were made with other settings.
        """
        check_world(self.trainer, self.shard)
        group = Group(self.trainer)
        # Rank 0 looks into folders, which may be changing; each header is read by one process.
        cases = group.first(lambda: self.cases)
        self._look_at_outputs(cases)
        ours = group.first(lambda: self._of_shard(cases))
        todo = group.first(lambda: self._resume.todo(ours) if self._resume else Todo([""] * len(ours)))
        tasks = [Task(*parts) for parts in zip(ours, todo.fingerprints, range(len(ours)), strict=True)]
        left = [task for task in tasks if task.case.subject not in todo.done]
        # Each header is read once, by one process; outlines travel only where somebody wants to look at them.
        stride = self._sizes([task.case for task in left[group.rank :: group.size]], group.size)
        self._known.clear()
        sent = stride if self.detailed else [replace(size, outline=None) for size in stride]
        gathered = group.gather((sent, extent(size.outline for size in stride)))
        # Back from one list for each rank to one for all.
        sizes = [gathered[n % group.size][0][n // group.size] for n in range(len(left))]
        mine, dealt = left, [left]
        if group.size > 1:
            dealt = distributed(left, sizes, group.size, self.distribute)
            mine = dealt[group.rank]
        patches = {task.number: size.patches for task, size in zip(left, sizes, strict=True)}
        loads = [sum(patches[task.number] / max(1, len(task.team)) for task in tasks) for tasks in dealt]
        done = [todo.done[task.case.subject] for task in tasks if task.case.subject in todo.done]
        settings = {self._resume.settings_digest: self._resume.settings} if self._resume and group.rank == 0 else {}
        self._plan = Plan(
            group, mine, cases, [task.case.subject for task in left], done, settings,
            sizes if group.rank == 0 else [], together(of_rank for _, of_rank in gathered), loads,
            [len(tasks) for tasks in dealt],
        )  # fmt: skip

    def _look_at_outputs(self, cases: Sequence[Case]) -> None:
        """Find out how the network's outputs lie in patches, where the model says that they lack a border."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, PatchPredictor):
            return
        self.layout = module.network.layout
        if self.layout == "cropped":
            self.halo = find_halo(module.network, lambda: _channels(cases), self.patch_size)
            check_overlap(self.patch_size, self.halo, self.patch_overlap)

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """End the stream of batches before the next one as soon as `stopped` says so."""
        self._stopped = stopped

    def failures(self) -> list[LoadFailure]:
        """Subjects that could not be loaded since the last call; whoever keeps the manifest asks after each batch."""
        found: list[LoadFailure] = []
        while self._failures:
            found.append(self._failures.pop(0))
        return found

    def _of_shard(self, cases: list[Case]) -> list[Case]:
        index, shards = self.shard
        if shards == 1:
            return cases

        # All subjects are dealt, done or not: a shard that starts late has to deal as the others did. One shard reads
        # the headers for all, or each of hundreds would open every file.
        def costs() -> list[int]:
            return [size.patches for size in self._sizes(cases)]

        if self._resume is None:
            return [cases[n] for n in deal(costs(), shards)[index]]
        grid = self.patch_size, self.patch_overlap, self.padding_mode is not None, self.divisible_by, self.halo
        space = self.preprocess.orientation, self.preprocess.spacing
        key = digest([grid, space, [[case.subject, list(case.images.values())] for case in cases]])
        dealt = deal(agreed(self._resume.folder / f"plan_of_{shards}.json", key, costs), shards)
        return [cases[n] for n in dealt[index]]

    def _sizes(self, cases: Sequence[Case], ranks: int = 1) -> list[Size]:
        # On a network's file system most of the time is waiting.
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(partial(self._size, ranks=ranks), cases))
        # The first of several shards reads all headers, and then needs those of its own subjects.
        self._known = {case.subject: size for case, size in zip(cases, sizes, strict=True)}
        return sizes

    def _size(self, case: Case, ranks: int) -> Size:
        return self._known[case.subject] if ranks == 1 and case.subject in self._known else self.size(case, ranks)

    def size(self, case: Case, ranks: int = 1) -> Size:
        """What a subject takes, in patches, from its headers alone; reading and writing count as one.

        A header that cannot be read costs that only: whoever has the subject finds out.

        Args:
            case: The subject.
            ranks: Among how many processes its grid might be divided.
        """
        try:
            subject = Subject({name: ScalarImage(path) for name, path in case.images.items()})
            space = self.preprocess.space(subject)
            grid, padding = lay_grid(
                space.model.shape,
                self.patch_size,
                self.patch_overlap,
                border=self.padding_mode is not None,
                fit=True,
                divisible_by=self.divisible_by,
                halo=self.halo,
            )
        except VoxquiltError:
            return Size(1)
        of_headers = outline(subject, space, grid, padding, transformed=bool(self.preprocess.intensity), halo=self.halo)
        return Size(len(grid) + 1, len(split(grid, ranks)), of_headers)

    def predict_dataloader(self) -> PatchStream:
        """All patches of this process, subject by subject."""
        return PatchStream(
            self.plan.tasks, self.load, int(self.batch_size), self.num_workers, self._failures.append, self._stopped
        )

    def load(self, task: Task) -> Loaded:
        """Read a subject, take it to model space and lay the grid.

        Raises:
            VoxquiltError: of the kind that tells what is wrong with the subject.
        """
        started, case = perf_counter(), task.case
        subject = Subject({name: ScalarImage(path) for name, path in case.images.items()})
        file = next(iter(subject.images.values())).file
        model_subject, space = self.preprocess(subject)
        sampler = GridSampler(
            model_subject, self.patch_size, self.patch_overlap, self.padding_mode,
            fit=True, divisible_by=self.divisible_by, halo=self.halo,
        )  # fmt: skip
        for name in model_subject.images:
            sampler.volume(name)  # pads, here rather than between two batches
        skip = LabelMap(self.skip.replace("{subject}", case.subject)) if isinstance(self.skip, str) else self.skip
        skipped = patches_to_skip(skip, sampler, subject, space)
        part = split(sampler.grid, len(task.team))[task.team.index(self.plan.group.rank)] if task.team else None
        numbers = to_predict(sampler, skipped, part)
        seconds = perf_counter() - started
        return Loaded(Work(task, file, sampler.grid, sampler.padding, space, numbers, skipped, part, seconds), sampler)


def _channels(cases: Iterable[Case]) -> int | None:
    """Of the images of the first subject whose headers can be read."""
    for case in cases:
        with suppress(VoxquiltError):
            return sum(ScalarImage(path).shape[0] for path in case.images.values())
    return None
