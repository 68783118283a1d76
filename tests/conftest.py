"""What several test files share."""

from collections.abc import Iterator

import pytest
from forks import Server, server
from hypothesis import settings

# Other examples in every run; CI has 15 minutes for all tests.
settings.register_profile("voxquilt", max_examples=50)
settings.load_profile("voxquilt")


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Starts runs of predict.py in a moment."""
    with server() as found:
        yield found
