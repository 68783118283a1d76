"""Draw docs/benchmarks.png from the results that `files.py --job one --json results.json` saved.

python benchmarks/plot.py results.json [docs/benchmarks.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib
from common import ROOT, failure, median
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, PEERS = "#d9622b", "#9aa5b1"
Bars = dict[str, float]


def bars(axes: Axes, title: str, values: Bars, unit: str) -> None:
    """One panel: a bar and its figure for each contender."""
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=[OURS if n.startswith("voxquilt") else PEERS for n in names])
    axes.bar_label(drawn, [unit.format(value) for value in values.values()], padding=3, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 1.2 * max(values.values()))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False, labelsize=9)


def main() -> None:
    """Two panels for each number of classes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", default=ROOT / "docs" / "benchmarks.png")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    jobs = {key.removeprefix("one "): runs for key, runs in results.items() if key.startswith("one ")}
    figure, panels = plt.subplots(len(jobs), 2, figsize=(9, 2.9 * len(jobs)), sharey="row", squeeze=False)
    for (classes, runs), (left, right) in zip(jobs.items(), panels, strict=True):
        base = median(runs["bare"], "seconds")
        shown = {name: done for name, done in runs.items() if name != "bare" and not failure(done)}
        beyond = {name: median(done, "seconds") - base for name, done in shown.items()}
        left.invert_yaxis()  # the panels of a row share it
        bars(left, f"{classes} classes: seconds beyond the bare forwards", beyond, "{:.1f}")
        gigabytes = {name: median(done, "peak") / 1000 for name, done in shown.items()}
        bars(right, f"{classes} classes: peak resident memory [GB]", gigabytes, "{:.2f}")
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()
