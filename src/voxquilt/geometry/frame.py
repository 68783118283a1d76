"""Provides frames, which place voxels in the world, and checked sizes, orientations and spacings."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from voxquilt.errors import ConfigError, GridError, InputError

Triple = tuple[int, int, int]
Location = tuple[int, int, int, int, int, int]
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Voxels before and after along i, j, k."""
AXES = "ijk"
_CODES = ("LR", "PA", "IS")


def to_triple(value: int | Iterable[int], name: str, *, minimum: int = 0) -> Triple:
    """One size for all axes, or three of them.

    Raises:
        GridError: not an integer or three, or a size below `minimum`.

    >>> to_triple(4, "patch_overlap")
    (4, 4, 4)
    """
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,) * 3
    integers = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values)
    if len(values) != 3 or not integers:
        raise GridError(f"{name} must be an integer or three of them, in voxels along i, j, k; it is {value!r}.")
    i, j, k = (int(v) for v in values)  # type: ignore[arg-type]
    for axis, size in zip(AXES, (i, j, k), strict=True):
        if size < minimum:
            raise GridError(f"{name} must be at least {minimum} along axis {axis}; it is {size}.")
    return i, j, k


@dataclass(frozen=True)
class Frame:
    """The geometry of a volume: the number of voxels along i, j, k and the affine from voxel indices to mm in RAS.

    Args:
        shape, affine: The geometry.
        zooms: Voxel sizes along i, j, k in mm where the file states them besides its affine.

    Raises:
        InputError: the affine is degenerate (a zero, infinite or missing voxel size, or axes in one plane).
    """

    shape: Triple
    affine: np.ndarray
    zooms: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f"the affine must be a finite 4 x 4 matrix; it is\n{affine}")
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        # The volume of the unit parallelepiped: 1 for orthogonal axes, 0 for axes in one plane.
        if sizes.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-4:
            raise InputError(f"the affine is degenerate: it does not span three dimensions:\n{affine}")
        object.__setattr__(self, "shape", to_triple(self.shape, "a volume's shape", minimum=1))
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def matches(self, other: "Frame") -> bool:
        """Whether shapes are equal and no corner differs by more than 1 % of a voxel plus float32 rounding."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], [1], indexing="ij")).reshape(4, -1)
        ours, theirs = self.affine @ corners, other.affine @ corners
        limit = 0.01 * min(self.spacing) + 1e-6 * np.abs(ours).max()
        return bool(np.abs(ours - theirs).max() <= limit)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along i, j, k in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def header_spacing(self) -> tuple[float, float, float]:
        """Voxel sizes as the file states them, if they are the affine's up to rounding; else the affine's.

        The number of voxels that another spacing needs is rounded, so that the last bit can decide it.
        """
        if self.zooms is None or not np.allclose(self.zooms, self.spacing, rtol=1e-4, atol=0):
            return self.spacing
        return self.zooms

    def with_measured_zooms(self) -> "Frame":
        """The same with the affine's voxel sizes, in float32, as nibabel writes them into a header."""
        axes = self.affine[:3, :3]
        i, j, k = np.sqrt((axes * axes).sum(0)).astype(np.float32).tolist()
        return replace(self, zooms=(i, j, k))

    @property
    def axcodes(self) -> str:
        """The anatomical direction nearest to each voxel axis, for example 'RAS'.

        >>> Frame((2, 2, 2), np.diag([-1, 1, 1, 1])).axcodes
        'LAS'
        """
        world, signs = closest_axes(self.affine)
        return "".join(_CODES[w][int(s > 0)] for w, s in zip(world, signs, strict=True))


def described(frame: Frame) -> str:
    """Voxels and their size, for messages.

    >>> described(Frame((3, 4, 5), np.diag([1, 1, 2.5, 1])))
    '3 x 4 x 5 voxels of 1 x 1 x 2.5 mm'
    """
    voxels, sizes = (" x ".join(f"{n:.5g}" for n in numbers) for numbers in (frame.shape, frame.spacing))
    return f"{voxels} voxels of {sizes} mm"


def closest_axes(affine: np.ndarray) -> tuple[Triple, Triple]:
    """Which world axis each voxel axis runs along, and in which direction (1 or -1).

    The polar decomposition separates the affine's rotation from its shears; the result is the permutation that is
    nearest to the rotation.
    """
    u, _, vt = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    rotation = u @ vt
    # Rounded before comparing: at exactly 45 degrees two permutations tie, and noise must not choose between them.
    world = max(permutations(range(3)), key=lambda p: round(sum(rotation[p[n], n] ** 2 for n in range(3)), 9))
    signs = tuple(1 if rotation[world[n], n] > 0 else -1 for n in range(3))
    return (world[0], world[1], world[2]), (signs[0], signs[1], signs[2])


def parse_axcodes(codes: str) -> tuple[Triple, Triple]:
    """The world axis and direction of each letter of an orientation such as 'RAS' or 'PIR'.

    Raises:
        ConfigError: not three letters, one of each pair L/R, P/A, I/S.
    """
    letters = str(codes).upper()
    pairs = [next((n for n, pair in enumerate(_CODES) if letter in pair), -1) for letter in letters]
    if sorted(pairs) != [0, 1, 2]:
        raise ConfigError(f"an orientation has one letter of each pair L/R, A/P, S/I, such as RAS; it is {codes!r}.")
    signs = [1 if letter == _CODES[n][1] else -1 for letter, n in zip(letters, pairs, strict=True)]
    return (pairs[0], pairs[1], pairs[2]), (signs[0], signs[1], signs[2])


def to_axis_order(transpose: Iterable[int] | None) -> Triple:
    """The axis that each of three is, such as (2, 1, 0) to reverse their order; None keeps it.

    Raises:
        ConfigError: not the numbers 0, 1, 2, each once.
    """
    order = (0, 1, 2) if transpose is None else tuple(transpose) if isinstance(transpose, Iterable) else (transpose,)
    if sorted(order, key=str) != [0, 1, 2]:
        raise ConfigError(
            f"transpose must be null or the axes 0, 1, 2, each once, such as [2,1,0]; it is {transpose!r}."
        )
    i, j, k = (int(n) for n in order)
    return i, j, k


def to_spacing(spacing: float | Iterable[float | None] | None) -> tuple[float | None, float | None, float | None]:
    """mm along the three model axes, None where the file's are kept.

    Raises:
        ConfigError: not a positive number or three.
    """
    values = tuple(spacing) if isinstance(spacing, Iterable) and not isinstance(spacing, str) else (spacing,) * 3
    valid = [v is None or (isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < np.inf) for v in values]
    if len(values) != 3 or not all(valid):
        raise ConfigError(f"spacing must be null, a positive number of mm, or three along i, j, k; it is {spacing!r}.")
    i, j, k = (None if v is None else float(v) for v in values)
    return i, j, k
