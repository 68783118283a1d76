"""Divides subjects into those to train on and to validate on: by folds, a column of a table, or a file of splits."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError
from voxquilt.text import of_subjects, question

_TRAINING = ("train", "training")
_VALIDATION = ("val", "valid", "validation")
_SPLITS = (
    "a list of folds, each an object whose train and val are lists of subject ids, as in nnU-Net's splits_final.json"
)


class Split(NamedTuple):
    """Subjects to train on, and others to validate on."""

    training: list[SubjectFiles]
    validation: list[SubjectFiles]


def make_split(
    cases: Sequence[SubjectFiles], folds: int | None, fold: int = 0, seed: int = 0, split: str | None = None
) -> Split:
    """Divide subjects.

    Args:
        cases: All subjects.
        folds: Number of parts of about equal size, drawn by the seed; one part validates. None: no validation.
        fold: The number of the part that validates, 0 to folds - 1.
        seed: Seed of the parts, which depend on nothing else but the subjects' ids.
        split: In place of folds, a column of the subjects' table. Cells are 'train' or 'val'; any other cell (such as
            'test') leaves the subject out. Or all cells are numbers of folds, and `fold` validates. Or a .json file: a
            list with an object for each fold, whose 'train' and 'val' are lists of subject ids, as nnU-Net writes it to
            splits_final.json; other subjects are left out.

    Raises:
        ConfigError: there is no such column or file, the file is none of splits or names subjects that are not there,
            there are too few subjects, or none is left to train on.
    """
    if split is not None:
        return (_from_file if Path(split).suffix.lower() == ".json" else _from_column)(cases, fold, split)
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


def _from_file(cases: Sequence[SubjectFiles], fold: int, name: str) -> Split:
    path = Path(name).expanduser()
    try:
        folds = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"data.split={name} cannot be read (relative to {Path.cwd()}): {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"data.split={name} is not a .json file: {error}. Wanted is {_SPLITS}.") from None
    if not isinstance(folds, list) or not all(map(_is_fold, folds)):
        raise ConfigError(f"data.split={name} does not hold splits. Wanted is {_SPLITS}.")
    if not 0 <= fold < len(folds):
        raise ConfigError(f"data.fold={fold} is not one of the {len(folds)} folds in {name}, counted from 0.")
    training, validating = (set(folds[fold][part]) for part in ("train", "val"))
    known = {case.subject for case in cases}
    if missing := sorted((training | validating) - known):
        raise ConfigError(
            f"data.split={name}: fold {fold} has {of_subjects(len(missing))} that data.inputs has not, such as "
            f"{missing[0]}.{question(missing[0], known)} With data.split=null, data.folds divides them."
        )
    if both := sorted(training & validating):
        raise ConfigError(f"data.split={name}: {both[0]} is to train on and to validate on in fold {fold}.")
    parts = Split([c for c in cases if c.subject in training], [c for c in cases if c.subject in validating])
    return _check_parts(parts, f" That is fold {fold} of {name}.")


def _is_fold(node: object) -> bool:
    parts = [node.get(part) for part in ("train", "val")] if isinstance(node, dict) else [None]
    return all(isinstance(part, list) and all(isinstance(subject, str) for subject in part) for part in parts)


def _check_parts(parts: Split, explanation: str) -> Split:
    if not parts.training:
        raise ConfigError(f"no subject is left to train on: {len(parts.validation)} are to validate.{explanation}")
    return parts
