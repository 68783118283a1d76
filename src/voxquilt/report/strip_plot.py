"""Lays out strip plots of volumes: a dot per subject along an axis in millilitres, with outliers apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from voxquilt.report.flags import LIMIT, ClassCohort

WIDTH, HEIGHT = 720, 60
"""Size of a plot in SVG's units."""
_MARGIN, _MIDDLE = 12, 26
_STEP, _MOST = 3, 7  # units between dots that would cover each other, and how many of them there are up and down
_NAMED = 50  # outliers that have a link and a text


@dataclass(frozen=True)
class Dot:
    """An outlier's dot."""

    x: float
    subject: str
    text: str


@dataclass(frozen=True)
class StripPlot:
    """A plot that a template draws.

    Args:
        name: The class.
        summary: What the plot shows, in words.
        path: The dots of subjects that are no outliers, as an SVG path of lines of length 0 with round ends.
        outliers: The dots of outliers, the furthest first.
        more: Outliers that have no dot of their own since there are too many.
        ticks: Positions and texts along the axis.
        middle: Position of the median.
        band: Positions between which no volume is an outlier; None where outliers are not sought.
        note: Why outliers are not sought.
    """

    name: str
    summary: str
    path: str
    outliers: list[Dot]
    more: int
    ticks: list[tuple[float, str]]
    middle: float
    band: tuple[float, float] | None
    note: str


def strip_plot(cohort: ClassCohort) -> StripPlot:
    """The plot of a class. Its size is bounded: dots that would cover each other are drawn once."""
    volumes = list(cohort.ml.values())
    ticks = _ticks(min(volumes), max(volumes))
    low, high = min(ticks[0], *volumes), max(ticks[-1], *volumes)

    def place(ml: float) -> float:
        return round(_MARGIN + (WIDTH - 2 * _MARGIN) * (ml - low) / ((high - low) or 1.0), 1)

    named = cohort.outliers[:_NAMED]
    dots = [Dot(place(cohort.ml[s]), s, f"{s}: {cohort.ml[s]:.4g} ml, z = {cohort.scores[s]:+.1f}") for s in named]
    rest = cohort.ml.keys() - set(named)
    middle = median(volumes)
    band = None
    if cohort.scores:
        reach = LIMIT * 1.4826 * median(abs(volume - middle) for volume in volumes)
        band = place(max(low, middle - reach)), place(min(high, middle + reach))
    count = len(volumes)
    summary = (
        f"{cohort.name}: {count} volumes from {min(volumes):.4g} to {max(volumes):.4g} ml, median {middle:.4g} ml; "
        f"{len(cohort.outliers)} outliers"
    )
    return StripPlot(
        cohort.name,
        summary,
        _swarm([place(cohort.ml[subject]) for subject in rest]),
        dots,
        len(cohort.outliers) - len(named),
        [(place(tick), f"{tick:.6g}") for tick in ticks],
        place(middle),
        band,
        cohort.note,
    )


def _swarm(places: Sequence[float]) -> str:
    """Dots at integer positions, those at one position above and below each other as far as there is room."""
    counts: dict[int, int] = {}
    for place in places:
        column = _STEP * round(place / _STEP)
        counts[column] = min(counts.get(column, 0) + 1, 2 * _MOST + 1)
    heights = [_MIDDLE + _STEP * ((n + 1) // 2) * (1 if n % 2 else -1) for n in range(2 * _MOST + 1)]
    return "".join(f"M{x},{heights[n]}h0" for x, count in sorted(counts.items()) for n in range(count))


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover a range."""
    if low == high:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, last + 1)]
