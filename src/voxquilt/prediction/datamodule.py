"""Which patches does a predict run see? A grid sampler per subject, and the subjects dealt to the processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from lightning.pytorch import LightningDataModule

from voxquilt.data.discovery import SubjectFiles, find_cases
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.prefetch import LoadFailure, PatchStream
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject_size import SubjectCost, SubjectSize, extent, together
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.process_group import Group
from voxquilt.distributed.shard_agreement import agreed
from voxquilt.geometry.frame import to_triple
from voxquilt.geometry.padding import to_padding
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.network_check import check_overlap, find_halo
from voxquilt.prediction.fingerprint import digest
from voxquilt.prediction.resume import Resume, Todo
from voxquilt.prediction.run_plan import RunPlan, assigned, check_world
from voxquilt.vocabulary import DISTRIBUTE, check_name


class GridDataModule(LightningDataModule):
    """Wraps a GridSampler around each subject and serves their patches for `Trainer.predict`.

    Args:
        inputs, images: See `voxquilt.data.discovery.find_cases`.
        patch_size: Voxels in model space, an integer or three.
        patch_overlap: Voxels that neighbours share, even, an integer or three.
        padding_mode: See GridSampler; volumes smaller than a patch are padded in any case.
        divisible_by: Pad model space to a multiple of so many voxels.
        batch_size: Patches a batch; 'auto' is settled by `voxquilt.planning.preflight.settled`, which VolumeWriter
            calls.
        num_workers: Threads that load subjects ahead, each one subject; 0 loads in the main thread.
        nonfinite: What to do with NaN and infinite voxels: 'error' or 'zero'.
        skip: Patches without foreground are not predicted and count as background. Foreground is what is above a
            number in the first image, in model space and as the network sees it; or above 0 in a mask file on that
            image's grid, given by a pattern with `{subject}`.
        labels: For `voxquilt.reporting.evaluation`: where true labels are, a path with `{subject}`, or one for each
            channel. By
            default those of a table's column `label`, which is no image.
        preprocess: To model space; RAS with the file's spacing by default.
        shard: (index, count): predict one of `count` parts of the subjects, of about as many patches each. Every part
            deals alike, from headers; with `resume` one of them reads these for all.
        distribute: With several processes, 'subject' gives each subject to one of them, 'slab' divides every volume's
            grid between all, 'auto' does so where there are fewer subjects than processes or one outweighs its share.
        resume: Finds what is done already; None predicts everything.
        output_dir: Where the run writes, since what lies there is never an input; by default the folder of `resume`.

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
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._inputs = inputs, images, (), output_dir if resume is None else resume.folder
        if is_first() and not is_external():
            _ = self.cases  # what is wrong with them is said at once, or when all processes can hear it
        to_padding(0 if padding_mode is None else padding_mode)
        self.grids = GridLoader(
            to_triple(patch_size, "data.patch_size", minimum=1),
            to_triple(patch_overlap, "data.patch_overlap"),
            replace(preprocess or Preprocess(), nonfinite=nonfinite),
            padding_mode,
            to_triple(divisible_by, "data.divisible_by", minimum=1),
            skip,
        )
        """How subjects are read and cut; the halo of the network's outputs is known from `setup` on."""
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.labels = labels
        self.shard = shard
        self.distribute = check_name(distribute, DISTRIBUTE, "run.distribute")
        self._resume = resume
        self._plan: RunPlan | None = None
        self._stopped: Callable[[], bool] = bool
        self._failures: list[LoadFailure] = []
        self._known: dict[str, SubjectCost] = {}
        self.layout: str = "auto"
        """How outputs lie in patches (`voxquilt.geometry.output_layout`), which `setup` asks the network."""
        self.detailed = False
        """Whether `plan.sizes` is to have outlines; set before `setup`."""

    @cached_property
    def cases(self) -> list[SubjectFiles]:
        """Every subject, in the order of their ids; with several processes only rank 0 looks for them."""
        return find_cases(*self._inputs)

    @property
    def plan(self) -> RunPlan:
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
        tasks = [SubjectTask(*parts) for parts in zip(ours, todo.fingerprints, range(len(ours)), strict=True)]
        self._left = left = [task for task in tasks if task.case.subject not in todo.done]
        # Each header is read once, by one process; outlines travel only where somebody wants to look at them.
        stride = self._stride(group)
        sent = stride if self.detailed else [replace(size, outline=None) for size in stride]
        gathered = group.gather((sent, extent(size.outline for size in stride)))
        # Back from one list for each rank to one for all.
        sizes = [gathered[n % group.size][0][n // group.size] for n in range(len(left))]
        done = [todo.done[task.case.subject] for task in tasks if task.case.subject in todo.done]
        settings = {self._resume.settings_digest: self._resume.settings} if self._resume and group.rank == 0 else {}
        plan = RunPlan(group, [], cases, [task.case.subject for task in left], done, settings, sizes)
        self._plan = assigned(plan, left, together(of_rank for _, of_rank in gathered), self.distribute)

    def outlines(self) -> dict[str, SubjectSize]:
        """Outlines of this process's share of the headers, read again; those of subjects that can be predicted."""
        plan, sizes = self.plan, self._stride(self.plan.group)
        names = plan.everything[plan.group.rank :: plan.group.size]
        known = plan.sizes[plan.group.rank :: plan.group.size]
        found = zip(names, known, sizes, strict=True)
        return {name: size.outline for name, before, size in found if size.outline is not None and not before.problem}

    def set_apart(self, problems: Mapping[str, str], left: Iterable[SubjectSize]) -> None:
        """Have subjects fail for what is wrong with them, and plan for the others alone; called by all processes.

        Args:
            problems: Reasons by subject, of this process's share of the headers.
            left: Outlines of the others of its share.
        """
        plan = self.plan
        gathered = plan.group.gather((dict(problems), extent(left)))
        reasons = {name: reason for of_rank, _ in gathered for name, reason in of_rank.items()}
        sizes = [
            SubjectCost(1, problem=reasons[name]) if name in reasons else size
            for name, size in zip(plan.everything, plan.sizes, strict=True)
        ]
        bad = sum(bool(size.problem) for size in sizes)
        rest = together(of_rank for _, of_rank in gathered)
        rest = replace(rest, subjects=len(sizes), unread=bad)
        self._plan = assigned(replace(plan, sizes=sizes), self._left, rest, self.distribute)

    def _stride(self, group: Group) -> list[SubjectCost]:
        """Of the subjects whose headers this process reads."""
        sizes = self._sizes([task.case for task in self._left[group.rank :: group.size]], group.size)
        self._known.clear()
        return sizes

    def _look_at_outputs(self, cases: Sequence[SubjectFiles]) -> None:
        """Find out how the network's outputs lie in patches, where the model says that they lack a border."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, PatchPredictor):
            return
        self.layout = module.network.layout
        if self.layout == "cropped":
            grids = self.grids
            halo = find_halo(module.network, cases, grids.patch_size)
            check_overlap(grids.patch_size, halo, grids.patch_overlap)
            self.grids = replace(grids, halo=halo)

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """End the stream of batches before the next one as soon as `stopped` says so."""
        self._stopped = stopped

    def failures(self) -> list[LoadFailure]:
        """Subjects that could not be loaded since the last call; whoever keeps the manifest asks after each batch."""
        found: list[LoadFailure] = []
        while self._failures:
            found.append(self._failures.pop(0))
        return found

    def _of_shard(self, cases: list[SubjectFiles]) -> list[SubjectFiles]:
        index, shards = self.shard
        if shards == 1:
            return cases

        # All subjects are dealt, done or not: a shard that starts late has to deal as the others did. One shard reads
        # the headers for all, or each of hundreds would open every file.
        def costs() -> list[int]:
            return [size.patches for size in self._sizes(cases)]

        if self._resume is None:
            return [cases[n] for n in deal(costs(), shards)[index]]
        grids, preprocess = self.grids, self.grids.preprocess
        grid = grids.patch_size, grids.patch_overlap, grids.padding_mode is not None, grids.divisible_by, grids.halo
        space = preprocess.orientation, preprocess.spacing
        key = digest([grid, space, [[case.subject, list(case.images.values())] for case in cases]])
        dealt = deal(agreed(self._resume.folder / f"plan_of_{shards}.json", key, costs), shards)
        return [cases[n] for n in dealt[index]]

    def _sizes(self, cases: Sequence[SubjectFiles], ranks: int = 1) -> list[SubjectCost]:
        # On a network's file system most of the time is waiting.
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(partial(self._size, ranks=ranks), cases))
        # The first of several shards reads all headers, and then needs those of its own subjects.
        self._known = {case.subject: size for case, size in zip(cases, sizes, strict=True)}
        return sizes

    def _size(self, case: SubjectFiles, ranks: int) -> SubjectCost:
        return self._known[case.subject] if ranks == 1 and case.subject in self._known else self.grids.cost(case, ranks)

    def predict_dataloader(self) -> PatchStream:
        """All patches of this process, subject by subject."""
        return PatchStream(
            self.plan.tasks,
            partial(self.grids.load, rank=self.plan.group.rank),
            int(self.batch_size),
            self.num_workers,
            self._failures.append,
            self._stopped,
        )
