"""Compares the files of a self-check, read by nibabel, with what has to be in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from voxquilt.geometry.space import Box
from voxquilt.selfcheck.findings import Finding, worst_of
from voxquilt.selfcheck.images import CONSTANT, NOISE, Channel
from voxquilt.selfcheck.reference import (
    AxisWay,
    Way,
    axis_ways,
    is_linear,
    returned_positions,
    returned_volume,
)
from voxquilt.selfcheck.spline_reference import NORM, bent, is_known, splined_volume
from voxquilt.selfcheck.stand_in import EPS, ROUNDINGS

_PLANES = 8
_NAMES = {CONSTANT: "a constant comes back", NOISE: "noise comes back"}


@dataclass(frozen=True)
class Rounding:
    """What a run rounds.

    Args:
        overlaps: Patches that cover a voxel at most: so many products are summed.
        unit: The largest relative error of a patch's values in the type that a network gives.
    """

    overlaps: int
    unit: float = 0.0

    def of(self, magnitude: np.ndarray | float, slope: float = 0.0) -> np.ndarray | float:
        """What rounding changes in values that differ by `slope` between neighbours.

        Every rounding changes a value by at most EPS / 2 of it; EPS leaves a factor of two.
        """
        return (ROUNDINGS + self.overlaps) * EPS * (magnitude + slope) + 2 * self.unit * (magnitude + slope)


def read_output(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(C, I, J, K) voxels of a file as viewers show them, its affine, and the slope of its integers."""
    image: Any = nib.load(path)
    slope = float(image.dataobj.slope)
    voxels = np.asarray(image.dataobj)
    voxels = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels[None]
    return voxels, image.affine, slope


def compare_geometry(source: Path, output: Path) -> Finding:
    """Whether a file's corners are where its input's are, both as nibabel reads them."""
    ours: Any = nib.load(source)
    theirs: Any = nib.load(output)
    check = "the files' affine"
    if ours.shape[:3] != theirs.shape[:3]:
        return Finding(check, problem=f"{output.name} has {theirs.shape[:3]} voxels, its input {ours.shape[:3]}")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in ours.shape[:3]], [1], indexing="ij")).reshape(4, -1)
    a, b = (image.affine @ corners for image in (ours, theirs))
    distances = np.linalg.norm((a - b)[:3], axis=0)
    worst = int(distances.argmax())
    allowed = 4 * EPS * float(np.abs(a).max())  # headers hold float32
    voxel = tuple(int(n) for n in corners[:3, worst])
    return Finding(check, float(distances[worst]), allowed, "mm", voxel, tuple(np.round(a[:3, worst], 2).tolist()))


def compare_headers(source: Path, output: Path) -> Finding:
    """Whether a file's orientation fields and units are its input's: some programs read one of them, some another."""
    ours: Any = nib.load(source)
    theirs: Any = nib.load(output)
    check, wrong = "the files' header", []
    for field in ("qform", "sform"):
        (a, our_code), (b, their_code) = (getattr(image, f"get_{field}")(coded=True) for image in (ours, theirs))
        alike = a is None or (b is not None and np.allclose(a, b, atol=1e-3))
        if our_code != their_code or not alike:
            wrong.append(field)
    if ours.header.get_xyzt_units()[0] != theirs.header.get_xyzt_units()[0]:
        wrong.append("unit")
    return Finding(check, problem=f"{output.name} has another {' and '.join(wrong)} than its input" if wrong else "")


