"""Provides a subject's id and the paths of its files, before any of them is read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SEMICOLON = "manifest.csv separates the names of files by semicolons"
"""Why an id cannot have a semicolon."""


@dataclass(frozen=True)
class SubjectFiles:
    """A subject's id and files, of which nothing has been read.

    Args:
        subject: The id.
        images: The file of each image, in the order of the network's channels.
        values: Cells of a table in columns that are not images, such as the split.
    """

    subject: str
    images: Mapping[str, Path]
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, str]:
        """The absolute path of each image."""
        return {name: os.path.abspath(path) for name, path in self.images.items()}


def expanded(text: str | Path) -> Path:
    """A path with ~ replaced by the home folder."""
    # Unlike Path.expanduser, this keeps ~name where there is no such user: it may be a file's name.
    return Path(os.path.expanduser(text))
