"""Draws docs/grid.png: the grid of a small volume and the weights of its patches, as voxquilt computes them."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from voxquilt.geometry.grid import make_grid
from voxquilt.stitching.blend import to_blend

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

SHAPE, PATCH, OVERLAP = (100, 70, 1), (40, 40, 1), (10, 10, 0)
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"]


def draw(path: Path) -> None:
    """The picture."""
    grid = make_grid(SHAPE, PATCH, OVERLAP)
    figure, (plane, *rows) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1.1, 1, 1], layout="constrained")
    plane.add_patch(Rectangle((0, 0), SHAPE[0], SHAPE[1], fill=False, lw=2))
    for n, (i0, j0, _, i1, j1, _) in enumerate(grid.locations.tolist()):
        colour = COLOURS[n % len(COLOURS)]
        plane.add_patch(Rectangle((i0, j0), i1 - i0, j1 - j0, fc=(*mpl.colors.to_rgb(colour), 0.25), ec=colour, lw=1.5))
        plane.text((i0 + i1) / 2, (j0 + j1) / 2, str(n), color="black", ha="center", va="center")
    plane.set(xlim=(-3, 104), ylim=(-3, 73), aspect="equal", xlabel="i", ylabel="j")
    plane.set_title(f"{len(grid)} patches of 40, overlap 10")
    for axes, mode in zip(rows, ("gaussian", "crop"), strict=True):
        total = np.zeros(SHAPE[0])
        for n, (start, weight) in enumerate(zip(grid.starts[0], to_blend(mode).axis_weights(grid, 0), strict=True)):
            x = np.arange(start, start + PATCH[0])
            axes.plot(x, np.asarray(weight), color=COLOURS[n % len(COLOURS)], lw=1.5)
            total[x] += np.asarray(weight)
        axes.plot(total, color="black", lw=1, ls="--")
        axes.set(xlabel="i", ylim=(-0.05, 1.15), title=f"{mode}: weights along i, and their sum")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("grid.png"))
