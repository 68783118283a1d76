"""Provides fixtures and markers that several test files share."""

import os
import subprocess
from collections.abc import Iterator

import pytest
import synthetic
from forks import Server, server

# Read when torch is imported, also by processes that tests start. Tests run side by side: with one thread per core in
# each of them, operations on a few voxels take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes, which take most of the time and which `make check` leaves out."""
    starters = (subprocess, subprocess.run, subprocess.Popen, synthetic.run)
    for item in items:
        module = getattr(item, "module", None)
        imports = any(value is starter for value in vars(module).values() for starter in starters) if module else False
        if imports or "forks" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """A server that starts runs of predict.py without delay."""
    with server() as found:
        yield found
