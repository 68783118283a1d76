"""Provides the LightningDataModule of a training: random patches to train on, whole volumes to validate on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import psutil
from lightning.pytorch import LightningDataModule
from torch import Tensor

from voxquilt.data.discovery import SubjectFiles, find_cases
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.prefetch import LoadFailure, PatchStream
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError, InputError
from voxquilt.geometry.frame import to_triple
from voxquilt.geometry.padding import to_padding
from voxquilt.training.epoch_order import EpochOrder
from voxquilt.training.header_checks import check_channels
from voxquilt.training.labels import TrainingLabels
from voxquilt.training.options import TrainingKeywords, TrainingOptions
from voxquilt.training.random_patches import LateLoader, RandomPatches
from voxquilt.training.splits import make_split
from voxquilt.training.volume_cache import CachedVolumes
from voxquilt.training.volume_loader import VolumeLoader
from voxquilt.vocabulary import TASKS, check_name

# The patches of so many volumes are mixed, and so many volumes that are not kept are in memory at a time.
_MIXED_VOLUMES = 8


class TrainingDataModule(LightningDataModule):
    """Random patches of subjects to train on, and the grids of other subjects to validate on.

    >>> import tempfile, torch, voxquilt
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = [(folder / name).mkdir() for name in ("images", "labels")]
    >>> for n in range(2):
    ...     voxquilt.ScalarImage(tensor=torch.rand(1, 20, 20, 20)).save(folder / f"images/s{n}.nii.gz")
    ...     voxquilt.LabelMap(tensor=torch.ones(1, 20, 20, 20).byte()).save(folder / f"labels/s{n}.nii.gz")
    >>> data = TrainingDataModule(folder / "images", f"{folder}/labels/{{subject}}.nii.gz", patch_size=16, folds=2)
    >>> data.setup("fit")
    >>> next(iter(data.train_dataloader()))["image"].shape
    torch.Size([2, 1, 16, 16, 16])

    Args:
        inputs, images, suffixes: See `voxquilt.data.discovery.find_cases`.
        labels: The label of each subject: a path with {subject}, relative to the working folder, or several by name,
            which become channels; None for the column `label` of a table. A segmentation needs one file of classes 0,
            1, ...; a multilabel task one mask per file or per channel; an image task the image to learn.
        patch_size: Voxels in model space, an integer or three.
        task: 'segmentation', 'multilabel' or 'image'.
        preprocess: Takes subjects to model space; RAS with the file's spacing by default.
        output_dir: The output folder of the training, whose files are never inputs.
        label_values: The numbers that classes 0, 1, ... have in the label files of a segmentation; None for 0, 1, ...
        inference_patch_size: Voxels of a patch in validation; None for `patch_size`.
        patch_overlap, padding_mode, divisible_by, placement, step: The grid of validation; see GridDataModule.
        label_interpolation: Order by which labels are interpolated, 0 or 1; see VolumeLoader.
        batch_size: Patches per batch; 2 by default.
        num_workers: Processes that cut and augment patches; 0, the default, uses the main process.
        patches_per_volume: Patches of each training subject per epoch; 8 by default.
        balanced: The share of patches centred on a class, 0.5 by default; see RandomPatches.
        augment: See RandomPatches.
        cache: MiB of volumes that each process keeps in memory; None for half of the free memory, shared by the
            processes of this machine.
        folds, fold, split: See `voxquilt.training.splits.make_split`. 5 folds by default.
        seed: Seed of folds and patches.

    Raises:
        ConfigError: no subjects, too few of them, or a label file that does not exist.
    """

    def __init__(
        self,
        inputs: object,
        labels: str | Mapping[str, str] | None,
        patch_size: int | Iterable[int],
        *,
        images: Mapping[str, str] | None = None,
        suffixes: Mapping[str, str] | None = None,
        task: str = "segmentation",
        preprocess: Preprocess | None = None,
        output_dir: str | Path | None = None,
        label_values: Sequence[int] | None = None,
        **options: Unpack[TrainingKeywords],
    ) -> None:
        super().__init__()
        self.options = TrainingOptions(**options)
        self.task = check_name(task, TASKS, "data.task")
        self.patch_size = to_triple(patch_size, "data.patch_size", minimum=1)
        self.labels = TrainingLabels(labels, task, label_values)
        folds, fold, split, seed = self.options.folds, self.options.fold, self.options.split, self.options.seed
        cases = find_cases(inputs, images, [split] if split else (), output_dir, suffixes=suffixes)
        self.training_cases, self.validation_cases = make_split(cases, folds, fold, seed, split)
        self.labels.check_files(self._cases)
        preprocess = preprocess or Preprocess()
        divisible_by = to_triple(self.options.divisible_by, "data.divisible_by", minimum=1)
        self._loader = VolumeLoader(
            self.labels, preprocess, self.patch_size, divisible_by, self.options.label_interpolation
        )
        padding_mode = self.options.padding_mode
        to_padding(0 if padding_mode is None else padding_mode)
        self._grids = GridLoader(
            to_triple(self.options.inference_patch_size or patch_size, "data.inference_patch_size", minimum=1),
            to_triple(self.options.patch_overlap, "data.patch_overlap"),
            preprocess,
            padding_mode,
            divisible_by,
            placement=self.options.placement,
            step=self.options.step,
        )
        self.classes: int | None = None
        """Channels of the network's output, once they are known: `setup` then refuses labels beyond them."""
        self._volumes: CachedVolumes | None = None

    @property
    def _cases(self) -> list[SubjectFiles]:
        return [*self.training_cases, *self.validation_cases]

    def truth(self, case: SubjectFiles) -> Tensor:
        """The label of a subject in native space: (L, I, J, K), classes and masks as integers.

        Raises:
            InputError: a file cannot be read, or holds values that are not labels.
        """
        return self.labels.read(case, self.classes)

    def setup(self, stage: str) -> None:
        """Check every header and label, and read as many training subjects as the cache holds.

        Raises:
            InputError: an image or label cannot be used; leaving it out would change the training.
        """
        if self._volumes is not None:
            return
        check_channels(self._cases, self.labels, self.classes)
        cases = self.training_cases
        self._volumes = CachedVolumes(
            lambda n: self._loader.load(cases[n], self.classes), len(cases), self._cache_bytes(), _MIXED_VOLUMES
        )
        kept = self._volumes.preload(2)
        if self.task != "image":
            self._check_labels(kept)

    def train_dataloader(self) -> LateLoader:
        """Random patches, which differ from epoch to epoch."""
        assert self._volumes is not None, "Lightning calls setup first"
        options = self.options
        patches = RandomPatches(
            self._volumes, self.patch_size, options.patches_per_volume,
            balanced=options.balanced if self.task != "image" else 0, seed=options.seed, augment=options.augment,
        )  # fmt: skip
        rank, ranks = self._rank
        order = EpochOrder(
            len(self._volumes), options.patches_per_volume, group=_MIXED_VOLUMES, seed=options.seed, rank=rank,
            ranks=ranks, taken=self._taken,
        )  # fmt: skip
        if len(order) == 0:
            raise ConfigError(f"{len(patches)} patches per epoch are too few for {ranks} processes.")
        return LateLoader(
            patches,
            options.batch_size,
            sampler=order,
            num_workers=options.num_workers,
            persistent_workers=options.num_workers > 0,
            # A smaller batch would be a step of another kind, and batch norm fails on a single small patch.
            drop_last=len(order) >= options.batch_size,
        )

    def val_dataloader(self) -> PatchStream | list[Any]:
        """The grids of this process's validation subjects; no subject is divided between processes."""
        cases = self.validation_cases
        if not cases:
            return []
        rank, ranks = self._rank
        numbers = deal([self._grids.cost(case).patches for case in cases], ranks)[rank]
        tasks = [SubjectTask(cases[n], number=n) for n in numbers]
        return PatchStream(tasks, self._grids.load, self.options.batch_size, 1, _raise_failure, bool)

    @property
    def _rank(self) -> tuple[int, int]:
        """This process's rank, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _taken(self) -> int:
        """Patches that this process has had of the current epoch, where a training resumes in the middle of one."""
        if self.trainer is None:
            return 0
        return self.options.batch_size * self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _cache_bytes(self) -> float:
        if self.options.cache is not None:
            return self.options.cache * 2**20
        return psutil.virtual_memory().available / (2 * (self.trainer.num_devices if self.trainer else 1))

    def _check_labels(self, kept: int) -> None:
        """Read the labels that no volume in the cache has been checked with, divided among the processes.

        A problem that one process finds is raised in all of them.
        """
        group = Group(self.trainer)
        cases = [*self.training_cases[min(group.gather(kept)) :], *self.validation_cases]
        problem = self.labels.first_problem(cases[group.rank :: group.size], self.classes)
        for message in filter(None, group.gather(problem)):
            raise InputError(message)


def _raise_failure(failure: LoadFailure) -> None:
    raise InputError(f"{failure.task.case.subject}: {failure.error}") from failure.error
