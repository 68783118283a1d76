"""Reads the first subject of a run while libraries are being imported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

from voxquilt.cli.collector import paused_collector
from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import VoxquiltError

# Larger images are read when it is known that the run fits the machine's memory.
_MOST_BYTES = 2**30


@contextmanager
def first_subject_read_ahead(cases: list[SubjectFiles] | None, plain: Mapping[str, Any]) -> Iterator[None]:
    """Start to read the images of the first subject, if it is certain that this process will need them in the block.

    Unpacking a file does not hold Python's lock, so that it costs no time while modules are imported.
    """
    if not cases or not _will_be_needed(plain):
        yield
        return
    with paused_collector():
        from voxquilt.data.formats.image_file import drop_read_ahead, open_image, read_ahead  # imports torch

    try:
        with suppress(VoxquiltError):  # which the subject's row will say
            files = [open_image(path) for path in cases[0].images.values()]
            if sum(prod(file.shape) * file.voxel_bytes for file in files) <= _MOST_BYTES:
                for file in files:
                    read_ahead(file)
        yield
    finally:
        drop_read_ahead()


def _will_be_needed(plain: Mapping[str, Any]) -> bool:
    trainer = plain["trainer"]
    is_alone = str(trainer["devices"]) == "1" and str(trainer["num_nodes"]) == "1" and plain["shard"]["count"] == 1
    begun = (Path(plain["output_dir"]).expanduser() / "manifest.csv").exists()
    return is_alone and not begun and not plain["run"]["dry_run"]
