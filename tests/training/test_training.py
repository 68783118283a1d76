"""Tests training: where patches are cut and by which process, what validation computes, what checkpoints predict."""

import io
import json
import os
import re
import shutil
import signal as signals
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from omegaconf import OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.train_config import check_train
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import ConfigError, InputError
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.weights.stored_settings import carried, to_carry
from voxquilt.planning.network_check import check_network
from voxquilt.predict import predict_volume
from voxquilt.reporting.metrics import class_dice
from voxquilt.reporting.overlay import PALETTE, overlay
from voxquilt.reporting.pictures import LINE, stacked
from voxquilt.stitching.stitch import Stitch
from voxquilt.training.datamodule import TrainingDataModule
from voxquilt.training.epoch_order import EpochOrder
from voxquilt.training.module import PatchTrainer
from voxquilt.training.options import TrainingKeywords, TrainingOptions
from voxquilt.training.random_patches import RandomPatches, centres_of
from voxquilt.training.schedules import polynomial, warmup_cosine
from voxquilt.training.splits import make_split
from voxquilt.training.validation import Validated, mean_metrics, metrics_of
from voxquilt.training.volume_cache import CachedVolumes, LabelledVolume

ROOT = Path(__file__).parents[2]
NET = (
    "model.net.channels=[4,8]", "model.net.strides=[2]", "model.net.num_res_units=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images in images/ and their bright regions in labels/."""
    folder = tmp_path_factory.mktemp("blobs")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for n in range(5):
        smooth = gaussian_filter(rng.normal(size=(24, 28, 20 + n)), 3)
        smooth /= smooth.std()
        image = (smooth + 0.3 * rng.normal(size=smooth.shape)).astype(np.float32)
        affine = np.diag([-1.0, 2, 1.5, 1])  # LAS
        nib.save(nib.Nifti1Image(image, affine), folder / f"images/s{n}.nii.gz")
        nib.save(nib.Nifti1Image((smooth > 0.7).astype(np.uint8), affine), folder / f"labels/s{n}.nii.gz")
    return folder


def data_of(blobs: Path, **options: object) -> TrainingDataModule:
    """Training data of the blobs."""
    return TrainingDataModule(blobs / "images", f"{blobs}/labels/{{subject}}.nii.gz", 16, **options)  # type: ignore[arg-type]


def numbered(shape: tuple[int, int, int]) -> LabelledVolume:
    """An image whose voxels hold their own number, and a label with one rare class."""
    image = torch.arange(np.prod(shape), dtype=torch.float32).reshape(1, *shape)
    label = torch.zeros((1, *shape), dtype=torch.uint8)
    label[0, 0, 0, 0] = 3
    return LabelledVolume("one", image, label, centres_of(label))


def net() -> UNet:
    """A small network with the same weights each time."""
    torch.manual_seed(0)
    return UNet(3, 1, 2, channels=(4, 8), strides=(2,))


def cases_of(count: int, column: list[str] | None = None) -> list[SubjectFiles]:
    """Subjects without files."""
    return [
        SubjectFiles(f"s{n:02}", {"image": Path(f"{n}.nii")}, {} if column is None else {"split": column[n]})
        for n in range(count)
    ]


# Patches


def test_image_and_label_of_a_random_patch_are_cut_at_one_location() -> None:
    """The label of a patch voxel is that of the voxel whose number the image patch holds."""
    volume = numbered((12, 9, 14))
    patches = RandomPatches([volume], (6, 5, 4), 50)
    for n in range(len(patches)):
        patch = patches[n]
        assert patch["image"].shape == patch["label"].shape == (1, 6, 5, 4)
        assert torch.equal(volume.label.flatten()[patch["image"].flatten().long()], patch["label"].flatten())


def test_balanced_patches_centre_on_a_rare_class_as_often_as_asked() -> None:
    """With balanced=0.5, half of them centre on a class of one voxel."""
    patches = RandomPatches([numbered((40, 40, 40))], (4, 4, 4), 400, balanced=0.5)
    share = np.mean([bool((patches[n]["label"] == 3).any()) for n in range(len(patches))])
    assert 0.4 < share < 0.6


def unevenness(volume: LabelledVolume, masks: list[torch.Tensor], draws: int, seed: int) -> float:
    r"""Chi-square of how often each mask holds the centre of a balanced patch, against equal frequencies.

    Patches are one voxel large, so that a patch is its centre.
    """
    patches = RandomPatches([volume], (1, 1, 1), draws, balanced=1.0, seed=seed)
    voxels = torch.tensor([int(patches[n]["image"]) for n in range(draws)])
    counts = np.array([int(mask.flatten()[voxels].sum()) for mask in masks])
    assert counts.sum() == draws  # never the background
    return float(((counts - draws / len(masks)) ** 2).sum() * len(masks) / draws)


@settings(deadline=None, max_examples=25)
@given(
    exponents=st.lists(st.integers(0, 4), min_size=2, max_size=5).filter(lambda some: max(some) - min(some) >= 2),
    first=st.integers(1, 9), channels=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_class_is_drawn_equally_often_whatever_its_size(
    exponents: list[int], first: int, channels: bool, seed: int
) -> None:
    """One class is 6 to 1296 times larger; counts pass a chi-square test that drawing by voxel would fail."""
    sizes = [6**e for e in exponents]
    shape = (16, 22, 20)
    image = torch.arange(np.prod(shape), dtype=torch.float32).reshape(1, *shape)
    values = torch.zeros(image.numel(), dtype=torch.int32)
    numbers = [first * (n + 1) for n in range(len(sizes))]  # classes need not follow each other
    values[: sum(sizes)] = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    label = values[torch.randperm(len(values), generator=generator)].reshape(1, *shape)
    masks = [label[0] == number for number in numbers]
    label = torch.stack(masks).to(torch.uint8) if channels else label
    centres = centres_of(label)
    assert [len(some) for some in centres] == sizes  # so few that all are remembered
    draws, bound = 150 * len(sizes), float(chi2.isf(1e-9, len(sizes) - 1))
    assert unevenness(LabelledVolume("even", image, label, centres), masks, draws, seed) < bound
    pooled = [torch.cat(centres)]  # the control: all classes' voxels alike
    assert unevenness(LabelledVolume("pooled", image, label, pooled), masks, draws, seed) > bound


def test_unbalanced_patches_reach_every_voxel() -> None:
    """Starts are uniform over all that fit, the outermost included."""
    patches = RandomPatches([numbered((4, 3, 3))], (3, 3, 3), 60, balanced=0.0)
    assert {int(patches[n]["image"].min()) for n in range(len(patches))} == {0, 9}


def test_centres_of_balanced_patches_lie_in_their_class_or_mask() -> None:
    """By value for one channel, without background; for several channels, in each mask."""
    label = torch.zeros(1, 5, 6, 7, dtype=torch.uint8)
    label[0, 2:4] = 7
    label[0, 4, 0, 0] = 9
    seven, nine = centres_of(label)
    assert (len(seven), nine.tolist()) == (2 * 6 * 7, [[4, 0, 0]])
    assert all(label[0, i, j, k] == 7 for i, j, k in seven.tolist())
    masks = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    masks[0, 0], masks[1, 0:2] = 1, 1
    assert [len(some) for some in centres_of(masks)] == [16, 32]


def test_augmentation_depends_on_the_seed_and_patch_number_only() -> None:
    """Image and label are flipped together, and only the image gets noise."""

    def made(seed: int) -> list[dict[str, torch.Tensor]]:
        augment = Compose([
            RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
            RandGaussianNoised(["image"], prob=1.0, std=0.01),
        ])  # fmt: skip
        patches = RandomPatches([numbered((12, 9, 14))], (6, 5, 4), 20, balanced=1.0, seed=seed, augment=augment)
        return [patches[n] for n in (*range(20), 3)]

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[3]["image"], first[20]["image"])
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))
    label = numbered((12, 9, 14)).label.flatten()
    for patch in first:
        assert torch.equal(
            label[patch["image"].round().clamp(0, len(label) - 1).flatten().long()], patch["label"].flatten()
        )
    assert type(first[0]["image"]) is torch.Tensor


