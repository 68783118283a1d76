"""Tests the grid sampler: a patch is a copied slice of the padded volume and knows where it lies."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from grids import axis_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from voxquilt.data.formats.nifti import NiftiFile
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.subject import AFFINE, DATA, LOCATION, LabelMap, ScalarImage, Subject
from voxquilt.errors import GridError, InputError, PaddingModeError
from voxquilt.vocabulary import PADDING_MODES

GEOMETRIES = st.tuples(axis_sizes(10), axis_sizes(8), axis_sizes(6))
SEEDS = st.integers(0, 2**32 - 1)
OBLIQUE = np.array([[0.9, -0.3, 0.1, -30], [0.4, 1.9, 0.2, 12], [-0.1, 0.1, 3.1, 7], [0, 0, 0, 1]])


def subject_of(shape: tuple[int, ...], seed: int = 0, affine: np.ndarray = OBLIQUE, **values: Any) -> Subject:
    """Two channels of noise and a label map."""
    random = np.random.default_rng(seed)
    return Subject(
        t1=ScalarImage(tensor=torch.from_numpy(random.normal(size=(2, *shape))).float(), affine=affine),
        seg=LabelMap(tensor=torch.from_numpy(random.integers(0, 9, (1, *shape))).byte(), affine=affine),
        **values,
    )


@given(GEOMETRIES, st.sampled_from([None, *(m for m in PADDING_MODES if m != "empty"), 0, 5]), SEEDS)
@settings(deadline=None, max_examples=80)
def test_patches_are_slices_of_the_volume_that_numpy_pads(
    sizes: tuple[tuple[int, int, int], ...], padding: str | float | None, seed: int
) -> None:
    """Every image, in its own type; a padding mode adds half of the overlap on every side."""
    shape, patch, overlap = zip(*sizes, strict=True)
    subject = subject_of(shape, seed)
    sampler = GridSampler(subject, patch, overlap, padding)
    border = [(0, 0), *((o // 2, o // 2) for o in overlap)]
    for name, image in subject.images.items():
        array = image.data.numpy()
        if isinstance(padding, str):
            array = np.pad(array, border, mode=padding)  # type: ignore[call-overload]
        elif padding is not None:
            array = np.pad(array, border, constant_values=padding)
        for n, (i0, j0, k0, i1, j1, k1) in enumerate(sampler.locations):
            data = sampler[n][name][DATA]
            assert data.dtype == image.data.dtype
            assert data.is_contiguous()
            np.testing.assert_array_equal(data, array[:, i0:i1, j0:j1, k0:k1])
            assert sampler[n][LOCATION].tolist() == [i0, j0, k0, i1, j1, k1]


@given(GEOMETRIES, st.booleans(), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_patch_knows_where_it_lies_in_the_world(
    sizes: tuple[tuple[int, int, int], ...], pad: bool, fit: bool, seed: int
) -> None:
    """A voxel of a patch and the voxel it was cut from have one world position, with and without padding."""
    shape, patch, overlap = zip(*sizes, strict=True)
    affine = OBLIQUE.copy()
    affine[:3] += np.random.default_rng(seed).normal(0, 0.05, (3, 4))
    # Every voxel holds its own index, -1 outside.
    index = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    sampler = GridSampler(
        Subject(index=LabelMap(tensor=index, affine=affine)), patch, overlap, -1 if pad or fit else None, fit=fit
    )
    for n in range(len(sampler)):
        item = sampler[n]
        found = item["index"][DATA].reshape(3, -1)
        places = np.stack(np.meshgrid(*map(np.arange, patch), indexing="ij")).reshape(3, -1)
        world = item["index"][AFFINE][:3, :3] @ places + item["index"][AFFINE][:3, 3:]
        inside = (found >= 0).all(0).numpy()
        expected = affine[:3, :3] @ found.numpy()[:, inside] + affine[:3, 3:]
        np.testing.assert_allclose(world[:, inside], expected, rtol=0, atol=1e-9)


def test_the_first_padded_patch_begins_before_the_volume() -> None:
    """With a border of 2 voxels of 3 mm it begins 6 mm before the first voxel."""
    subject = subject_of((8, 8, 8), affine=np.diag([3.0, 3, 3, 1]))
    sampler = GridSampler(subject, 6, 4, "edge")
    assert sampler.padding == ((2, 2), (2, 2), (2, 2))
    assert sampler[0]["t1"][AFFINE][:3, 3].tolist() == [-6, -6, -6]
    assert sampler[len(sampler) - 1]["t1"][AFFINE][:3, 3].tolist() == [12, 12, 12]


def test_a_loader_collates_patches_metadata_and_locations() -> None:
    """DataLoader stacks data, affines, locations and numbers, and lists strings; other values are left out."""
    subject = subject_of((8, 7, 6), age=42, name="sub-01", score=0.5, tags={"a", "b"}, nothing=None, left=True)
    sampler = GridSampler(subject, (4, 4, 4), 2)
    batches = list(DataLoader(sampler, batch_size=4, num_workers=0))
    assert sum(len(b[LOCATION]) for b in batches) == len(sampler)
    np.testing.assert_array_equal(torch.cat([b[LOCATION] for b in batches]), sampler.locations)
    first = batches[0]
    assert set(first) == {"t1", "seg", "age", "name", "score", "left", LOCATION}
    assert first["age"].tolist() == [42] * 4
    assert first["name"] == ["sub-01"] * 4
    assert first["score"].tolist() == [0.5] * 4
    assert first["left"].tolist() == [True] * 4
    assert first["t1"][AFFINE].shape == (4, 4, 4)
    for n in range(4):
        assert torch.equal(first["t1"][DATA][n], sampler[n]["t1"][DATA])
        assert torch.equal(first["seg"][DATA][n], sampler[n]["seg"][DATA])


def test_a_patch_may_be_changed_in_place() -> None:
    """It is a copy: the volume, overlapping patches and the image's affine do not change."""
    for padding in (None, 0):
        subject = subject_of((6, 6, 6))
        kept, affine = subject["t1"].data.clone(), subject["t1"].affine.copy()
        sampler = GridSampler(subject, 4, 2, padding)
        expected = [sampler[n]["t1"][DATA].clone() for n in range(len(sampler))]
        for n, patch in enumerate(sampler):
            assert torch.equal(patch["t1"][DATA], expected[n])
            patch["t1"][DATA].fill_(torch.nan)
            patch["t1"][AFFINE].fill(0)
            patch[LOCATION].fill_(0)
        assert torch.equal(subject["t1"].data, kept)
        np.testing.assert_array_equal(subject["t1"].affine, affine)


