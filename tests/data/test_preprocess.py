"""Tests preprocessing: transforms per image, finite voxels, and nothing of the caller's changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms.intensity.array import NormalizeIntensity
from torch import Tensor

from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.errors import ConfigError, InputError

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def noise(*shape: int, seed: int = 0, mean: float = 100) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 10, shape)).float()


def zscore(data: Tensor) -> Tensor:
    return (data - data.mean()) / data.std()


def add_in_place(data: Tensor) -> Tensor:
    return data.add_(1)


def test_transforms_are_applied_in_turn_to_each_image_by_itself() -> None:
    """Each image is normalised with its own mean; the second transform gets the first one's result."""
    subject = Subject(t1=ScalarImage(noise(1, 5, 6, 7)), flair=ScalarImage(noise(2, 5, 6, 7, seed=1, mean=-3)))
    prepared = Preprocess(intensity=[zscore, lambda data: data * 2]).__call__(subject).subject
    for name, image in subject.images.items():
        torch.testing.assert_close(prepared[name].data, zscore(image.data) * 2)
    assert list(prepared) == ["t1", "flair"]


def test_a_mapping_gives_each_image_its_own_transforms() -> None:
    """Images that it does not name are unchanged."""
    subject = Subject(t1=ScalarImage(noise(1, 4, 4, 4)), flair=ScalarImage(noise(1, 4, 4, 4, seed=1)))
    prepared = Preprocess(intensity={"flair": [torch.neg, torch.abs]})(subject).subject
    assert torch.equal(prepared["t1"].data, subject["t1"].data)
    assert torch.equal(prepared["flair"].data, subject["flair"].data.neg().abs())


def test_a_mapping_that_names_no_image_of_the_subject_is_an_error() -> None:
    """A misspelt name would silently leave an image unchanged."""
    subject = Subject(t1=ScalarImage(noise(1, 4, 4, 4)))
    with pytest.raises(ConfigError, match=r"must be one of t1; it is 't2'"):
        Preprocess(intensity={"t2": [torch.neg]})(subject)


def test_transforms_get_float32_in_model_space() -> None:
    """(C, I, J, K) with RAS axes, for any type and axes of the file."""
    seen: list[Tensor] = []

    def look(data: Tensor) -> Tensor:
        seen.append(data.clone())
        return data

    volume = torch.arange(24, dtype=torch.int16).reshape(1, 2, 3, 4)
    for dtype in (torch.int16, torch.uint8, torch.float64, torch.float16, torch.bool):
        Preprocess(intensity=[look])(Subject(t1=ScalarImage(tensor=volume.to(dtype), affine=LPS)))
        assert seen[-1].dtype == torch.float32
        assert torch.equal(seen[-1], volume.to(dtype).flip(1, 2).float())


def test_transforms_are_not_applied_to_label_maps() -> None:
    """Labels are names, not numbers."""
    labels = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4)
    subject = Subject(t1=ScalarImage(noise(1, 2, 3, 4)), seg=LabelMap(labels))
    prepared = Preprocess(intensity=[torch.neg])(subject).subject
    assert isinstance(prepared["seg"], LabelMap)
    assert torch.equal(prepared["seg"].data, labels)


@pytest.mark.filterwarnings("ignore")  # what MONAI's import says of others
def test_transforms_of_monai_give_plain_tensors() -> None:
    """MONAI's array transforms are callables on (C, I, J, K); their MetaTensor becomes a plain tensor."""
    from monai.transforms import NormalizeIntensity, ScaleIntensityRangePercentiles  # heavy, and of this test only

    data = noise(2, 5, 6, 7)
    transforms = [ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True), NormalizeIntensity(channel_wise=True)]
    prepared = Preprocess(intensity=transforms)(Subject(t1=ScalarImage(data))).subject["t1"].data
    assert type(prepared) is Tensor
    assert prepared.dtype == torch.float32
    low, high = np.percentile(data.numpy(), [1, 99])
    scaled = ((data.numpy() - low) / (high - low)).clip(0, 1)
    expected = (scaled - scaled.mean((1, 2, 3), keepdims=True)) / scaled.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(prepared, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [(lambda data: data.numpy().astype(np.float64) * 2, np.ndarray), (lambda data: (data * 2).double(), Tensor)],
)
def test_a_transform_may_return_an_array_or_another_type(transform: Callable[[Tensor], Any], dtype: type) -> None:
    """It becomes a float32 tensor."""
    data = noise(1, 3, 3, 3)
    assert isinstance(transform(data), dtype)
    prepared = Preprocess(intensity=[transform])(Subject(t1=ScalarImage(data))).subject["t1"].data
    assert prepared.dtype == torch.float32
    assert torch.equal(prepared, data * 2)


