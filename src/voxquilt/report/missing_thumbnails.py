"""Draws the thumbnails that a run has not drawn, from the files of its inputs and outputs."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from voxquilt.data.formats.image_file import ImageFile, open_image
from voxquilt.errors import VoxquiltError
from voxquilt.report.run_folder import RunFolder
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.thumbnails import MAPS, OVERLAY, maps_of, path_of, try_thumbnails
from voxquilt.vocabulary import IMAGE, LABELS, MAP, VOLUMES

# Each thread holds a subject's volumes; reading releases the interpreter's lock.
_THREADS = min(4, os.cpu_count() or 1)


def draw_missing(run: RunFolder, tell: Callable[[str], object]) -> int:
    """Draw the thumbnails of subjects that are done and have none; how many could be drawn.

    Args:
        run: The run.
        tell: Called with the reason why a subject has no picture.
    """
    missing = [row for row in run.rows.values() if row.status != "failed" and not _has_thumbnail(run.path, row)]
    numbers, series = label_values_of(run.configuration), is_series(run.configuration)
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda row: _draw(run.path, row, numbers, series), missing)
        for row, reason in zip(missing, reasons, strict=True):
            if reason:
                tell(f"{row.subject}: {reason}")
    return sum(_has_thumbnail(run.path, row) for row in missing)


def label_values_of(configuration: Mapping[str, Any]) -> list[int] | None:
    """The numbers of classes 0, 1, ... in label files, as the run was told; None for these themselves."""
    values = (configuration.get("stitch") or {}).get("label_values")
    return [int(value) for value in values] if isinstance(values, list) else None


def is_series(configuration: Mapping[str, Any]) -> bool:
    """Whether channels of files are volumes of a series (data.time=volumes), of which the first is drawn."""
    return (configuration.get("data") or {}).get("time") == VOLUMES


def outputs_of(row: Row, kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A subject's outputs of some kinds: the file's name and its kind, by product."""
    return {
        name.removeprefix(f"{row.subject}_").partition(".nii")[0]: (name, kind)
        for name, kind in zip(row.outputs, row.kinds, strict=True)
        if kind in kinds
    }


def _has_thumbnail(folder: Path, row: Row) -> bool:
    return path_of(folder, OVERLAY, row.subject).is_file()


def _draw(folder: Path, row: Row, numbers: list[int] | None, series: bool) -> str:
    """Draw a subject's thumbnails; why they could not be drawn, or ''."""
    try:
        file = open_image(next(iter(row.inputs.values()))) if row.inputs else None
        outputs = outputs_of(row, (LABELS, MAP, IMAGE))
        first = next((name for name, kind in outputs.values() if kind == LABELS), None)
        labels = None if first is None else open_image(folder / first)
        kinds = {product: kind for product, (_, kind) in outputs.items() if kind == IMAGE or product.endswith(MAPS)}
        files = {product: open_image(folder / outputs[product][0]) for product in kinds}
        maps = [product for product, file in files.items() if series or file.channels == 1]
        volumes = {product: _read(files[product])[: 1 if series else None] for product in maps}
        grid = file or labels or next(iter(files.values()), None)
        if grid is None:
            return "there is no volume to draw"
        image = None if file is None else _read(file)[0]
        drawn = None if labels is None else _read(labels)[: 1 if series else None]
        try_thumbnails(folder, row.subject, image, drawn, maps_of(volumes, kinds), grid.frame.affine, numbers)
    except (VoxquiltError, OSError) as error:
        return str(error)
    return ""


def _read(file: ImageFile) -> np.ndarray:
    return file.read().numpy()
