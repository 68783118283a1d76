"""What does a training see? Random patches of some subjects, and the whole volumes of others to validate on."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from voxquilt.data.discovery import LABEL, SubjectFiles, find_cases, label_files
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.listing import meant
from voxquilt.data.prefetch import LoadFailure, PatchStream
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import Image, LabelMap, ScalarImage, Subject
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError, InputError, VoxquiltError
from voxquilt.geometry.frame import to_triple
from voxquilt.geometry.padding import to_padding
from voxquilt.stitching.label_values import beyond, to_classes
from voxquilt.text import of_subjects
from voxquilt.training.epoch_order import EpochOrder
from voxquilt.training.random_patches import Augment, LateLoader, RandomPatches, centres_of
from voxquilt.training.splits import make_split
from voxquilt.training.volume_cache import CachedVolumes, Labelled
from voxquilt.vocabulary import TASKS, check_name

# Volumes whose patches are mixed, and of those that are not kept so many are in memory at a time.
_GROUP = 8


class TrainingDataModule(LightningDataModule):
    """Random patches of subjects to train on, and the grids of those to validate on, by `GridDataModule`.

    Args:
        inputs, images: See `voxquilt.data.discovery.find_cases`.
        labels: The label of each subject: a path with {subject}, from the working folder, or several by name, which
            become channels; None for the column `label` of a table. For segmentation a file of classes 0, 1, ...; for
            several labels a voxel a file for each, or one with a mask a channel; else the image that is wanted.
        patch_size: Voxels in model space, an integer or three.
        inference_patch_size: Voxels of a patch of validation; None is `patch_size`.
        patch_overlap, padding_mode, divisible_by: Of validation's grid; see GridDataModule.
        task: 'segmentation', 'multilabel' or 'image'.
        batch_size: Patches a batch.
        num_workers: Processes that cut and augment patches; 0 does so in the main one.
        patches_per_volume: Patches of each training subject an epoch.
        balanced: See RandomPatches.
        augment: See RandomPatches.
        cache: MiB of volumes that each process keeps in memory; None is half of what is free, shared by the processes
            of this machine.
        folds, fold, split: See `voxquilt.training.splits.make_split`; `split` is its column.
        seed: Of the folds and of the patches.
        preprocess: To model space; RAS with the file's spacing by default.
        output_dir: Of the training; what lies there is never an input.
        label_values: The numbers that classes 0, 1, ... have in the label files of a segmentation; None for 0, 1, ...

    Raises:
        ConfigError: nothing found, too few subjects, or a label that is not there.
    """

    def __init__(
        self,
        inputs: object,
        labels: str | Mapping[str, str] | None,
        patch_size: int | Iterable[int],
        *,
        images: Mapping[str, str] | None = None,
        inference_patch_size: int | Iterable[int] | None = None,
        patch_overlap: int | Iterable[int] = 0,
        padding_mode: str | float | None = None,
        divisible_by: int | Iterable[int] = 1,
        task: str = "segmentation",
        batch_size: int = 2,
        num_workers: int = 0,
        patches_per_volume: int = 8,
        balanced: float = 0.5,
        augment: Augment | None = None,
        cache: float | None = None,
        folds: int | None = 5,
        fold: int = 0,
        split: str | None = None,
        seed: int = 0,
        preprocess: Preprocess | None = None,
        output_dir: str | Path | None = None,
        label_values: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.task = check_name(task, TASKS, "data.task")
        self.patch_size = to_triple(patch_size, "data.patch_size", minimum=1)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.patches_per_volume, self.balanced, self.augment = patches_per_volume, balanced, augment
        self.cache, self.seed = cache, seed
        self.preprocess = preprocess or Preprocess()
        self._labels, self._divisible_by, self._label_values = labels, divisible_by, label_values
        cases = find_cases(inputs, images, [split] if split else (), output_dir)
        self.training_cases, self.validation_cases = make_split(cases, folds, fold, seed, split)
        to_padding(0 if padding_mode is None else padding_mode)
        self._grids = GridLoader(
            to_triple(inference_patch_size or patch_size, "data.inference_patch_size", minimum=1),
            to_triple(patch_overlap, "data.patch_overlap"),
            self.preprocess,
            padding_mode,
            to_triple(divisible_by, "data.divisible_by", minimum=1),
        )
        for case in (*self.training_cases, *self.validation_cases):
            for path in self.label_files(case).values():
                if not path.is_file():
                    raise ConfigError(
                        f"{case.subject}: its label {path} is not there (looked from {Path.cwd()}).{meant(path)}"
                    )
        self.classes: int | None = None
        """Channels of the network's output, once they are known: `setup` then refuses labels beyond them."""
        self._failures: list[LoadFailure] = []
        self._volumes: CachedVolumes | None = None

    def label_files(self, case: SubjectFiles) -> dict[str, Path]:
        """The files of a subject's label, by channel.

        Raises:
            ConfigError: data.labels names none.
        """
        found = label_files(case, self._labels)
        if not found:
            raise ConfigError(
                f"{case.subject}: there is no column {LABEL!r}; set data.labels=labels/{{subject}}.nii.gz."
            )
        return found

    def labelled(self, case: SubjectFiles) -> Subject:
        """A subject with its images, then its labels under other names; reads headers only.

        Raises:
            InputError: they do not lie on one grid, or cannot be read.
        """
        kind = ScalarImage if self.task == "image" else LabelMap
        labels: dict[str, Image] = {_named(name): kind(path) for name, path in self.label_files(case).items()}
        subject = Subject({name: ScalarImage(path) for name, path in case.images.items()} | labels)
        try:
            _ = subject.frame
        except InputError as error:
            raise InputError(f"{case.subject}: {error}") from error
        return subject

    def truth(self, case: SubjectFiles) -> Tensor:
        """A subject's label as its files have it: (L, I, J, K), classes and masks as integers.

        Raises:
            InputError: it cannot be read, or holds numbers that are no classes.
        """
        images = self.labelled(case).images
        return self._checked(torch.cat([images[_named(name)].stored() for name in self.label_files(case)]))

    def setup(self, stage: str) -> None:
        """Look at every header and label, and read as many training subjects as memory is for.

        Raises:
            InputError: an image or label that cannot be used; training on what is left would be another training.
        """
        if self._volumes is not None:
            return
        self._check_headers()
        share = 2 * (self.trainer.num_devices if self.trainer else 1)
        limit = psutil.virtual_memory().available / share if self.cache is None else self.cache * 2**20
        cases = self.training_cases
        self._volumes = CachedVolumes(lambda n: self._load(cases[n]), len(cases), limit, _GROUP)
        kept = self._volumes.preload(2)
        if self.task != "image":
            self._check_labels(kept)

    def train_dataloader(self) -> LateLoader:
        """Random patches, others each epoch."""
        assert self._volumes is not None, "Lightning calls setup first"
        patches = RandomPatches(
            self._volumes, self.patch_size, self.patches_per_volume,
            balanced=self.balanced if self.task != "image" else 0, seed=self.seed, augment=self.augment,
        )  # fmt: skip
        trainer, rank, ranks, taken = self.trainer, 0, 1, int
        if trainer is not None:
            rank, ranks = trainer.global_rank, trainer.world_size
            taken = lambda: self.batch_size * trainer.fit_loop.epoch_loop.batch_progress.current.ready  # noqa: E731
        order = EpochOrder(
            len(self._volumes), self.patches_per_volume, group=_GROUP, seed=self.seed, rank=rank, ranks=ranks,
            taken=taken,
        )  # fmt: skip
        if len(order) == 0:
            raise ConfigError(f"{len(patches)} patches an epoch are too few for {ranks} processes.")
        return LateLoader(
            patches,
            self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Less than a batch would be a step of another kind, and batch norm fails on a single small patch.
            drop_last=len(order) >= self.batch_size,
        )

    def val_dataloader(self) -> PatchStream | list[Any]:
        """The grids of this process's share of the validation subjects; every subject is of one process."""
        cases = self.validation_cases
        if not cases:
            return []
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dealt = deal([self._grids.cost(case).patches for case in cases], ranks)[rank]
        tasks = [SubjectTask(cases[n], number=n) for n in dealt]
        return PatchStream(tasks, self._grids.load, self.batch_size, 1, self._failures.append, bool)

    def raise_failures(self) -> None:
        """Raise InputError for a validation subject that could not be loaded."""
        if self._failures:
            failure = self._failures[0]
            raise InputError(f"{failure.task.case.subject}: {failure.error}") from failure.error

    def _check_headers(self) -> None:
        """Numbers of channels, of every subject."""
        images: dict[int, list[str]] = {}
        for case in (*self.training_cases, *self.validation_cases):
            subject = self.labelled(case)
            images.setdefault(sum(subject.images[name].shape[0] for name in case.images), []).append(case.subject)
            labels = sum(image.shape[0] for name, image in subject.images.items() if name not in case.images)
            wanted = 1 if self.task == "segmentation" else self.classes
            if wanted not in (None, labels):
                what = "with a mask for each" if self.task == "multilabel" else "as many as the network's image"
                raise InputError(
                    f"{case.subject}: its label has {labels} channel{'s' * (labels != 1)}; "
                    + (
                        "one of classes is wanted, or task=multilabel."
                        if self.task == "segmentation"
                        else f"the network gives {wanted}, {what}. Set model.net.out_channels, or change data.labels."
                    )
                )
        if len(images) > 1:
            (most, _), *others = sorted(images.items(), key=lambda item: -len(item[1]))
            odd, subjects = others[-1]
            raise InputError(
                f"{subjects[0]}: its images have {odd} channel{'s' * (odd != 1)}; those of "
                f"{of_subjects(len(images[most]))} have {most}. All must have as many."
            )

    def _check_labels(self, kept: int) -> None:
        """Read the labels beyond the first `kept`, each by one process; what one of them finds is raised in all."""
        group = Group(self.trainer)
        cases = [*self.training_cases[min(group.gather(kept)) :], *self.validation_cases]

        def problem(case: SubjectFiles) -> str | None:
            try:
                self.truth(case)
            except VoxquiltError as error:
                return str(error).removeprefix(f"{case.subject}: ")
            return None

        with ThreadPoolExecutor(2) as pool:
            mine = cases[group.rank :: group.size]
            texts = zip(mine, pool.map(problem, mine), strict=True)
            found = next((f"{case.subject}: {text}" for case, text in texts if text), None)
        told = list(filter(None, group.gather(found)))
        if told:
            raise InputError(told[0])

    def _load(self, case: SubjectFiles) -> Labelled:
        subject = self.labelled(case)
        images, labels = (
            {n: i for n, i in subject.images.items() if (n in case.images) == one} for one in (True, False)
        )
        try:
            in_model, _ = self.preprocess(Subject(images))
            # Labels are not subject to what intensities are.
            wanted, _ = Preprocess(self.preprocess.orientation, self.preprocess.spacing)(Subject(labels))
            sampler = GridSampler(
                Subject(in_model.images | wanted.images), self.patch_size, fit=True, divisible_by=self._divisible_by
            )
            label = self._checked(torch.cat([sampler.volume(name) for name in labels]))
        except VoxquiltError as error:
            raise InputError(f"{case.subject}: {error}") from error
        image = torch.cat([sampler.volume(name) for name in images])
        return Labelled(case.subject, image, label, centres_of(label) if self.task != "image" else [])

    def _checked(self, label: Tensor) -> Tensor:
        if self.task == "image":
            return label.float()
        if self.task == "segmentation" and len(label) > 1:
            raise InputError(f"its label has {len(label)} channels; one of classes is wanted, or task=multilabel.")
        odd = (label < 0) | (label != label.round()) if label.is_floating_point() else label < 0
        if odd.any():
            raise InputError(
                f"its label holds {float(label[odd][0]):g}; wanted are classes, which are whole numbers from 0."
            )
        if self.task == "multilabel":
            return (label > 0).to(torch.uint8)
        if self._label_values is not None:
            label = to_classes(label, self._label_values)
        if self.classes is not None and label.max() >= self.classes:
            raise InputError(beyond(int(label.max()), self.classes))
        return label.to(torch.uint8 if label.max() < 256 else torch.int32)


def _named(name: str) -> str:
    # With a space, as no image's name that a configuration or a table gives.
    return "its label" if name == LABEL else f"label {name}"
