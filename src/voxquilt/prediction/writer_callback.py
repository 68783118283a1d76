"""Provides the Lightning callback that stitches outputs of a predict run and writes the volumes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from voxquilt.data.batch import PatchBatch
from voxquilt.distributed.control_channel import BROKEN, Stop
from voxquilt.distributed.environment import disarm_observer
from voxquilt.distributed.signals import Signals
from voxquilt.errors import ConfigError, RunError
from voxquilt.filesystem import read_json
from voxquilt.models.predictor import PatchPredictor
from voxquilt.models.several_predictors import SeveralPredictors
from voxquilt.planning.preflight import check_models
from voxquilt.planning.resource_estimate import MIB
from voxquilt.prediction.datamodule import GridDataModule, datamodule_of
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.prediction.output_files import OutputFiles, OutputOptions
from voxquilt.prediction.run_events import events_of
from voxquilt.prediction.run_session import RunDisplay, RunSession, connect
from voxquilt.prediction.subject_outcomes import SubjectOutcomes
from voxquilt.reporting.manifest import Row, of_shard, read_rows
from voxquilt.reporting.progress import make_display
from voxquilt.reporting.progress_counts import RunProgress
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import Outputs
from voxquilt.vocabulary import LOGS, ON_ERROR, check_name

log = logging.getLogger("voxquilt")


class VolumeWriter(Callback):
    """Quilts each subject's outputs and writes its products as `<subject>_<product>.nii.gz`, with a manifest.

    A subject that fails becomes a row of the manifest, and the run goes on. With several processes, rank 0 keeps the
    manifest for all, and no process ends before all have finished: they agree on the exit status.

    >>> import tempfile, voxquilt
    >>> folder = Path(tempfile.mkdtemp())
    >>> voxquilt.ScalarImage(tensor=torch.rand(1, 20, 18, 16)).save(folder / "sub-01.nii.gz")
    >>> writer = VolumeWriter(folder / "outputs", Stitch("hann", products=["labels", "entropy"]), log="plain")
    >>> predictor = voxquilt.PatchPredictor(torch.nn.Conv3d(1, 2, 3, padding=1))
    >>> trainer = Trainer(accelerator="cpu", callbacks=[writer], logger=False, enable_progress_bar=False)
    >>> data = voxquilt.GridDataModule(folder / "sub-01.nii.gz", patch_size=16, patch_overlap=8)
    >>> trainer.predict(predictor, data, return_predictions=False)
    >>> writer.rows[0].outputs
    ('sub-01_labels.nii.gz', 'sub-01_entropy.nii.gz')

    Args:
        output_dir: Folder of the outputs; made if it is missing.
        stitch: Blend and products; gaussian and labels (an image for one channel) by default.
        on_error: 'skip' goes on after a failed subject, 'raise' stops at the first, in all processes.
        overlay: Whether to write `<subject>_overlay.png`: three planes with the labels' outlines.
        compress: Whether to write .nii.gz, or else .nii.
        in_memory: MiB; larger products are kept in unnamed files in output_dir until they are written. None is an
            eighth of the memory that is free when the writer is made: up to three subjects are held at a time.
        tensorboard: Whether to write numbers of subjects, and pictures of the first, in output_dir/tensorboard.
        report: Whether to draw thumbnails in output_dir/report, for the page that `voxquilt-report` makes.
        statistics: Whether to write output_dir/statistics.csv: numbers of each label of each subject.
        log: How progress is shown: 'rich' bars, 'plain' lines, 'json' objects on stdout; 'auto' shows bars on a
            terminal.
        configuration: Configuration of the run, for run.json.
        combination: How the volumes of several models become those of the run.

    Raises:
        ConfigError: on_error or log is unknown.
    """

    def __init__(
        self,
        output_dir: str | Path,
        stitch: Stitch | None = None,
        *,
        on_error: str = "skip",
        overlay: bool = False,
        compress: bool = True,
        in_memory: float | None = None,
        tensorboard: bool = False,
        report: bool = False,
        statistics: bool = True,
        log: str = "auto",
        configuration: Mapping[str, Any] | None = None,
        combination: Combination | None = None,
    ) -> None:
        self.options = OutputOptions(
            Path(output_dir).expanduser().resolve(),
            stitch or Stitch(),
            ".nii.gz" if compress else ".nii",
            overlay=overlay,
            tensorboard=tensorboard,
            report=report,
            in_memory=psutil.virtual_memory().available / 8 if in_memory is None else in_memory * MIB,
            combination=combination,
            statistics=statistics,
        )
        self._raise = check_name(on_error, ON_ERROR, "on_error") == "raise"
        self._log = check_name(log, LOGS, "run.log")
        self._configuration = dict(configuration or {})
        self._session: RunSession | None = None
        shard = self._configuration.get("shard") or {}
        self._shard = shard.get("index", 0), shard.get("count", 1)
        self._rows: list[Row] | None = None
        self._status: int | None = None

    @property
    def output_dir(self) -> Path:
        """Folder of the outputs."""
        return self.options.folder

    @property
    def stitch(self) -> Stitch:
        """Blend and products."""
        return self.options.stitch

    @property
    def rows(self) -> list[Row]:
        """The row of each subject of the last run; with several processes, on rank 0."""
        if self._rows is None:  # the run was in processes that Lightning started
            return list(read_rows([self.output_dir / of_shard("manifest.csv", self._shard)]).values())
        return self._rows

    @property
    def status(self) -> int:
        """The exit status of the last run: 0 all done, 1 some failed or the run broke off, 128 + n after signal n."""
        if self._status is not None:
            return self._status
        outcome = self.outcome  # of a run in processes that Lightning started; without one there was no run
        status = outcome.get("exit_status") if outcome else 0
        return BROKEN if status is None else status

    @property
    def outcome(self) -> dict[str, Any]:
        """The content of run.json of the last run."""
        return read_json(self.output_dir / of_shard("run.json", self._shard))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that cannot fit, open the manifest on rank 0, and connect the other processes to it.

        Raises:
            ConfigError: too little memory or disk, a data module that is not a GridDataModule, or a module without
                predict_step.
        """
        data = datamodule_of(trainer, "VolumeWriter")
        _check_module(pl_module)
        self.options = replace(self.options, logged=bool(trainer.loggers))
        forecasts = check_models(trainer, pl_module, partial(self.options.settings, data), data)
        if not all(forecast.settings.images_on_device for forecast in forecasts):
            data.images_to_host()
        plan = data.plan
        display = self._display(data, trainer.loggers) if plan.group.rank == 0 else None
        statistics = self.options.statistics
        data.keep_images(self.options.in_memory if self.options.keeps_images else None)
        channel, record = connect(self.output_dir, data, self._configuration, display, statistics=statistics)
        data.stop_when(lambda: channel.stop is not None)
        self._rows = record.rows if record else []
        drawn, device = display.events.drawn if display else None, trainer.strategy.root_device
        files = OutputFiles(self.options, plan.cases, drawn, device)
        # Here, since the first subjects are loaded before on_predict_start, and their failures must be reported.
        subjects = OpenSubjects(data, files, SubjectOutcomes(channel, self._raise), device)
        signals = Signals(lambda name, status: channel.ask_stop(Stop(name, status)))
        self._session = RunSession(plan.group.rank, channel, record, subjects, signals, display)
        if display is not None:
            display.start()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, once all processes have connected."""
        session = self._running()
        if self.stitch.restore == "labels" and session.record is not None:
            log.info(
                "stitch.restore=labels: labels are made in model space and resampled by nearest neighbour; at another "
                "spacing their borders have steps as large as its voxels."
            )
        disarm_observer()
        session.begin()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._running().subjects.begin_batch()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Feed a batch's outputs to its subjects; hand over those that are complete."""
        subjects = self._running().subjects
        while isinstance(outputs, torch.OutOfMemoryError) and subjects.free_device():
            if isinstance(pl_module, PatchPredictor | SeveralPredictors):
                pl_module.try_full_batches()
            outputs = trainer.strategy.predict_step(batch, batch_idx)
        if isinstance(outputs, Exception) and len(batch.rows) > 1:
            # Predicted again subject by subject, so that only the subject with the error fails.
            for part in batch.by_subject():
                subjects.take(_name_outputs(trainer.strategy.predict_step(part, batch_idx), part), part)
        else:
            subjects.take(_name_outputs(outputs, batch), batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until all processes have written everything.

        Raises:
            RunError: a process died, or a subject failed with on_error='raise'.
        """
        session, self._session = self._running(), None
        self._status = session.end()
        stop = session.channel.stop
        if stop is not None and stop.status == BROKEN:
            raise RunError(stop.reason)
        if stop is None and session.record is not None:
            session.record.statistics.fill(datamodule_of(trainer, "VolumeWriter").grids, self.stitch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop all processes and finish complete subjects. The others get no row, since they did not fail."""
        if self._session is not None:
            session, self._session = self._session, None
            self._status = session.fail(exception)

    def _running(self) -> RunSession:
        assert self._session is not None, "Lightning calls setup first"
        return self._session

    def _display(self, data: GridDataModule, loggers: Sequence[Logger]) -> RunDisplay:
        plan = data.plan
        events = events_of(self.options, data, loggers, self._configuration, self._shard)
        patches = {subject: cost.patches - 1 for subject, cost in zip(plan.subjects, plan.costs, strict=True)}
        return RunDisplay(make_display(self._log), RunProgress(patches, plan.group.size), events)


def _name_outputs(outputs: Any, batch: PatchBatch) -> Outputs | Exception:
    """Outputs by name, or the error that they raise."""
    try:
        return batch.named(outputs)
    except Exception as error:
        return error


def _check_module(module: LightningModule) -> None:
    if type(module).predict_step is LightningModule.predict_step:
        name = type(module).__name__
        raise ConfigError(
            f"{name} has no predict_step, and Lightning's own would call it with a batch that is not a tensor: use "
            f"PatchPredictor({name}(...)), or give it one that returns self(batch.data)."
        )