@settings(deadline=None)
@given(
    volumes=st.integers(1, 12), per=st.integers(1, 6), group=st.integers(1, 5), ranks=st.integers(1, 3),
    epoch=st.integers(0, 3), seed=st.integers(0, 5),
)  # fmt: skip
def test_an_epoch_has_every_patch_once_and_the_ranks_share_it(
    volumes: int, per: int, group: int, ranks: int, epoch: int, seed: int
) -> None:
    """Together the ranks have the patches of one process, except a rest below their number; few volumes are open."""

    def numbers(rank: int, count: int) -> list[int]:
        order = EpochOrder(volumes, per, group=group, seed=seed, rank=rank, ranks=count)
        order.set_epoch(epoch)
        assert len(list(order)) == len(order)
        return list(order)

    total = volumes * per
    alone = numbers(0, 1)
    assert sorted(alone) == list(range(epoch * total, (epoch + 1) * total))
    each = [numbers(rank, ranks) for rank in range(ranks)]
    assert len({len(some) for some in each}) == 1
    # Taken in turn they are the order of one process, so batches of all ranks together are its batches.
    together = [n for some in zip(*each, strict=True) for n in some]
    assert together == alone[: total // ranks * ranks]
    for first in range(0, total, group * per):
        some = alone[first : first + group * per]
        assert len({n % total // per for n in some}) <= group


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.integers(0, 3))
def test_each_volume_is_read_once_per_epoch_and_few_are_in_memory(
    count: int, kept: int, group: int, epoch: int
) -> None:
    """Volumes that fit the cache are read once for good; of the others one group is open at a time."""
    reads: list[int] = []

    def load(n: int) -> LabelledVolume:
        reads.append(n)
        return numbered((2, 2, 2))

    volumes = CachedVolumes(load, count, numbered((2, 2, 2)).nbytes * kept, group)
    assert volumes.preload(2) == min(count, kept)
    reads.clear()
    order = EpochOrder(count, 3, group=group, seed=0)
    order.set_epoch(epoch)
    for number in order:
        _ = volumes[number % (3 * count) // 3]
        assert len(volumes._recent) <= group
    assert sorted(reads) == list(range(min(count, kept), count))


# Splits


@settings(deadline=None)
@given(st.integers(2, 30), st.data())
def test_folds_are_disjoint_complete_and_even(count: int, data: st.DataObject) -> None:
    """Every subject validates in one fold and trains in the others; fold sizes differ by at most one."""
    folds, seed = data.draw(st.integers(2, count)), data.draw(st.integers(0, 3))
    parts = [make_split(cases_of(count), folds, fold, seed) for fold in range(folds)]
    validating = [case.subject for part in parts for case in part.validation]
    assert sorted(validating) == [case.subject for case in cases_of(count)]
    assert max(len(p.validation) for p in parts) - min(len(p.validation) for p in parts) <= 1
    for part in parts:
        assert {c.subject for c in part.training} | {c.subject for c in part.validation} == set(validating)
        assert not {c.subject for c in part.training} & {c.subject for c in part.validation}
    assert parts == [make_split(cases_of(count), folds, fold, seed) for fold in range(folds)]


def test_a_table_column_assigns_subjects_to_training_and_validation() -> None:
    """By words or numbers of folds; other words leave a subject out."""
    words = make_split(cases_of(4, ["train", "VAL", "test", "train"]), 5, split="split")
    assert [[c.subject for c in part] for part in words] == [["s00", "s03"], ["s01"]]
    numbers = make_split(cases_of(4, ["0", "1", "2", "1"]), 5, 1, split="split")
    assert [[c.subject for c in part] for part in numbers] == [["s00", "s02"], ["s01", "s03"]]


def test_a_split_without_training_subjects_is_refused() -> None:
    """So are more folds than subjects, a fold that does not exist, and a missing column."""
    for arguments, message in (
        ((cases_of(2, ["val", "val"]), 5, 0, 0, "split"), r"no subject is left to train on: 2 .* has: val"),
        ((cases_of(2), 3), r"data\.folds=3 needs .* there are 2"),
        ((cases_of(2), 2, 2), r"data\.fold=2 is not one of data\.folds=2"),
        ((cases_of(2), 5, 0, 0, "part"), r"data\.split=part is not a column of the table of s00"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_split(*arguments)  # type: ignore[arg-type]


def test_a_file_of_splits_has_a_list_of_subjects_for_each_fold(tmp_path: Path) -> None:
    """As nnU-Net writes it; subjects that a fold does not name are left out."""
    path = tmp_path / "splits.json"
    path.write_text('[{"train": ["s00", "s02"], "val": ["s01"]}, {"train": ["s01"], "val": ["s03", "s00"]}]')
    for fold, wanted in ((0, [["s00", "s02"], ["s01"]]), (1, [["s01"], ["s00", "s03"]])):
        found = make_split(cases_of(4), 5, fold, split=str(path))
        assert [[c.subject for c in part] for part in found] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"splits\.json cannot be read \(relative to .*No such file"),
        ("[", "is not a .json file"),
        ("{}", "does not hold splits"),
        ("[3]", "does not hold splits"),
        ('[{"train": ["s00"]}]', "does not hold splits"),
        ('[{"train": ["s00"], "val": [1]}]', "does not hold splits"),
        ("[]", r"data\.fold=0 is not one of the 0 folds"),
        ('[{"train": ["s00", "s9"], "val": ["t"]}]', r"has 2 subjects that data\.inputs has not, such as s9"),
        ('[{"train": ["s00"], "val": ["s00"]}]', "s00 is to train on and to validate on"),
        ('[{"train": [], "val": ["s00"]}]', r"no subject is left to train on.* That is fold 0"),
    ],
)
def test_what_is_not_a_file_of_splits_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "splits.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        make_split(cases_of(2), 5, split=str(path))


# Data


def test_a_missing_label_and_one_on_another_grid_are_named(blobs: Path, tmp_path: Path) -> None:
    """The first before anything is read, the second from headers alone; training never goes on without them."""
    with pytest.raises(ConfigError, match=r"s0: its label .*nowhere/s0\.nii\.gz does not exist"):
        TrainingDataModule(blobs / "images", "nowhere/{subject}.nii.gz", 16)
    for n in range(5):
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4 + n), np.uint8), np.eye(4)), tmp_path / f"s{n}.nii.gz")
    data = TrainingDataModule(blobs / "images", f"{tmp_path}/{{subject}}.nii.gz", 16)
    with pytest.raises(InputError, match=r"s\d: .*'image' and 'its label'.*different grids"):
        data.setup("fit")


def relabelled(blobs: Path, folder: Path, subject: str, value: float, channels: int = 1) -> str:
    """The blobs' labels with one voxel of one subject changed, optionally as several masks; returns their pattern."""
    folder.mkdir(exist_ok=True)
    for n in range(5):
        file = nib.load(blobs / f"labels/s{n}.nii.gz")
        label = np.asarray(file.dataobj).astype(np.float32)
        if f"s{n}" == subject:
            label[3, 4, 5] = value
            label = np.stack([label] * channels, axis=-1) if channels > 1 else label
        nib.save(nib.Nifti1Image(label, file.affine), folder / f"s{n}.nii.gz")
    return f"{folder}/{{subject}}.nii.gz"


