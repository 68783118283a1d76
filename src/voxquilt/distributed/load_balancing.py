"""Divides subjects among the processes of a run by their costs; every process computes the same division."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def deal(costs: Sequence[float], parts: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Assign each subject to one part, so that all parts take about the same time.

    Longest subjects first, each to the part with the least load so far (LPT; Graham, Bounds on multiprocessing timing
    anomalies, 1969). Then, as long as it helps, the busiest part gives a subject to another or exchanges it for a
    smaller one: with about three subjects per part this saves another tenth.

    Args:
        costs: Cost of each subject, in any unit.
        parts: Number of parts, at least 1.
        loads: Cost that each part has already; empty for none.

    Returns:
        For each part the ascending numbers of its subjects, which are empty for some if there are more parts than
        subjects.

    >>> deal([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    total = [float(load) for load in loads] or [0.0] * parts
    least = max((sum(costs) + sum(total)) / parts, max(costs, default=0.0), max(total))
    heap = [(load, part) for part, load in enumerate(total)]
    heapify(heap)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, part = heap[0]
        dealt[part].append(number)
        total[part] += costs[number]
        heapreplace(heap, (load + costs[number], part))
    while max(total) > 1.01 * least and _improve(dealt, costs, total):
        pass
    return [sorted(numbers) for numbers in dealt]


def _improve(dealt: list[list[int]], costs: Sequence[float], loads: list[float]) -> bool:
    """Make the exchange that relieves the busiest part most; False if no exchange does."""
    top = max(loads)
    busiest = loads.index(top)
    best = (top, -1, -1, -1)
    for part, numbers in enumerate(dealt):
        for mine in dealt[busiest]:
            for theirs in (-1, *numbers) if part != busiest else ():
                less = costs[mine] - (costs[theirs] if theirs >= 0 else 0)
                best = min(best, (max(top - less, loads[part] + less), part, mine, theirs))
    height, part, mine, theirs = best
    if height >= top:
        return False
    less = costs[mine] - (costs[theirs] if theirs >= 0 else 0)
    loads[busiest] -= less
    loads[part] += less
    dealt[busiest].remove(mine)
    dealt[part].append(mine)
    if theirs >= 0:
        dealt[part].remove(theirs)
        dealt[busiest].append(theirs)
    return True
