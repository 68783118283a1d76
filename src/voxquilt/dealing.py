"""Which part of a run does which subject? Decided alike by every part from the costs alone."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def deal(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Give each subject whole to a part, so that the parts take about the same time.

    The longest first, each to the part that has the least so far (LPT; Graham, Bounds on multiprocessing timing
    anomalies, 1969). Then, as long as it helps, the busiest part gives a subject to another or exchanges it for a
    smaller one: with about three subjects a part this takes off another tenth.

    Args:
        costs: Of each subject, in any unit.
        parts: At least 1.

    Returns:
        For each part the numbers of its subjects, ascending; none where there are more parts than subjects.

    >>> deal([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0.0, part) for part in range(parts)]
    heapify(loads)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, part = loads[0]
        dealt[part].append(number)
        heapreplace(loads, (load + costs[number], part))
    least = max(sum(costs) / parts, *costs) if costs else 0.0
    while _busiest(dealt, costs)[0] > 1.01 * least and _exchanged(dealt, costs):
        pass
    return [sorted(numbers) for numbers in dealt]


def _busiest(dealt: list[list[int]], costs: Sequence[float]) -> tuple[float, int]:
    """The highest load and whose it is, the first of several."""
    loads = [sum(costs[n] for n in numbers) for numbers in dealt]
    return max(loads), loads.index(max(loads))


def _exchanged(dealt: list[list[int]], costs: Sequence[float]) -> bool:
    """Make the exchange that relieves the busiest part most; False if none does."""
    top, busiest = _busiest(dealt, costs)
    found = (top, -1, -1, -1)
    for part, numbers in enumerate(dealt):
        load = sum(costs[n] for n in numbers)
        for mine in dealt[busiest]:
            for theirs in (-1, *numbers) if part != busiest else ():
                less = costs[mine] - (costs[theirs] if theirs >= 0 else 0)
                found = min(found, (max(top - less, load + less), part, mine, theirs))
    height, part, mine, theirs = found
    if height >= top:
        return False
    dealt[busiest].remove(mine)
    dealt[part].append(mine)
    if theirs >= 0:
        dealt[part].remove(theirs)
        dealt[busiest].append(theirs)
    return True
