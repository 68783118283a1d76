"""Tests subjects: images on one grid, made of any source, and read when their voxels are first used."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import voxquilt
import voxquilt.data.image
from voxquilt.data.formats.nifti import NiftiFile
from voxquilt.data.subject import AFFINE, CHANNELS_DIMENSION, DATA, LOCATION, LabelMap, ScalarImage, Subject
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Frame

AFFINE_2MM = np.diag([2.0, 3.0, 4.0, 1.0])


def saved(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def test_torchios_constants_have_our_names_and_work_as_keys() -> None:
    """A loop that is written with TorchIO's constants works."""
    assert (voxquilt.DATA, voxquilt.AFFINE, voxquilt.LOCATION) == (DATA, AFFINE, LOCATION)
    assert CHANNELS_DIMENSION == voxquilt.CHANNELS_DIMENSION == 1
    assert voxquilt.inference.GridSampler is voxquilt.GridSampler
    assert voxquilt.inference.GridAggregator is voxquilt.GridAggregator


def test_a_subject_is_a_dictionary_that_shows_its_keys() -> None:
    """Images and other values by name; its repr is TorchIO's."""
    subject = Subject(t1=ScalarImage(torch.zeros(1, 2, 3, 4)), seg=LabelMap(torch.zeros(1, 2, 3, 4)), age=42)
    assert repr(subject) == "Subject(Keys: ('t1', 'seg', 'age'); images: 2)"
    assert subject["age"] == 42
    assert list(subject.images) == ["t1", "seg"]
    assert isinstance(subject["seg"], LabelMap)
    assert repr(subject["t1"]) == "ScalarImage(tensor: (1, 2, 3, 4))"


def test_a_subject_can_be_made_of_a_mapping() -> None:
    """For names that are not Python identifiers; keywords are added."""
    subject = Subject({"t1 post": ScalarImage(torch.ones(2, 2, 2)), "age": 1}, age=2)
    assert dict(subject.images) == {"t1 post": subject["t1 post"]}
    assert subject["age"] == 2


def test_shapes_spacing_and_affine_are_those_of_the_images() -> None:
    """The spatial shape excludes channels; the spacing is in mm along i, j, k."""
    image = ScalarImage(tensor=torch.zeros(5, 2, 3, 4), affine=AFFINE_2MM)
    subject = Subject(t1=image)
    assert subject.shape == image.shape == (5, 2, 3, 4)
    assert subject.spatial_shape == image.spatial_shape == (2, 3, 4)
    assert subject.spacing == image.spacing == (2, 3, 4)
    np.testing.assert_array_equal(image[AFFINE], AFFINE_2MM)
    assert torch.equal(image[DATA], torch.zeros(5, 2, 3, 4))
    with pytest.raises(KeyError, match="'data' and 'affine', not 'dat'"):
        image["dat"]


def test_a_subject_without_images_is_an_error() -> None:
    """Also if an array was given in place of an image."""
    for values in ({}, {"age": 42}, {"t1": torch.zeros(1, 2, 2, 2)}):
        with pytest.raises(InputError, match="a Subject needs at least one image"):
            Subject(values)


def test_images_of_different_shapes_are_an_error_that_names_both(tmp_path: Path) -> None:
    """With their sources and shapes."""
    path = saved(tmp_path / "flair.nii.gz", np.zeros((2, 3, 5), dtype=np.uint8))
    subject = Subject(
        t1=ScalarImage(torch.zeros(1, 2, 3, 4)), seg=LabelMap(torch.zeros(2, 3, 4)), flair=ScalarImage(path)
    )
    with pytest.raises(InputError) as error:
        _ = subject.spatial_shape
    for part in ("'t1'", "'flair'", str(path), "(2, 3, 4)", "(2, 3, 5)", "a tensor"):
        assert part in str(error.value)
    assert "'seg'" not in str(error.value)


