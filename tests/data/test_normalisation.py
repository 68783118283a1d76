"""Tests nnU-Net's normalisations against NumPy, bit by bit, and the mask of voxels inside against SciPy."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from torch import Tensor

from voxquilt.data.normalisation import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
    accurate_mean_and_std,
    inside_mask,
    nonzero_box,
)
from voxquilt.errors import InputError

Numbers = np.ndarray
IMAGE = np.random.default_rng(0).normal(100, 300, (100, 100, 100)).astype(np.float32)
INSIDE = np.random.default_rng(1).random(IMAGE.shape) > 0.3
CT = CTNormalization(-54.3, 264.1, 125.68850708007812, 48.878780364990234)


# What nnU-Net computes, on float32 arrays.


def numpy_ct(image: Numbers) -> Numbers:
    image = np.clip(image, -54.3, 264.1)
    image -= 125.68850708007812
    image /= 48.878780364990234
    return image


def numpy_zscore(image: Numbers) -> Numbers:
    return (image - image.mean()) / max(image.std(), 1e-8)


def numpy_masked(image: Numbers) -> Numbers:
    result = image.copy()
    result[INSIDE] = numpy_zscore(image[INSIDE])
    return result


def numpy_rescaled(image: Numbers) -> Numbers:
    image = image - image.min()
    image /= np.clip(image.max(), a_min=1e-8, a_max=None)
    return image


CASES: dict[str, tuple[Callable[[Tensor, Tensor | None], Tensor], Callable[[Numbers], Numbers]]] = {
    "CT": (CT, numpy_ct),
    "CT with a mask, which has no effect": (CT, numpy_ct),
    "Z-score": (ZScoreNormalization(), numpy_zscore),
    "Z-score with a mask": (ZScoreNormalization(use_mask=True), numpy_masked),
    "rescale": (RescaleTo01Normalization(), numpy_rescaled),
    "none": (NoNormalization(), lambda image: image),
}


@pytest.mark.parametrize("name", CASES)
def test_normalisations_are_numpys_to_the_last_bit(name: str) -> None:
    """On a million voxels, for each channel by itself, and the input is not changed."""
    normalise, reference = CASES[name]
    second = (IMAGE * 3 + 7)[::-1].copy()
    data = torch.from_numpy(np.stack([IMAGE, second]))
    before = data.clone()
    result = normalise(data, torch.from_numpy(INSIDE) if "mask" in name else None)
    assert torch.equal(data, before)
    assert result.dtype == torch.float32
    for channel, image in zip(result, (IMAGE, second), strict=True):
        assert np.array_equal(channel.numpy(), reference(image))


def test_rgb_is_divided_by_255() -> None:
    """To the last bit; other intensities are an error."""
    image = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8)
    assert np.array_equal(RGBTo01Normalization()(torch.from_numpy(image)).numpy(), image / np.float32(255))
    for wrong in (-1.0, 256.0, float("nan")):
        with pytest.raises(InputError, match="wants intensities from 0 to 255; these are"):
            RGBTo01Normalization()(torch.full((1, 2, 2, 2), wrong))


def test_sums_in_float64_give_numpys_mean_and_deviation_but_for_rounding() -> None:
    """To 3e-7 of their size; other devices than the host have them."""
    mean, std = accurate_mean_and_std(torch.from_numpy(IMAGE))
    assert mean.dtype == std.dtype == torch.float32
    assert float(mean) == pytest.approx(float(IMAGE.mean()), rel=3e-7)
    assert float(std) == pytest.approx(float(IMAGE.std()), rel=3e-7)
    exact = IMAGE.astype(np.float64)
    assert (float(mean), float(std)) == pytest.approx((exact.mean(), exact.std()), rel=1e-7)


def test_constant_images_do_not_divide_by_zero() -> None:
    """The divisor is at least 1e-8."""
    constant = torch.full((1, 2, 3, 4), 5.0)
    inside = torch.ones(2, 3, 4, dtype=torch.bool)
    for normalise in (ZScoreNormalization(), ZScoreNormalization(True), RescaleTo01Normalization()):
        assert normalise(constant, inside).unique().tolist() == [0]
    assert CTNormalization(0, 10, 4, 0)(constant).unique().tolist() == pytest.approx([1e8])


def test_an_empty_mask_changes_nothing() -> None:
    """As for an image of zeros alone."""
    data = torch.zeros(1, 2, 3, 4)
    assert torch.equal(ZScoreNormalization(True)(data, data[0] != 0), data)


def test_a_mask_that_is_missing_is_an_error() -> None:
    """Else voxels outside would count."""
    with pytest.raises(InputError, match=r"ZScoreNormalization\(use_mask=True\) needs the mask"):
        ZScoreNormalization(True)(torch.zeros(1, 2, 2, 2))


def test_only_a_masked_z_score_asks_for_the_mask() -> None:
    """So that the mask need not be made for others."""
    assert ZScoreNormalization(True).uses_inside
    others = (ZScoreNormalization(), CT, RescaleTo01Normalization(), RGBTo01Normalization(), NoNormalization())
    assert not any(normalise.uses_inside for normalise in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_device_normalises_as_the_host_does(name: str) -> None:
    """To the last bit where no sum is taken, else to 3e-6."""
    normalise, reference = CASES[name]
    inside = torch.from_numpy(INSIDE).cuda() if "mask" in name else None
    result = normalise(torch.from_numpy(IMAGE)[None].cuda(), inside)[0].cpu().numpy()
    np.testing.assert_allclose(result, reference(IMAGE), rtol=0, atol=3e-6 if "Z-score" in name else 0)


# The mask


def reference_mask(volumes: Numbers) -> tuple[Numbers, tuple[tuple[int, int], ...]]:
    """The mask and the box by definition, over the whole volume."""
    mask = ndimage.binary_fill_holes((volumes != 0).any(0))
    assert mask is not None
    places = np.argwhere(mask) if mask.any() else np.argwhere(~mask)
    return mask, tuple((int(low), int(high) + 1) for low, high in zip(places.min(0), places.max(0), strict=True))


@settings(max_examples=300, deadline=None)
@given(
    volumes=arrays.arrays(
        np.int8,
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
        elements=st.sampled_from([0, 0, 1]),
        fill=st.just(1),
    )
)
def test_filling_holes_within_the_box_is_filling_them_in_the_volume(volumes: Numbers) -> None:
    """For any mask, in one image of several channels or in several images."""
    mask, box = reference_mask(volumes)
    for channels in ([torch.from_numpy(volumes)], list(torch.from_numpy(volumes)[:, None])):
        found, bounds = inside_mask(channels)
        assert np.array_equal(found.numpy(), mask)
        assert bounds == nonzero_box(channels) == box


def test_holes_are_filled_but_not_bays() -> None:
    """Background that only touches the outside along an edge or a corner is a hole."""
    image = torch.zeros(1, 7, 7, 7)
    image[0, 1:6, 1:6, 1:6] = 1
    image[0, 2:5, 2:5, 2:5] = 0
    mask, box = inside_mask([image])
    assert (int(mask.sum()), box) == (125, ((1, 6), (1, 6), (1, 6)))
    image[0, 1, 1, 3] = 0  # an edge of the shell, which the hole touches along an edge only
    assert int(inside_mask([image])[0].sum()) == 124
    image[0, 1, 3, 3] = 0
    assert int(inside_mask([image])[0].sum()) == 125 - 27 - 2


def test_an_image_of_zeros_is_boxed_as_a_whole() -> None:
    """With no voxel inside."""
    mask, box = inside_mask([torch.zeros(2, 3, 4, 5)])
    assert (bool(mask.any()), box) == (False, ((0, 3), (0, 4), (0, 5)))


def test_nan_counts_as_inside() -> None:
    """As in NumPy it is not 0."""
    image = torch.zeros(1, 3, 3, 3)
    image[0, 1, 2, 0] = float("nan")
    assert nonzero_box([image]) == ((1, 2), (2, 3), (0, 1))


@pytest.mark.slow
def test_a_large_volume_takes_seconds() -> None:
    """A hollow ball in 512 x 512 x 500 voxels."""
    squares = [torch.linspace(-1, 1, size) ** 2 for size in (500, 512, 512)]
    radius = squares[0][:, None, None] + squares[1][:, None] + squares[2]
    image = ((radius < 0.3) | ((radius > 0.4) & (radius < 0.8))).to(torch.int16)[None]
    start = time.perf_counter()
    mask, _ = inside_mask([image])
    assert time.perf_counter() - start < 10
    assert torch.equal(mask, radius < 0.8)
