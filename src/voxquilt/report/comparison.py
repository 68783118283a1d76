"""Renders a page that shows several runs of the same subjects side by side: each of them beside the first."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from voxquilt.errors import ConfigError, InputError, VoxquiltError
from voxquilt.filesystem import replacing
from voxquilt.report.agreement import dice_of_files
from voxquilt.report.changed_settings import differing_settings
from voxquilt.report.missing_thumbnails import is_series, label_values_of
from voxquilt.report.page import STATIC, key_of, link_to, render, value_text
from voxquilt.report.run_folder import RunFolder, read_run
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.thumbnails import OVERLAY, path_of
from voxquilt.text import escaped

# Each thread holds two label volumes.
_THREADS = min(4, os.cpu_count() or 1)
_ROWS = 100
_MOST_CLASSES = 6


@dataclass(frozen=True)
class Pair:
    """One subject in two runs.

    Args:
        subject: The id.
        run: The number of the run that is compared with the first, from 1.
        dice: Dice's coefficient by class.
        ml: Volume of all labels in both; None where it is not known.
        problem: Why they were not compared.
    """

    subject: str
    run: int
    dice: Mapping[int, float] = field(default_factory=dict)
    ml: tuple[float | None, float | None] = (None, None)
    problem: str = ""

    @property
    def mean(self) -> float:
        """The mean over classes; 1 where neither run has a label."""
        return fmean(self.dice.values()) if self.dice else 1.0


def write_comparison(folders: Sequence[Path], path: Path) -> None:
    """Compare runs, and write a page.

    Args:
        folders: Their output folders, the one to compare with first.
        path: The page; pictures are linked from where the runs have them.

    Raises:
        ConfigError: a folder twice, or no folder for the page.
        InputError: a folder has no manifest, or two have no subject in common.
        OutputError: the page cannot be written.
    """
    if len({*folders}) < len(folders):
        raise ConfigError(f"a folder is given twice: {', '.join(map(str, folders))}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")
    runs = [read_run(folder) for folder in folders]
    pairs = compare_runs(runs)
    names = _names(runs)
    numbers = list(dict.fromkeys(number for pair in pairs for number in pair.dice))
    shown = sorted(numbers) if 1 < len(numbers) <= _MOST_CLASSES else []
    columns = ["Dice", *(names.get(n, str(n)) for n in shown), "before [ml]", "here [ml]", "change [ml]"]
    base = path.resolve().parent
    rows = [_view(pair, runs, shown, base) for pair in pairs]
    page = render(
        "comparison.html.j2",
        STATIC,
        runs=[_facts(run) for run in runs],
        settings=[(key, [value_text(value) for value in values]) for key, values in _differing(runs)],
        versions=_versions(runs),
        classes=_by_class(pairs, names),
        columns=columns,
        parts=[rows[n : n + _ROWS] for n in range(0, len(rows), _ROWS)],
        total=len(rows),
    )
    with replacing(path) as file:
        file.write(page)


def compare_runs(runs: Sequence[RunFolder]) -> list[Pair]:
    """Each later run beside the first, by subject: those that cannot be compared, then those that changed most.

    Raises:
        InputError: two runs have no subject in common.
    """
    first = runs[0]
    work = [(number, run, subject) for number, run in enumerate(runs[1:], 1) for subject in first.rows | run.rows]
    for run in runs[1:]:
        if not first.rows.keys() & run.rows.keys():
            raise InputError(f"{first.path} and {run.path} have no subject in common.")
    with ThreadPoolExecutor(_THREADS) as pool:
        pairs = list(pool.map(lambda item: _compare(first, item[1], item[2], item[0]), work))
    return sorted(pairs, key=lambda pair: (not pair.problem, pair.mean, pair.subject, pair.run))


def _compare(first: RunFolder, other: RunFolder, subject: str, number: int) -> Pair:
    rows = [run.rows.get(subject) for run in (first, other)]
    volumes = rows[0].volume_ml if rows[0] else None, rows[1].volume_ml if rows[1] else None
    problems = [_problem(row, run) for run, row in zip((first, other), rows, strict=True)]
    if any(problems):
        return Pair(subject, number, ml=volumes, problem=", ".join(filter(None, problems)))
    files = [run.path / row.label_files[0] for run, row in zip((first, other), rows, strict=True) if row]
    try:
        return Pair(subject, number, dice_of_files(*files, series=is_series(first.configuration)), volumes)
    except (VoxquiltError, OSError) as error:
        return Pair(subject, number, ml=volumes, problem=str(error))


def _problem(row: Row | None, run: RunFolder) -> str:
    """Why a subject has no labels to compare."""
    if row is not None and row.status != "failed" and row.label_files:
        return ""
    what = "not" if row is None else "failed" if row.status == "failed" else "without labels"
    return f"{what} in {run.path.name}"


def _view(pair: Pair, runs: Sequence[RunFolder], shown: Sequence[int], base: Path) -> dict[str, object]:
    dice = [pair.mean if not pair.problem else None, *(pair.dice.get(n) for n in shown)]
    before, here = pair.ml
    change = None if before is None or here is None else here - before
    compared = (runs[0], runs[pair.run])
    lowest = min(pair.dice, key=lambda n: pair.dice[n], default=None)
    note = ""
    if lowest is not None and len(pair.dice) > 1 and pair.dice[lowest] < 1:
        note = f"least alike: {_names(runs).get(lowest, str(lowest))}, {pair.dice[lowest]:.3f}"
    return {
        "key": f"{key_of(pair.subject)}-{pair.run}",
        "subject": escaped(pair.subject),
        "run": escaped(runs[pair.run].path.name),
        "several": len(runs) > 2,
        "is": "failed" if pair.problem else "flagged" if pair.mean < 1 else "rest",
        "problem": escaped(pair.problem),
        "note": escaped(note),
        "thumbnails": [
            (escaped(run.path.name), link_to(os.path.relpath(path_of(run.path, OVERLAY, pair.subject), base)))
            for run in compared
            if path_of(run.path, OVERLAY, pair.subject).is_file()
        ],
        "numbers": [
            *("" if value is None else f"{value:.4f}" for value in dice),
            *("" if value is None else f"{value:.4g}" for value in (before, here, change)),
        ],
    }


def _names(runs: Sequence[RunFolder]) -> dict[int, str]:
    """Names of the numbers in label files, as the first run that names them does."""
    for run in runs:
        names = (run.configuration.get("stitch") or {}).get("class_names")
        if names:
            return dict(zip(label_values_of(run.configuration) or range(len(names)), map(str, names), strict=False))
    return {}


def _facts(run: RunFolder) -> tuple[str, str, str, str]:
    """A run's name, folder, subjects, and end."""
    failed = sum(row.status == "failed" for row in run.rows.values())
    counts = f"{len(run.rows) - failed} done, {failed} failed"
    return escaped(run.path.name), escaped(str(run.path)), counts, str(run.record.get("ended", ""))


def _differing(runs: Sequence[RunFolder]) -> list[tuple[str, list[object]]]:
    return differing_settings([run.configuration for run in runs])


def _versions(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    versions = [run.record.get("versions") or {} for run in runs]
    names = dict.fromkeys(name for found in versions for name in found)
    lines = [(name, [str(found.get(name, "")) for found in versions]) for name in names]
    return [(name, values) for name, values in lines if len({*values}) > 1]


def _by_class(pairs: Sequence[Pair], names: Mapping[int, str]) -> list[tuple[str, int, str, str]]:
    """By class: its name, the pairs that have it, mean and standard deviation of Dice, and the lowest."""
    lines = []
    for number in sorted({n for pair in pairs for n in pair.dice}):
        values = [pair.dice[number] for pair in pairs if number in pair.dice]
        spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        lines.append(
            (escaped(names.get(number, str(number))), len(values), f"{fmean(values):.4f}{spread}", f"{min(values):.4f}")
        )
    return lines
