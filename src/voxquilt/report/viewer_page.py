"""Provides the viewer's page, whose files are the same on a server and on disk."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

from voxquilt.report.display_copy import SubjectVolumes
from voxquilt.report.niivue import HOW, SCRIPT, is_here

FOLDER = "report"
"""Where the viewer's files are, below the folder of the report."""
VIEWER = f"{FOLDER}/viewer.html"
_HERE = Path(__file__).parent
_OWN = ("viewer.css", "viewer.js")


def viewer_files() -> dict[str, bytes]:
    """The contents of the viewer's own files by their path beside the report."""
    page = (_HERE / "templates" / "viewer.html").read_text("utf-8").replace("{{ how }}", HOW)
    return {VIEWER: page.encode()} | {f"{FOLDER}/{name}": (_HERE / "static" / name).read_bytes() for name in _OWN}


def niivue() -> bytes | None:
    """The script of NiiVue; None if it has not been fetched."""
    return SCRIPT.read_bytes() if is_here() else None


def framed(volumes: SubjectVolumes, number: int, *, packed: bool = False) -> bytes:
    """A volume as the viewer takes it: how it is shown, as JSON behind its length in 4 bytes, then a NIfTI file.

    Args:
        volumes: The subject.
        number: The volume's number.
        packed: Whether the file is gzipped.
    """
    content, about = volumes.copy(number)
    text = json.dumps(about | {"packed": packed}).encode()
    return len(text).to_bytes(4, "little") + text + (gzip.compress(content, 6) if packed else content)


def embedded(volumes: SubjectVolumes, numbers: list[int], more: dict[str, Any]) -> bytes:
    """A script that hands volumes to the viewer where no server does, since pages on disk may load nothing else."""
    about = volumes.describe() | more
    about["volumes"] = [
        about["volumes"][n] | {"data": base64.b64encode(framed(volumes, n, packed=True)).decode()} for n in numbers
    ]
    return f"window.voxquiltSubject = {json.dumps(about)};\n".encode()
