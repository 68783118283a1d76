"""Tests the overlay picture: which planes it shows, which side is up, and where outlines run."""

import tracemalloc
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from voxquilt.errors import InputError, OutputError
from voxquilt.reporting.overlay import PALETTE, flat, overlay, save_png
from voxquilt.reporting.pictures import LINE, MARGIN, stacked

ORIENTATIONS = [np.array([*zip(p, f, strict=True)]) for p in permutations(range(3)) for f in product((1, -1), repeat=3)]


def drawn(image: np.ndarray, labels: np.ndarray, affine: np.ndarray, folder: Path) -> np.ndarray:
    """The picture as an array (height, width, 3)."""
    path = folder / "overlay.png"
    save_png(overlay(image, labels, affine), path)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def panels(picture: np.ndarray, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """The planes without their margins; `sizes` are (height, width)."""
    found, left = [], 0
    for height, width in sizes:
        top = (picture.shape[0] - height) // 2
        found.append(picture[top : top + height, left + MARGIN : left + MARGIN + width])
        left += width + 2 * MARGIN
    assert left == picture.shape[1]
    return found


def test_where_masks_overlap_the_last_is_drawn() -> None:
    """Channels count from 1; a single channel holds labels already."""
    labels = np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2)
    assert np.shares_memory(flat(labels), labels)
    masks = np.array([[1, 1, 0, 0], [0, 9, 0, 0], [0, 0, 0, 1]], np.uint8).reshape(3, 4, 1, 1)
    assert flat(masks).ravel().tolist() == [1, 2, 0, 3]


def is_colour(panel: np.ndarray, label: int) -> np.ndarray:
    return (panel == PALETTE[(label - 1) % len(PALETTE)]).all(axis=-1)


def test_compared_pictures_share_planes_and_grey_levels() -> None:
    """A volume with other labels looks equal where nothing is outlined; a darker one looks as much darker."""
    rng = np.random.default_rng(0)
    image = rng.uniform(10, 200, (12, 14, 16))
    truth, labels = np.zeros((2, 12, 14, 16), np.uint8)
    truth[1:5, 9:13, 2:7], labels[7:11, 1:3, 9:15] = 1, 2
    affine = np.array([[0, -2, 0, 0], [0, 0, 1, 0], [1.5, 0, 0, 0], [0, 0, 0, 1.0]])
    wanted = np.asarray(overlay(image, truth, affine))
    alone = np.asarray(overlay(image, labels, affine))
    shown = np.asarray(overlay(image, labels, affine, planes_of=truth))
    drawn_on = is_colour(wanted, 1) | is_colour(shown, 2)
    assert np.array_equal(wanted[~drawn_on], shown[~drawn_on])
    assert not np.array_equal(wanted[~drawn_on], alone[~drawn_on])  # the control: its own labels lie elsewhere
    none = np.zeros_like(truth)
    options = {"planes_of": truth, "window_of": image}
    bright, dark = (np.asarray(overlay(v, none, affine, **options)).astype(int) for v in (image, image - 40))
    inside = (bright > 60) & (bright < 250) & (dark > 5)  # where neither is cut off
    black, white = np.percentile(image, (1, 99))
    assert np.median((bright - dark)[inside]) == pytest.approx(40 / (white - black) * 255, abs=3)
    assert np.array_equal(bright, np.asarray(overlay(image, none, affine, planes_of=truth)))
    with pytest.raises(InputError, match="of one shape"):
        overlay(image, labels, affine, planes_of=truth[:5])


def test_stacked_pictures_keep_their_captions() -> None:
    """Each under its own picture, complete."""
    pictures = [Image.new("RGB", (60, 30), colour) for colour in ("red", "blue")]
    found = np.asarray(stacked([("first", pictures[0]), ("", pictures[1])]))
    assert found.shape == (2 * (30 + LINE), 60, 3)
    assert (found[LINE : LINE + 30] == (255, 0, 0)).all()
    assert (found[30 + 2 * LINE :] == (0, 0, 255)).all()
    assert found[:LINE].any()
    assert not found[LINE + 30 : 30 + 2 * LINE].any()


