"""Plans a run from headers: which subjects are left to do, and which process predicts which of them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.subject_size import RunSize, SubjectCost, SubjectSize, combined, largest_of, run_size
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.assignment import assign_tasks
from voxquilt.distributed.environment import not_the_tasks, slurm_tasks
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.process_group import Group
from voxquilt.distributed.shard_agreement import agreed
from voxquilt.errors import ConfigError
from voxquilt.geometry.padding import pads_border
from voxquilt.prediction.fingerprint import digest
from voxquilt.prediction.resume import Resume, Todo
from voxquilt.prediction.runs_before import failures_before
from voxquilt.reporting.manifest import Row
from voxquilt.vocabulary import CHANNELS


@dataclass(frozen=True)
class RunPlan:
    """What a run does, as this process sees it.

    Args:
        group: The processes of the run.
        tasks: Tasks of this process, shared volumes first.
        cases: Every subject, including those of other shards.
        subjects: Ids of all subjects of the run, or of its shard, that are not done.
        done: Rows of the subjects that were done before.
        settings: Settings by their digest, for the record; empty without `resume`.
        costs: Costs of `subjects`; they have sizes if `GridDataModule.detailed` is set.
        size: Size of the run: of `subjects` that can be predicted.
        loads: Patches of each rank, where reading and writing a subject count as one.
        counts: Number of subjects of each rank.
    """

    group: Group
    tasks: list[SubjectTask]
    cases: list[SubjectFiles]
    subjects: list[str]
    done: list[Row]
    settings: Mapping[str, Any]
    costs: list[SubjectCost] = field(default_factory=list)
    size: RunSize = field(default_factory=RunSize)
    loads: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def assign(plan: RunPlan, tasks: Sequence[SubjectTask], size: RunSize, distribute: str) -> RunPlan:
    """Assign the subjects of a plan to the processes; the result is the same in all of them.

    Args:
        plan: A plan that has the costs of the tasks.
        tasks: The subjects to predict.
        size: Size of the subjects that can be predicted.
        distribute: See GridDataModule.
    """
    group, costs = plan.group, plan.costs
    firsts = accumulate((cost.volumes - 1 for cost in costs), initial=0)  # each volume of a series has a number
    tasks = [
        replace(task, problem=cost.problem, volumes=cost.volumes, number=task.number + first)
        for task, cost, first in zip(tasks, costs, firsts, strict=False)
    ]
    by_rank = assign_tasks(tasks, costs, group.size, distribute) if group.size > 1 else [tasks]
    patches = {task.number: cost.patches for task, cost in zip(tasks, costs, strict=True)}
    loads = [sum(patches[task.number] / max(1, len(task.team)) for task in mine) for mine in by_rank]
    return replace(plan, tasks=by_rank[group.rank], size=size, loads=loads, counts=[len(mine) for mine in by_rank])


class RunPlanner:
    """Decides what a run does from the headers of its subjects; the same in all processes.

    Args:
        group: The processes of the run.
        models: How each model's subjects are read and cut.
        shard: (index, count); see GridDataModule.
        distribute: See GridDataModule.
        resume: Finds the subjects that are done already; None plans all.
    """

    def __init__(
        self,
        group: Group,
        models: Sequence[GridLoader],
        shard: tuple[int, int],
        distribute: str,
        resume: Resume | None,
    ) -> None:
        self._group, self._models, self._shard = group, models, shard
        self._distribute, self._resume = distribute, resume
        self._tasks: list[SubjectTask] = []
        # Costs from headers that were read for all shards, and are needed again for this shard's subjects.
        self._known: dict[str, SubjectCost] = {}
        self._failed_before: dict[str, str] = {}

    def plan(self, cases: list[SubjectFiles], *, detailed: bool = False) -> RunPlan:
        """The plan of a run; called by all processes.

        Args:
            cases: Every subject.
            detailed: Whether the plan's costs have the sizes of each subject, on all ranks.

        Raises:
            ConfigError: outputs were made with other settings and may not be overwritten.
        """
        group, resume = self._group, self._resume
        masks = {mask for grids in self._models for mask in (grids.within, grids.skip) if isinstance(mask, str)}
        self._failed_before = group.first(lambda: failures_before(cases, masks))
        ours = group.first(lambda: self.select_shard(cases))
        todo = group.first(lambda: resume.todo(ours) if resume else Todo([""] * len(ours)))
        tasks = [SubjectTask(*parts) for parts in zip(ours, todo.fingerprints, range(len(ours)), strict=True)]
        # What is done of a subject was made of a file that should have been written anew.
        kept = {subject: row for subject, row in todo.done.items() if subject not in self._failed_before}
        self._tasks = [task for task in tasks if task.case.subject not in kept]
        # Each header is read once, by one process; sizes are sent only if they will be shown.
        costs = self._costs_of_stride()
        sent = costs if detailed else [replace(cost, size=None) for cost in costs]
        gathered = group.gather((sent, run_size(cost.size for cost in costs)))
        # From one list per rank to one for all.
        all_costs = [gathered[n % group.size][0][n // group.size] for n in range(len(self._tasks))]
        done = [kept[task.case.subject] for task in tasks if task.case.subject in kept]
        settings = {resume.settings_digest: resume.settings} if resume and group.rank == 0 else {}
        plan = RunPlan(group, [], cases, [task.case.subject for task in self._tasks], done, settings, all_costs)
        return assign(plan, self._tasks, combined(size for _, size in gathered), self._distribute)

    def set_apart(self, plan: RunPlan, problem: Callable[[SubjectSize], str | None], *, has_others: bool) -> RunPlan:
        """A plan in which subjects with a problem fail; see GridDataModule.set_apart."""
        group = self._group
        # Headers are read again, each by one process, since sizes are kept for the whole run only if `detailed`.
        mine = slice(group.rank, None, group.size)
        headers = zip(plan.subjects[mine], plan.costs[mine], self._costs_of_stride(), strict=True)
        sizes = {name: cost.size for name, before, cost in headers if cost.size and not before.problem}
        files = {case.subject: ", ".join(map(str, case.images.values())) for case in plan.cases}
        reasons = {name: reason for name, size in sizes.items() if (reason := problem(size)) is not None}
        if not any(group.gather(len(reasons) < len(sizes))) and not has_others:
            return plan
        left = run_size(size for name, size in sizes.items() if name not in reasons)
        gathered = group.gather(({name: f"{files[name]}: {reason}" for name, reason in reasons.items()}, left))
        problems = {name: reason for reasons_of_rank, _ in gathered for name, reason in reasons_of_rank.items()}
        costs = [
            SubjectCost(1, problem=problems[name]) if name in problems else cost
            for name, cost in zip(plan.subjects, plan.costs, strict=True)
        ]
        rest = combined(size for _, size in gathered)
        rest = replace(rest, subjects=len(costs), unread=sum(bool(cost.problem) for cost in costs))
        return assign(replace(plan, costs=costs), self._tasks, rest, self._distribute)

    def select_shard(self, cases: list[SubjectFiles]) -> list[SubjectFiles]:
        """The subjects of this shard."""
        index, shards = self._shard
        if shards == 1:
            return cases

        # All subjects are dealt, done or not: a shard that starts late must deal as the others did. One shard reads the
        # headers for all; otherwise each of hundreds of shards would open every file.
        def costs() -> list[int]:
            return [cost.patches for cost in self._costs(cases)]

        if self._resume is None:
            return [cases[n] for n in deal(costs(), shards)[index]]
        key = digest([*map(_placement, self._models), [[case.subject, list(case.images.values())] for case in cases]])
        dealt = deal(agreed(self._resume.folder / f"plan_of_{shards}.json", key, costs), shards)
        return [cases[n] for n in dealt[index]]

    def _costs_of_stride(self) -> list[SubjectCost]:
        """Costs of the subjects whose headers this process reads."""
        group = self._group
        costs = self._costs([task.case for task in self._tasks[group.rank :: group.size]], group.size)
        self._known.clear()
        return costs

    def _costs(self, cases: Sequence[SubjectFiles], ranks: int = 1) -> list[SubjectCost]:
        # On a network file system most of the time is spent waiting.
        with ThreadPoolExecutor(8) as pool:
            costs = list(pool.map(partial(self._cost, ranks=ranks), cases))
        # The first of several shards reads all headers, and later needs those of its own subjects.
        self._known = {case.subject: cost for case, cost in zip(cases, costs, strict=True)}
        return costs

    def _cost(self, case: SubjectFiles, ranks: int) -> SubjectCost:
        if case.subject in self._failed_before:
            return SubjectCost(1, problem=self._failed_before[case.subject])
        known = self._known.get(case.subject) if ranks == 1 else None
        return known or largest_of([grids.cost(case, ranks) for grids in self._models])


def _placement(grids: GridLoader) -> list[Any]:
    """What decides how many patches a model's subjects have."""
    preprocess = grids.preprocess
    grid = grids.patch_size, grids.patch_overlap, pads_border(grids.padding_mode), grids.divisible_by, grids.halo
    space = preprocess.orientation, preprocess.spacing, preprocess.grid, preprocess.transpose
    return [*grid, grids.placement, grids.step, *space, *[grids.time] * (grids.time != CHANNELS)]


def check_world(trainer: Trainer | None, shard: tuple[int, int]) -> None:
    """Refuse processes that would each predict everything, or wait for each other forever.

    Raises:
        ConfigError: SLURM started more tasks than the trainer counts, or the strategy divides the network.
    """
    if trainer is None:
        return
    if shard[1] == 1 and slurm_tasks() not in (1, trainer.world_size):
        raise ConfigError(not_the_tasks(trainer.world_size))
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(
            f"trainer.strategy={type(trainer.strategy).__name__} divides the network between processes, so that all "
            f"must predict equally many patches; use ddp or ddp_spawn."
        )
