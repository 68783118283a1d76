"""Draws the metrics of a run as box plots, one box per class."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from voxquilt.filesystem import replacing
from voxquilt.reporting.evaluation import Score

_PANELS = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "hd95_mm": "HD95 [mm]",
    "relative_volume_error": "volume error",
}


def write_boxes(path: Path, scores: Sequence[Score]) -> None:
    """Write a PNG with one panel for each of four metrics, of the subjects whose value is finite.

    Args:
        path: The PNG, which appears only when it is complete.
        scores: The scores of all subjects and classes.

    Raises:
        OutputError: the file cannot be written.
    """
    # Here, since few runs have true labels, and Matplotlib takes as long to import as a small run takes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len({score.product for score in scores if score.agreement}) > 1
    boxes = list(dict.fromkeys((score.name, score.product) for score in scores if score.agreement))
    names = [f"{name} ({product})" if several else name for name, product in boxes]
    width = min(6 + 0.25 * len(names), 40)
    figure = Figure(figsize=(width, 2.2 * len(_PANELS)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (metric, title) in zip(figure.subplots(len(_PANELS), sharex=True), _PANELS.items(), strict=True):
        columns = [
            [
                value
                for score in scores
                if score.agreement
                and (score.name, score.product) == box
                and isfinite(value := getattr(score.agreement, metric))
            ]
            for box in boxes
        ]
        axes.boxplot(columns, showfliers=False, medianprops={"color": "#d55e00"})
        for n, column in enumerate(columns, 1):
            axes.plot([n] * len(column), column, ".", color="#0072b2", alpha=0.5)
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(range(1, len(names) + 1), names, rotation=90 if len(names) > 8 else 0)
        if "Dice" in title:
            axes.set_ylim(-0.02, 1.02)
    with replacing(path) as file:
        canvas.print_png(file)
