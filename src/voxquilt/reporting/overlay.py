"""What does the result look like on the image? Three planes with the outlines of the labels, as one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from voxquilt.errors import InputError
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame, Triple, closest_axes
from voxquilt.stitching.label_values import planes_of

# Okabe and Ito's colours, told apart by colour-blind eyes too, in the order in which they stand out on grey.
PALETTE = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178)],
    dtype=np.uint8,
)
HEIGHT = 400  # pixels that the lowest plane has at least
LONGEST = 1600  # pixels that no plane exceeds: this wins for needles and for very large volumes
MARGIN = 20  # pixels around each plane, for the letters
FONT_SIZE = 14  # pixels
LINE = 24  # pixels of a caption


@dataclass(frozen=True)
class _View:
    """One plane of an RAS volume: the axis it cuts, those to the picture's right and up, and the letters there."""

    cut: int
    right: int
    up: int
    letters: str  # left, right, bottom, top


_VIEWS = (_View(0, 1, 2, "PAIS"), _View(1, 0, 2, "LRIS"), _View(2, 0, 1, "LRPA"))


def overlay_png(image: np.ndarray, labels: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write `overlay` as a PNG.

    Args:
        image, labels, affine: See `overlay`.
        path: The PNG, complete under its name or not there at all; its folder must exist.

    Raises:
        InputError: image and labels are not 3-D or differ in shape, or the affine is degenerate.
        OutputError: the file cannot be written.
    """
    picture = overlay(image, labels, affine)
    with replacing(Path(path)) as file:
        picture.save(file, format="PNG")


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    *,
    planes_of: np.ndarray | None = None,
    window_of: np.ndarray | None = None,
) -> Image.Image:
    """Draw a sagittal, a coronal and an axial plane side by side, with the outline of each label in its own colour.

    The planes meet in the centre of mass of all labels, or in the middle of the volume without any. Whatever the
    orientation of the arrays, superior or anterior is up, and the patient's left is on the left of the picture.
    Pictures that are to be compared get one `planes_of` and one `window_of`.

    Args:
        image: (I, J, K) numbers; black to white is the 1st to the 99th percentile of what is not 0 in the planes.
        labels: (I, J, K) integers, 0 for background.
        affine: (4, 4) voxel indices to mm in RAS.
        planes_of: (I, J, K) labels that say where the planes are; None: `labels`.
        window_of: (I, J, K) numbers that say what is black and white; None: `image`.

    Raises:
        InputError: these are not 3-D or differ in shape, or the affine is degenerate.
    """
    planes_of = labels if planes_of is None else planes_of
    window_of = image if window_of is None else window_of
    shapes = {volume.shape for volume in (image, labels, planes_of, window_of)}
    if image.ndim != 3 or len(shapes) > 1:
        raise InputError(
            f"an overlay needs an image and labels of one shape (I, J, K), without channels; "
            f"the image is {image.shape} and the labels are {labels.shape}."
        )
    frame = Frame(image.shape, affine)
    centre = _centre(_to_ras(planes_of, frame))
    image, labels, window_of = (_to_ras(volume, frame) for volume in (image, labels, window_of))
    spacing = [frame.spacing[axis] for axis in _ras_order(frame)]
    black, white = _window([_plane(window_of, view, centre) for view in _VIEWS])
    greys = [_grey(_plane(image, view, centre), black, white) for view in _VIEWS]
    extents = [n * mm for n, mm in zip(image.shape, spacing, strict=True)]
    scale = _pixels_per_mm(extents, min(spacing))
    panels = []
    for view, grey in zip(_VIEWS, greys, strict=True):
        size = tuple(max(1, round(extents[axis] * scale)) for axis in (view.up, view.right))
        outlined = _outlined(_resized(grey, size), _nearest(_plane(labels, view, centre), size))
        panels.append(_captioned(outlined, view.letters))
    return _side_by_side(panels)


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its caption."""
    canvas = Image.new(
        "RGB", (max(picture.width for _, picture in pictures), sum(picture.height + LINE for _, picture in pictures))
    )
    draw, top = ImageDraw.Draw(canvas), 0
    for caption, picture in pictures:
        draw.text((MARGIN, top + LINE // 2), caption, fill="white", anchor="lm", font_size=FONT_SIZE)
        canvas.paste(picture, (0, top + LINE))
        top += LINE + picture.height
    return canvas


def flat(
    labels: Shaped[np.ndarray, "c i j k"], label_values: Sequence[int] | None = None
) -> Shaped[np.ndarray, "i j k"]:
    """One label a voxel, to draw: of several channels, which are masks, the last; they count from 1.

    Args:
        labels: As files hold them.
        label_values: The numbers that classes have there, in their order: a class has its own colour, whatever its
            number.
    """
    if len(labels) == 1:
        if label_values is None:
            return labels[0]
        numbers = np.array(sorted({0, *label_values}))
        # Numbers other than 0 count from 1, in the order of the classes.
        places = {number: n for n, number in enumerate((v for v in label_values if v), 1)}
        ranks = np.array([places.get(int(number), 0) for number in numbers], np.min_scalar_type(len(numbers)))
        drawn = np.empty_like(labels, ranks.dtype)
        for plane, into in zip(planes_of(labels), planes_of(drawn), strict=True):
            found = np.searchsorted(numbers, plane).clip(max=len(numbers) - 1)
            into[...] = np.where(numbers[found] == plane, ranks[found], 0)
        return drawn[0]
    found = np.zeros(labels.shape[1:], np.uint8 if len(labels) < 256 else np.uint16)
    for n, mask in enumerate(labels, 1):
        found[mask > 0] = n
    return found


def _to_ras(volume: np.ndarray, frame: Frame) -> np.ndarray:
    """A view, nothing copied: axes in the order right, anterior, superior, all of them ascending."""
    _, signs = closest_axes(frame.affine)
    return volume[tuple(slice(None, None, sign) for sign in signs)].transpose(_ras_order(frame))


def _ras_order(frame: Frame) -> list[int]:
    """The voxel axes that run along right, anterior and superior."""
    world, _ = closest_axes(frame.affine)
    return [world.index(axis) for axis in range(3)]


def _centre(labels: np.ndarray) -> Triple:
    """The voxel nearest to the centre of mass of all labels."""
    # Slab by slab along the axis of the longest stride: a large volume is read once, in order, and never copied.
    slow = int(np.argmax(np.abs(labels.strides)))
    rest = [axis for axis in range(3) if axis != slow]
    counts = [np.zeros(n, dtype=np.int64) for n in labels.shape]
    for n, slab in enumerate(np.moveaxis(labels, slow, 0)):
        inside = slab != 0
        counts[slow][n] = np.count_nonzero(inside)
        counts[rest[0]] += np.count_nonzero(inside, axis=1)
        counts[rest[1]] += np.count_nonzero(inside, axis=0)
    total = int(counts[0].sum())
    if not total:
        i, j, k = (n // 2 for n in labels.shape)
    else:
        # In integers, so that no order of summation moves the planes.
        i, j, k = ((2 * int(np.arange(len(c)) @ c) + total) // (2 * total) for c in counts)
    return i, j, k


def _plane(volume: np.ndarray, view: _View, centre: Triple) -> Shaped[np.ndarray, "up right"]:
    """The voxels where `view` cuts the volume, the picture's top row first."""
    # Not take(), which would first copy a volume that is not C-ordered.
    return np.moveaxis(volume, view.cut, 0)[centre[view.cut]].T[::-1]


def _window(planes: list[Shaped[np.ndarray, "_ _"]]) -> tuple[float, float]:
    """What is black and what is white, in all planes."""
    values = np.concatenate([plane.ravel() for plane in planes]).astype(np.float64)
    values = values[np.isfinite(values)]
    low, high = np.percentile(values[values != 0], (1, 99)) if values.any() else (0.0, 0.0)
    if low == high and values.size:  # a mask, or a constant image
        low, high = values.min(), values.max()
    return float(low), float(high)


def _grey(plane: Shaped[np.ndarray, "_ _"], black: float, white: float) -> UInt8[np.ndarray, "_ _"]:
    shares = (plane.astype(np.float64) - black) / ((white - black) or 1.0)
    return (np.nan_to_num(np.clip(shares, 0, 1)) * 255).round().astype(np.uint8)


def _pixels_per_mm(extents: list[float], finest: float) -> float:
    """One scale for all planes; `extents` of the volume and its smallest voxel size in mm."""
    # The axial plane is as high as the volume is long; the others as high as the volume. No voxel is lost if it fits.
    wanted = max(HEIGHT / min(extents[1], extents[2]), 1 / finest)
    return min(wanted, LONGEST / max(extents))


def _resized(grey: UInt8[np.ndarray, "_ _"], size: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    picture = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _nearest(labels: Shaped[np.ndarray, "_ _"], size: tuple[int, ...]) -> Int[np.ndarray, "h w"]:
    # By hand: Pillow has no 64-bit integers.
    rows, columns = ((2 * np.arange(m) + 1) * n // (2 * m) for m, n in zip(size, labels.shape, strict=True))
    return labels[np.ix_(rows, columns)].astype(np.int64)


def _edges(labels: Int[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The outermost two pixels inside each label; beyond the picture is background, so every outline is closed."""
    low = ndimage.minimum_filter(labels, size=5, mode="constant")
    high = ndimage.maximum_filter(labels, size=5, mode="constant")
    return (labels != 0) & (low != high)


def _outlined(grey: UInt8[np.ndarray, "h w"], labels: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    picture = np.repeat(grey[..., None], 3, axis=2)
    edges = _edges(labels)
    picture[edges] = PALETTE[(labels[edges] - 1) % len(PALETTE)]
    return picture


def _captioned(picture: UInt8[np.ndarray, "h w 3"], letters: str) -> Image.Image:
    """The picture in a black margin, with one letter at the middle of each side."""
    height, width, _ = picture.shape
    panel = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN))
    panel.paste(Image.fromarray(picture), (MARGIN, MARGIN))
    draw, half, middle = ImageDraw.Draw(panel), MARGIN // 2, (panel.width // 2, panel.height // 2)
    places = [(half, middle[1]), (panel.width - half, middle[1])]
    places += [(middle[0], panel.height - half), (middle[0], half)]
    for place, letter in zip(places, letters, strict=True):
        draw.text(place, letter, fill="white", anchor="mm", font_size=FONT_SIZE)
    return panel


def _side_by_side(panels: list[Image.Image]) -> Image.Image:
    height = max(panel.height for panel in panels)
    canvas = Image.new("RGB", (sum(panel.width for panel in panels), height))
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, (height - panel.height) // 2))
        left += panel.width
    return canvas
