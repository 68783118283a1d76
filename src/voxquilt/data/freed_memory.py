"""Returns freed memory to the system."""

import ctypes
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Have the C library return what it keeps of freed memory for later.

    A volume's preparation frees pieces of up to 32 MB, the size below which glibc keeps them, and together they may be
    as large as the volume. Other C libraries keep less, and nothing is done.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no such handle
        return None
