"""Holds a line of what `voxquilt doctor` says, without names of people, machines and folders."""

import getpass
import re
import socket
from dataclasses import dataclass
from pathlib import Path

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Line:
    """What was found.

    Args:
        topic: What it is about, such as 'disk'.
        state: 'ok', 'note' (it may matter to you) or 'problem' (something will not work).
        text: What was found.
        advice: What to do about a note or a problem.
    """

    topic: str
    state: str
    text: str
    advice: str = ""

    @classmethod
    def of(cls, topic: str, text: str, problem: str = "", note: str = "") -> "Line":
        """A problem or a note if there is one, with the advice that these hold; else fine."""
        return cls(topic, PROBLEM if problem else NOTE if note else OK, hidden(text), hidden(problem or note))


def hidden(text: str) -> str:
    """Text in which the home folder is ~, and the user, the machine and other folders have no names.

    Lines are pasted into reports of bugs, and errors of others name what they like.
    """
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    # Of a folder elsewhere only the last name is kept; /dev is the same everywhere.
    text = re.sub(r"(?<![\w~.:/])/(?!dev/)(?:[^\s/'\",:;()]+/)+(?=[^\s/'\",:;()])", ".../", text)
    for name, instead in ((_user(), "<user>"), (socket.gethostname(), "<machine>")):
        if len(name) > 1:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
