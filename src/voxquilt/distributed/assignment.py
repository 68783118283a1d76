"""Assigns subjects to processes: each to one process, or its grid in slabs to several."""

from collections.abc import Sequence
from dataclasses import replace

from voxquilt.data.subject_size import SubjectCost
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.load_balancing import deal


def find_shared(costs: Sequence[SubjectCost], ranks: int, distribute: str) -> list[int]:
    """Numbers of the subjects that several processes share.

    Args:
        costs: The cost of each subject.
        ranks: Number of processes.
        distribute: 'subject' for none, 'slab' for all, 'auto' for all if there are fewer subjects than processes,
            otherwise for those that cost more than an even share, which would keep the other processes waiting.
    """
    if ranks == 1 or distribute == "subject":
        return []
    even = sum(cost.patches for cost in costs) / ranks
    share_all = distribute == "slab" or len(costs) < ranks
    return [n for n, cost in enumerate(costs) if cost.parts > 1 and (share_all or cost.patches > even)]


def assign_tasks(
    tasks: Sequence[SubjectTask], costs: Sequence[SubjectCost], ranks: int, distribute: str
) -> list[list[SubjectTask]]:
    """The tasks of each rank: first those that are shared, in one order for all ranks; then its own.

    Subjects of one process are dealt on top of the loads of the shared ones, so that they even out unequal slabs.
    """
    shared = find_shared(costs, ranks, distribute)
    dealt: list[list[SubjectTask]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for place, n in enumerate(shared):
        # The rank that collects differs from subject to subject, since it also writes.
        team = tuple((place + member) % ranks for member in range(costs[n].parts))
        task = replace(tasks[n], team=team)
        for rank in team:
            dealt[rank].append(task)
            loads[rank] += costs[n].patches / len(team)
    unshared = sorted(set(range(len(tasks))) - set(shared))
    for mine, numbers in zip(dealt, deal([costs[n].patches for n in unshared], ranks, loads), strict=True):
        mine.extend(tasks[unshared[n]] for n in numbers)
    return dealt
