"""What can be printed? Every name, also one that a stream's encoding lacks: it is escaped, and never an error."""

import io
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

from voxquilt.errors import VoxquiltError


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


def of_subjects(count: int) -> str:
    """'1 subject', or more of them."""
    return f"{count} subject{'s' * (count != 1)}"


def plain_text(error: object) -> str:
    """An error's text without a terminal's codes for colours and bold letters, which torch puts into its own."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).strip()


def first_line(error: BaseException) -> str:
    """Of an error's text; its kind where it has none."""
    return (plain_text(error) or type(error).__name__).splitlines()[0]


def reason_of(error: Exception) -> str:
    """An error as a row of the manifest tells it."""
    return str(error) if isinstance(error, VoxquiltError) else f"{type(error).__name__}: {_gist(error)}"


def _gist(error: Exception) -> str:
    """TorchScript puts its own traceback before the message; other messages are kept as they are."""
    text = plain_text(error)
    return text.splitlines()[-1] if "TorchScript" in text.split("\n")[0] else text


def question(typed: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """' Did you mean ...?' with the nearest of the known words, which is never the one that was typed; or ''."""
    near = nearest(typed, known, cutoff=cutoff)
    return f" Did you mean {prefix}{near}?" if near else ""


def nearest(typed: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The nearest of the known words, other than the one that was typed; '' if none is near."""
    return next(iter(get_close_matches(typed, [word for word in known if word != typed], 1, cutoff)), "")
