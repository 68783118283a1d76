"""Tests which objects count as a subject: paths, arrays, tensors, dictionaries, and objects of MONAI and TorchIO."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grids import bare
from monai.data.meta_tensor import MetaTensor
from synthetic import noise, save
from torch import Tensor

from voxquilt import GridSampler, LabelMap, ScalarImage, Stitch, Subject, predict_volume
from voxquilt.data.conversion import to_mask, to_subject
from voxquilt.data.preprocess import Preprocess
from voxquilt.errors import ConfigError, InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tio = pytest.importorskip("torchio", minversion="1.2.1")

# A permutation, a flip, a rotation by 0.1 about an axis, and a spacing of 1.5, 1 and 2 mm.
OBLIQUE = np.array([[0, -1.0, 0, 30], [-1.5 * np.cos(0.1), 0, 2 * np.sin(0.1), 12],
                    [1.5 * np.sin(0.1), 0, 2 * np.cos(0.1), 7], [0, 0, 0, 1]])  # fmt: skip
VOXELS = torch.from_numpy(noise((9, 8, 7)))[None].float()
SEGMENTATION = (VOXELS > 50).byte()
IDENTITY: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: VOXELS,
    "a tensor of one channel": lambda: VOXELS[0],
    "a tensor with a gradient": lambda: VOXELS.clone().requires_grad_(),
    "an array": lambda: VOXELS.numpy(),
    "an array of uint16": lambda: VOXELS.numpy().astype(np.uint16),
    "an image": lambda: ScalarImage(VOXELS),
    "a dictionary": lambda: {"t1": VOXELS, "age": 42, "name": "sub-01"},
    "a MetaTensor as it is": lambda: MetaTensor(VOXELS),
}
OF_AFFINE: dict[str, Callable[[Path], Any]] = {
    "a path's text": lambda folder: str(folder / "t1.nii.gz"),
    "a path": lambda folder: folder / "t1.nii.gz",
    "an image": lambda _: ScalarImage(tensor=VOXELS, affine=OBLIQUE),
    "an image of a MetaTensor": lambda _: ScalarImage(tensor=MetaTensor(VOXELS, affine=torch.from_numpy(OBLIQUE))),
    "a MetaTensor": lambda _: MetaTensor(VOXELS, affine=torch.from_numpy(OBLIQUE)),
    "a MetaTensor of LPS": lambda _: MetaTensor(
        VOXELS, affine=torch.from_numpy(np.diag([-1.0, -1, 1, 1]) @ OBLIQUE), meta={"space": "LPS"}
    ),
    "a dictionary of MetaTensors": lambda _: {"image": MetaTensor(VOXELS, affine=torch.from_numpy(OBLIQUE)), "n": 1},
    "a dictionary of paths": lambda folder: {"t1": folder / "t1.nii.gz", "where": "here"},
    "a patch's dictionary": lambda _: {"t1": {"data": VOXELS, "affine": torch.from_numpy(OBLIQUE)}},
    "TorchIO's image": lambda _: tio.ScalarImage(tensor=VOXELS, affine=OBLIQUE),
    "TorchIO's image of a file": lambda folder: tio.ScalarImage(folder / "t1.nii.gz"),
    "TorchIO's subject": lambda _: tio.Subject(t1=tio.ScalarImage(tensor=VOXELS, affine=OBLIQUE), age=42),
    "TorchIO's with labels": lambda _: tio.Subject(
        seg=tio.LabelMap(tensor=SEGMENTATION, affine=OBLIQUE), t1=tio.ScalarImage(tensor=VOXELS, affine=OBLIQUE)
    ),
    "a subject with labels": lambda _: Subject(
        seg=LabelMap(tensor=SEGMENTATION, affine=OBLIQUE), t1=ScalarImage(tensor=VOXELS, affine=OBLIQUE)
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("files")
    save(found / "t1.nii.gz", VOXELS[0].numpy(), OBLIQUE)
    return found


def predicted(subject: Any, network: Callable[[Tensor], Tensor] = lambda x: x.sin(), **options: Any) -> np.ndarray:
    """Predict with a network and a model space for which the affine and the order of axes matter."""
    model_space = Preprocess(spacing=1.7)
    options = {"stitch": Stitch("hann", ["logits"])} | options
    (found,) = predict_volume(network, subject, 6, 2, preprocess=model_space, **options).values()
    return found


def only_tensors(x: Tensor) -> Tensor:
    assert type(x) is Tensor
    assert x.shape[1] == 1
    return x.sin()


@pytest.mark.parametrize("kind", IDENTITY)
def test_voxels_alone_are_predicted_with_the_identity_as_affine(kind: str) -> None:
    """Equal to a Subject with that affine; the network gets plain tensors only."""
    found = predicted(IDENTITY[kind](), only_tensors)
    np.testing.assert_array_equal(found, predicted(Subject(t1=ScalarImage(tensor=VOXELS, affine=np.eye(4)))))


@pytest.mark.parametrize("kind", OF_AFFINE)
def test_an_object_with_an_affine_is_predicted_with_that_affine(kind: str, folder: Path) -> None:
    """Label maps beside the images are not channels; the identity would give other voxels."""
    found = predicted(OF_AFFINE[kind](folder), only_tensors)
    wanted = predicted(Subject(t1=ScalarImage(tensor=VOXELS, affine=OBLIQUE)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)  # a file's affine is float32
    assert np.abs(wanted - predicted(VOXELS)).max() > 0.1


def test_conversion_keeps_the_kinds_names_and_values_of_torchios_subject() -> None:
    """Voxels and affines too. A subject with label maps alone feeds them to the network."""
    theirs = tio.Subject(
        t1=tio.ScalarImage(tensor=VOXELS, affine=OBLIQUE), seg=tio.LabelMap(tensor=SEGMENTATION, affine=OBLIQUE), age=42
    )
    ours = to_subject(theirs)
    assert [(name, type(image)) for name, image in ours.images.items()] == [("t1", ScalarImage), ("seg", LabelMap)]
    assert ours["age"] == 42
    for name, image in ours.images.items():
        assert torch.equal(image.data, theirs[name].data)
        np.testing.assert_array_equal(image.affine, OBLIQUE)
    made = predict_volume(lambda x: x, Subject(seg=LabelMap(SEGMENTATION)), 6, 2, stitch=Stitch("crop", ["logits"]))
    np.testing.assert_array_equal(made["logits"], SEGMENTATION.numpy())


def test_a_sampler_cuts_torchios_subject_into_the_patches_of_torchio() -> None:
    """Same padding, locations, voxels, affines and values, and labels in their own type."""
    theirs = tio.Subject(
        t1=tio.ScalarImage(tensor=VOXELS, affine=OBLIQUE), seg=tio.LabelMap(tensor=SEGMENTATION, affine=OBLIQUE), age=42
    )
    for padding in (None, "reflect"):
        our, their = GridSampler(theirs, 4, 2, padding), tio.GridSampler(theirs, 4, 2, padding)
        assert len(our) == len(their)
        for one, other in zip(our, their, strict=True):
            assert one["location"].tolist() == other["location"].tolist()
            assert one["age"] == 42
            for name in ("t1", "seg"):
                assert torch.equal(one[name]["data"], other[name]["data"])
                np.testing.assert_allclose(one[name]["affine"], other[name]["affine"], rtol=0, atol=1e-9)


def test_a_mask_may_be_any_object_that_holds_one_image() -> None:
    """The same patches are skipped for a label map, a tensor, an array, and TorchIO's label map."""
    mask = torch.zeros(1, 9, 8, 7).byte()
    mask[:, :3, :3, :3] = 1
    kinds = [LabelMap(mask), mask, mask.numpy(), MetaTensor(mask), tio.LabelMap(tensor=mask), ScalarImage(mask)]
    found = [predict_volume(lambda x: x, VOXELS, 4, 2, skip=kind, stitch=Stitch(fill=-5))["image"] for kind in kinds]
    assert (found[0] == -5).any()
    assert not (found[0] == -5).all()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    with pytest.raises(InputError, match="a mask is one image; this is dict with the keys"):
        to_mask({"a": mask, "b": mask})


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
def test_a_blend_name_stands_for_a_stitch_with_that_blend(mode: str) -> None:
    """A misspelling is answered with the nearest name."""
    network = lambda x: torch.cat([x, 100 - x], 1)  # noqa: E731
    made, wanted = (predict_volume(network, VOXELS, 6, 2, stitch=stitch) for stitch in (mode, Stitch(mode)))
    np.testing.assert_array_equal(made["labels"], wanted["labels"])
    with pytest.raises(ConfigError, match=r"it is 'gausian'\. Did you mean gaussian"):
        predict_volume(network, VOXELS, 6, 2, stitch="gausian")


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (None, "this is builtins.NoneType"),
        (3.5, "this is builtins.float"),
        ([VOXELS], "this is builtins.list"),
        ({"age": 42}, r"this is dict with the keys \['age'\]"),
        (VOXELS[None], r"this one is \(1, 1, 9, 8, 7\). Select one volume of a batch, such as batch\[0\]"),
        (VOXELS[0, 0], r"this is an array of shape \(8, 7\)"),
        (torch.zeros(0, 3, 3, 3), r"without empty axes; this one is \(0, 3, 3, 3\)"),
        (MetaTensor(VOXELS, affine=torch.zeros(4, 4)), "the affine is degenerate"),
        ("nowhere.nii.gz", "nowhere.nii.gz: there is no such file"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_that_is_not_a_volume_is_one_input_error(volume: Any, said: str) -> None:
    """From predict_volume and from a sampler: what is wanted and what came."""
    with pytest.raises(InputError, match=said):
        _ = bare(to_subject)(volume).frame
    if isinstance(volume, (torch.Tensor, dict, str)):  # others are refused by the annotations that tests check
        for use in (lambda: predicted(volume), lambda: GridSampler(volume, 4)):
            with pytest.raises(InputError, match=said):
                use()


def test_predicting_a_tensor_imports_neither_monai_nor_torchio() -> None:
    """Their classes are recognised by their attributes."""
    program = (
        "import sys, torch, voxquilt; voxquilt.predict_volume(lambda x: x, torch.rand(1, 6, 6, 6), 4, 2); "
        "print({'monai', 'torchio'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
