"""Prints the results and the metrics of a run as tables."""

import itertools
from collections.abc import Sequence
from math import isfinite, isinf
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxquilt.reporting.evaluation import Score
from voxquilt.reporting.manifest import Row

# Rows of a table that people read; with more subjects only those that failed are shown.
_MAX_ROWS = 100


def print_table(rows: Sequence[Row], folder: Path, subjects: int) -> None:
    """Print a line per subject with status, volume of labels and time, then errors and the folder of the files.

    Args:
        rows: The rows of subjects that are done or have failed.
        folder: The output folder.
        subjects: Number of subjects in the run.
    """
    table = Table(title="voxquilt")
    for heading in ("subject", "status"):
        table.add_column(heading)
    for heading in (escape("volume [ml]"), "patches", "seconds"):
        table.add_column(heading, justify="right")
    shown = rows if len(rows) <= _MAX_ROWS else [row for row in rows if row.status == "failed"][:_MAX_ROWS]
    for row in shown:
        volume = "" if row.volume_ml is None else f"{row.volume_ml:.1f}"
        style = "red" if row.status == "failed" else None
        patches = f"{row.patches} of {row.patches + row.skipped}" if row.skipped else str(row.patches)
        table.add_row(escape(row.subject), row.status, volume, patches, f"{row.seconds:.1f}", style=style)
    console = Console(highlight=False, soft_wrap=True)
    if shown:
        console.print(table)
    for row in shown:
        if row.status == "failed":
            console.print(f"[red]{escape(row.subject)}[/red]: {escape(row.error)}")
    before, failed = (sum(row.status == status for row in rows) for status in ("skipped", "failed"))
    earlier = f", {before} of them before" if before else ""
    console.print(f"{len(rows) - failed} of {subjects} subjects done{earlier}; see {escape(str(folder))}")


_COLUMNS = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "hd95_mm": "HD95 [mm]",
    "volume_error_ml": "volume error [ml]",
}


def print_scores(scores: Sequence[Score], folder: Path) -> None:
    """Print a line per class with its number of subjects, means and standard deviations, then subjects not compared.

    Args:
        scores: The scores of all subjects and classes.
        folder: The folder of metrics.csv.
    """
    table = Table(title="agreement with the labels")
    # stitch.compare adds labels of further overlap modes to those of stitch.overlap_mode.
    products = list(dict.fromkeys(score.product for score in scores if score.agreement))
    for heading in ("class", "labels") if len(products) > 1 else ("class",):
        table.add_column(heading)
    for heading in ("subjects", *_COLUMNS.values()):
        table.add_column(escape(heading), justify="right")
    names = list(dict.fromkeys(score.name for score in scores if score.agreement))
    for name, product in list(itertools.product(names, products))[:_MAX_ROWS]:
        agreements = [
            score.agreement for score in scores if score.agreement and (score.name, score.product) == (name, product)
        ]
        present = [agreement for agreement in agreements if agreement.volume_ml or agreement.true_volume_ml]
        cells = [_mean_text([getattr(agreement, metric) for agreement in present]) for metric in _COLUMNS]
        table.add_row(escape(name), *[product] * (len(products) > 1), str(len(present)), *cells)
    console = Console(highlight=False, soft_wrap=True)
    if names:
        console.print(table)
    for score in [score for score in scores if score.error][:_MAX_ROWS]:
        style = "red" if score.failed else "yellow"
        console.print(f"[{style}]{escape(score.subject)}[/{style}]: not compared: {escape(score.error)}")
    compared = len({score.subject for score in scores if score.agreement})
    subjects = len({score.subject for score in scores})
    console.print(f"{compared} of {subjects} subjects compared with their labels; see {escape(str(folder))}")


def _mean_text(numbers: Sequence[float]) -> str:
    """Mean and standard deviation of the finite numbers, and how many are infinite."""
    finite = [number for number in numbers if isfinite(number)]
    infinite = sum(isinf(number) for number in numbers)
    spread = f" ± {stdev(finite):.3g}" if len(finite) > 1 else ""
    return (f"{fmean(finite):.3g}{spread}" if finite else "") + (f" ({infinite} infinite)" if infinite else "")