def test_padding_does_not_change_the_subject() -> None:
    """The sampler pads a copy; the subject keeps its shape and gets no new key."""
    subject = subject_of((6, 6, 6), age=42)
    kept = {name: image.data.clone() for name, image in subject.images.items()}
    sampler = GridSampler(subject, 6, 4, "reflect")
    _ = sampler[0]
    assert list(subject) == ["t1", "seg", "age"]
    assert subject.spatial_shape == (6, 6, 6)
    assert all(torch.equal(subject[name].data, data) for name, data in kept.items())


def test_patches_are_counted_and_indexed_like_a_list() -> None:
    """Negative indices count from the end, others are an IndexError, and iteration ends; `sampler()` iterates too."""
    sampler = GridSampler(subject_of((8, 7, 6)), 4, 2)
    n = len(sampler)
    assert n == 3 * 3 * 2
    for index in (-1, -n, n - 1):
        assert sampler[index][LOCATION].tolist() == sampler.locations[index].tolist()
    for index in (n, -n - 1):
        with pytest.raises(IndexError, match=f"patch {index} of {n}"):
            sampler[index]
    for patches in (sampler, sampler()):
        np.testing.assert_array_equal(np.stack([p[LOCATION] for p in patches]), sampler.locations)


@pytest.mark.parametrize("mode", ["mirror", "", "CONSTANT", "replicate"])
def test_an_unknown_padding_mode_is_a_key_error_and_a_value_error(mode: str) -> None:
    """TorchIO raises KeyError; ours prints as a sentence, although a KeyError prints a repr."""
    with pytest.raises(PaddingModeError) as error:
        GridSampler(subject_of((8, 8, 8)), 4, 2, mode)
    assert isinstance(error.value, KeyError)
    assert isinstance(error.value, ValueError)
    assert str(error.value) == (f"padding_mode must be a number or one of {', '.join(PADDING_MODES)}; it is {mode!r}.")


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.uint8, 255, torch.uint8),
        (torch.uint8, -1024, torch.float32),
        (torch.uint8, 256, torch.float32),
        (torch.int16, -1024, torch.int16),
        (torch.int16, 0.5, torch.float32),
        (torch.int16, float("nan"), torch.float32),
        (torch.bool, 1, torch.bool),
        (torch.bool, 7, torch.float32),
        (torch.float16, -1000.5, torch.float16),
    ],
)
def test_a_padding_value_is_never_wrapped(dtype: torch.dtype, value: float, expected: torch.dtype) -> None:
    """A number that the voxel type cannot hold makes the padded volume float32, and the border holds that number."""
    sampler = GridSampler(Subject(a=ScalarImage(torch.ones(1, 2, 2, 2).to(dtype))), 3, 2, value)
    volume = sampler.volume("a")
    assert volume.dtype == expected
    assert torch.equal(volume[:, 1:3, 1:3, 1:3].float(), torch.ones(1, 2, 2, 2))
    torch.testing.assert_close(volume[:, 0].double(), torch.full((1, 4, 4), value).double(), equal_nan=True)