def test_a_transform_may_add_channels_but_not_change_the_grid() -> None:
    """The error names the transform, the image and both shapes."""
    subject = Subject(t1=ScalarImage(noise(1, 4, 5, 6)))
    both = Preprocess(intensity=[lambda data: torch.cat([data, -data])])(subject).subject["t1"].data
    assert torch.equal(both, torch.cat([subject["t1"].data, -subject["t1"].data]))

    def crop(data: Tensor) -> Tensor:
        return data[..., 1:]

    with pytest.raises(InputError) as error:
        Preprocess(intensity=[crop])(subject)
    for part in ("crop", "'t1'", "(1, 4, 5, 6)", "(1, 4, 5, 5)", "may not change the grid"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="may not change the grid"):
        Preprocess(intensity=[lambda data: data[0]])(subject)


# The caller's tensor.


def changes_nothing(subject: Subject, name: str = "t1") -> None:
    """Prepare with transforms that work in place, in all cases in which voxels may or may not be copies."""
    kept = subject[name].data.clone()
    for orientation in (None, "RAS", "LPS", "SAR"):
        for spacing in (None, 2.0):
            prepared = Preprocess(orientation, spacing, intensity=[add_in_place])(subject).subject[name].data
            assert torch.equal(subject[name].data, kept)
            if spacing is None:
                assert prepared.sum() == (kept.float() + 1).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (1, 1, 4, 1), (2, 1, 1, 1)])
def test_the_callers_tensor_is_never_changed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """By transforms that work in place where nothing was permuted, flipped or resampled before."""
    changes_nothing(Subject(t1=ScalarImage(torch.arange(float(np.prod(shape))).reshape(shape).to(dtype))))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_cached_voxels_of_a_file_image_are_never_changed(tmp_path: Path, suffix: str) -> None:
    """Neither the file nor the voxels that the image has read and kept."""
    path = tmp_path / f"t1{suffix}"
    nib.save(nib.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4)), path)
    content = path.read_bytes()
    image = ScalarImage(path)
    unread = Preprocess(intensity=[add_in_place])(Subject(t1=image)).subject["t1"].data
    assert torch.equal(unread, image.data + 1)
    changes_nothing(Subject(t1=image))
    assert path.read_bytes() == content


def test_preparing_a_subject_caches_no_voxels_in_it(tmp_path: Path) -> None:
    """Else a run over many files would keep all of them in memory."""
    path = tmp_path / "t1.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), dtype=np.uint8), np.eye(4)), path)
    subject = Subject(t1=ScalarImage(path))
    prepared = Preprocess()(subject).subject
    assert prepared["t1"].stored().dtype == torch.uint8  # as small as the file has it, since nothing changed it
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"t1\.nii: the file is empty"):
        _ = subject["t1"].data


# Voxels that are NaN or infinite.


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_non_finite_voxels_are_an_error_or_set_to_zero(value: float, dtype: torch.dtype) -> None:
    """The error names the image, the count and the setting; `zero` changes these voxels alone."""
    data = noise(2, 4, 5, 6).to(dtype)
    data[0, 1, 2, 3] = data[1, 0, 0, 0] = data[1, 3, 4, 5] = value
    subject = Subject(good=ScalarImage(noise(1, 4, 5, 6)), t1=ScalarImage(data))
    with pytest.raises(InputError, match=r"image 't1' \(a tensor\) has 3 voxels that are NaN or infinite; .*=zero"):
        Preprocess()(subject)
    prepared = Preprocess(nonfinite="zero")(subject).subject["t1"].data
    expected = torch.where(data.isfinite(), data, torch.zeros_like(data))
    assert torch.equal(prepared.double(), expected.double())
    assert not data.isfinite().all()


@pytest.mark.parametrize("value", [1e300, -1e300, 3.5e38])
@pytest.mark.parametrize("kind", [ScalarImage, LabelMap])
def test_voxels_beyond_float32_are_blamed_on_the_image(value: float, kind: Any, tmp_path: Path) -> None:
    """For float64 voxels of a file or a tensor; the network, which gets float32, is not blamed."""
    data = noise(1, 4, 5, 6).double()
    data[0, 1, 2, 3] = data[0, 0, 0, 0] = value
    nib.save(nib.Nifti1Image(data[0].numpy(), np.eye(4)), tmp_path / "t1.nii")
    for image in (kind(data), kind(tmp_path / "t1.nii")):
        with pytest.raises(InputError, match=r"image 't1' .* has 2 voxels .* or too large for float32 \(2 of them\)"):
            Preprocess()(Subject(t1=image))
        prepared = Preprocess(nonfinite="zero")(Subject(t1=image)).subject["t1"].data
        assert torch.equal(prepared.double(), torch.where(data.abs() < 1e30, data, 0))
    largest = torch.full((1, 3, 3, 3), torch.finfo(torch.float32).max, dtype=torch.float64)
    assert torch.equal(Preprocess()(Subject(t1=ScalarImage(largest))).subject["t1"].data.double(), largest)


