"""Tests the assignment of subjects: each to one process, or once to each of its team, with balanced loads."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject_size import SubjectCost
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.assignment import assign_tasks, find_shared
from voxquilt.distributed.load_balancing import deal
from voxquilt.vocabulary import DISTRIBUTE

RANKS = st.integers(1, 9)


@st.composite
def cohorts(draw: st.DrawFn, most: int = 200) -> tuple[list[SubjectCost], int]:
    """Sizes of subjects and a number of processes; a subject has at most one part per process and per patch."""
    ranks = draw(RANKS)
    patches = draw(st.lists(st.integers(1, most), max_size=30))
    return [SubjectCost(count, draw(st.integers(1, min(count, ranks)))) for count in patches], ranks


def tasks(count: int) -> list[SubjectTask]:
    return [SubjectTask(SubjectFiles(f"s{n:02}", {"image": Path(f"{n}.nii")}), f"print {n}", n) for n in range(count)]


def loads(dealt: list[list[SubjectTask]], sizes: list[SubjectCost]) -> list[float]:
    return [sum(sizes[task.number].patches / max(1, len(task.team)) for task in mine) for mine in dealt]


@given(cohorts(), st.sampled_from(DISTRIBUTE))
def test_every_subject_goes_to_one_process_or_to_each_of_its_team(
    cohort: tuple[list[SubjectCost], int], mode: str
) -> None:
    """Exactly once, with its files and fingerprint unchanged."""
    sizes, ranks = cohort
    given_ = tasks(len(sizes))
    dealt = assign_tasks(given_, sizes, ranks, mode)
    assert len(dealt) == ranks
    doers: dict[int, list[int]] = {task.number: [] for task in given_}
    for rank, mine in enumerate(dealt):
        for task in mine:
            doers[task.number].append(rank)
            original = given_[task.number]
            assert (task.case, task.fingerprint) == (original.case, original.fingerprint)
    teams = {task.number: task.team for mine in dealt for task in mine}
    for number, ranks_of in doers.items():
        team = teams[number]
        assert ranks_of == (sorted(team) if team else ranks_of[:1])
        assert len(ranks_of) == (sizes[number].parts if team else 1)
        assert len({*team}) == len(team)
        assert all({task.team for task in mine if task.number == number} <= {team} for mine in dealt)


@given(cohorts(), st.sampled_from(DISTRIBUTE))
def test_shared_subjects_come_first_and_in_one_order_for_all(cohort: tuple[list[SubjectCost], int], mode: str) -> None:
    """Otherwise processes would wait for each other in a ring. Unshared subjects keep their order too."""
    sizes, ranks = cohort
    for mine in assign_tasks(tasks(len(sizes)), sizes, ranks, mode):
        shared = [bool(task.team) for task in mine]
        assert shared == sorted(shared, reverse=True)
        for kind in (True, False):
            numbers = [task.number for task in mine if bool(task.team) == kind]
            assert all(a < b for a, b in pairwise(numbers))


@given(cohorts())
def test_the_mode_decides_which_subjects_are_shared(cohort: tuple[list[SubjectCost], int]) -> None:
    """'subject' none, 'slab' all that can be divided, 'auto' those of small cohorts or larger than an even share."""
    sizes, ranks = cohort
    divisible = [n for n, size in enumerate(sizes) if size.parts > 1]
    assert find_shared(sizes, ranks, "subject") == []
    assert find_shared(sizes, ranks, "slab") == (divisible if ranks > 1 else [])
    auto = find_shared(sizes, ranks, "auto")
    if ranks == 1:
        assert auto == []
    elif len(sizes) < ranks:
        assert auto == divisible
    else:
        total = sum(size.patches for size in sizes)
        assert auto == [n for n in divisible if sizes[n].patches * ranks > total]


def test_auto_shares_subjects_that_would_keep_others_waiting() -> None:
    """Few subjects, one giant, an even cohort, indivisible subjects, and none."""
    assert find_shared([SubjectCost(10, 3)] * 2, 3, "auto") == [0, 1]
    assert find_shared([SubjectCost(100, 2), SubjectCost(1, 2), SubjectCost(1, 1)], 2, "auto") == [0]
    assert find_shared([SubjectCost(10, 2)] * 2, 2, "auto") == []
    assert find_shared([SubjectCost(100, 1), SubjectCost(1, 2)], 2, "auto") == []
    assert find_shared([], 3, "auto") == []


def test_processes_take_turns_in_collecting_shared_volumes() -> None:
    """The first of a team also writes; with as many volumes as processes each collects one."""
    sizes = [SubjectCost(9, 3)] * 6
    dealt = assign_tasks(tasks(6), sizes, 3, "slab")
    assert Counter(task.team[0] for task in dealt[0]) == {0: 2, 1: 2, 2: 2}
    assert [task.team for task in dealt[1]] == [(0, 1, 2), (1, 2, 0), (2, 0, 1)] * 2


@given(cohorts(), st.sampled_from(DISTRIBUTE))
def test_no_process_has_much_more_than_its_share(cohort: tuple[list[SubjectCost], int], mode: str) -> None:
    """At most an even share plus the largest subject, the bound of giving each to the least loaded process."""
    sizes, ranks = cohort
    shared = {*find_shared(sizes, ranks, mode)}
    whole = [size.patches for n, size in enumerate(sizes) if n not in shared]
    dealt = assign_tasks(tasks(len(sizes)), sizes, ranks, mode)
    after, before = loads(dealt, sizes), loads([[task for task in mine if task.team] for mine in dealt], sizes)
    assert abs(sum(after) - sum(size.patches for size in sizes)) < 1e-6
    assert max(after) <= max(*before, 0, sum(after) / ranks + max(whole, default=0)) + 1e-6


def test_unshared_subjects_go_to_processes_without_slabs() -> None:
    """A volume of two parts among four processes: the other two get the rest."""
    dealt = assign_tasks(tasks(3), [SubjectCost(20, 2), SubjectCost(10), SubjectCost(10)], 4, "slab")
    assert [[task.number for task in mine] for mine in dealt] == [[0], [0], [1], [2]]


# Dealing on top of existing loads

COSTS = st.lists(st.integers(1, 100), max_size=25)
LOADS = st.lists(st.integers(0, 100), min_size=1, max_size=8)


@given(COSTS, LOADS)
def test_dealing_takes_existing_loads_into_account(costs: list[int], before: list[int]) -> None:
    """No part exceeds an even share plus one subject, unless it had more before."""
    dealt = deal(costs, len(before), before)
    assert sorted(n for numbers in dealt for n in numbers) == list(range(len(costs)))
    after = [load + sum(costs[n] for n in numbers) for load, numbers in zip(before, dealt, strict=True)]
    even = (sum(costs) + sum(before)) / len(before)
    for load, total in zip(before, after, strict=True):
        assert total <= max(load, even + max(costs, default=0))


@given(COSTS, st.integers(1, 8))
def test_loads_are_zero_by_default(costs: list[int], parts: int) -> None:
    """The same parts come out as with explicit zeros."""
    assert deal(costs, parts) == deal(costs, parts, [0] * parts)


@given(COSTS, LOADS)
def test_dealing_is_equal_for_integer_and_float_costs(costs: list[int], before: list[int]) -> None:
    """So that every machine computes the same parts."""
    assert deal(costs, len(before), before) == deal([float(c) for c in costs], len(before), [float(x) for x in before])


def test_a_part_loaded_beyond_the_rest_gets_nothing() -> None:
    """Its load is more than all the others together would get."""
    assert deal([5, 5, 5], 3, [100, 0, 0])[0] == []
    assert deal([4, 3], 2, [0, 2]) == [[0], [1]]
    assert deal([], 2, [3, 1]) == [[], []]
