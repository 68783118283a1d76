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

from voxquilt.data.discovery import SubjectFiles, label_files
from voxquilt.data.subject import LabelMap, Subject
from voxquilt.errors import InputError
from voxquilt.filesystem import replacing
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.metrics import Agreement, agreements
from voxquilt.text import escaped, reason_of

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
        product: Which of the subject's labels: 'labels', and 'labels_<mode>' of stitch.compare.
    """

    subject: str
    name: str
    agreement: Agreement | None
    error: str = ""
    failed: bool = False
    product: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Compares a run's labels with others.

    Args:
        folder: Of the run's files.
        cases: Its subjects, which know the labels of a table.
        labels: A pattern with `{subject}`, one for each channel, or None for those of the table.
        class_names: Of classes 0, 1, ..., or of channels; without, each value that any volume has is a class.
        tolerance: mm, of the surface Dice.
        label_values: The numbers that classes 0, 1, ... have in the files, those of the true labels too; None for 0,
            1, ... themselves.
    """

    folder: Path
    cases: Sequence[SubjectFiles]
    labels: str | Mapping[str, str] | None
    class_names: Sequence[str] | None
    tolerance: float
    label_values: Sequence[int] | None = None

    def scores(self, rows: Sequence[Row]) -> list[Score]:
        """A line for every subject and class; one without a class for a subject that cannot be compared.

        Args:
            rows: Of the manifest.
        """
        cases = {case.subject: case for case in self.cases}
        with ThreadPoolExecutor(_THREADS) as pool:
            compared = list(pool.map(lambda row: self._tried(cases[row.subject], row), rows))
        classes = {n for found in compared if isinstance(found, dict) for one in found.values() for n in one}
        scores: list[Score] = []
        for row, found in zip(rows, compared, strict=True):
            if isinstance(found, Score):
                scores.append(found)
                continue
            for product, one in found.items():
                several = [(self._name(n), one.get(n, ABSENT)) for n in sorted(classes)]
                scores += [Score(row.subject, name, agreement, product=product) for name, agreement in several]
        return scores

    def _tried(self, case: SubjectFiles, row: Row) -> dict[str, dict[int, Agreement]] | Score:
        files = list(label_files(case, self.labels).values())
        missing = [str(path) for path in files if not os.path.isfile(path)]
        if missing or not files:
            return Score(case.subject, "", None, f"there is no label file {' and '.join(missing)}".strip())
        if row.status == "failed":
            return Score(case.subject, "", None, "it was not predicted")
        try:
            return {product: self._compared(path, files) for product, path in self._labels_of(row).items()}
        except Exception as error:
            return Score(case.subject, "", None, reason_of(error), failed=True)

    def _labels_of(self, row: Row) -> dict[str, Path]:
        """A subject's labels by product, those of stitch.compare too; of several outputs the first's."""
        pattern = re.compile(re.escape(row.subject) + r"_(?P<product>(?P<output>.+_)?labels(_[a-z]+)?)\.nii(\.gz)?")
        found = [(match, name) for name in row.outputs if (match := pattern.fullmatch(name))]
        if not found:
            raise InputError(
                f"no labels were written of it, only {', '.join(row.outputs)}; set stitch.products=[labels]."
            )
        output = found[0][0]["output"]
        return {match["product"]: self.folder / name for match, name in found if match["output"] == output}

    def _compared(self, path: Path, files: Sequence[Path]) -> dict[int, Agreement]:
        made = LabelMap(path)
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
        numbers = list(self.label_values or range(len(self.class_names or ())))
        known = [number for number in numbers if number]
        if numbers:
            self._check_numbers(truth[0], numbers)
        return dict.fromkeys(known, ABSENT) | agreements(labels[0], truth[0], frame.affine, self.tolerance)

    def _check_numbers(self, truth: np.ndarray, numbers: Sequence[int]) -> None:
        highest = int(truth.max())
        if self.label_values is None and highest > max(numbers):
            raise InputError(
                f"its label has class {highest}; there are {len(numbers)}, 0 to {max(numbers)} (stitch.class_names)."
            )
        unknown = set[int]() if self.label_values is None else {*np.unique(truth).tolist()} - {0, *numbers}
        if unknown:
            raise InputError(f"its label holds {min(unknown)}, which is none of stitch.label_values={list(numbers)}.")

    def _name(self, number: int) -> str:
        names = dict(zip(self.label_values or range(len(self.class_names or ())), self.class_names or (), strict=False))
        return str(names.get(number, number))


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """A .csv with a row for each score; what is not defined is empty, what is infinite is inf.

    Raises:
        OutputError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["subject", "class", "product", *METRICS, "error"])
    for score in scores:
        numbers = ["" if isnan(value) else f"{value:.6g}" for value in values(score)] or [""] * len(METRICS)
        writer.writerow([score.subject, score.name, score.product, *numbers, " ".join(score.error.split())])
    with replacing(path) as file:
        file.write(escaped(text.getvalue()).encode())


METRICS = (*(field.name for field in fields(Agreement)), "volume_error_ml", "relative_volume_error")


def values(score: Score) -> list[float]:
    """A score's numbers in the order of METRICS; none without an agreement."""
    return [] if score.agreement is None else [getattr(score.agreement, name) for name in METRICS]


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
