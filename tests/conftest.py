"""What several test files share."""

from collections.abc import Iterator

import pytest
from forks import Server, server


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Starts runs of predict.py in a moment."""
    with server() as found:
        yield found
