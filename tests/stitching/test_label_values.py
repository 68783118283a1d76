"""Tests the numbers in label files: each is written exactly, in a type that holds it, or the subject fails."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import MapLabelValue
from PIL import Image
from synthetic import noise, read, save
from torch import Tensor

from voxquilt import predict_volume
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import ConfigError, OutputError
from voxquilt.reporting.overlay import PALETTE, flat
from voxquilt.stitching.label_values import to_labels
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import check_label_values

NUMBERS = st.one_of(
    st.integers(0, 300), st.sampled_from([255, 256, 1002, 65535, 65536, 2**24 + 1, 2**32 - 1, 2**40 + 1])
)


def three(x: Tensor) -> Tensor:
    """Classes 0, 1 and 2 of an image that holds them."""
    return torch.cat([-(x - n).abs() for n in range(3)], 1)


def labels_of(stitch: Stitch, volume: np.ndarray) -> np.ndarray:
    subject = Subject(t1=ScalarImage(torch.from_numpy(volume)[None].float()))
    return predict_volume(three, subject, 4, 2, stitch=stitch)["labels"][0]


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBERS, min_size=3, max_size=3, unique=True), st.sampled_from(["crop", "gaussian"]), st.booleans())
def test_class_numbers_have_one_type_for_all_subjects(numbers: list[int], mode: str, empty: bool) -> None:
    """The smallest type that holds all of them, even for a subject with class 0 alone, and after post-processing."""
    volume = np.zeros((5, 4, 6), np.int64) if empty else noise((5, 4, 6)).astype(np.int64) % 3
    stitch = Stitch(mode, label_values=numbers, restore="labels" if empty else "scores")
    labels = labels_of(stitch, volume)
    assert labels.dtype == np.min_scalar_type(max(numbers))
    np.testing.assert_array_equal(labels, np.array(numbers, np.uint64)[volume])
    swapped = Stitch(mode, label_values=numbers, postprocess=[lambda classes: 2 - classes])
    np.testing.assert_array_equal(labels_of(swapped, volume), np.array(numbers, np.uint64)[2 - volume])


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBERS, min_size=3, max_size=3), st.sampled_from([torch.int64, torch.float64]))
def test_the_file_holds_the_exact_values_of_post_processing(numbers: list[int], dtype: torch.dtype) -> None:
    """256 does not become 0, nor 1002 234: the type grows where needed, and never shrinks."""
    volume = noise((5, 4, 6)).astype(np.int64) % 3
    stitch = Stitch(postprocess=[lambda classes: torch.tensor(numbers, dtype=dtype)[classes]])
    labels = labels_of(stitch, volume)
    np.testing.assert_array_equal(labels, np.array(numbers, np.uint64)[volume])
    assert labels.dtype == np.min_scalar_type(max(numbers[n] for n in np.unique(volume)))
    assert labels.dtype.kind == "u"


@pytest.mark.parametrize(("target", "dtype"), [(1002, np.uint16), (256, np.uint16), (70_000, np.uint32), (7, np.uint8)])
def test_numbers_of_monais_map_label_value_are_written(target: int, dtype: type) -> None:
    """MONAI's transform works in the type it is given."""
    volume = noise((5, 4, 6)).astype(np.int64) % 2
    labels = labels_of(Stitch(postprocess=[MapLabelValue([0, 1], [0, target], dtype=np.int64)]), volume)
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, volume * target)


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (lambda c: -c, "-1"),
        (lambda c: c * 0.5, "0.5"),
        (lambda c: c / 0, "nan|inf"),
        (lambda c: c * (1 + 0j), "complex"),
        (lambda c: torch.where(c > 0, torch.tensor(-torch.inf), 0.0), "-inf"),
    ],
)
@pytest.mark.parametrize("numbers", [None, [0, 5, 9]])
def test_an_invalid_label_fails_the_subject(transform: object, named: str, numbers: list[int] | None) -> None:
    """Negative, fractional, complex and non-finite values; the message gives the value."""
    with pytest.raises(OutputError, match=f"post-processing gave .*({named})"):
        labels_of(Stitch(postprocess=[transform], label_values=numbers), noise((4, 4, 4)).astype(np.int64) % 2)  # type: ignore[list-item]


def test_post_processing_that_leaves_the_classes_is_an_error() -> None:
    """With label_values post-processing must return classes; without, any label number."""
    with pytest.raises(
        OutputError, match=r"gave 7, which is not a class: stitch\.label_values has numbers for classes 0 to 2"
    ):
        labels_of(Stitch(postprocess=[lambda c: c * 0 + 7], label_values=[0, 5, 9]), np.zeros((4, 4, 4), np.int64))


def test_post_processed_masks_keep_their_numbers() -> None:
    """Here 300, for outputs with several labels per voxel."""
    masks = np.asfortranarray(np.ones((2, 3, 3, 3), np.uint8))
    assert (to_labels(masks, [lambda m: m * 300]) == 300).all()


