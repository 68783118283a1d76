"""Reads the first subject of a run while libraries are being imported."""

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import VoxquiltError

# Larger images are read when it is known that the run fits the machine's memory.
_MOST_BYTES = 2**30


def read_first_subject(cases: list[SubjectFiles], plain: Mapping[str, Any]) -> None:
    """Start to read the images of the first subject, if it is certain that this process will need them.

    Unpacking a file does not hold Python's lock, so that it costs no time while modules are imported.
    """
    trainer = plain["trainer"]
    is_alone = str(trainer["devices"]) == "1" and str(trainer["num_nodes"]) == "1" and plain["shard"]["count"] == 1
    begun = (Path(plain["output_dir"]).expanduser() / "manifest.csv").exists()
    if begun or not is_alone or plain["run"]["dry_run"]:
        return
    from voxquilt.data.formats.image_file import open_image, read_ahead  # imports torch

    with suppress(VoxquiltError):  # which the subject's row will say
        files = [open_image(path) for path in cases[0].images.values()]
        if sum(prod(file.shape) * file.voxel_bytes for file in files) <= _MOST_BYTES:
            for file in files:
                read_ahead(file)