def test_every_padding_mode_equals_that_of_numpy() -> None:
    """Statistics are taken along each line of voxels, as in numpy.pad."""
    volume = torch.arange(24.0).reshape(1, 2, 3, 4)
    for mode in PADDING_MODES:
        sampler = GridSampler(Subject(a=ScalarImage(volume)), (4, 5, 6), 2, mode)
        expected = np.pad(volume.numpy(), ((0, 0), (1, 1), (1, 1), (1, 1)), mode=mode)  # type: ignore[call-overload]
        inside = (slice(None), *[slice(1, -1)] * 3) if mode == "empty" else slice(None)
        np.testing.assert_array_equal(sampler.volume("a")[inside], expected[inside])


@given(
    st.tuples(*[st.integers(1, 30)] * 3),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.integers(0, 3),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_fit_pads_as_little_as_needed_and_evenly_on_both_sides(
    shape: tuple[int, int, int], patch: tuple[int, int, int], half: int, multiple: tuple[int, int, int], pad: bool
) -> None:
    """To the smallest multiple that holds a patch and the border."""
    overlap = [2 * min(half, (p - 1) // 2) for p in patch]
    image = ScalarImage(torch.ones(1, *shape))
    sampler = GridSampler(Subject(a=image), patch, overlap, 0 if pad else None, fit=True, divisible_by=multiple)
    for n, p, o, m, padded, (before, after) in zip(
        shape, patch, overlap, multiple, sampler.grid.shape, sampler.padding, strict=True
    ):
        least = max(n + (o if pad else 0), p)
        assert padded == next(size for size in range(least, least + m) if size % m == 0)
        assert n + before + after == padded
        assert 0 <= after - before <= 1
    (i, _), (j, _), (k, _) = sampler.padding
    volume = sampler.volume("a")
    assert volume.sum() == np.prod(shape)
    assert volume[:, i : i + shape[0], j : j + shape[1], k : k + shape[2]].min() == 1


def test_without_fit_a_small_volume_is_refused() -> None:
    """As in TorchIO; the message says what to do."""
    with pytest.raises(
        GridError, match=r"axis k has 5 voxels but the patch needs 6.*set padding_mode or use a smaller"
    ):
        GridSampler(subject_of((8, 8, 5)), 6)
    assert len(GridSampler(subject_of((8, 8, 5)), 6, fit=True)) == 4


def test_images_on_different_grids_are_refused() -> None:
    """By the constructor, before a patch is cut."""
    subject = Subject(t1=ScalarImage(torch.zeros(8, 8, 8)), seg=LabelMap(torch.zeros(8, 8, 7)))
    with pytest.raises(InputError, match="images 't1' and 'seg'"):
        GridSampler(subject, 4)


def test_a_sampler_reads_voxels_only_when_a_patch_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count and locations of patches come from the header; then each image is read once."""
    array = np.random.default_rng(0).integers(0, 255, (9, 8, 7)).astype(np.uint8)
    for name in ("t1", "seg"):
        nib.save(nib.Nifti1Image(array, OBLIQUE), tmp_path / f"{name}.nii.gz")
    read: list[str] = []
    voxels = NiftiFile.read
    monkeypatch.setattr(NiftiFile, "read", lambda file: read.append(file.path.name) or voxels(file))
    subject = Subject(t1=ScalarImage(tmp_path / "t1.nii.gz"), seg=LabelMap(tmp_path / "seg.nii.gz"))
    sampler = GridSampler(subject, 4, 2, 0)
    assert (len(sampler), sampler.locations.shape, sampler.patch_size) == (5 * 4 * 4, (80, 6), (4, 4, 4))
    assert read == []
    patches = list(sampler)
    assert read == ["t1.nii.gz", "seg.nii.gz"]
    padded = np.pad(array, 1)
    for patch, (i0, j0, k0, i1, j1, k1) in zip(patches, sampler.locations, strict=True):
        np.testing.assert_array_equal(patch["t1"][DATA][0], padded[i0:i1, j0:j1, k0:k1])
        assert patch["seg"][DATA].dtype == torch.uint8


def test_cut_returns_a_view() -> None:
    """Pipelines use `cut` to copy neither volume nor patch."""
    subject = subject_of((8, 8, 8))
    sampler = GridSampler(subject, 4, 2)
    assert sampler.volume("t1").data_ptr() == subject["t1"].data.data_ptr()
    patch = sampler.cut("t1", len(sampler) - 1)
    assert patch.untyped_storage().data_ptr() == subject["t1"].data.untyped_storage().data_ptr()
    assert torch.equal(patch, subject["t1"].data[:, 4:, 4:, 4:])