@pytest.mark.parametrize("bad", [[0, 0, 1], [0, -1, 2], [0, 1.5, 2], [0, True, 2], [], 5, "012", [0, 2**53 + 1, 1]])
def test_invalid_label_values_are_refused(bad: object) -> None:
    """Before any file is read."""
    with pytest.raises(ConfigError, match=r"stitch\.label_values"):
        check_label_values(bad)


def test_label_values_match_the_classes_and_class_names_in_number() -> None:
    """One per class, two with a threshold, none for masks."""
    with pytest.raises(ConfigError, match=r"2 numbers and .* 3 names"):
        Stitch(label_values=[0, 7], class_names=["a", "b", "c"])
    with pytest.raises(ConfigError, match="2 numbers; the network's output has 3 classes"):
        labels_of(Stitch(label_values=[0, 7]), np.zeros((4, 4, 4), np.int64))
    with pytest.raises(ConfigError, match="each channel is a mask"):
        labels_of(Stitch(label_values=[0, 7, 8], activation="sigmoid"), np.zeros((4, 4, 4), np.int64))
    subject = Subject(t1=ScalarImage(torch.from_numpy(noise((4, 4, 4)))[None].float()))
    made = predict_volume(
        lambda x: x, subject, 4, stitch=Stitch(products=["labels"], threshold=50, label_values=[0, 512])
    )
    np.testing.assert_array_equal(made["labels"][0], np.where(noise((4, 4, 4)) > 50, 512, 0))


def test_label_values_concern_only_the_output_with_labels() -> None:
    """Other outputs may have any number of classes."""
    stitch = Stitch(products={"organ": ["labels"], "tissue": ["probabilities"]}, label_values=[0, 900])
    subject = Subject(t1=ScalarImage(torch.from_numpy(noise((4, 4, 4)))[None].float()))
    made = predict_volume(lambda x: {"organ": three(x)[:, :2], "tissue": three(x)}, subject, 4, stitch=stitch)
    assert made["organ_labels"].dtype == np.uint16
    assert made["tissue_probabilities"].shape == (3, 4, 4, 4)


def test_overlay_colours_follow_the_order_of_classes_not_their_numbers() -> None:
    """1002 and 9 are drawn as the first and the second foreground class."""
    labels = np.array([0, 1002, 9, 77], np.uint16).reshape(1, 4, 1, 1)
    assert flat(labels, [0, 1002, 9]).ravel().tolist() == [0, 1, 2, 0]
    assert flat(labels, [77, 1002, 9]).ravel().tolist() == [0, 2, 3, 1]


def test_names_volumes_metrics_and_pictures_use_the_numbers_of_the_file(tmp_path: Path, forks: Server) -> None:
    """A run with label_values and compare, whose outputs all name the right classes."""
    scan = save(tmp_path / "in/a.nii", noise((12, 10, 9)))
    truth = np.where(scan > 50, 1002, 0).astype(np.int16)
    truth[:3] = 0
    save(tmp_path / "truth/a.nii", truth)
    job = (
        "data.inputs=in", "data.labels=truth/{subject}.nii", "data.patch_size=8", "data.patch_overlap=4", "trainer=cpu",
        "model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null", "callbacks.writer.overlay=true",
        "stitch.label_values=[0,1002]", "stitch.class_names=[background,bright]", "stitch.compare=[crop]",
    )  # fmt: skip
    run = forks.start(*job, cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    out = tmp_path / "outputs"
    for name in ("labels", "labels_crop"):
        labels = read(out / f"a_{name}.nii.gz")
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, np.where(scan > 50, 1002, 0))
        (extension,) = nib.load(out / f"a_{name}.nii.gz").header.extensions
        text = bytes(extension.get_content()).rstrip(b"\0")
        assert json.loads(text) == {"labels": {"0": "background", "1002": "bright"}}
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["product"]) for row in rows] == [("bright", "labels"), ("bright", "labels_crop")]
    right, more = int(((scan > 50) & (truth > 0)).sum()), int((scan > 50).sum())
    for row in rows:
        assert float(row["dice"]) == pytest.approx(2 * right / (right + more), rel=1e-5)
        assert float(row["volume_ml"]) == pytest.approx(more / 1000, rel=1e-5)
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        assert float(next(csv.DictReader(file))["volume_ml"]) == pytest.approx(more / 1000)
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(out / "a_overlay.png")).reshape(-1, 3)}
    assert tuple(PALETTE[0]) in colours
    save(tmp_path / "truth/a.nii", (scan > 50).astype(np.uint8))
    run = forks.start(*job, cwd=tmp_path)
    assert checked(run.wait()) == 1
    assert "its label holds 1, which is not in stitch.label_values=[0, 1002]" in " ".join(run.text.split())
    run = forks.start(*job[:-3], "stitch.label_values=[0,1002,7]", "output_dir=other", cwd=tmp_path)
    assert checked(run.wait()) == 2
    assert "stitch.label_values has 3 numbers; the network's output has 2 classes" in run.text
