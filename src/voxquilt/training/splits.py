"""Divides subjects into those to train on and those to validate on, by folds or by a column of a table."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError

_TRAINING = ("train", "training")
_VALIDATION = ("val", "valid", "validation")


class Split(NamedTuple):
    """Subjects to train on, and others to validate on."""

    training: list[SubjectFiles]
    validation: list[SubjectFiles]


def make_split(
    cases: Sequence[SubjectFiles], folds: int | None, fold: int = 0, seed: int = 0, column: str | None = None
) -> Split:
    """Divide subjects.

    Args:
        cases: All subjects.
        folds: Number of parts of about equal size, drawn by the seed; one part validates. None: no validation.
        fold: The number of the part that validates, 0 to folds - 1.
        seed: Seed of the parts, which depend on nothing else but the subjects' ids.
        column: A column of the subjects' table, in place of folds. Cells are 'train' or 'val'; any other cell (such as
            'test') leaves the subject out. Or all cells are numbers of folds, and `fold` validates.

    Raises:
        ConfigError: there is no such column, there are too few subjects, or none is left to train on.
    """
    if column is not None:
        return _from_column(cases, fold, column)
    if folds is None:
        return Split(list(cases), [])
    if not 2 <= folds <= len(cases):
        raise ConfigError(
            f"data.folds={folds} needs at least 2 folds and as many subjects; there are {len(cases)}. Add subjects, or "
            f"set data.folds=null to train on all of them without validation."
        )
    if not 0 <= fold < folds:
        raise ConfigError(f"data.fold={fold} is not one of data.folds={folds}, counted from 0.")
    order = sorted(cases, key=lambda case: case.subject)
    random.Random(seed).shuffle(order)
    kept = {case.subject for case in order[fold::folds]}
    return _check_parts(Split([c for c in cases if c.subject not in kept], [c for c in cases if c.subject in kept]), "")


def _from_column(cases: Sequence[SubjectFiles], fold: int, column: str) -> Split:
    without = [case.subject for case in cases if column not in case.values]
    if without:
        raise ConfigError(
            f"data.split={column} is not a column of the table of {without[0]}; set data.inputs to a .csv that has it."
        )
    cells = {case.subject: case.values[column].lower() for case in cases}
    if all(cell.isdecimal() for cell in cells.values()):
        validating = {subject for subject, cell in cells.items() if int(cell) == fold}
        training = cells.keys() - validating
    else:
        validating = {subject for subject, cell in cells.items() if cell in _VALIDATION}
        training = {subject for subject, cell in cells.items() if cell in _TRAINING}
    distinct = ", ".join(sorted(set(cells.values())))
    parts = Split([c for c in cases if c.subject in training], [c for c in cases if c.subject in validating])
    return _check_parts(parts, f" The column {column} has: {distinct}.")


def _check_parts(parts: Split, explanation: str) -> Split:
    if not parts.training:
        raise ConfigError(f"no subject is left to train on: {len(parts.validation)} are to validate.{explanation}")
    return parts
