"""Which process does what? Subjects whole to one process each, or a volume's grid in slabs to several."""

from collections.abc import Sequence
from dataclasses import replace

from voxquilt.data.subject_size import SubjectCost
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.load_balancing import deal


def shares(sizes: Sequence[SubjectCost], ranks: int, distribute: str) -> list[int]:
    """Numbers of the subjects that several processes share.

    Args:
        sizes: Of every subject.
        ranks: How many processes there are.
        distribute: 'subject' for none, 'slab' for all, 'auto' for all if there are fewer subjects than processes, and
            else for those that outweigh an even share, so that one process would keep the others waiting.
    """
    if ranks == 1 or distribute == "subject":
        return []
    even = sum(size.patches for size in sizes) / ranks
    every = distribute == "slab" or len(sizes) < ranks
    return [n for n, size in enumerate(sizes) if size.parts > 1 and (every or size.patches > even)]


def distributed(
    tasks: Sequence[SubjectTask], sizes: Sequence[SubjectCost], ranks: int, distribute: str
) -> list[list[SubjectTask]]:
    """For each rank its tasks: first those that are shared, in one order for all; then its own.

    Whole subjects are dealt on top of what the shares weigh, so that they fill up where slabs are unequal.
    """
    shared = shares(sizes, ranks, distribute)
    dealt: list[list[SubjectTask]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for place, n in enumerate(shared):
        # The collecting rank changes, since it also writes.
        team = tuple((place + member) % ranks for member in range(sizes[n].parts))
        task = replace(tasks[n], team=team)
        for rank in team:
            dealt[rank].append(task)
            loads[rank] += sizes[n].patches / len(team)
    whole = sorted(set(range(len(tasks))) - set(shared))
    for mine, numbers in zip(dealt, deal([sizes[n].patches for n in whole], ranks, loads), strict=True):
        mine.extend(tasks[whole[n]] for n in numbers)
    return dealt