def compare_returned(
    kind: str,
    output: Path,
    way: Way,
    rounding: Rounding,
    *,
    channels: Sequence[Channel] = (),
    written: Sequence[np.ndarray] = (),
) -> Finding | None:
    """Whether a synthetic subject came back; None where there is no reference for it.

    Args:
        kind: The subject.
        output: The file that the network's input came back as.
        way: How it went to model space and back.
        rounding: What the run rounds.
        channels: What the channels of a ramp or a constant are.
        written: The channels of noise.
    """
    check = _NAMES.get(kind) or f"{kind.replace('_', ' along ')} comes back"
    try:
        ways = axis_ways(way)
    except ValueError as error:
        return Finding(check, problem=f"{error}.")
    voxels, affine, _ = read_output(output)
    count = len(written) or len(channels)
    if voxels.shape != (count, *way.shape):
        return Finding(check, problem=f"the file has the shape {voxels.shape}; wanted is {(count, *way.shape)}.")
    is_splined = kind == NOISE and not is_linear(way, ways)
    if is_splined and not is_known(way):
        return None
    i, j, k = inside_of(way, ways)
    if not all(map(np.any, (i, j, k))):
        return None
    positions = returned_positions(ways)
    beyond = None if way.box is None else ~_inside_box(way)
    found = []
    for n, values in enumerate(voxels):
        volume, largest, slack = None, 0.0, 0.0
        if kind == NOISE:
            volume = splined_volume(written[n], way, ways) if is_splined else returned_volume(written[n], ways)
            largest = float(np.abs(written[n]).max())
        if is_splined:
            slack = bent(largest, splines_of(way))
            largest *= NORM ** (3 * splines_of(way))
        # A few planes at a time, which stay in the cache.
        for first in range(0, len(values), _PLANES):
            planes = slice(first, first + _PLANES)
            if volume is not None:
                wanted, allowed, unit, per_mm = volume[planes], rounding.of(largest) + slack, "", 1.0
            else:
                channel = channels[n]
                wanted = channel.over(positions[0][planes], *positions[1:])
                allowed = rounding.of(np.abs(wanted), sum(map(abs, channel.slope)))
                allowed += channel.unknown(splines_of(way)) + beside(channel, ways)
                unit, per_mm = "" if kind == CONSTANT else "mm", channel.per_mm
            error = np.abs(values[planes] - wanted)
            error[~(i[planes, None, None] & j[:, None] & k)] = 0
            if beyond is not None:  # where there is background
                outside = beyond[planes]
                error[outside], allowed = np.abs(values[planes])[outside], np.where(outside, 0.0, allowed)
            found.append(worst_of(check, error, allowed, affine, unit, per_mm, first))
    return max(found, key=_excess)


def inside_of(way: Way, ways: Sequence[AxisWay]) -> list[np.ndarray]:
    """Where along each axis the reference holds: within the box, and where splines are exact."""
    inside = []
    for n, along in enumerate(ways):
        first, stop = (0, way.shape[n]) if way.box is None else way.box[n]
        x = np.arange(way.shape[n])
        inside.append((x >= first) & (x < stop) & (along.is_exact | is_linear(way, ways)))
    return inside


def compare_box(way: Way, box: Box, key: str) -> Finding:
    """Whether a setting has left the voxels that it has to leave."""
    check = f"what {key} leaves"
    found, wanted = (one or tuple((0, n) for n in way.shape) for one in (way.box, box))
    problem = "" if tuple(map(tuple, found)) == tuple(map(tuple, wanted)) else f"{found} in place of {wanted}"
    return Finding(check, problem=problem)


def _inside_box(way: Way) -> np.ndarray:
    inside = np.zeros(way.shape, bool)
    inside[tuple(slice(*ends) for ends in way.box or ())] = True
    return inside


def splines_of(way: Way) -> int:
    """How often cubic splines interpolate, there and back."""
    return sum(3 in orders for orders in way.orders)


def beside(channel: Channel, ways: Sequence[AxisWay]) -> float:
    """How much a value changes where the nearest voxel is taken in place of interpolation."""
    return sum(abs(a) * along.slack for a, along in zip(channel.slope, ways, strict=True))


def _excess(finding: Finding) -> float:
    return np.inf if finding.problem else finding.error / max(finding.allowed, 1e-300)
