"""How do a subject's finished volumes become files? Named by subject and product, never over an input."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.nifti import write
from voxquilt.data.subject_task import SubjectWork
from voxquilt.errors import OutputError
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.overlay import flat, overlay_png
from voxquilt.stitching.label_values import planes_of
from voxquilt.stitching.stitch import Stitch


class Format(NamedTuple):
    """What is written.

    Args:
        suffix: '.nii.gz' or '.nii'.
        overlay: A picture beside.
    """

    suffix: str
    overlay: bool


class Files:
    """Writes the products of a run's subjects into one folder.

    Args:
        folder: It exists.
        stitch: Tells the classes' names.
        form: What is written.
        cases: Every subject, whose images are not to be overwritten.
    """

    def __init__(self, folder: Path, stitch: Stitch, form: Format, cases: Iterable[SubjectFiles]) -> None:
        self._folder, self._stitch, self._form, self._cases = folder, stitch, form, cases
        self._written: set[Path] = set()

    def write(self, work: SubjectWork, volumes: Mapping[str, np.ndarray], of_labels: list[str]) -> Row:
        """Write a subject's products.

        Args:
            work: The subject.
            volumes: (C, I, J, K) by product.
            of_labels: Which of them hold labels.

        Raises:
            OutputError: a file cannot be written, or is an input of the run, or another subject's.
        """
        subject, native = work.task.case.subject, work.space.native
        outputs = []
        for product, data in volumes.items():
            path = self._checked(f"{subject}_{product}{self._form.suffix}")
            names = self._names(data) if product in of_labels else None
            write(path, data, native, header=work.file.header, label_names=names)
            outputs.append(path.name)
        labels = volumes[of_labels[0]] if of_labels else None
        if labels is not None and self._form.overlay:
            path = self._checked(f"{subject}_overlay.png")
            drawn = flat(labels, self._stitch.label_values)
            overlay_png(work.file.read()[0].numpy(), drawn, native.affine, path)
            outputs.append(path.name)
        volume, of_classes = None, dict[str, float]()
        if labels is not None:
            ml = abs(float(np.linalg.det(native.affine[:3, :3]))) / 1000  # of sheared voxels too
            voxels, counts = _counted(labels)
            volume = voxels * ml
            names = self._names(labels)
            # Several labels a voxel are channels, counted from 0; without names, labels have their numbers.
            of_classes = {str(names.get(n, n)): count * ml for n, count in counts.items()}
        return Row(
            subject,
            "done",
            tuple(outputs),
            patches=len(work.grid) - len(work.skipped),
            skipped=len(work.skipped),
            volume_ml=volume,
            fingerprint=work.task.fingerprint,
            class_ml=of_classes,
        )

    def _names(self, labels: np.ndarray) -> dict[int, str]:
        """By number in the file; of several labels a voxel, by channel."""
        return dict(enumerate(map(str, self._stitch.class_names or ()))) if len(labels) > 1 else self._stitch.names

    def _checked(self, name: str) -> Path:
        path = self._folder / name
        if path.exists() and _identity(path) in self._inputs:
            raise OutputError(f"{path} is an input of this run and is not overwritten; choose another output_dir.")
        if path in self._written:  # a's output x_y and a_x's output y
            raise OutputError(f"{path} is another subject's file of this run; rename an output or a subject.")
        self._written.add(path)
        return path

    @cached_property
    def _inputs(self) -> set[tuple[int, int] | None]:
        # Asked for only where a file is there already: looking at every input of a large cohort, in every process, is
        # too much for a network's file system.
        return {_identity(path) for case in self._cases for path in case.images.values()} - {None}


def _counted(labels: Shaped[np.ndarray, "c i j k"]) -> tuple[int, dict[int, int]]:
    """Voxels with any label, and those of each: of each value above 0, or of each channel."""
    if len(labels) > 1:
        return int(np.count_nonzero(labels.any(axis=0))), {n: int(np.count_nonzero(c)) for n, c in enumerate(labels)}
    counts = Counter[int]()
    # Plane by plane: counting makes 8 bytes of each voxel.
    for plane in planes_of(labels):
        if plane.dtype.itemsize <= 2:  # faster than sorting
            found = np.bincount(plane.ravel(order="K"))
            counts.update({int(n): int(found[n]) for n in np.flatnonzero(found)})
        else:
            values, numbers = np.unique(plane, return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    del counts[0]
    return counts.total(), dict(sorted(counts.items()))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
