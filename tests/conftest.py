"""What several test files share."""

import os
from collections.abc import Iterator

import pytest
from forks import Server, server

# Read when torch is imported, by the processes that tests start too. Tests are run beside each other: with a thread for
# each core in each of them, operations on few voxels take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Starts runs of predict.py in a moment."""
    with server() as found:
        yield found
