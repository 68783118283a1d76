"""How good are a run's labels? Each subject's written file against its label file, class by class, on the file's grid.

What is compared lies on disk, so that it does not matter which process wrote it, or when.
"""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import isnan, nan
from pathlib import Path

import numpy as np
from torch import Tensor

from voxquilt.atomic import replacing
from voxquilt.cases import Case, label_files
from voxquilt.errors import InputError, reason_of
from voxquilt.manifest import Row
from voxquilt.metrics import Agreement, agreements
from voxquilt.streams import escaped
from voxquilt.subject import LabelMap, Subject

ABSENT = Agreement(nan, nan, nan, 0.0, 0.0)
"""Of a class that neither volume has."""
# A volume and its label are held by each; reading and searching leave the interpreter to others.
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Score:
    """A line of metrics.csv.

    Args:
        subject: Its id.
        name: Of the class; empty where the subject was not compared.
        agreement: None where the subject was not compared.
        error: Why it was not.
        failed: Whether that is an error, or just no label.
    """

    subject: str
    name: str
    agreement: Agreement | None
    error: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Compares a run's labels with others.

    Args:
        folder: Of the run's files.
        cases: Its subjects, which know the labels of a table.
        labels: A pattern with `{subject}`, one for each channel, or None for those of the table.
        class_names: Of labels 0, 1, ..., or of channels; without, each value that any volume has is a class.
        tolerance: mm, of the surface Dice.
    """

    folder: Path
    cases: Sequence[Case]
    labels: str | Mapping[str, str] | None
    class_names: Sequence[str] | None
    tolerance: float

    def scores(self, rows: Sequence[Row]) -> list[Score]:
        """A line for every subject and class; one without a class for a subject that cannot be compared.

        Args:
            rows: Of the manifest.
        """
        cases = {case.subject: case for case in self.cases}
        with ThreadPoolExecutor(_THREADS) as pool:
            compared = list(pool.map(lambda row: self._tried(cases[row.subject], row), rows))
        classes = {n for found in compared if isinstance(found, dict) for n in found}
        scores: list[Score] = []
        for row, found in zip(rows, compared, strict=True):
            if isinstance(found, Score):
                scores.append(found)
            else:
                scores += [Score(row.subject, self._name(n), found.get(n, ABSENT)) for n in sorted(classes)]
        return scores

    def _tried(self, case: Case, row: Row) -> dict[int, Agreement] | Score:
        files = list(label_files(case, self.labels).values())
        missing = [str(path) for path in files if not os.path.isfile(path)]
        if missing or not files:
            return Score(case.subject, "", None, f"there is no label file {' and '.join(missing)}".strip())
        if row.status == "failed":
            return Score(case.subject, "", None, "it was not predicted")
        try:
            return self._compared(case, row, files)
        except Exception as error:
            return Score(case.subject, "", None, reason_of(error), failed=True)

    def _compared(self, case: Case, row: Row, files: Sequence[Path]) -> dict[int, Agreement]:
        made = LabelMap(self.folder / _labels_of(row))
        truths = {f"label {n}": LabelMap(path) for n, path in enumerate(files)}
        frame = Subject({"prediction": made, **truths}).frame  # or an error that names both grids
        labels = _integers(made.stored(), made)
        truth = [channel for image in truths.values() for channel in _integers(image.stored(), image)]
        if len(labels) != len(truth):
            raise InputError(f"its label has {len(truth)} channels, and its prediction {len(labels)}.")
        if len(labels) > 1:
            pairs = enumerate(zip(labels, truth, strict=True))
            both = {n: [(volume > 0).astype(np.uint8) for volume in pair] for n, pair in pairs}
            return {n: agreements(a, b, frame.affine, self.tolerance).get(1, ABSENT) for n, (a, b) in both.items()}
        known = range(1, len(self.class_names or ()))
        if self.class_names and truth[0].max() > max(known, default=0):
            raise InputError(
                f"its label has class {truth[0].max()}; there are {len(self.class_names)}, 0 to "
                f"{len(self.class_names) - 1} (stitch.class_names)."
            )
        return dict.fromkeys(known, ABSENT) | agreements(labels[0], truth[0], frame.affine, self.tolerance)

    def _name(self, number: int) -> str:
        names = self.class_names or ()
        return str(names[number]) if number < len(names) else str(number)


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """A .csv with a row for each score; what is not defined is empty, what is infinite is inf.

    Raises:
        OutputError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["subject", "class", *METRICS, "error"])
    for score in scores:
        numbers = ["" if isnan(value) else f"{value:.6g}" for value in values(score)] or [""] * len(METRICS)
        writer.writerow([score.subject, score.name, *numbers, " ".join(score.error.split())])
    with replacing(path) as file:
        file.write(escaped(text.getvalue()).encode())


METRICS = (*(field.name for field in fields(Agreement)), "volume_error_ml", "relative_volume_error")


def values(score: Score) -> list[float]:
    """A score's numbers in the order of METRICS; none without an agreement."""
    return [] if score.agreement is None else [getattr(score.agreement, name) for name in METRICS]


def _labels_of(row: Row) -> str:
    """The name of a subject's labels; of several outputs the first."""
    pattern = re.compile(re.escape(row.subject) + r"_(.+_)?labels\.nii(\.gz)?")
    found = [name for name in row.outputs if pattern.fullmatch(name)]
    if not found:
        raise InputError(f"no labels were written of it, only {', '.join(row.outputs)}; set stitch.products=[labels].")
    return found[0]


def _integers(data: Tensor, image: LabelMap) -> list[np.ndarray]:
    """Channels of a label file, as integers from 0."""
    if data.is_floating_point():
        whole = data.round()
        if not bool((whole == data).all()):
            raise InputError(f"{image.path} holds numbers that are no labels, such as {float(data[whole != data][0])}.")
        data = whole.int()
    if int(data.min()) < 0:
        raise InputError(f"{image.path} holds {int(data.min())}, which is no label: they count from 0.")
    return [channel.numpy() for channel in data]
