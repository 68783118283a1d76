"""What can be printed? Every name, also one that a stream's encoding lacks: it is escaped, and never an error."""

import io
import sys


def forgive() -> None:
    """Have this process's stdout and stderr escape what they cannot encode, such as an umlaut in ASCII.

    A name that cannot be shown is no reason to lose a run that has written its files. Called at the start of every
    process of a command, since each has streams of its own.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def escaped(text: str) -> str:
    r"""Text that is UTF-8 wherever it goes: of a file name that is not, the odd bytes are escaped.

    >>> escaped("sub-\udcff")
    'sub-\\udcff'
    """
    return text.encode("utf-8", "backslashreplace").decode()