@pytest.mark.parametrize("change", [(0, 3, 0.1), (2, 2, 1.02), (0, 1, 0.02)])
def test_images_of_different_affines_are_an_error_that_names_both(change: tuple[int, int, float]) -> None:
    """A shift by a tenth of a voxel, 2 % of spacing over 20 voxels, 2 % of shear."""
    affine = np.eye(4)
    affine[change[:2]] = change[2]
    data = torch.zeros(1, 20, 20, 20)
    subject = Subject(t1=ScalarImage(tensor=data), seg=LabelMap(tensor=data, affine=affine))
    with pytest.raises(InputError, match=r"(?s)images 't1' and 'seg' of one subject lie on different grids.*spacing"):
        _ = subject.frame


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_affines_that_differ_by_rounding_are_one_grid(scale: float) -> None:
    """Float32 headers and quaternions move corners by far less than 1 % of a voxel."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * [1.1 * scale, 0.9 * scale, 2.3 * scale]
    affine[:3, 3] = np.array([-91.37, 126.11, -72.9]) * scale
    rounded = affine.astype(np.float32).astype(np.float64)
    quaternion = nib.Nifti1Header()
    quaternion.set_qform(affine)
    data = torch.zeros(1, 200, 30, 40)
    for other in (rounded, quaternion.get_qform()):
        assert not np.array_equal(other, affine)
        subject = Subject(t1=ScalarImage(tensor=data, affine=affine), seg=LabelMap(tensor=data, affine=other))
        assert subject.frame == Frame((200, 30, 40), affine)


def test_a_tensor_keeps_its_type_and_gets_a_channel_axis() -> None:
    """(I, J, K) is one channel; nothing is copied or converted."""
    tensor = torch.arange(24, dtype=torch.int16).reshape(2, 3, 4)
    for image in (ScalarImage(tensor), ScalarImage(tensor=tensor), LabelMap(tensor)):
        assert image.data.dtype == torch.int16
        assert torch.equal(image.data, tensor[None])
        assert image.data.data_ptr() == tensor.data_ptr()
        np.testing.assert_array_equal(image.affine, np.eye(4))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4)[::-1, :, ::-1],
        np.arange(24, dtype=">i2").reshape(2, 3, 4),
        np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)),
        np.broadcast_to(np.arange(4, dtype=np.int64), (2, 3, 4)),
    ],
    ids=["plain", "flipped views", "big-endian", "Fortran order", "read-only"],
)
def test_any_numpy_array_can_be_an_image(array: np.ndarray) -> None:
    """Whatever its strides, byte order and flags, values and type are kept."""
    image = LabelMap(tensor=array, affine=AFFINE_2MM)
    assert image.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(image.data[0].numpy(), array)
    assert image.data.numpy().dtype == array.dtype.newbyteorder("=")


def test_an_affine_may_be_a_tensor_or_a_list() -> None:
    """It becomes a float64 array."""
    image = ScalarImage(tensor=torch.zeros(1, 2, 2, 2), affine=torch.from_numpy(AFFINE_2MM).float())
    assert image.affine.dtype == np.float64
    np.testing.assert_array_equal(image.affine, AFFINE_2MM)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs a path or a tensor, and not both"),
        ({"path": "t1.nii", "tensor": torch.zeros(1, 1, 1)}, "needs a path or a tensor, and not both"),
        ({"path": "t1.nii", "affine": np.eye(4)}, "t1.nii: a file has its own affine"),
        ({"tensor": torch.zeros(3, 3)}, r"\(C, I, J, K\) or \(I, J, K\) without empty axes; this one is \(3, 3\)"),
        ({"tensor": torch.zeros(1, 1, 1, 1, 1)}, r"this one is \(1, 1, 1, 1, 1\)"),
        ({"tensor": torch.zeros(1, 3, 0, 3)}, r"this one is \(1, 3, 0, 3\)"),
        ({"tensor": torch.zeros(0, 3, 3, 3)}, r"this one is \(0, 3, 3, 3\)"),
        ({"tensor": torch.zeros(3, 3, 3), "affine": np.zeros((4, 4))}, "the affine is degenerate"),
        ({"tensor": torch.zeros(3, 3, 3), "affine": np.eye(3)}, "must be a finite 4 x 4 matrix"),
        ({"tensor": torch.zeros(3, 3, 3), "affine": np.diag([1, 1, np.nan, 1])}, "must be a finite 4 x 4 matrix"),
    ],
)
def test_an_object_that_is_not_an_image_is_an_input_error(values: dict[str, Any], message: str) -> None:
    """The message says what an image can be made of and what came."""
    with pytest.raises(InputError, match=message):
        ScalarImage(**values)


def test_asking_a_tensor_image_for_its_file_is_an_input_error() -> None:
    """Not an AttributeError."""
    with pytest.raises(InputError, match="it has no file"):
        _ = ScalarImage(torch.zeros(2, 2, 2)).file


def test_scalars_are_read_as_float32_and_labels_in_their_own_type(tmp_path: Path) -> None:
    """`stored` has the file's type; `data` converts intensities only, and is cached."""
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = saved(tmp_path / "a b ü.nii.gz", array)
    scalar, labels = ScalarImage(path), LabelMap(str(path))
    assert repr(scalar) == f"ScalarImage(path: {path})"
    assert (scalar.stored().dtype, scalar.data.dtype, labels.data.dtype) == (torch.int16, torch.float32, torch.int16)
    for image in (scalar, labels):
        np.testing.assert_array_equal(image.data[0].numpy(), array)
        assert image.data is image.data


def test_voxels_are_read_once_at_their_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constructing a subject reads nothing; its geometry reads each header once."""
    paths = [saved(tmp_path / f"{n}.nii", np.full((2, 3, 4), n, dtype=np.uint8), AFFINE_2MM) for n in range(2)]
    read: list[Path] = []
    voxels, header = NiftiFile.read, voxquilt.data.image.open_image

    def count(file: NiftiFile) -> torch.Tensor:
        read.append(file.path)
        return voxels(file)

    headers: list[Any] = []
    monkeypatch.setattr(NiftiFile, "read", count)
    monkeypatch.setattr(voxquilt.data.image, "open_image", lambda path: headers.append(path) or header(path))
    subject = Subject(t1=ScalarImage(paths[0]), seg=LabelMap(paths[1]))
    assert repr(subject) == "Subject(Keys: ('t1', 'seg'); images: 2)"
    assert headers == []
    assert (subject.spatial_shape, subject.spacing, subject["t1"].shape) == ((2, 3, 4), (2, 3, 4), (1, 2, 3, 4))
    assert subject.spatial_shape == (2, 3, 4)
    assert headers == paths
    assert read == []
    assert subject["seg"].data.unique().tolist() == [1]
    assert subject["seg"].data.unique().tolist() == [1]
    assert read == [paths[1]]


def test_a_missing_file_is_an_error_when_it_is_first_read(tmp_path: Path) -> None:
    """Not before: a subject may be made of files that are written later."""
    subject = Subject(t1=ScalarImage(tmp_path / "none.nii.gz"))
    with pytest.raises(InputError, match=r"none\.nii\.gz: there is no such file"):
        _ = subject.spatial_shape
