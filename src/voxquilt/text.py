"""Makes text printable on any stream, and has the wordings that messages share."""

import hashlib
import io
import logging
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

from voxquilt.errors import VoxquiltError


def escape_streams() -> None:
    """Have this process's stdout and stderr escape what they cannot encode, such as an umlaut in ASCII.

    A name that cannot be shown must not end a run that has written its files. Called at the start of every process of a
    command, since each has streams of its own.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_stdout() -> None:
    """Send what is printed or logged from here on to stderr, since a program reads stdout."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    sys.stdout = sys.stderr


def escaped(text: str) -> str:
    r"""Text that can be encoded as UTF-8: bytes of a file name that is not UTF-8 are escaped.

    >>> escaped("sub-\udcff")
    'sub-\\udcff'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def of_subjects(count: int) -> str:
    """A number of subjects: '1 subject', '2 subjects'."""
    return f"{count} subject{'s' * (count != 1)}"


def plain_text(error: object) -> str:
    """An error's text without a terminal's codes for colours and bold letters, which torch puts into its own."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its class where it has no text."""
    return (plain_text(error) or type(error).__name__).splitlines()[0]


def reason_of(error: Exception) -> str:
    """The text of an error in a row of the manifest."""
    return (
        str(error)
        if isinstance(error, VoxquiltError)
        else f"{type(error).__name__}: {_without_torchscript_traceback(error)}"
    )


def _without_torchscript_traceback(error: Exception) -> str:
    """The message behind the traceback that TorchScript puts before it; other messages are kept as they are."""
    text = plain_text(error)
    return text.splitlines()[-1] if "TorchScript" in text.split("\n")[0] else text


def question(typed: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """' Did you mean ...?' with the nearest of the known words, or '' if none is near."""
    near = nearest(typed, known, cutoff=cutoff)
    return f" Did you mean {prefix}{near}?" if near else ""


def nearest(typed: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The nearest of the known words, other than the one that was typed; '' if none is near."""
    return next(iter(get_close_matches(typed, [word for word in known if word != typed], 1, cutoff)), "")


def gib(count: float, digits: int = 2) -> str:
    """A number of bytes in GiB.

    >>> gib(3 * 2**29)
    '1.50 GiB'
    """
    return f"{count / 2**30:.{digits}f} GiB"


def byte_size(count: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> byte_size(1536), byte_size(2**31)
    ('2 KiB', '2.00 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return gib(count * 2**30)


def digest(text: str, digits: int) -> str:
    """Hexadecimal digits that tell texts apart: the first of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
