"""Which part of a run does which subject? Decided alike by every part from the costs alone."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def deal(costs: Sequence[float], parts: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Give each subject whole to a part, so that the parts take about the same time.

    The longest first, each to the part that has the least so far (LPT; Graham, Bounds on multiprocessing timing
    anomalies, 1969). Then, as long as it helps, the busiest part gives a subject to another or exchanges it for a
    smaller one: with about three subjects a part this takes off another tenth.

    Args:
        costs: Of each subject, in any unit.
        parts: At least 1.
        loads: What each part has to do already; nothing if empty.

    Returns:
        For each part the numbers of its subjects, ascending; none where there are more parts than subjects.

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
    while max(total) > 1.01 * least and _exchanged(dealt, costs, total):
        pass
    return [sorted(numbers) for numbers in dealt]


def _exchanged(dealt: list[list[int]], costs: Sequence[float], loads: list[float]) -> bool:
    """Make the exchange that relieves the busiest part most; False if none does."""
    top = max(loads)
    busiest = loads.index(top)
    found = (top, -1, -1, -1)
    for part, numbers in enumerate(dealt):
        for mine in dealt[busiest]:
            for theirs in (-1, *numbers) if part != busiest else ():
                less = costs[mine] - (costs[theirs] if theirs >= 0 else 0)
                found = min(found, (max(top - less, loads[part] + less), part, mine, theirs))
    height, part, mine, theirs = found
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
