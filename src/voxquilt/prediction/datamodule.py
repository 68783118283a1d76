"""Provides the LightningDataModule of a predict run: a grid of patches per subject, and subjects dealt to processes."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Unpack

from lightning.pytorch import LightningDataModule, Trainer

from voxquilt.data.copy_stream import copy_stream
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.discovery import SubjectFiles, find_cases
from voxquilt.data.grid_loader import GridLoader, make_grids
from voxquilt.data.prefetch import LoadFailure, PatchStream, never_dropped
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.shared_reads import SharedReads
from voxquilt.data.subject_size import RunSize, SubjectSize
from voxquilt.data.subject_task import LoadedSubject, SubjectTask
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError
from voxquilt.models.predictor import PatchPredictor
from voxquilt.models.several_predictors import predictors_of
from voxquilt.planning.network_check import check_overlap, find_halo
from voxquilt.prediction.run_options import RunChoices, RunOptions
from voxquilt.prediction.run_plan import RunPlan, RunPlanner, check_world
from voxquilt.vocabulary import DISTRIBUTE, TIMES, check_name

log = logging.getLogger("voxquilt")


class GridDataModule(LightningDataModule):
    """Wraps a GridSampler around each subject and serves their patches for `Trainer.predict`.

    >>> import tempfile, torch, voxquilt
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> voxquilt.ScalarImage(tensor=torch.rand(1, 20, 18, 16)).save(folder / "sub-01.nii.gz")
    >>> data = GridDataModule(folder / "sub-01.nii.gz", patch_size=16, patch_overlap=8, batch_size=4)
    >>> data.setup("predict")
    >>> [batch.data.shape for batch in data.predict_dataloader()]
    [torch.Size([4, 1, 16, 16, 16])]

    In a run, `Trainer(callbacks=[VolumeWriter("outputs")]).predict(PatchPredictor(network), data)` does both.

    Args:
        inputs, images, suffixes, extra_images: See `voxquilt.data.discovery.find_cases`.
        patch_size: Voxels in model space, an integer or three.
        patch_overlap: Voxels that neighbours share, an even integer or three.
        padding_mode: See GridSampler; volumes smaller than a patch are padded in any case.
        divisible_by: Pad model space to a multiple of this many voxels.
        batch_size: Patches per forward pass; with 'auto' VolumeWriter chooses as many as fit.
        num_workers: Threads that load subjects ahead, one subject each; 0 loads in the main thread.
        skip: Patches without foreground are not predicted and count as background. Foreground is where the
            first image, as the network sees it, is above a number; or where a mask file on that image's grid, given by
            a pattern with `{subject}`, is above 0.
        labels: Where `voxquilt.reporting.evaluation` finds true labels: a path with `{subject}`, or one per channel. By
            default the column `label` of a table, which is not an image.
        preprocess: Takes subjects to model space; by default RAS with the file's spacing.
        options: See `voxquilt.prediction.run_options.RunOptions`.

    Raises:
        ConfigError, GridError: one of these is wrong.
    """

    def __init__(
        self,
        inputs: object,
        patch_size: int | Iterable[int],
        patch_overlap: int | Iterable[int] = 0,
        *,
        images: Mapping[str, str] | None = None,
        padding_mode: str | float | None = None,
        divisible_by: int | Iterable[int] = 1,
        batch_size: int | str = 1,
        num_workers: int = 1,
        skip: float | str | None = None,
        labels: str | Mapping[str, str] | None = None,
        preprocess: Preprocess | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__()
        run = RunChoices(**options)
        check_name(run.distribute, DISTRIBUTE, "run.distribute")
        check_name(run.time, TIMES, "data.time")
        output_dir = run.resume.folder if run.resume else run.output_dir
        self._find = partial(find_cases, inputs, images, (), output_dir, suffixes=run.suffixes, extra=run.extra_images)
        if is_first() and not is_external():
            _ = self.cases  # errors are raised at once, or in `setup` where all processes take part
        first = make_grids(
            preprocess or Preprocess(), patch_size, patch_overlap, padding_mode, divisible_by, run.placement, run.step
        )
        self.models = [
            replace(
                grids,
                skip=skip,
                within=run.within,
                margin=run.margin,
                time=run.time,
                preprocess=replace(grids.preprocess, nonfinite=run.nonfinite),
            )
            for grids in (first, *run.more_models)
        ]
        """How each model's subjects are read and cut; the halo of a network's outputs is known after `setup`."""
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.labels = labels
        self.shard = run.shard
        self._run = run
        self._planner: RunPlanner | None = None
        self._plan: RunPlan | None = None
        self._feed: DeviceFeed | None = None
        self._stopped: Callable[[], bool] = bool
        self._failed: Callable[[LoadFailure], None] = _log_failure
        self._reads: SharedReads | None = None
        self._is_dropped: Callable[[SubjectTask], bool] = never_dropped
        self.detailed = False
        """Whether `plan.costs` has the sizes of each subject; set before `setup`."""

    @property
    def grids(self) -> GridLoader:
        """How subjects are read and cut for the model, or for the first of several."""
        return self.models[0]

    @cached_property
    def cases(self) -> list[SubjectFiles]:
        """Every subject, in the order of their ids; with several processes only rank 0 searches for them."""
        return self._find()

    @property
    def plan(self) -> RunPlan:
        """What `setup` decided."""
        assert self._plan is not None, "Lightning calls setup first"
        return self._plan

    def setup(self, stage: str) -> None:
        """Decide which process predicts which subjects; the same in all processes.

        Raises:
            ConfigError: the processes do not belong together; or outputs were made with other settings.
        """
        check_world(self.trainer, self.shard)
        group = Group(self.trainer)
        # Only rank 0 lists folders, since their contents may be changing; each header is read by one process.
        cases = group.first(lambda: self.cases)
        self.models = _with_halos(self.models, self.trainer, cases)
        self._reads = SharedReads([grids.preprocess for grids in self.models])
        self._feed = None if self.trainer is None else _make_feed(self.trainer, self.grids.preprocess)
        self._planner = RunPlanner(group, self.models, self.shard, self._run.distribute, self._run.resume)
        self._plan = self._planner.plan(cases, detailed=self.detailed)

    @property
    def group(self) -> Group:
        """The processes of the run."""
        return self.plan.group

    @property
    def run_size(self) -> RunSize:
        """The size of the run: of the subjects that can be predicted."""
        return self.plan.size

    @property
    def images(self) -> list[str]:
        """Names of a subject's images."""
        return list(self.plan.cases[0].images)

    @property
    def are_shared(self) -> bool:
        """Whether several processes share some volume."""
        return any(task.team for task in self.plan.tasks)

    @property
    def has_others(self) -> bool:
        """Whether there are subjects besides those of the plan: some that are done, or of another shard."""
        return bool(self.plan.done) or self.shard[1] > 1

    def set_apart(self, problem: Callable[[SubjectSize], str | None]) -> None:
        """Have subjects with a problem fail, and plan for the others alone; called by all processes.

        If all subjects have a problem, and there are no others, it is a problem of the run, and none is set apart.

        Args:
            problem: Gives the problem of a subject, or None.
        """
        assert self._planner is not None, "Lightning calls setup first"
        self._plan = self._planner.set_apart(self.plan, problem, has_others=self.has_others)

    @property
    def feed(self) -> DeviceFeed | None:
        """Brings subjects to the network's device; None where that is the host."""
        return self._feed

    def images_to_host(self) -> bool:
        """Keep all images on the host, since the device's memory is too small; False if they are there already."""
        return self._feed is not None and self._feed.to_host()

    def keep_images(self, size: float | None) -> None:
        """Hand over images with the work on their subject, with their voxels if they take at most so many bytes."""
        self.models = [replace(grids, keeps=size) for grids in self.models]

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """End the stream of batches before the next one as soon as `stopped` returns True."""
        self._stopped = stopped

    def report_failures_to(self, failed: Callable[[LoadFailure], None]) -> None:
        """Call `failed` with each subject that cannot be loaded, in the thread that tried; by default it is logged."""
        self._failed = failed

    def drop_when(self, is_dropped: Callable[[SubjectTask], bool]) -> None:
        """Leave out a subject's further models if `is_dropped` returns True for their task."""
        self._is_dropped = is_dropped

    @property
    def tasks_by_model(self) -> list[SubjectTask]:
        """Tasks of this process, those of a subject's models one after the other."""
        return [task for one in self.plan.tasks for task in one.by_models(len(self.models))]

    def predict_dataloader(self) -> PatchStream:
        """All patches of this process, subject by subject."""
        batch_size = int(self.batch_size)
        return PatchStream(
            self.tasks_by_model, self.load, batch_size, self.num_workers, self._failed, self._stopped, self._feed,
            self._is_dropped,
        )  # fmt: skip

    def load(self, task: SubjectTask) -> LoadedSubject:
        """Read a subject, take it to model space and lay its grid; see GridLoader.load."""
        loaded = self.models[task.model].load(task, self.plan.group.rank, self._feed, self._reads)
        if self._feed is not None:
            self._feed.check_range(loaded.source)
        return loaded


