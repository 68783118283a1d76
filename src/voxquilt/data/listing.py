"""Lists the image files of folders and patterns, and suggests others where there are none."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from voxquilt.data.formats.registry import suffix_of, suffixes
from voxquilt.data.formats.unsupported import WITHOUT, counted, foreign_suffix, is_dicom
from voxquilt.text import nearest

# Names in a folder, at most, that are compared with a name that does not exist.
_COMPARED = 10_000


class Listing(NamedTuple):
    """The image files in a folder, or those that match a pattern.

    Args:
        images: Files with the suffix of a file format, broken links included: reading them reports the error.
        foreign: Suffixes of the image files of formats that voxquilt does not read.
        links: Those of the images that are links.
        of_runs: Outputs of runs, which are left out: `**` does not enter folders that runs have written to.
    """

    images: list[Path]
    foreign: list[str]
    links: set[Path]
    of_runs: list[Path]


class OutputFolder:
    """The folder that a run writes to, whose files are never inputs, whatever path leads to them.

    Args:
        folder: A path, which need not exist; None for a run that writes no files.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.name = folder
        self._real = "" if folder is None else os.path.realpath(os.path.expanduser(folder))
        self._exists = self._real != "" and os.path.isdir(self._real)
        self._known: dict[str, str] = {}

    def is_folder(self, path: Path) -> bool:
        """Whether a path leads to this folder."""
        return self._exists and os.path.realpath(path) == self._real

    def holds(self, path: Path, *, root: Path | None = None, link: bool | None = None) -> bool:
        """Whether a file lies in the folder, or is a link to one that does.

        Args:
            path: The file.
            root: The folder that was searched. Subfolders of the output folder belong to it, unless `root` is in it.
            link: Whether the file is a link; None if that is not known.
        """
        if not self._exists:
            return False
        deep = root is not None and not self._is_above(os.path.realpath(root))
        if os.path.islink(path) if link is None else link:
            target = os.path.realpath(path)
            return self._lies_in(os.path.dirname(path), deep) or self._lies_in(os.path.dirname(target), deep)
        return self._lies_in(os.path.dirname(path), deep)

    def _lies_in(self, folder: str, deep: bool) -> bool:
        if folder not in self._known:
            self._known[folder] = os.path.realpath(folder)
        real = self._known[folder]
        return real == self._real or (deep and self._is_above(real))

    def _is_above(self, real: str) -> bool:
        return real.startswith(self._real.rstrip(os.sep) + os.sep)


def is_image(name: str) -> bool:
    """Whether a name has the suffix of a file format; hidden files, such as a run's temporary ones, are not images."""
    return name.lower().endswith(suffixes()) and not name.startswith(".")


def in_folder(path: Path) -> Listing:
    """The image files in a folder, without those in its subfolders.

    Raises:
        OSError: the folder cannot be read.
    """
    listing = Listing([], [], set(), [])
    # Unlike Path.iterdir with is_file, this needs no call per file: 100,000 calls on a network take minutes.
    with os.scandir(path) as entries:
        for entry in entries:
            if is_image(entry.name) and not _is_folder(entry):
                listing.images.append(path / entry.name)
                listing.links.update([path / entry.name] if entry.is_symlink() else [])
            elif suffix := foreign_suffix(entry.name):
                listing.foreign.append(suffix)
    listing.images.sort()
    return listing


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    with suppress(OSError):  # a link that points to itself
        return entry.is_dir()
    return False


def matching(pattern: str) -> Listing:
    """The image files that match a pattern; `**` enters all folders except those that runs have written to."""
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
    links = {path for path in paths if is_image(path.name) and os.path.islink(path)}
    images = [path for path in paths if is_image(path.name) and not os.path.isdir(path)]
    of_runs: list[Path] = []
    if "**" in pattern:
        written = {folder for folder in {path.parent for path in images} if _has_run_record(folder)}
        of_runs = [path for path in images if path.parent in written]
        images = list(_without_repetition(path for path in images if path.parent not in written))
    return Listing(images, [suffix for path in paths if (suffix := foreign_suffix(path.name))], links, of_runs)


def _has_run_record(folder: Path) -> bool:
    """Whether a run has written to a folder."""
    return any(folder.glob("manifest*.csv")) and any(folder.glob("run*.json"))


def _without_repetition(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file once: a link to a folder above it leads to the same file by many paths."""
    paths = sorted(paths, key=lambda path: (len(path.parts), path))
    name_counts, known = Counter(path.name for path in paths), set[str]()
    for path in paths:
        real = os.path.realpath(path) if name_counts[path.name] > 1 else ""
        if not real or real not in known:
            known.add(real)
            yield path


def root_of(path: Path) -> Path:
    """The folder in which a pattern is searched; of a path without wildcards, the path itself."""
    while glob.has_magic(str(path)) and not os.path.isdir(path):
        path = path.parent
    return path


def instead(path: Path) -> str:
    """A sentence for a message on a folder or pattern without images: what is there, or the closest existing path."""
    root = root_of(path)
    if not os.path.isdir(root):
        return meant(path)
    here: list[str] = []
    with suppress(OSError):
        here = in_folder(root).foreign or _dicom(root)
    if here:
        return f" {root} has {counted(here)}. Convert them first."
    deeper, foreign = _below(root)
    if deeper and root == path:
        return f" Folders in it have: {_pattern(root, deeper)}."
    if deeper:
        return f" There is {deeper[0]}, for example."
    if foreign:
        return f" Folders in it have {counted(foreign)}. Convert them first."
    return meant(path)


def _dicom(folder: Path) -> list[str]:
    """DICOM files without a suffix."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in islice(entries, 1000) if not entry.is_dir(follow_symlinks=False)]
    return [WITHOUT for path in paths if os.path.isfile(path) and is_dicom(path)]


def _below(root: Path) -> tuple[list[Path], list[str]]:
    """Images in a folder and its subfolders, as far as they are searched, and suffixes of other image files."""
    images: list[Path] = []
    foreign: list[str] = []
    searched = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        images += [Path(folder, name) for name in sorted(names) if is_image(name)]
        foreign += [suffix for name in names if (suffix := foreign_suffix(name))]
        searched += len(names) + 1
        if searched > _COMPARED:
            break
    return images, foreign


def _pattern(root: Path, images: list[Path]) -> str:
    """Settings that name images in subfolders: a pattern; or if all have the same name, subjects named by folder."""
    names = {path.name for path in images}
    depths = {len(path.relative_to(root).parts) for path in images}
    if len(names) < len(images) and depths == {2}:
        return f"data.inputs={root} data.images='{{image: \"{{subject}}/{images[0].name}\"}}'"
    suffix = suffix_of(images[0].name)
    return f"data.inputs='{glob.escape(str(root))}/**/*{suffix}'"


def meant(path: Path) -> str:
    """A question for a message on a path that does not exist: the closest name in the deepest folder that exists."""
    missing = path
    while not os.path.exists(missing.parent):
        missing = missing.parent
    if os.path.lexists(missing) or glob.has_magic(missing.name):
        return ""  # it exists: something else is wrong
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, _COMPARED)]
    except OSError:
        return ""
    closest = nearest(missing.name, names)
    return f" Did you mean {missing.with_name(closest)}?" if closest else ""
