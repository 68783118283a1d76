"""Which image files does a folder hold, or a pattern match? And which others are there that could have been meant?"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from voxquilt.data.formats.unsupported import WITHOUT, counted, foreign_suffix, is_dicom
from voxquilt.text import nearest
from voxquilt.vocabulary import PRODUCTS

SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".img.gz", ".hdr", ".img")
# Names of a folder, at most, among which a near one is looked for, or which are looked at for what was meant.
_LOOKED_AT = 10_000


class Listing(NamedTuple):
    """What lies in a folder, or what a pattern matches.

    Args:
        images: NIfTI files by their names, also links that lead nowhere: whoever reads them says so.
        foreign: Extensions of images of other formats.
        links: Those of the images that are links.
        of_runs: Outputs of runs, into whose folders `**` does not go.
    """

    images: list[Path]
    foreign: list[str]
    links: set[Path]
    of_runs: list[Path]


class OutputFolder:
    """The folder that a run writes to: what lies there is never an input, by whatever way it is named.

    Args:
        folder: It need not exist; None for a run that writes nothing.
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
        """Whether a file lies in it, or is a link to one that does.

        Args:
            path: The file.
            root: Where one began to look for it. Folders in the output folder are part of it, unless one looks there.
            link: Whether the file is a link, where that is known.
        """
        if not self._exists:
            return False
        deep = root is not None and not self._is_above(os.path.realpath(root))
        if os.path.islink(path) if link is None else link:
            aim = os.path.realpath(path)
            return self._lies_in(os.path.dirname(path), deep) or self._lies_in(os.path.dirname(aim), deep)
        return self._lies_in(os.path.dirname(path), deep)

    def _lies_in(self, folder: str, deep: bool) -> bool:
        if folder not in self._known:
            self._known[folder] = os.path.realpath(folder)
        real = self._known[folder]
        return real == self._real or (deep and self._is_above(real))

    def _is_above(self, real: str) -> bool:
        return real.startswith(self._real.rstrip(os.sep) + os.sep)


def is_image(name: str) -> bool:
    """A name that NIfTI files have; hidden files, such as a running job's temporary ones, are left alone."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def in_folder(path: Path) -> Listing:
    """What lies in a folder itself.

    Raises:
        OSError: it cannot be read.
    """
    found = Listing([], [], set(), [])
    # Unlike Path.iterdir and is_file this asks nothing of each file, which of 100,000 on a network takes minutes.
    with os.scandir(path) as entries:
        for entry in entries:
            if is_image(entry.name) and not _is_folder(entry):
                found.images.append(path / entry.name)
                found.links.update([path / entry.name] if entry.is_symlink() else [])
            elif suffix := foreign_suffix(entry.name):
                found.foreign.append(suffix)
    found.images.sort()
    return found


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def matching(pattern: str) -> Listing:
    """What a pattern matches; `**` goes into all folders but those that runs have written to."""
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
    links = {path for path in paths if is_image(path.name) and os.path.islink(path)}
    images = [path for path in paths if is_image(path.name) and not os.path.isdir(path)]
    of_runs: list[Path] = []
    if "**" in pattern:
        written = {folder for folder in {p.parent for p in images if _PRODUCT.search(p.name)} if _is_of_run(folder)}
        of_runs = [path for path in images if path.parent in written]
        images = list(_once(path for path in images if path.parent not in written))
    return Listing(images, [suffix for path in paths if (suffix := foreign_suffix(path.name))], links, of_runs)


_PRODUCT = re.compile(rf"_({'|'.join(PRODUCTS)})(_[a-z]+)?\.nii(\.gz)?$")


def _is_of_run(folder: Path) -> bool:
    """Whether a run keeps its record there: then volumes beside it that are called like products are its outputs."""
    return any(folder.glob("manifest*.csv")) and any(folder.glob("run*.json"))


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file once, though a link to a folder above it makes many paths of one."""
    paths = sorted(paths, key=lambda path: (len(path.parts), path))
    times, known = Counter(path.name for path in paths), set[str]()
    for path in paths:
        real = os.path.realpath(path) if times[path.name] > 1 else ""
        if not real or real not in known:
            known.add(real)
            yield path


def root_of(path: Path) -> Path:
    """The folder from which a pattern looks; a path that is none is its own."""
    while glob.has_magic(str(path)) and not os.path.isdir(path):
        path = path.parent
    return path


def instead(path: Path) -> str:
    """What to say of a folder or pattern without NIfTI files: what is there, and what could have been meant."""
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
    """DICOM without an extension."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in islice(entries, 1000) if not entry.is_dir(follow_symlinks=False)]
    return [WITHOUT for path in paths if os.path.isfile(path) and is_dicom(path)]


def _below(root: Path) -> tuple[list[Path], list[str]]:
    """NIfTI files in a folder and those below it, as far as one looks, and other images."""
    images: list[Path] = []
    foreign: list[str] = []
    looked_at = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        images += [Path(folder, name) for name in sorted(names) if is_image(name)]
        foreign += [suffix for name in names if (suffix := foreign_suffix(name))]
        looked_at += len(names) + 1
        if looked_at > _LOOKED_AT:
            break
    return images, foreign


def _pattern(root: Path, images: list[Path]) -> str:
    """What names files in the folders of a folder: by a pattern, or where all are called alike, by their folders."""
    names = {path.name for path in images}
    depths = {len(path.relative_to(root).parts) for path in images}
    if len(names) < len(images) and depths == {2}:
        return f"data.inputs={root} data.images='{{image: \"{{subject}}/{images[0].name}\"}}'"
    suffix = next(suffix for suffix in SUFFIXES if images[0].name.lower().endswith(suffix))
    return f"data.inputs='{glob.escape(str(root))}/**/*{suffix}'"


def meant(path: Path) -> str:
    """A question for a message on a path that is not there: the nearest name in the folder where it goes wrong."""
    missing = path
    while not os.path.exists(missing.parent):
        missing = missing.parent
    if os.path.lexists(missing) or glob.has_magic(missing.name):
        return ""  # it is there, and what is wrong is something else
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, _LOOKED_AT)]
    except OSError:
        return ""
    near = nearest(missing.name, names)
    return f" Did you mean {missing.with_name(near)}?" if near else ""
