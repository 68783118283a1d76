"""Tests what shards agree on through a file: computed once, and never read from an incomplete file."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from synthetic import count_headers, noise, save

from voxquilt.distributed.process_group import Group
from voxquilt.distributed.shard_agreement import agreed
from voxquilt.errors import OutputError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.resume import Resume
from voxquilt.prediction.run_plan import RunPlanner


def test_of_many_simultaneous_shards_one_computes_for_all(tmp_path: Path) -> None:
    """The others wait for its result, and later ones read it."""
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(len(calls))
        time.sleep(0.05)
        return [3, 1, 2, len(calls)]

    path = tmp_path / "new/plan.json"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: agreed(path, "a", make), range(8)))
    assert found == [[3, 1, 2, 1]] * 8
    assert calls == [0]
    assert agreed(path, "a", lambda: [9]) == [3, 1, 2, 1]


@pytest.mark.parametrize(
    "before", ["", '{"key": "a", "numbers": [1, 2', "[]", '{"key": "b", "numbers": [1, 2, 3, 4, 5]}']
)
def test_an_invalid_or_foreign_agreement_is_replaced(before: str, tmp_path: Path) -> None:
    """An empty or truncated file, another program's, another key's."""
    path = tmp_path / "plan.json"
    path.write_text(before)
    assert agreed(path, "a", lambda: [7]) == [7]
    assert agreed(path, "a", lambda: [8]) == [7]


def test_a_failed_computation_leaves_no_agreement(tmp_path: Path) -> None:
    """The next shard computes it; a file that cannot be written is named."""

    def fails() -> list[int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        agreed(tmp_path / "plan.json", "a", fails)
    assert agreed(tmp_path / "plan.json", "a", lambda: [1]) == [1]
    with pytest.raises(OutputError, match=r"plan\.json: writing failed"):
        agreed(tmp_path / "plan.json/plan.json", "a", fails)


def test_one_shard_reads_the_headers_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again only if subjects or grid change; every subject is then still in exactly one shard."""
    for n in range(7):
        save(tmp_path / f"scans/{n}.nii", noise((8, 8, 8 + 4 * n)))
    read = count_headers(monkeypatch)

    def dealt(patch: int, resume: Resume | None) -> list[str]:
        read.clear()
        shards = [GridDataModule(str(tmp_path / "scans"), patch, shard=(n, 3), resume=resume) for n in range(3)]
        planners = [RunPlanner(Group(None), [data.grids], data.shard, "subject", resume) for data in shards]
        dealt = [planner.select_shard(data.cases) for planner, data in zip(planners, shards, strict=True)]
        return sorted(case.subject for cases in dealt for case in cases)

    every = [str(n) for n in range(7)]
    resume = Resume(tmp_path / "outputs", {})
    assert dealt(8, resume) == every
    assert sorted(read) == every
    assert dealt(8, resume) == every
    assert read == []
    assert dealt(6, resume) == every
    assert sorted(read) == every
    save(tmp_path / "scans/7.nii", noise((8, 8, 8)))
    assert dealt(6, resume) == [*every, "7"]
    assert len(read) == 8
    assert dealt(6, None) == [*every, "7"]
    assert len(read) == 24
