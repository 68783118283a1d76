"""Tests that the benchmark of a GPU runs from beginning to end, on the host and with small volumes."""

import json
import subprocess
import sys

from synthetic import ROOT


def test_every_part_gives_figures_that_hang_together() -> None:
    """A table, and one line of JSON: all parts, positive seconds, forwards that are no longer than their loop."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["device"], found["small"]) == ("cpu", True)
    jobs = {row.pop("job"): row for row in found["rows"]}
    assert [name.split(",")[0].split(":")[0] for name in jobs] == [
        *["stitching"] * 2, *["CT"] * 3, "2 volumes", "2 volumes again", *["loop"] * 4
    ]  # fmt: skip
    assert not any("problem" in row for row in jobs.values())
    assert all(value > 0 for row in jobs.values() for name, value in row.items() if name != "device GiB")
    for row in jobs.values():
        if "forwards [s]" in row:
            assert row["forwards [s]"] < row["loop [s]"]
    assert all(name in done.stdout for name in jobs)