@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize("subject", ["s0", "s2"])  # one trains, one validates
@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (-1, "-1"), (-0.25, "-0.25")])
def test_an_invalid_label_value_is_named_before_training(
    value: float, shown: str, subject: str, cache: float | None, blobs: Path, tmp_path: Path
) -> None:
    """One voxel of one subject, whether it is cached or not, in training or validation."""
    pattern = relabelled(blobs, tmp_path / "odd", subject, value)
    data = TrainingDataModule(blobs / "images", pattern, 16, cache=cache)
    assert [case.subject for case in data.validation_cases] == ["s2"]
    with pytest.raises(InputError, match=rf"^{subject}: its label holds {shown}; classes are whole numbers from 0"):
        data.setup("fit")


@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize("subject", ["s3", "s2"])
@pytest.mark.parametrize("value", [2, 255, 1000])
def test_a_label_beyond_the_networks_classes_is_named_before_training(
    value: int, subject: str, cache: float | None, blobs: Path, tmp_path: Path
) -> None:
    """As soon as the number of classes is known; the highest class itself is accepted."""
    data = TrainingDataModule(blobs / "images", relabelled(blobs, tmp_path / "odd", subject, value), 16, cache=cache)
    data.classes = 2
    message = rf"^{subject}: its label has class {value}; the network gives 2, 0 to 1\."
    with pytest.raises(InputError, match=message):
        data.setup("fit")
    data.classes = value + 1
    data.setup("fit")


def test_a_subject_with_other_channels_is_named_before_training(blobs: Path, tmp_path: Path) -> None:
    """For labels of each task and for images, from headers."""
    two = relabelled(blobs, tmp_path / "two", "s1", 1, channels=2)
    for task, classes, message in (
        (
            "segmentation",
            2,
            r"^s1: its label has 2 channels; segmentation needs one channel of classes\. For several masks",
        ),
        ("multilabel", 1, r"^s1: its label has 2 channels; the network has 1, one per mask\."),
        ("image", 1, r"^s1: its label has 2 channels; the network has 1, the channels of its image\."),
    ):
        data = TrainingDataModule(blobs / "images", two, 16, task=task)
        data.classes = classes
        with pytest.raises(InputError, match=message):
            data.setup("fit")
    relabelled(blobs, tmp_path / "images", "s4", 1, channels=3)
    data = TrainingDataModule(tmp_path / "images", f"{blobs}/labels/{{subject}}.nii.gz", 16)
    with pytest.raises(InputError, match=r"^s4: its images have 3 channels; those of 4 subjects have 1\."):
        data.setup("fit")


def test_an_unknown_keyword_of_the_training_data_is_named(blobs: Path) -> None:
    """No keyword is dropped silently; those declared for type checkers are those that exist."""
    with pytest.raises(TypeError, match="'batchsize'"):
        data_of(blobs, batchsize=2)
    assert TrainingKeywords.__annotations__ == TrainingOptions.__annotations__
    options = data_of(blobs, batch_size=3, fold=1, padding_mode="edge").options
    assert options == TrainingOptions(batch_size=3, fold=1, padding_mode="edge")


def test_a_validation_subject_that_cannot_be_read_ends_validation_with_its_name(blobs: Path, tmp_path: Path) -> None:
    """It is truncated after the headers were checked; no mean is computed over the remaining subjects."""
    shutil.copytree(blobs / "images", tmp_path / "images")
    data = TrainingDataModule(tmp_path / "images", f"{blobs}/labels/{{subject}}.nii.gz", 16)
    data.setup("fit")
    [case] = data.validation_cases
    path = case.images["image"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=rf"^{case.subject}: .*{path.name}"):
        list(data.val_dataloader())


def test_volumes_smaller_than_the_patch_are_padded(blobs: Path) -> None:
    """The patch then holds the whole volume."""
    data = TrainingDataModule(blobs / "images", f"{blobs}/labels/{{subject}}.nii.gz", 32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 32, 32, 32)


# Training and validation


def fitted(blobs: Path, folder: Path, epochs: int = 1, **options: object) -> tuple[Trainer, PatchTrainer]:
    """Train in this process."""
    module = PatchTrainer(net(), DiceCELoss(to_onehot_y=True, softmax=True), stitch=Stitch("hann"))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(blobs, patch_overlap=4, **options))
    return trainer, module


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning warns about few workers and few steps."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def test_validation_metrics_equal_those_of_predicting(blobs: Path, tmp_path: Path) -> None:
    """val_dice is the mean over subjects of class_dice between predict_volume's labels and the label file."""
    trainer, module = fitted(blobs, tmp_path, folds=2)
    data = trainer.datamodule  # type: ignore[attr-defined]
    module.eval()
    dice = []
    for case in data.validation_cases:
        subject = Subject(image=ScalarImage(case.images["image"]))
        labels = predict_volume(module.net, subject, 16, 4, stitch=Stitch("hann"))["labels"]
        truth = np.asarray(nib.load(blobs / f"labels/{case.subject}.nii.gz").dataobj)
        dice.append(float(class_dice(torch.from_numpy(labels[0]).long(), torch.from_numpy(truth).long(), 2)[1]))
    assert len(dice) == 3
    assert float(trainer.callback_metrics["val_dice"]) == pytest.approx(np.mean(dice), abs=1e-6)
    assert float(trainer.callback_metrics["val_score"]) == pytest.approx(np.mean(dice), abs=1e-6)
    assert [one.subject for one in module.validated] == sorted(case.subject for case in data.validation_cases)


def test_a_label_without_a_class_in_the_network_is_named(blobs: Path, tmp_path: Path) -> None:
    """With the subject, the class, and the classes that the network has."""
    for n in range(5):
        file = nib.load(blobs / f"labels/s{n}.nii.gz")
        nib.save(nib.Nifti1Image(file.get_fdata().astype(np.uint8) * 2, file.affine), tmp_path / f"s{n}.nii.gz")
    module = PatchTrainer(net(), DiceCELoss(to_onehot_y=True, softmax=True))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = TrainingDataModule(blobs / "images", f"{tmp_path}/{{subject}}.nii.gz", 16, balanced=1.0)
    with pytest.raises(InputError, match=r"^s\d: its label has class 2; the network gives 2, 0 to 1"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("ranks", "subject", "cache"), [(1, "s1", "null"), (1, "s2", "0"), (2, "s2", "0"), (2, "s4", "0")]
)
def test_the_command_names_only_the_invalid_label(
    ranks: int, subject: str, cache: str, forks: Server, blobs: Path, tmp_path: Path
) -> None:
    """Before training, with status 2 in all processes, whichever reads it; it does not suggest resuming."""
    relabelled(blobs, blobs / f"odd_{subject}", subject, 7)
    text = train(forks, blobs, tmp_path, f"data.cache={cache}", ranks=ranks, labels=f"odd_{subject}", status=2)
    assert text.count(f"voxquilt: {subject}: its label has class 7; the network gives 2, 0 to 1.") == 1
    assert "goes on" not in text
    assert "Traceback" not in text
    assert not re.search(r"s\d.* s\d", text.partition("voxquilt: ")[2])  # no other subject is named
    assert not (tmp_path / "outputs/checkpoints").exists()


