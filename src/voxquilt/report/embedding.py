"""Puts the viewer and small volumes beside a report on disk, for a viewer without a server."""

import math
from collections.abc import Callable
from pathlib import Path

from voxquilt.data.formats.image_file import open_image
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.filesystem import replacing
from voxquilt.report.display_copy import Entry, SubjectVolumes
from voxquilt.report.niivue import HOW, SCRIPT
from voxquilt.report.page import key_of
from voxquilt.report.run_folder import RunFolder
from voxquilt.report.viewer_page import FOLDER, VIEWER, embedded, niivue, viewer_files
from voxquilt.reporting.manifest import Row
from voxquilt.text import byte_size, of_subjects
from voxquilt.vocabulary import MAP

MOST_VOXELS = 2**22
"""Voxels of the largest volume that is put beside a report, such as 160 x 160 x 160."""
_MAPS = ("disagreement", "entropy")


def embed(run: RunFolder, tell: Callable[[str], object]) -> Callable[[Row], str]:
    """Write the viewer and a script with volumes for each subject whose volumes are small.

    Args:
        run: The run.
        tell: Called with a line of how much was written.

    Returns:
        The link to the viewer of a subject, or ''.

    Raises:
        ConfigError: NiiVue is not here.
        OutputError: a file cannot be written.
    """
    script = niivue()
    if script is None:
        raise ConfigError(f"the viewer needs NiiVue: {HOW}.")
    folder = run.path / FOLDER
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    for name, content in (viewer_files() | {f"{FOLDER}/{SCRIPT.name}": script}).items():
        _write(run.path / name, content)
    keys, size = set[str](), 0
    for row in run.rows.values():
        try:
            content = _volumes(run, row)
        except (VoxquiltError, OSError) as error:
            tell(f"no volumes of {row.subject}: {error}")
            continue
        if content:
            _write(folder / "volumes" / f"{key_of(row.subject)}.js", content)
            keys.add(row.subject)
            size += len(content)
    tell(f"put volumes of {of_subjects(len(keys))} beside the report, {byte_size(size)}")
    return lambda row: f"{VIEWER}#{key_of(row.subject)}" if row.subject in keys else ""


def _volumes(run: RunFolder, row: Row) -> bytes:
    """The script with a subject's volumes; empty where there are none, or where they are large."""
    if row.status == "failed":
        return b""
    volumes = SubjectVolumes(row, run.path, run.configuration)
    numbers = [n for n, entry in enumerate(volumes.entries) if _is_wanted(entry)]
    return embedded(volumes, numbers, {"key": key_of(row.subject)}) if numbers else b""


def _is_wanted(entry: Entry) -> bool:
    if entry.kind == MAP and not entry.name.endswith(_MAPS):
        return False
    return math.prod(open_image(entry.path).frame.shape) <= MOST_VOXELS


def _write(path: Path, content: bytes) -> None:
    with replacing(path, durable=False) as file:
        file.write(content)