@pytest.mark.parametrize(
    ("transform", "count"),
    [
        (torch.log, 60),
        (lambda x: x / x.sum(), 60),
        (lambda x: x.numpy().astype(np.float64) + 1e300, 60),
        (NormalizeIntensity(subtrahend=0, divisor=np.nan), 60),
        (lambda x: torch.sqrt(x - torch.arange(60).view(x.shape)), 59),
    ],
)
def test_a_transform_that_produces_non_finite_voxels_is_named(transform: Any, count: int) -> None:
    """With the image and the count, however non-finite voxels of the file are handled."""
    constant = torch.zeros(1, 3, 4, 5)
    for nonfinite in ("error", "zero"):
        preprocess = Preprocess(intensity={"t2": [lambda x: x, transform]}, nonfinite=nonfinite)
        with pytest.raises(
            InputError, match=rf"intensity transform .* turned {count} finite voxels of image 't2' into NaN or inf"
        ):
            preprocess(Subject(t1=ScalarImage(constant), t2=ScalarImage(constant)))


def test_infinities_that_cancel_are_detected() -> None:
    """inf and -inf, and a lone NaN among millions of voxels."""
    data = torch.zeros(1, 100, 100, 100)
    data[0, 1, 1, 1], data[0, 2, 2, 2] = torch.inf, -torch.inf
    with pytest.raises(InputError, match="has 2 voxels"):
        Preprocess()(Subject(t1=ScalarImage(data)))


def test_a_non_finite_label_map_is_an_error(tmp_path: Path) -> None:
    """Float label maps exist; the error names the file."""
    path = tmp_path / "seg.nii"
    nib.save(nib.Nifti1Image(np.array([[[0, 1, np.nan]]], dtype=np.float32), np.eye(4)), path)
    with pytest.raises(InputError, match=r"image 'seg' \(.*seg\.nii\) has 1 voxels"):
        Preprocess()(Subject(seg=LabelMap(path)))


def test_finite_voxels_with_an_infinite_sum_pass() -> None:
    """The largest values of the type."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        largest = torch.full((1, 4, 4, 4), most, dtype=dtype)
        prepared = Preprocess()(Subject(seg=LabelMap(largest), t1=ScalarImage(largest))).subject
        assert torch.equal(prepared["seg"].data, largest)
        assert torch.equal(prepared["t1"].data, largest)


def test_integers_are_always_finite() -> None:
    """The largest values of int64 and of every other type pass unchanged."""
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64):
        value = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        data = torch.full((1, 4, 4, 4), value, dtype=dtype)
        assert torch.equal(Preprocess()(Subject(seg=LabelMap(data))).subject["seg"].data, data)


# Settings, and the space.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orientation": "RAX"}, "one letter of each pair L/R, A/P, S/I, such as RAS; it is 'RAX'"),
        ({"spacing": 0}, "spacing must be null, a positive number of mm, or three along i, j, k; it is 0"),
        ({"spacing": (1, 1)}, r"spacing must be .* it is \(1, 1\)"),
        ({"nonfinite": "zeros"}, r"nonfinite must be one of error, zero; it is 'zeros'\. Did you mean zero\?"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    """The constructor of Preprocess raises a ConfigError."""
    with pytest.raises(ConfigError, match=message):
        Preprocess(**settings)


def test_images_are_interpolated_and_labels_are_not() -> None:
    """At half the spacing intensities are linear in between; labels are those of the nearest voxel."""
    ramp = torch.arange(8.0).reshape(1, 8, 1, 1)
    subject = Subject(t1=ScalarImage(ramp), seg=LabelMap((ramp * 10).byte()))
    prepared, space = Preprocess(spacing=(0.5, None, None))(subject)
    assert space.model.shape == prepared.spatial_shape == (16, 1, 1)
    x = np.arange(16) / 2 - 0.25
    np.testing.assert_allclose(prepared["t1"].data.flatten(), x.clip(0, 7), rtol=0, atol=1e-6)
    assert prepared["seg"].data.flatten().tolist() == [10 * int(v) for v in x.round().clip(0, 7)]
    np.testing.assert_array_equal(prepared["t1"].affine, space.model.affine)