@pytest.mark.parametrize("schedule", [warmup_cosine, polynomial])
def test_a_schedule_ends_at_zero(schedule: object) -> None:
    """And never exceeds the learning rate."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    scheduler = schedule(optimizer, 40)  # type: ignore[operator]
    rates = []
    for _ in range(40):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert max(rates) == pytest.approx(0.1)
    assert rates[20] < 0.08
    assert rates[-1] < 0.005


# The command


def train(
    forks: Server, blobs: Path, cwd: Path, *arguments: str, ranks: int = 1, labels: str = "labels", status: int = 0
) -> str:
    """Run train.py on the blobs; returns its output."""
    run = forks.start(
        f"data.inputs={blobs}/images", f"data.labels={blobs}/{labels}/{{subject}}.nii.gz", "data.patch_size=16",
        "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=1", *NET, *arguments,
        cwd=cwd, ranks=ranks, script="train",
    )  # fmt: skip
    assert checked(run.wait(120)) == status, run.text
    return run.text


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint, which holds plain types only."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_a_checkpoint_predicts_with_nothing_but_inputs(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """It carries patch size, model space, intensities, network and class names; the user's settings override them."""
    train(
        forks, blobs, tmp_path, "trainer.max_epochs=2", "stitch.class_names=[none,blob]", "preprocess.spacing=1.5",
        "preprocess.intensity=[{_target_: monai.transforms.NormalizeIntensity}]", "stitch.overlap_mode=hann",
    )  # fmt: skip
    checkpoint = tmp_path / "outputs/checkpoints/best.ckpt"
    assert checkpoint.is_file()
    loaded = torch.load(checkpoint, weights_only=True)
    assert loaded["voxquilt"] == carried(checkpoint)
    run = forks.start(f"data.inputs={blobs}/images", f"ckpt_path={checkpoint}", "output_dir=short", cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    assert "from best.ckpt: data.patch_size=16, data.patch_overlap=8" in run.text
    said = (
        f"data.inputs={blobs}/images", f"ckpt_path={checkpoint}", "output_dir=long", "data.patch_size=16",
        "data.patch_overlap=8", "preprocess.spacing=1.5", "stitch.overlap_mode=hann", "model=state_dict",
        "preprocess.intensity=[{_target_: monai.transforms.NormalizeIntensity}]", "model/net=unet", "model.prefix=net.",
        *NET,
    )  # fmt: skip
    run = forks.start(*said, cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    for n in range(5):
        short, long = (nib.load(tmp_path / f"{name}/s{n}_labels.nii.gz") for name in ("short", "long"))
        assert np.array_equal(np.asarray(short.dataobj), np.asarray(long.dataobj))
        assert short.header.extensions
    run = forks.start(
        f"data.inputs={blobs}/images/s0.nii.gz", f"ckpt_path={checkpoint}", "output_dir=own",
        "stitch.overlap_mode=crop", "data.patch_overlap=0", cwd=tmp_path,
    )  # fmt: skip
    assert checked(run.wait()) == 0, run.text
    assert "yours: data.patch_overlap=0, stitch.overlap_mode=crop" in run.text


def test_a_checkpoint_brings_all_that_makes_its_model_space(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Without them its network would see other voxels than it was trained on, and nothing would say so."""
    keys = (
        "preprocess.spacing=1.5", "preprocess.transpose=[2,1,0]", "preprocess.grid=corner", "preprocess.crop=nonzero",
        "preprocess.interpolation=3", "preprocess.per_slice=3", "preprocess.intensity_first=true", "stitch.order=0",
        "stitch.per_slice=2",
    )  # fmt: skip
    intensity = "preprocess.intensity={0: [{_target_: voxquilt.ZScoreNormalization, use_mask: true}]}"
    train(forks, blobs, tmp_path, "trainer.max_epochs=1", *keys, intensity)
    checkpoint = tmp_path / "outputs/checkpoints/last.ckpt"
    said = (f"data.inputs={blobs}/images/s0.nii.gz", f"ckpt_path={checkpoint}", "output_dir=predicted")
    run = forks.start(*said, cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    (recorded,) = json.loads((tmp_path / "predicted/run.json").read_text())["settings"].values()
    for text in keys:
        key, _, value = text.partition("=")
        assert recorded[key] == OmegaConf.from_dotlist([f"value={value}"]).value, key
    assert recorded["preprocess.intensity.0"] == [{"_target_": "voxquilt.ZScoreNormalization", "use_mask": True}]
    run = forks.start(*said, "data.step=0.5", "run.overwrite=true", cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text  # in place of the overlap that it brings


def test_settings_of_the_defaults_are_not_carried() -> None:
    """So that checkpoints from before a key was there have the same settings."""
    plain = {"data": {"patch_size": 8}, "preprocess": {"orientation": "RAS", "grid": "centre", "interpolation": 1}}
    assert to_carry({**plain, "model": {}, "stitch": {"order": 1}}, ["image"])["preprocess"] == {"orientation": "RAS"}


GOING_ON = ("trainer.max_epochs=4", "data.patches_per_volume=4")


@pytest.fixture(scope="module")
def uninterrupted(forks: Server, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after four epochs of 8 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(forks, blobs, folder, *GOING_ON)
    return weights(folder / "outputs/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("stop", "status", "workers"),
    [("epochs=2", 0, 0), ("epochs=2", 0, 2), ("steps=11", 130, 0), ("steps=11", 130, 2), ("steps=16", 130, 0)],
)
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    stop: str, status: int, workers: int, forks: Server, blobs: Path, tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """To the bit: data, optimizer and schedule continue where they stopped, within an epoch too."""
    fault = ("+callbacks.fault._target_=synthetic.StopAfter", f"+callbacks.fault.{stop}")
    text = train(forks, blobs, tmp_path, *GOING_ON, f"data.num_workers={workers}", *fault, status=status)
    assert (" goes on." in text) == (status == 130)
    last = tmp_path / "outputs/checkpoints/last.ckpt"
    train(forks, blobs, tmp_path, *GOING_ON, f"data.num_workers={workers}", f"ckpt_path={last}")
    parts = weights(last)
    assert parts.keys() == uninterrupted.keys()
    assert all(torch.equal(parts[key], uninterrupted[key]) for key in parts)


ONE = ("trainer.max_epochs=1", "data.patches_per_volume=1", "callbacks.board=null")


@pytest.fixture(scope="module")
def finished(forks: Server, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    train(forks, blobs, folder, *ONE)
    return folder / "outputs"


def kept(folder: Path) -> dict[str, bytes]:
    """Contents of checkpoints by file name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("there", "more"),
    [
        (("best.ckpt", "last.ckpt"), ()),
        (("last.ckpt",), ()),  # of one that was interrupted
        (("epoch=3.ckpt",), ()),
        (("best.ckpt",), ("ckpt_path=elsewhere/last.ckpt", "trainer.max_epochs=2")),
        (("best.ckpt",), ("output_dir=other", "callbacks.last.dirpath=${hydra:runtime.cwd}/outputs/checkpoints")),
        (("best.ckpt",), ("-m", "output_dir=outputs,new")),
    ],
)
def test_a_training_does_not_overwrite_another(
    there: tuple[str, ...], more: tuple[str, ...], forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """Refused before anything is written, with three remedies, also for a start from a checkpoint elsewhere."""
    folder = tmp_path / "outputs/checkpoints"
    folder.mkdir(parents=True)
    for name in there:
        (folder / name).write_bytes((finished / "checkpoints/last.ckpt").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/last.ckpt").write_bytes((finished / "checkpoints/last.ckpt").read_bytes())
    before = kept(folder)
    text = train(forks, blobs, tmp_path, *ONE, *more, status=2)
    assert f"has another training's checkpoints (outputs/checkpoints/{there[0]}" in text
    assert f"ckpt_path=outputs/checkpoints/{'last.ckpt' if 'last.ckpt' in there else there[0]}, choose another" in text
    assert "run.overwrite=true, which removes them. Nothing was started." in text
    assert kept(folder) == before
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"checkpoints"}
    assert (tmp_path / "new").exists() == ("-m" in more)  # the sweep's other job is a training of its own


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_overwriting_training_removes_all_checkpoints_of_the_other(
    ranks: int, forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """Even best.ckpt if nothing validates; only once it has begun, and never the checkpoint it resumes from."""
    folder = tmp_path / "outputs/checkpoints"
    shutil.copytree(finished / "checkpoints", folder)
    (folder / "notes.txt").write_text("mine")
    before = kept(folder)
    train(forks, blobs, tmp_path, *ONE, "run.overwrite=true", "model.net.channels=[4]", status=2, ranks=ranks)
    assert kept(folder) == before
    train(forks, blobs, tmp_path, *ONE, "run.overwrite=true", "data.folds=null", ranks=ranks)
    assert kept(folder).keys() == {"last.ckpt", "notes.txt"}
    assert kept(folder)["last.ckpt"] != before["last.ckpt"]
    start = "ckpt_path=outputs/checkpoints/best.ckpt"
    (folder / "best.ckpt").write_bytes(kept(folder)["last.ckpt"])
    train(
        forks,
        blobs,
        tmp_path,
        *ONE,
        "run.overwrite=true",
        "data.folds=null",
        "trainer.max_epochs=2",
        start,
        ranks=ranks,
    )
    assert kept(folder).keys() == {"best.ckpt", "last.ckpt", "notes.txt"}
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 1


def test_only_rank_0_checks_for_another_trainings_checkpoints(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Later processes find rank 0's own checkpoints and do not ask; the same command again is refused once."""
    more = (*ONE, "trainer=ddp", "trainer.devices=2", "logger=null")
    train(forks, blobs, tmp_path, *more)
    assert {"last.ckpt"} <= kept(tmp_path / "outputs/checkpoints").keys()
    assert train(forks, blobs, tmp_path, *more, status=2).count("has another training's checkpoints") == 1


def refusal(blobs: Path, *overrides: str) -> str:
    """The message of train.py's checks on a training that is to be resumed; empty if they pass."""
    register_resolvers()
    GlobalHydra.instance().clear()
    typed = to_overrides([
        f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz", "data.patch_size=16", *NET,
        *ONE, "trainer.accelerator=cpu", "trainer.max_epochs=2", "output_dir=not/there", *overrides,
    ])  # fmt: skip
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", typed)
    try:
        check_train(cfg)
    except ConfigError as error:
        return str(error)
    return ""


CHANGES = [
    (["data.patch_size=8"], ["data.patch_size was 16 and is 8"]),
    (["model.net.channels=[4,16]"], ["model.net.channels was [4, 8] and is [4, 16]"]),
    (["model/net=segresnet"], ['model.net._target_ was "monai.networks.nets.UNet" and is "monai.networks.nets.SegR']),
    (["model/loss=dice_bce"], ['model.loss._target_ was "monai.losses.DiceCELoss" and is "monai.losses.DiceFocal']),
    (["model.optimizer.lr=0.1"], ["model.optimizer.lr was 0.001 and is 0.1"]),
    (["model.schedule=null"], ["model.schedule.warmup was 0.05 and is null"]),
    (["data.augment.transforms.1.std=0.5"], ["data.augment.transforms.1.std was 0.1 and is 0.5"]),
    (["data/augment=none"], ["data.augment.transforms.0.prob was 0.3 and is null"]),
    (["preprocess.spacing=3"], ["preprocess.spacing was null and is 3"]),
    (["run.seed=1"], ["run.seed was 0 and is 1", "data.seed was 0 and is 1"]),
    (["data.fold=1"], ["data.fold was 0 and is 1", "(s1) newly among the subjects to validate on"]),
    (["data.balanced=1", "data.batch_size=4"], ["data.balanced was 0.5 and is 1", "data.batch_size was 2 and is"]),
    (["trainer.gradient_clip_val=1"], ["trainer.gradient_clip_val was null and is 1"]),
    (["callbacks=[train,ema]"], ["callbacks.ema.decay was null and is 0.999"]),
    (["data.inputs=moved/images"], ["other images of 1 subject (s3)", "data.inputs was "]),
    (["data.labels=moved/labels/{subject}.nii.gz"], ["other labels of 1 subject (s4)", "data.labels was "]),
    (["data.inputs=fewer", "data.folds=null"], ["data.folds was 5 and is null", "2 subjects (s3, s4) no longer among"]),
]


def test_a_training_resumes_only_with_its_own_settings_and_data(
    forks: Server, blobs: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change is refused by its key with both values; nothing is written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(blobs, "moved")
    for folder, name, other in (("images", "s3", "s2"), ("labels", "s4", "s0")):
        shutil.copy(blobs / f"{folder}/{other}.nii.gz", f"moved/{folder}/{name}.nii.gz")
    shutil.copytree(blobs / "images", "fewer", ignore=shutil.ignore_patterns("s3*", "s4*"))
    last = finished / "checkpoints/last.ckpt"
    assert refusal(blobs, f"ckpt_path={last}") == ""
    for changed, named in CHANGES:
        found = refusal(blobs, f"ckpt_path={last}", *changed)
        assert found.startswith(f"{last} was trained with other settings or data:"), changed
        for line in named:
            assert line in found
    text = train(forks, blobs, tmp_path, *ONE, "trainer.max_epochs=2", f"ckpt_path={last}", *CHANGES[0][0], status=2)
    # Nothing that only follows from it is named, such as the overlap of validation's patches.
    assert text.startswith(
        f"voxquilt: {last} was trained with other settings or data:\n  {CHANGES[0][1][0]}\n  A training resumes"
    )
    assert text.endswith("Nothing was started.\n")
    assert not (tmp_path / "outputs").exists()


def test_settings_that_do_not_affect_training_may_change_on_resume(
    forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """Where the data is, how a patch size is written, validation, and the number of workers."""
    shutil.copytree(blobs, tmp_path / "moved")
    text = train(
        forks, blobs, tmp_path, *ONE, "trainer.max_epochs=2", f"ckpt_path={finished}/checkpoints/last.ckpt",
        "data.inputs=moved/images", "data.labels=moved/labels/{subject}.nii.gz", "data.patch_size=[16,16,16]",
        "data.patch_overlap=4", "stitch.overlap_mode=crop", "data.cache=0", "data.balanced=0.50", "callbacks=[train]",
        "trainer.log_every_n_steps=5",
    )  # fmt: skip
    assert "epoch 2 of 2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_epochs=1"], "has been trained for 1 epochs, and trainer.max_epochs=1 leaves nothing to do: set"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 leaves nothing to do"),
        (["trainer.max_epochs=5", "trainer.max_steps=2"], "for 2 steps, and trainer.max_steps=2 leaves nothing to do"),
        (
            ["trainer.max_epochs=5", "ckpt_path=net.pt"],
            "net.pt is not a checkpoint that a training can resume from",
        ),
        (["trainer.max_epochs=5", "ckpt_path=slim.ckpt"], "ckpt_path=slim.ckpt holds only weights"),
        (["trainer.max_epochs=5", "ckpt_path=[slim.ckpt]"], "ckpt_path must be one checkpoint to resume from"),
        (
            ["trainer.max_epochs=5", "ckpt_path=old.ckpt", "model.net.channels=[4,16]"],
            "ckpt_path is of another network",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_one_message(
    arguments: list[str], message: str, forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """All epochs are done, or the file is not a training's, or of another network; status 2, no traceback."""
    last = finished / "checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save(content["state_dict"], tmp_path / "net.pt")
    torch.save({key: value for key, value in content.items() if key != "optimizer_states"}, tmp_path / "slim.ckpt")
    torch.save({key: value for key, value in content.items() if key != "voxquilt_training"}, tmp_path / "old.ckpt")
    text = train(forks, blobs, tmp_path, *ONE, f"ckpt_path={last}", *arguments, status=2)
    assert message in text
    assert text.count("voxquilt: ") == 1
    assert "Traceback" not in text
    assert not (tmp_path / "outputs/checkpoints").exists()


def test_a_checkpoint_without_training_settings_resumes_with_a_warning(
    forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """Earlier versions wrote such checkpoints."""
    content = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    del content["voxquilt_training"]
    torch.save(content, tmp_path / "old.ckpt")
    text = train(forks, blobs, tmp_path, *ONE, "trainer.max_epochs=2", "ckpt_path=old.ckpt")
    assert "old.ckpt has no record of how it was trained: settings and data cannot be compared." in text
    assert "epoch 2 of 2" in text


def test_a_training_resumes_from_a_checkpoint_in_torchs_old_format(
    forks: Server, blobs: Path, tmp_path: Path, finished: Path
) -> None:
    """Its record of settings and data is compared as well."""
    content = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    text = train(forks, blobs, tmp_path, *ONE, "trainer.max_epochs=2", "data.seed=7", "ckpt_path=old.ckpt", status=2)
    assert "old.ckpt was trained with other settings or data" in text
    text = train(forks, blobs, tmp_path, *ONE, "trainer.max_epochs=2", "ckpt_path=old.ckpt")
    assert "epoch 2 of 2" in text


def test_means_are_over_the_subjects_that_have_a_metric() -> None:
    """A class that neither label nor prediction has is left out, as is one for which a subject has no value."""
    nan = float("nan")
    found = [
        Validated("a", {"dice": 0.5, "dice_x": 0.5, "dice_y": nan}),
        Validated("b", {"dice": 0.9, "dice_x": 0.8, "dice_y": 1.0}),
        Validated("c", {"dice": nan, "dice_x": nan, "dice_y": nan, "dice_z": nan}),
    ]
    assert mean_metrics(found, "segmentation") == pytest.approx(
        {"dice": 0.7, "dice_x": 0.65, "dice_y": 1.0, "score": 0.7}
    )
    images = [Validated("a", {"mae": 1.0, "psnr": 20.0}), Validated("b", {"mae": 2.0, "psnr": 30.0})]
    assert mean_metrics(images, "image") == pytest.approx({"mae": 1.5, "psnr": 25.0, "score": 25.0})
    assert mean_metrics([], "image") == {}


def test_metrics_of_a_subject_equal_values_computed_by_hand() -> None:
    """Background counts among masks but not among labels; PSNR is relative to the span of the reference image."""
    labels, truth = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 1, 1, 0, 0])
    volume = (1, 6, 1, 1)
    found = metrics_of("segmentation", labels.reshape(volume), truth.reshape(volume), ["none", "x", "y", "z"])
    assert found == pytest.approx({"dice": 0.4, "dice_x": 0.8, "dice_y": 0.0, "dice_z": float("nan")}, nan_ok=True)
    masks, wanted = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    found = metrics_of("multilabel", masks.reshape(2, 4, 1, 1), wanted.reshape(2, 4, 1, 1), ["x", "y"])
    assert found == pytest.approx({"dice": 0.5, "dice_x": 0.5, "dice_y": float("nan")}, nan_ok=True)
    image, clean = torch.tensor([1.0, 2.0, 5.0, 9.0]), torch.tensor([1.0, 3.0, 5.0, 11.0])
    found = metrics_of("image", image.reshape(1, 4, 1, 1), clean.reshape(1, 4, 1, 1), [])
    assert found == pytest.approx({"mae": 0.75, "psnr": 10 * np.log10(10**2 / (5 / 4))})


def test_two_processes_train_and_validate_as_one(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """With half the batch size: the same losses, metrics and weights up to rounding, and subjects counted once."""
    common = (
        "trainer.max_epochs=2",
        "data.patches_per_volume=4",
        "data.folds=2",
        "model.optimizer._target_=torch.optim.SGD",
    )
    train(forks, blobs, tmp_path, *common, "data.batch_size=4", "output_dir=one")
    train(forks, blobs, tmp_path, *common, "data.batch_size=2", "output_dir=two", "trainer.strategy=ddp", ranks=2)
    one, two = (curves(tmp_path / name) for name in ("one", "two"))
    assert {"train_loss", "val_dice", "val_score"} <= one.keys()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == pytest.approx(two[name], abs=1e-4), name
    first, second = (weights(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("one", "two"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-4, rtol=1e-3)


def curves(folder: Path) -> dict[str, list[float]]:
    """Scalars in TensorBoard's event files."""
    (events,) = {
        path.parent for path in (folder / "tensorboard").rglob("events.out.tfevents.*") if "hparams" not in str(path)
    }
    found = EventAccumulator(str(events))
    found.Reload()
    return {tag: [s.value for s in found.Scalars(tag)] for tag in found.Tags()["scalars"] if "final" not in tag}


def pictures(folder: Path) -> list[np.ndarray]:
    """Pictures of the single validation subject, in order."""
    (events,) = {path.parent for path in (folder / "tensorboard").rglob("events*") if "hparams" not in str(path)}
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    assert found.Tags()["images"] == ["validation/s2"]
    return [np.asarray(Image.open(io.BytesIO(one.encoded_image_string))) for one in found.Images("validation/s2")]


def test_tensorboard_has_curves_pictures_and_hyperparameters(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Losses fall; a picture per validation subject and validation; settings with the final metrics."""
    train(forks, blobs, tmp_path, "trainer.max_epochs=6", "model.optimizer.lr=0.01")
    found = curves(tmp_path / "outputs")
    assert len(found["train_loss"]) == len(found["val_dice"]) == 6
    assert found["train_loss"][-1] < found["train_loss"][0]
    assert {"val_dice_1", "lr-AdamW"} <= found.keys() or "val_dice_1" in found
    shown = pictures(tmp_path / "outputs")
    assert len(shown) == 6
    image, label = (nib.load(blobs / f"{name}/s2.nii.gz") for name in ("images", "labels"))
    volume, truth = np.asarray(image.dataobj), np.asarray(label.dataobj)
    below = stacked([("s2: truth", overlay(volume, truth, image.affine))])
    outlined = (np.asarray(below)[LINE:] == PALETTE[0]).all(axis=-1)
    for n, picture in enumerate(shown, 1):
        half = len(picture) // 2
        assert np.array_equal(picture[half:], below)  # the same in every epoch
        caption = stacked([(f"s2: prediction, epoch {n}, step {16 * n}", Image.fromarray(picture[LINE:half]))])
        assert np.array_equal(picture[:half], caption)
        # The prediction has the planes and grey levels of the truth: only outlines differ.
        plain = ~outlined & ~(picture[LINE:half] == PALETTE[0]).all(axis=-1)
        assert np.array_equal(picture[LINE:half][plain], picture[half + LINE :][plain])
    text = b"".join(path.read_bytes() for path in (tmp_path / "outputs/tensorboard").rglob("events*"))
    assert b"model.optimizer.lr" in text
    assert b"final/val_dice" in text


def test_a_network_with_several_labels_per_voxel_trains(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Two nested masks from two files; the checkpoint predicts each separately."""
    (tmp_path / "core").mkdir()
    for n in range(5):
        file = nib.load(blobs / f"labels/s{n}.nii.gz")
        core = np.asarray(nib.load(blobs / f"images/s{n}.nii.gz").dataobj) > 1.2
        nib.save(nib.Nifti1Image(core.astype(np.uint8), file.affine), tmp_path / f"core/s{n}.nii.gz")
    labels = f"data.labels={{blob: '{blobs}/labels/{{subject}}.nii.gz', core: 'core/{{subject}}.nii.gz'}}"
    run = forks.start(
        f"data.inputs={blobs}/images", labels, "data.patch_size=16", "task=multilabel", *NET, "trainer.max_epochs=12",
        "stitch.class_names=[blob,core]", "model.optimizer.lr=0.01", "trainer.accelerator=cpu",
        "trainer.check_val_every_n_epoch=6", cwd=tmp_path, script="train",
    )  # fmt: skip
    assert checked(run.wait(120)) == 0, run.text
    assert curves(tmp_path / "outputs")["val_dice_blob"][-1] > 0.5
    run = forks.start(f"data.inputs={blobs}/images", "ckpt_path=outputs/checkpoints/best.ckpt", cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    assert nib.load(tmp_path / "outputs/s0_labels.nii.gz").shape == (24, 28, 20, 2)


def test_a_network_from_image_to_image_trains(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Its error falls below that of the noisy image; the checkpoint predicts an image of floats."""
    (tmp_path / "clean").mkdir()
    noise = []
    for n in range(5):
        file = nib.load(blobs / f"images/s{n}.nii.gz")
        clean = gaussian_filter(file.get_fdata(), 1)
        noise.append(np.abs(clean - file.get_fdata()).mean())
        nib.save(nib.Nifti1Image(clean.astype(np.float32), file.affine), tmp_path / f"clean/s{n}.nii.gz")
    run = forks.start(
        f"data.inputs={blobs}/images", "data.labels=clean/{subject}.nii.gz", "data.patch_size=16", "task=image",
        "model.net.channels=[8,8]", "model.net.strides=[1]", "model.net.norm=batch", "trainer.max_epochs=15",
        "model.optimizer.lr=0.01", "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=15", cwd=tmp_path,
        script="train",
    )  # fmt: skip
    assert checked(run.wait(120)) == 0, run.text
    (picture,) = pictures(tmp_path / "outputs")
    clean = nib.load(tmp_path / "clean/s2.nii.gz")
    volume = np.asarray(clean.dataobj)
    bright, none = volume > volume.mean(), np.zeros(volume.shape, np.uint8)
    truth = stacked([("s2: truth", overlay(volume, none, clean.affine, planes_of=bright))])
    half = len(picture) // 2
    assert np.array_equal(picture[half:], truth)
    run = forks.start(
        f"data.inputs={blobs}/images/s2.nii.gz", "ckpt_path=outputs/checkpoints/last.ckpt", "output_dir=one",
        "trainer.accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert checked(run.wait()) == 0, run.text
    predicted = np.asarray(nib.load(tmp_path / "one/s2_image.nii.gz").dataobj)
    above = np.asarray(overlay(predicted, none, clean.affine, planes_of=bright, window_of=volume))
    assert np.abs(picture[LINE:half].astype(int) - above).max() <= 1  # in the truth's greys
    found = curves(tmp_path / "outputs")
    assert found["val_mae"][-1] < 0.8 * np.mean(noise)
    assert found["val_psnr"] == found["val_score"]
    run = forks.start(f"data.inputs={blobs}/images", "ckpt_path=outputs/checkpoints/best.ckpt", cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    assert nib.load(tmp_path / "outputs/s0_image.nii.gz").get_data_dtype() == np.float32


SMALL = {
    "ct": ("data.patch_size=16", "model.net.kernel_size=[3,3,3]", "model.net.strides=[1,2,2]",
           "model.net.upsample_kernel_size=[2,2]", "model.net.filters=[4,8,8]"),
    "mr_t1": ("data.patch_size=16", "model.net.kernel_size=[3,3,3]", "model.net.strides=[1,2,2]",
              "model.net.upsample_kernel_size=[2,2]", "model.net.filters=[4,8,8]"),
    "multimodal": ("data.patch_size=16", "model.net.init_filters=8", "model.net.out_channels=2"),
    "slices_2d": ("data.patch_size=[16,16,1]", "data.patch_overlap=[8,8,0]", "model.net.channels=[4,8]",
                  "model.net.strides=[2]"),
    "denoising": ("data.patch_size=16", "model.net.channels=[4,4]", "model.net.strides=[1]"),
}  # fmt: skip


@pytest.mark.parametrize("experiment", SMALL)
def test_an_experiment_trains_and_its_checkpoint_predicts(
    forks: Server, blobs: Path, tmp_path: Path, experiment: str
) -> None:
    """With a smaller network; predict.py gets only inputs and checkpoint."""
    inputs, labels = f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz"
    if experiment == "multimodal":
        for n in range(5):
            (tmp_path / f"raw/s{n}").mkdir(parents=True)
            for name in ("t1", "t1c", "t2", "flair"):
                (tmp_path / f"raw/s{n}/{name}.nii.gz").symlink_to(blobs / f"images/s{n}.nii.gz")
        inputs = "data.inputs=raw"
    common = ("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "trainer.accelerator=cpu", "output_dir=o")
    run = forks.start(
        f"experiment={experiment}", inputs, labels, *common, *SMALL[experiment], cwd=tmp_path, script="train"
    )
    assert checked(run.wait(120)) == 0, run.text
    images = "data.images={t1: '{subject}/t1.nii.gz', t1c: '{subject}/t1c.nii.gz', t2: '{subject}/t2.nii.gz'"
    more = [f"{images}, flair: '{{subject}}/flair.nii.gz'}}"] if experiment == "multimodal" else []
    run = forks.start(inputs, *more, "ckpt_path=o/checkpoints/best.ckpt", "output_dir=p", cwd=tmp_path)
    assert checked(run.wait()) == 0, run.text
    product = "image" if experiment == "denoising" else "labels"
    assert nib.load(tmp_path / f"p/s1_{product}.nii.gz").shape == (24, 28, 21)


def test_weights_can_be_averaged_and_training_can_stop_early(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """callbacks=[train,ema,early_stopping]: the checkpoint has the averaged weights, and fewer epochs are trained."""
    common = ("trainer.max_epochs=12", "model.optimizer.lr=0.01", "data.patches_per_volume=4")
    train(forks, blobs, tmp_path, *common, "output_dir=plain")
    # With weights that hardly change no validation is better than the first.
    train(
        forks, blobs, tmp_path, *common, "output_dir=both", "callbacks=[train,ema,early_stopping]",
        "callbacks.ema.decay=1.0", "callbacks.early_stopping.patience=2",
    )  # fmt: skip
    assert len(curves(tmp_path / "plain")["val_dice"]) == 12
    assert len(curves(tmp_path / "both")["val_dice"]) <= 6
    plain, both = (weights(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("plain", "both"))
    assert plain.keys() == both.keys()
    assert not all(torch.equal(plain[key], both[key]) for key in plain)


def test_a_loss_that_is_not_finite_ends_the_training_with_a_remedy(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Status 1, one message with epoch, step and subjects; earlier checkpoints stay."""
    run = forks.start(
        f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz", "data.patch_size=16", *NET,
        "trainer.accelerator=cpu", "model.optimizer.lr=1e30", "model.schedule=null", "trainer.max_epochs=3",
        cwd=tmp_path, script="train",
    )  # fmt: skip
    assert checked(run.wait(60)) == 1, run.text
    assert "voxquilt: the loss is nan in epoch" in run.text
    assert "lower model.optimizer.lr" in run.text
    assert (tmp_path / "outputs/checkpoints/last.ckpt").is_file()
    assert " goes on." not in run.text  # it would end alike
    assert "Traceback" not in run.text


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_training_saves_its_last_state(
    forks: Server, blobs: Path, tmp_path: Path, signal: str, status: int
) -> None:
    """And prints the command to resume, which works."""
    arguments = (
        f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz", "data.patch_size=16", *NET,
        "trainer.accelerator=cpu",
    )  # fmt: skip
    run = forks.start(*arguments, "trainer.max_epochs=100000", cwd=tmp_path, script="train")
    last = tmp_path / "outputs/checkpoints/last.ckpt"
    run.until(last)
    os.kill(run.pids[0], getattr(signals, signal))
    assert checked(run.wait(60)) == status, run.text
    assert f"voxquilt: stopped; the same command with ckpt_path={last} goes on." in run.text
    assert "Traceback" not in run.text
    done = torch.load(last, weights_only=True)["epoch"]
    train(forks, blobs, tmp_path, f"trainer.max_epochs={done + 2}", "trainer.check_val_every_n_epoch=1000000",
          f"ckpt_path={last}")  # fmt: skip
    assert torch.load(last, weights_only=True)["epoch"] == done + 1


def test_worker_processes_without_a_cache_cut_the_patches_of_the_main_process(
    forks: Server, blobs: Path, tmp_path: Path
) -> None:
    """Volumes are read each time. With trainer.precision=bf16-mixed the weights stay float32."""
    common = ("trainer.max_epochs=2", "data.patches_per_volume=4")
    train(forks, blobs, tmp_path, *common, "output_dir=plain")
    train(forks, blobs, tmp_path, *common, "output_dir=other", "data.cache=0", "data.num_workers=2")
    plain, other = (weights(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("plain", "other"))
    assert all(torch.equal(plain[key], other[key]) for key in plain)
    train(forks, blobs, tmp_path, *common, "output_dir=half", "trainer.precision=bf16-mixed")
    half = weights(tmp_path / "half/checkpoints/last.ckpt")
    assert all(value.dtype == torch.float32 for value in half.values() if value.is_floating_point())
    assert not all(torch.equal(plain[key], half[key]) for key in plain)


@pytest.mark.parametrize(("net", "size"), [("unet", 32), ("dynunet", 32), ("segresnet", 32), ("swinunetr", 64)])
def test_the_output_of_each_configured_network_has_the_size_of_the_patch(net: str, size: int) -> None:
    """For a patch size that its file in conf/ allows."""
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/net/{net}.yaml"))
    found = check_network(PatchNetwork([build(node, "net")]), ["image"], 1, (size,) * 3, ["a", "b"])  # type: ignore[arg-type]
    assert found is not None
    assert found.outputs == {"": (1, 2, size, size, size)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.labels=labels"], "data.labels is a path with {subject}, such as"),
        (["data.labels=null"], "data.labels is missing"),
        (["data.folds=9"], "data.folds=9 needs at least 2 folds and as many subjects; there are 5"),
        (["data.folds=1"], "data.folds (null: no validation) must be an integer of at least 2"),
        (["data.balanced=2"], "data.balanced is a share, 0 to 1; it is 2"),
        (["data.batch_size=0"], "data.batch_size must be an integer of at least 1"),
        (["stitch.class_names=[a,b,c]"], "stitch.class_names has 3 names (a, b, c) and model.net.out_channels is 2"),
        (["+data.patchsize=3"], "there is no key data.patchsize. Did you mean data.patch_size?"),
        (["data.patch_overlap=20"], "data.patch_overlap"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
        (["task=segmentatoin"], "segmentation"),
        (["data.patch_size=17"], "data.patch_size=[18, 18, 18] would work"),
        (["model.net.in_channels=2"], "the network takes 2 channels; subjects have 1 (image)"),
        (["model.net._target_=monai.networks.nets.UNett"], "model cannot be built"),
        (["model.net.out_channels=0"], "shape (1, 0, 16, 16, 16)"),
        (["model.net.strides=[0]"], "the network cannot take patches of [16, 16, 16] voxels with 1 channel"),
    ],
)
def test_an_impossible_training_is_one_message_and_status_2(
    forks: Server, blobs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Before anything is trained or written, without a traceback."""
    run = forks.start(
        f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz", "data.patch_size=16",
        "trainer.accelerator=cpu", *NET, *arguments, cwd=tmp_path, script="train",
    )  # fmt: skip
    assert checked(run.wait(60)) == 2, run.text
    assert message in run.text
    assert "Traceback" not in run.text
    assert not (tmp_path / "outputs").exists()


def test_label_values_of_files_are_mapped_to_classes_for_training(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """0 and 1002 train like 0 and 1; the checkpoint passes the numbers on to predicting."""
    shutil.copytree(blobs / "images", tmp_path / "images")
    (blobs / "numbers").mkdir()
    for path in (blobs / "labels").iterdir():
        image = nib.load(path)
        numbers = np.asarray(image.dataobj).astype(np.int16) * 1002
        nib.save(nib.Nifti1Image(numbers, image.affine), blobs / "numbers" / path.name)
    more = ("trainer.max_epochs=1", "stitch.label_values=[0,1002]")
    train(forks, blobs, tmp_path, "trainer.max_epochs=1", "output_dir=plain")
    text = train(forks, blobs, tmp_path, *more, labels="numbers")
    one, other = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("plain", "outputs"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "val_dice" in text
    done = forks.start(
        "data.inputs=images", "ckpt_path=outputs/checkpoints/last.ckpt", "output_dir=made", "trainer=cpu", cwd=tmp_path
    )
    assert checked(done.wait(120)) == 0, done.text
    for path in (tmp_path / "made").glob("*_labels.nii.gz"):
        labels = np.asarray(nib.load(path).dataobj)
        assert labels.dtype == np.uint16
        assert set(np.unique(labels)) <= {0, 1002}
    last = "ckpt_path=outputs/checkpoints/last.ckpt"
    text = train(forks, blobs, tmp_path, last, "trainer.max_epochs=2", labels="numbers", status=2)
    assert "stitch.label_values was [0, 1002] and is null" in text
    wrong = train(forks, blobs, tmp_path, *more, "output_dir=wrong", status=2)  # whose labels are 0 and 1
    assert "its label holds 1, which is none of stitch.label_values=[0, 1002]" in wrong
    for more, message in (("stitch.label_values=[0,5,7]", "out_channels is 2"), ("stitch.label_values=[1,2]", "has 0")):
        assert message in train(forks, blobs, tmp_path, more, "output_dir=wrong", status=2)


def test_training_a_network_with_a_smaller_output_is_refused(forks: Server, blobs: Path, tmp_path: Path) -> None:
    """Labels would not match it: one message, not the loss's error."""
    net = ("~model/net", "+model.net._target_=torch.nn.Conv3d", "+model.net.in_channels=1", "+model.net.out_channels=2")
    run = forks.start(
        f"data.inputs={blobs}/images", f"data.labels={blobs}/labels/{{subject}}.nii.gz", "data.patch_size=16", *net,
        "+model.net.kernel_size=5", "trainer.accelerator=cpu", cwd=tmp_path, script="train",
    )  # fmt: skip
    assert checked(run.wait(60)) == 2, run.text
    assert "train.py trains networks whose outputs are as large as their patches" in run.text
