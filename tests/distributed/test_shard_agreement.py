"""Laws of what shards agree on without knowing of each other: worked out once, and never from half a file."""

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


def test_of_many_who_ask_at_once_one_works_it_out(tmp_path: Path) -> None:
    """The others wait for it; who comes later reads it too."""
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
def test_numbers_of_something_else_are_replaced(before: str, tmp_path: Path) -> None:
    """Half a file, another program's, another key's, a longer one's."""
    path = tmp_path / "plan.json"
    path.write_text(before)
    assert agreed(path, "a", lambda: [7]) == [7]
    assert agreed(path, "a", lambda: [8]) == [7]


def test_an_error_leaves_nothing_to_read(tmp_path: Path) -> None:
    """Who comes next works it out; a file that cannot be written is named."""

    def fails() -> list[int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        agreed(tmp_path / "plan.json", "a", fails)
    assert agreed(tmp_path / "plan.json", "a", lambda: [1]) == [1]
    with pytest.raises(OutputError, match=r"plan\.json: writing failed"):
        agreed(tmp_path / "plan.json/plan.json", "a", fails)


def test_one_shard_reads_the_headers_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the subjects or the grid are others; every subject then is still in one shard."""
    for n in range(7):
        save(tmp_path / f"scans/{n}.nii", noise((8, 8, 8 + 4 * n)))
    read = count_headers(monkeypatch)

    def dealt(patch: int, resume: Resume | None) -> list[str]:
        read.clear()
        shards = [GridDataModule(str(tmp_path / "scans"), patch, shard=(n, 3), resume=resume) for n in range(3)]
        planners = [RunPlanner(Group(None), data.grids, data.shard, "subject", resume) for data in shards]
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