def test_outlines_are_the_two_outermost_pixels_of_the_mask(tmp_path: Path) -> None:
    """With 10 pixels per voxel, coloured pixels are the mask minus its erosion by 2, in all three planes."""
    labels = np.zeros((40, 40, 40), dtype=np.int16)
    labels[5:18, 20:31, 3:12] = 1
    labels[9:14, 23:28, 6:9] = 0  # a hole, which has an outline too
    picture = drawn(np.zeros(labels.shape), labels, np.eye(4), tmp_path)
    planes = [labels[11], labels[:, 25], labels[:, :, 7]]
    for panel, plane in zip(panels(picture, [(400, 400)] * 3), planes, strict=True):
        mask = np.kron(plane.T[::-1], np.ones((10, 10))) > 0
        expected = mask & ~ndimage.binary_erosion(mask, np.ones((5, 5)))
        np.testing.assert_array_equal(is_colour(panel, 1), expected)
        assert not panel[~expected].any()


def test_a_label_that_touches_the_edge_has_a_closed_outline(tmp_path: Path) -> None:
    """If everything is one label, the outline is the picture's frame."""
    volume = np.ones((40, 40, 40), dtype=np.uint8)
    for panel in panels(drawn(volume, volume, np.eye(4), tmp_path), [(400, 400)] * 3):
        frame = np.ones((400, 400), dtype=bool)
        frame[2:-2, 2:-2] = False
        np.testing.assert_array_equal(is_colour(panel, 1), frame)


def test_every_label_has_its_own_colour_until_the_palette_repeats(tmp_path: Path) -> None:
    """Label 256 looks like label 1."""
    labels = np.zeros((40, 40, 40), dtype=np.uint64)
    labels[:10], labels[10:20], labels[20:] = 1, 2, 1 + len(PALETTE)
    axial = panels(drawn(np.zeros(labels.shape), labels, np.eye(4), tmp_path), [(400, 400)] * 3)[2]
    assert is_colour(axial, 1)[200, 98:100].all()
    assert is_colour(axial, 2)[200, 100:102].all()
    assert is_colour(axial, 2)[200, 198:200].all()
    assert is_colour(axial, 1)[200, 200:202].all()
    assert len(np.unique(PALETTE, axis=0)) == len(PALETTE) == 255