def datamodule_of(trainer: Trainer, user: str) -> GridDataModule:
    """The GridDataModule of a predict run.

    Raises:
        ConfigError: the trainer has other data, which `user` cannot work with.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, GridDataModule):
        raise ConfigError(f"{user} needs a GridDataModule at predict; the trainer has {type(data).__name__}.")
    return data


def _with_halos(models: Sequence[GridLoader], trainer: Trainer | None, cases: list[SubjectFiles]) -> list[GridLoader]:
    """The models with the layout of outputs of each network, and the halo of patches if outputs lack a border."""
    modules = predictors_of(trainer.lightning_module) if trainer is not None else [None] * len(models)
    found = []
    for grids, module in zip(models, modules, strict=True):
        halo, layout = grids.halo, grids.layout
        if isinstance(module, PatchPredictor):
            layout = module.network.layout
        if isinstance(module, PatchPredictor) and layout == "cropped":
            halo = find_halo(module.network, cases, grids.patch_size)
            check_overlap(grids.patch_size, halo, grids.patch_overlap)
        found.append(replace(grids, halo=halo, layout=layout))
    return found


def _make_feed(trainer: Trainer, preprocess: Preprocess) -> DeviceFeed | None:
    stream, module = copy_stream(trainer.strategy.root_device), trainer.lightning_module
    if stream is None:
        return None
    return DeviceFeed(
        stream,
        takes_volumes=preprocess.device == "auto",
        channels_last=all(isinstance(p, PatchPredictor) and p.network.channels_last for p in predictors_of(module)),
        precision=str(trainer.precision),
    )


def _log_failure(failure: LoadFailure) -> None:
    log.error("%s: failed: %s", failure.task.case.subject, failure.error)
