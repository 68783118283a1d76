"""Finishes subjects on cores that are idle while others are predicted."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Cores for each thread, and the most threads. On a GPU's host many cores are idle; where there are few, they have other
# work.
_CORES, _MOST = 4, 4


def spare_threads() -> int:
    """Threads for what is computed of a finished subject, at least one."""
    return max(1, min((os.cpu_count() or 1) // _CORES, _MOST))


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results of a function in the order of the items, of which few are computed ahead, so that memory is bounded.

    Args:
        function: Called in any of the threads.
        items: What it is called with.
        threads: With 1 it is called here.
    """
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