@pytest.mark.parametrize(("axis", "expected"), [(0, (0, 1, 1)), (1, (1, 0, 2)), (2, (2, 2, 0))])
def test_right_and_anterior_and_superior_are_right_or_up(axis: int, expected: tuple[int, ...], tmp_path: Path) -> None:
    """A ramp along an RAS axis grows to the right (1), upwards (2), or not at all (0) in each plane."""
    ramp = np.moveaxis(np.broadcast_to(np.arange(1.0, 41.0), (40, 40, 40)), -1, axis)
    picture = drawn(ramp, np.zeros(ramp.shape, dtype=int), np.eye(4), tmp_path)
    for panel, way in zip(panels(picture, [(400, 400)] * 3), expected, strict=True):
        left, right, bottom, top = (
            int(panel[v, h, 0]) for v, h in [(200, 20), (200, 380), (380, 200), (20, 200)]
        )  # fmt: skip
        assert (right - left > 200, top - bottom > 200) == (way == 1, way == 2)
        assert (right == left, top == bottom) == (way != 1, way != 2)


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_the_picture_does_not_depend_on_the_order_of_the_axes(orientation: np.ndarray, tmp_path: Path) -> None:
    """All 48 flips and permutations of an oblique, anisotropic volume give equal pixels."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1000, (12, 17, 9)).astype(np.int16)
    labels = (ndimage.gaussian_filter(rng.random(image.shape), 2) > 0.5).astype(np.int16)
    affine = np.array([[1, 0.1, 0, 5], [-0.05, 1.5, 0.2, -3], [0, -0.2, 2, 7], [0, 0, 0, 1]])
    turned = [nib.Nifti1Image(v, affine).as_reoriented(orientation) for v in (image, labels)]
    picture = drawn(np.asarray(turned[0].dataobj), np.asarray(turned[1].dataobj), turned[0].affine, tmp_path)
    np.testing.assert_array_equal(picture, drawn(image, labels, affine, tmp_path))


def test_lengths_in_the_picture_are_proportional_to_mm(tmp_path: Path) -> None:
    """60 x 100 x 120 mm at 4 pixels per mm, so that the lowest plane is 400 pixels high, for any voxel size."""
    labels = np.zeros((60, 50, 40), dtype=np.uint8)
    picture = drawn(labels, labels, np.diag([1, 2, 3, 1]), tmp_path)
    assert len(panels(picture, [(480, 400), (480, 240), (400, 240)])) == 3
    assert picture.shape == (480 + 2 * MARGIN, 400 + 240 + 240 + 6 * MARGIN, 3)


def test_orientation_letters_are_drawn_in_the_margins(tmp_path: Path) -> None:
    """Four around each plane, and none on it."""
    empty = np.zeros((40, 40, 40), dtype=np.uint8)
    picture = drawn(empty, empty, np.eye(4), tmp_path)
    assert not any(panel.any() for panel in panels(picture, [(400, 400)] * 3))
    _, letters = ndimage.label(ndimage.binary_dilation(picture[..., 0] > 0, iterations=2))
    assert letters == 12


def test_grey_spans_the_1st_to_99th_percentile_of_nonzero_voxels(tmp_path: Path) -> None:
    """So neither the background nor a single bright voxel decides the brightness."""
    image = np.zeros((40, 40, 40), dtype=np.int16)
    image[10:30, 10:30, 10:30] = np.arange(100, 120)
    image[20, 20, 20] = 30000
    centre = panels(drawn(image, np.zeros(image.shape, int), np.eye(4), tmp_path), [(400, 400)] * 3)[0]
    assert centre[50, 50, 0] == 0
    assert centre[295, 150, 0] == 0
    assert centre[105, 150, 0] >= 250
    assert 120 <= centre[200, 150, 0] <= 135


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 50, 50), (400, 400 + 8 + 8)),
        ((50, 1, 50), (1600, 32 + 1600 + 1600)),
        ((50, 50, 1), (1600, 1600 + 1600 + 1600)),
        ((1, 1, 1), (400, 1200)),
        ((1, 1, 5000), (1600, 3)),
        ((3000, 2, 2), (2, 2 + 1600 + 1600)),
    ],
)
def test_thin_and_long_volumes_have_1_to_1600_pixels_per_axis(
    shape: tuple[int, ...], size: tuple[int, int], tmp_path: Path
) -> None:
    """Without the margins."""
    volume = np.ones(shape, dtype=np.uint8)
    height, width, _ = drawn(volume, volume, np.eye(4), tmp_path).shape
    assert abs(height - 2 * MARGIN - size[0]) <= 1
    assert abs(width - 6 * MARGIN - size[1]) <= 1


@pytest.mark.parametrize("value", [0, 7, -3, 1e30, np.nan, np.inf])
def test_a_constant_image_is_black_or_white(value: float, tmp_path: Path) -> None:
    """Without a warning and without invented contrast."""
    image = np.full((20, 20, 20), value, dtype=np.float32)
    for panel in panels(drawn(image, np.zeros(image.shape, int), np.eye(4), tmp_path), [(400, 400)] * 3):
        assert panel.min() == panel.max()


def test_a_mask_as_an_image_is_white_on_black(tmp_path: Path) -> None:
    """Both percentiles of its nonzero voxels are one number, and both values are still visible."""
    mask = np.zeros((40, 40, 40), dtype=bool)
    mask[10:30, 10:30, 10:30] = True
    panel = panels(drawn(mask, np.zeros(mask.shape, int), np.eye(4), tmp_path), [(400, 400)] * 3)[0]
    assert (panel[200, 200, 0], panel[50, 50, 0]) == (255, 0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_volume_is_not_copied(order: str, tmp_path: Path) -> None:
    """Only planes take memory, also for flipped and Fortran-ordered volumes."""
    image = np.ones((300, 300, 300), dtype=np.uint8, order=order)  # type: ignore[call-overload]
    tracemalloc.start()
    save_png(overlay(image, image, np.diag([-1, -1, 1, 1])), tmp_path / "overlay.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < image.nbytes / 2


def test_shapes_that_differ_are_an_error() -> None:
    """The message has both shapes."""
    with pytest.raises(InputError, match=r"the image is \(4, 4, 4\) and the labels are \(4, 4, 5\)"):
        overlay(np.ones((4, 4, 4)), np.ones((4, 4, 5), dtype=int), np.eye(4))


def test_a_picture_that_cannot_be_written_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A folder of that name is an error."""
    (tmp_path / "overlay.png").mkdir()
    volume = np.ones((4, 4, 4), dtype=int)
    with pytest.raises(OutputError, match=r"overlay\.png: writing failed"):
        save_png(overlay(volume, volume, np.eye(4)), tmp_path / "overlay.png")
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]
