"""The plan of a run, on which its processes agree before a voxel is read: who does what."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.subject_size import RunSize, SubjectCost, SubjectSize, extent, together
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.assignment import distributed
from voxquilt.distributed.environment import not_the_tasks, slurm_tasks
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.process_group import Group
from voxquilt.distributed.shard_agreement import agreed
from voxquilt.errors import ConfigError
from voxquilt.prediction.fingerprint import digest
from voxquilt.prediction.resume import Resume, Todo
from voxquilt.reporting.manifest import Row


@dataclass(frozen=True)
class RunPlan:
    """What a run does, as this process sees it.

    Args:
        group: The processes of the run.
        tasks: Of this process, shared volumes first.
        cases: Every subject there is, also of other shards.
        everything: Ids of all subjects of the run, or of its shard, that are not done.
        done: Rows of those that were done before.
        settings: What made them, for the record; empty without `resume`.
        sizes: Of `everything`; with outlines on rank 0 where `GridDataModule.detailed` is set.
        extent: Of `everything`.
        loads: Patches of each rank, a subject's reading and writing counted as one.
        counts: Subjects of each rank.
    """

    group: Group
    tasks: list[SubjectTask]
    cases: list[SubjectFiles]
    everything: list[str]
    done: list[Row]
    settings: Mapping[str, Any]
    sizes: list[SubjectCost] = field(default_factory=list)
    extent: RunSize = field(default_factory=RunSize)
    loads: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def assigned(plan: RunPlan, left: Sequence[SubjectTask], extent: RunSize, distribute: str) -> RunPlan:
    """A plan with its subjects given to the processes, alike in all of them.

    Args:
        plan: Its sizes are those of `left`.
        left: What is to be done.
        extent: Of what can be done.
        distribute: See GridDataModule.
    """
    group, sizes = plan.group, plan.sizes
    tasks = [replace(task, problem=size.problem) for task, size in zip(left, sizes, strict=True)]
    dealt = distributed(tasks, sizes, group.size, distribute) if group.size > 1 else [tasks]
    patches = {task.number: size.patches for task, size in zip(tasks, sizes, strict=True)}
    loads = [sum(patches[task.number] / max(1, len(task.team)) for task in of_rank) for of_rank in dealt]
    return replace(plan, tasks=dealt[group.rank], extent=extent, loads=loads, counts=[len(tasks) for tasks in dealt])


class RunPlanner:
    """Decides what a run does from the headers of its subjects, alike in all processes.

    Args:
        group: The processes of the run.
        grids: How subjects are cut.
        shard: (index, count); see GridDataModule.
        distribute: See GridDataModule.
        resume: Finds what is done already; None plans everything.
    """

    def __init__(
        self, group: Group, grids: GridLoader, shard: tuple[int, int], distribute: str, resume: Resume | None
    ) -> None:
        self._group, self._grids, self._shard = group, grids, shard
        self._distribute, self._resume = distribute, resume
        self._tasks: list[SubjectTask] = []
        # What headers say that were read for all shards, and are needed once more for this one's subjects.
        self._known: dict[str, SubjectCost] = {}

    def plan(self, cases: list[SubjectFiles], *, detailed: bool = False) -> RunPlan:
        """The plan of a run; called by all processes.

        Args:
            cases: Every subject.
            detailed: Whether the plan's sizes have what headers say of each subject, on all ranks.

        Raises:
            ConfigError: outputs were made with other settings, and may not be overwritten.
        """
        group, resume = self._group, self._resume
        ours = group.first(lambda: self.of_shard(cases))
        todo = group.first(lambda: resume.todo(ours) if resume else Todo([""] * len(ours)))
        tasks = [SubjectTask(*parts) for parts in zip(ours, todo.fingerprints, range(len(ours)), strict=True)]
        self._tasks = [task for task in tasks if task.case.subject not in todo.done]
        # Each header is read once, by one process; what it says travels only where somebody wants to look at it.
        costs = self._costs_of_stride()
        sent = costs if detailed else [replace(cost, outline=None) for cost in costs]
        gathered = group.gather((sent, extent(cost.outline for cost in costs)))
        # Back from one list for each rank to one for all.
        sizes = [gathered[n % group.size][0][n // group.size] for n in range(len(self._tasks))]
        done = [todo.done[task.case.subject] for task in tasks if task.case.subject in todo.done]
        settings = {resume.settings_digest: resume.settings} if resume and group.rank == 0 else {}
        plan = RunPlan(group, [], cases, [task.case.subject for task in self._tasks], done, settings, sizes)
        return assigned(plan, self._tasks, together(of_rank for _, of_rank in gathered), self._distribute)

    def set_apart(self, plan: RunPlan, problem: Callable[[SubjectSize], str | None], *, has_others: bool) -> RunPlan:
        """A plan in which subjects fail that have a problem; see GridDataModule.set_apart."""
        group = self._group
        # Headers are read again, each by one process: sizes are kept for the whole run only where somebody asks.
        mine = slice(group.rank, None, group.size)
        headers = zip(plan.everything[mine], plan.sizes[mine], self._costs_of_stride(), strict=True)
        sizes = {name: cost.outline for name, before, cost in headers if cost.outline and not before.problem}
        files = {case.subject: ", ".join(map(str, case.images.values())) for case in plan.cases}
        reasons = {name: reason for name, size in sizes.items() if (reason := problem(size)) is not None}
        if not any(group.gather(len(reasons) < len(sizes))) and not has_others:
            return plan
        left = extent(size for name, size in sizes.items() if name not in reasons)
        gathered = group.gather(({name: f"{files[name]}: {reason}" for name, reason in reasons.items()}, left))
        problems = {name: reason for of_rank, _ in gathered for name, reason in of_rank.items()}
        costs = [
            SubjectCost(1, problem=problems[name]) if name in problems else cost
            for name, cost in zip(plan.everything, plan.sizes, strict=True)
        ]
        rest = together(of_rank for _, of_rank in gathered)
        rest = replace(rest, subjects=len(costs), unread=sum(bool(cost.problem) for cost in costs))
        return assigned(replace(plan, sizes=costs), self._tasks, rest, self._distribute)

    def of_shard(self, cases: list[SubjectFiles]) -> list[SubjectFiles]:
        """The subjects of this shard."""
        index, shards = self._shard
        if shards == 1:
            return cases

        # All subjects are dealt, done or not: a shard that starts late has to deal as the others did. One shard reads
        # the headers for all, or each of hundreds would open every file.
        def costs() -> list[int]:
            return [cost.patches for cost in self._costs(cases)]

        if self._resume is None:
            return [cases[n] for n in deal(costs(), shards)[index]]
        grids, preprocess = self._grids, self._grids.preprocess
        grid = grids.patch_size, grids.patch_overlap, grids.padding_mode is not None, grids.divisible_by, grids.halo
        space = preprocess.orientation, preprocess.spacing
        key = digest([grid, space, [[case.subject, list(case.images.values())] for case in cases]])
        dealt = deal(agreed(self._resume.folder / f"plan_of_{shards}.json", key, costs), shards)
        return [cases[n] for n in dealt[index]]

    def _costs_of_stride(self) -> list[SubjectCost]:
        """Costs of the subjects whose headers this process reads."""
        group = self._group
        costs = self._costs([task.case for task in self._tasks[group.rank :: group.size]], group.size)
        self._known.clear()
        return costs

    def _costs(self, cases: Sequence[SubjectFiles], ranks: int = 1) -> list[SubjectCost]:
        # On a network's file system most of the time is waiting.
        with ThreadPoolExecutor(8) as pool:
            costs = list(pool.map(partial(self._cost, ranks=ranks), cases))
        # The first of several shards reads all headers, and then needs those of its own subjects.
        self._known = {case.subject: cost for case, cost in zip(cases, costs, strict=True)}
        return costs

    def _cost(self, case: SubjectFiles, ranks: int) -> SubjectCost:
        known = self._known.get(case.subject) if ranks == 1 else None
        return known or self._grids.cost(case, ranks)


def check_world(trainer: Trainer | None, shard: tuple[int, int]) -> None:
    """Refuse processes that would each predict everything, or wait for each other for ever.

    Raises:
        ConfigError: SLURM started more tasks than the trainer counts, or the strategy divides the network.
    """
    if trainer is None:
        return
    if shard[1] == 1 and slurm_tasks() not in (1, trainer.world_size):
        raise ConfigError(not_the_tasks(trainer.world_size))
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(
            f"trainer.strategy={type(trainer.strategy).__name__} divides the network between processes, so that none "
            f"may predict more patches than another; use ddp or ddp_spawn."
        )
