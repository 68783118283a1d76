"""Who does what in a run? The plan that its processes agree on, before a voxel is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject_size import RunSize, SubjectCost
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.assignment import distributed
from voxquilt.distributed.environment import not_the_tasks, slurm_tasks
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError
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
