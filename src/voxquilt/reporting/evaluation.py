"""Compares the label files that a run has written with true labels, for each subject and class.

Files are compared, so that it does not matter which process wrote them, or when.
"""

import csv
import io
import os
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
"""The agreement of a class that neither volume has."""
# Each thread holds a volume and its label; reading and searching release the interpreter's lock.
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Score:
    """A row of metrics.csv.

    Args:
        subject: The id.
        name: Name of the class; empty where the subject was not compared.
        agreement: None where the subject was not compared.
        error: Why the subject was not compared.
        failed: Whether comparing failed; False where there is just no label.
        product: The labels compared: 'labels', or 'labels_<mode>' of stitch.compare.
    """

    subject: str
    name: str
    agreement: Agreement | None
    error: str = ""
    failed: bool = False
    product: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Compares the labels of a run with true labels.

    Args:
        folder: The run's output folder.
        cases: The run's subjects, with the labels of a table.
        labels: A pattern with `{subject}`, or one per channel; None for the labels of the table.
        class_names: Names of classes 0, 1, ..., or of channels; None: every value that a volume has is a class.
        tolerance: Tolerance of the surface Dice in mm.
        label_values: The numbers of classes 0, 1, ... in the files and in the true labels; None for 0, 1, ...
    """

    folder: Path
    cases: Sequence[SubjectFiles]
    labels: str | Mapping[str, str] | None
    class_names: Sequence[str] | None
    tolerance: float
    label_values: Sequence[int] | None = None

    def scores(self, rows: Sequence[Row]) -> list[Score]:
        """A score for every subject and class; one without a class for a subject that cannot be compared.

        Args:
            rows: Rows of the manifest.
        """
        cases = {case.subject: case for case in self.cases}
        with ThreadPoolExecutor(_THREADS) as pool:
            results = list(pool.map(lambda row: self._compare_subject(cases[row.subject], row), rows))
        classes = sorted({
            n for result in results if isinstance(result, dict) for by_class in result.values() for n in by_class
        })  # fmt: skip
        scores: list[Score] = []
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Score):
                scores.append(result)
                continue
            scores += [
                Score(row.subject, self._name(n), by_class.get(n, ABSENT), product=product)
                for product, by_class in result.items()
                for n in classes
            ]
        return scores

    def _compare_subject(self, case: SubjectFiles, row: Row) -> dict[str, dict[int, Agreement]] | Score:
        files = list(label_files(case, self.labels).values())
        missing = [str(path) for path in files if not os.path.isfile(path)]
        if missing or not files:
            return Score(case.subject, "", None, f"there is no label file {' and '.join(missing)}".strip())
        if row.status == "failed":
            return Score(case.subject, "", None, "it was not predicted")
        try:
            return {product: self._compare_file(path, files) for product, path in self._labels_of(row).items()}
        except Exception as error:
            return Score(case.subject, "", None, reason_of(error), failed=True)

    def _labels_of(self, row: Row) -> dict[str, Path]:
        """A subject's label files by product: the first, and those that stitch.compare has made beside it."""
        products = {name.removeprefix(f"{row.subject}_").partition(".")[0]: name for name in row.label_files}
        if not products:
            raise InputError(
                f"no labels were written for it, only {', '.join(row.outputs)}; set stitch.products=[labels]."
            )
        first = next(iter(products))
        beside = {product: name for product, name in products.items() if product.startswith(f"{first}_")}
        return {product: self.folder / name for product, name in ({first: products[first]} | beside).items()}

    def _compare_file(self, path: Path, files: Sequence[Path]) -> dict[int, Agreement]:
        prediction = LabelMap(path)
        truths = {f"label {n}": LabelMap(path) for n, path in enumerate(files)}
        frame = Subject({"prediction": prediction, **truths}).frame  # or an error that names both grids
        labels = _integers(prediction.stored(), prediction)
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
            raise InputError(f"its label holds {min(unknown)}, which is not in stitch.label_values={list(numbers)}.")

    def _name(self, number: int) -> str:
        names = dict(zip(self.label_values or range(len(self.class_names or ())), self.class_names or (), strict=False))
        return str(names.get(number, number))


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Write a .csv with a row per score, where undefined values are empty and infinite ones 'inf'.

    Raises:
        OutputError: the file cannot be written.
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
    """A score's numbers in the order of METRICS; empty without an agreement."""
    return [] if score.agreement is None else [getattr(score.agreement, name) for name in METRICS]


def _integers(data: Tensor, image: LabelMap) -> list[np.ndarray]:
    """The channels of a label file as integers from 0."""
    if data.is_floating_point():
        rounded = data.round()
        if not bool((rounded == data).all()):
            value = float(data[rounded != data][0])
            raise InputError(f"{image.path} holds {value}, which is not a label: labels are whole numbers from 0.")
        data = rounded.int()
    if int(data.min()) < 0:
        raise InputError(f"{image.path} holds {int(data.min())}, which is not a label: labels count from 0.")
    return [channel.numpy() for channel in data]
