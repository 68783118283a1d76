"""Lists what the server of a report gives out: every path is looked up in a table, and none is joined to a folder's."""

import json
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from voxquilt.errors import InputError
from voxquilt.report.display_copy import SubjectVolumes
from voxquilt.report.flags import cohorts_of, flags_of
from voxquilt.report.niivue import HOW, SCRIPT
from voxquilt.report.page import KINDS, REPORT, STATIC, THUMBNAILS, in_order, key_of, read_static, render_report
from voxquilt.report.run_folder import read_run
from voxquilt.report.viewer_page import FOLDER, VIEWER, framed, niivue, viewer_files

_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".json": "application/json", ".jpg": "image/jpeg", ".png": "image/png",
}  # fmt: skip
_BYTES = "application/octet-stream"

Answer = tuple[bytes, str]
"""A body, and its type."""


class ServedFiles:
    """The page of a run, its thumbnails, the outputs that its manifest names, and copies of volumes for the viewer.

    Args:
        folder: The output folder, as it is now: what later runs add is not served.

    Raises:
        InputError: it has no manifest.
    """

    def __init__(self, folder: Path) -> None:
        run = read_run(folder)
        root = folder.resolve()
        ordered = in_order(run, flags_of(run, cohorts_of(run)))
        page = render_report(run, lambda row: f"{VIEWER}#{key_of(row.subject)}", served=True), _TYPES[".html"]
        self._answers: dict[bytes, Callable[[], Answer]] = {REPORT.encode(): lambda: page, b"": lambda: page}
        static = {f"{FOLDER}/{name}": read_static(name).encode() for name in STATIC}
        for name, content in (viewer_files() | static).items():
            self._answers[name.encode()] = partial(_known, content, _TYPES[Path(name).suffix])
        self._answers[f"{FOLDER}/{SCRIPT.name}".encode()] = _script
        self._volumes: dict[str, SubjectVolumes] = {}
        # Volumes are read one at a time, so that those of several requests do not add up in memory.
        self._lock = threading.Lock()
        shown = [row for row in ordered if row.status != "failed"]
        keys = [key_of(row.subject) for row in shown]
        for n, row in enumerate(shown):
            pictures = [THUMBNAILS / kind / f"{row.subject}.jpg" for kind in KINDS]
            for path in [*pictures, *map(Path, row.outputs)]:
                self._answers[os.fsencode(path)] = partial(_read, root, path)
            self._volumes[keys[n]] = SubjectVolumes(row, root, run.configuration)
            steps = {"previous": keys[n - 1] if n else "", "next": keys[n + 1] if n + 1 < len(keys) else ""}
            self._answers[f"{FOLDER}/volumes/{keys[n]}.json".encode()] = partial(self._describe, keys[n], steps)

    def find(self, path: bytes) -> Callable[[], Answer] | None:
        """What makes the answer to a path; None where nothing is served."""
        volume = re.fullmatch(rf"{FOLDER}/volumes/([0-9a-f]+)/([0-9]{{1,4}})".encode(), path)
        if volume is not None and volume[1].decode() in self._volumes:
            return partial(self._volume, volume[1].decode(), int(volume[2]))
        return self._answers.get(path)

    def _describe(self, key: str, steps: dict[str, str]) -> Answer:
        return json.dumps(self._volumes[key].describe() | steps).encode(), _TYPES[".json"]

    def _volume(self, key: str, number: int) -> Answer:
        with self._lock:
            return framed(self._volumes[key], number), _BYTES


def _known(content: bytes, kind: str) -> Answer:
    return content, kind


def _script() -> Answer:
    content = niivue()
    if content is None:
        raise InputError(f"NiiVue is not here: {HOW}.")
    return content, _TYPES[".js"]


def _read(root: Path, path: Path) -> Answer:
    file = (root / path).resolve()
    if not file.is_relative_to(root):
        raise InputError(f"{path} leads out of the folder.")
    return file.read_bytes(), _TYPES.get(path.suffix, _BYTES)
