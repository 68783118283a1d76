"""From a predict loop to files: the callback that quilts each subject's outputs and keeps the manifest."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from voxquilt.cohort import Cohort
from voxquilt.datamodule import GridDataModule
from voxquilt.errors import ConfigError, OutputError, RunError
from voxquilt.files import Files, Format
from voxquilt.launch import disarm_observer
from voxquilt.line import BROKEN, Alone, Hub, Line, Message, Spoke, Stop
from voxquilt.manifest import Row
from voxquilt.names import ON_ERROR, check_name
from voxquilt.record import Record
from voxquilt.signals import Signals
from voxquilt.stitch import Stitch
from voxquilt.volumes import Scratch

log = logging.getLogger("voxquilt")


class VolumeWriter(Callback):
    """Quilts each subject's outputs and writes its products as `<subject>_<product>.nii.gz`, with a manifest beside.

    A subject that fails becomes a row of the manifest, and the run goes on. With several processes rank 0 keeps the
    manifest for all, and no process ends before all have finished: they agree on how the run ended.

    Args:
        output_dir: Made if it is missing.
        stitch: Blend and products; gaussian and labels (an image for one channel) by default.
        on_error: 'skip' goes on after a failed subject, 'raise' stops at the first, in all processes.
        overlay: Also write `<subject>_overlay.png`: three planes with the labels' outlines.
        compress: .nii.gz, else .nii.
        in_memory: MiB; a product that is larger waits in an unnamed file in output_dir until it is written. None is an
            eighth of the memory that is free when the writer is made: up to three subjects are held at a time.
        configuration: For run.json.

    Raises:
        ConfigError: on_error is unknown.
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
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser().resolve()
        self.stitch = stitch or Stitch()
        self.form = Format(".nii.gz" if compress else ".nii", overlay)
        self.in_memory = psutil.virtual_memory().available / 8 / 2**20 if in_memory is None else in_memory
        self.rows: list[Row] = []
        """What became of each subject of the last run; with several processes, on rank 0."""
        self.status = 0
        """The exit status of the last run: 0 all done, 1 some failed or it broke off, 128 + n after signal n."""
        self._raise = check_name(on_error, ON_ERROR, "on_error") == "raise"
        self._configuration = dict(configuration or {})
        self._run: _Run | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the manifest on rank 0, and connect the other processes to it."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, GridDataModule):
            raise ConfigError(f"VolumeWriter needs a GridDataModule at predict; the trainer has {type(data).__name__}.")
        self._run = _Run(self.output_dir, data, self._configuration)
        self.rows = self._run.record.rows if self._run.record else []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, once all processes are there."""
        run, data = self._running(), trainer.datamodule  # type: ignore[attr-defined]
        if self.stitch.restore == "labels" and data.plan.group.rank == 0:
            log.info(
                "stitch.restore=labels: labels are made in model space and brought back by nearest neighbour; at "
                "another spacing their borders have steps as large as its voxels."
            )
        disarm_observer()
        files = Files(self.output_dir, self.stitch, self.form, data.plan.cases)
        scratch = Scratch(self.output_dir, self.in_memory * 2**20)
        device = trainer.strategy.root_device
        run.begin(Cohort(data, self.stitch, files, scratch, run.line, raise_first=self._raise, device=device))

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
        cohort = self._running().cohort
        if isinstance(outputs, torch.OutOfMemoryError) and cohort.to_host():
            outputs = trainer.strategy.predict_step(batch, batch_idx)
        if isinstance(outputs, Exception) and len(batch.runs) > 1:
            # Which of the subjects is it? The others must not fail with it.
            for alone in batch.by_subject():
                cohort.take(trainer.strategy.predict_step(alone, batch_idx), alone)
        else:
            cohort.take(outputs, batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until everything is written, by all processes.

        Raises:
            RunError: a process died, or a subject failed with on_error='raise'.
        """
        run, self._run = self._running(), None
        self.status = run.end()
        if run.line.stop is not None and run.line.stop.status == BROKEN:
            raise RunError(run.line.stop.reason)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop all processes; finish what is complete. Subjects that are not have no row: they did not fail."""
        if self._run is not None:
            run, self._run = self._run, None
            self.status = run.fail(exception)

    def _running(self) -> "_Run":
        assert self._run is not None, "Lightning calls setup first"
        return self._run


class _Run:
    """A predict run from its first to its last moment, as one process sees it.

    Args:
        folder: Where outputs go.
        data: Its subjects.
        configuration: For the record.
    """

    def __init__(self, folder: Path, data: GridDataModule, configuration: Mapping[str, Any]) -> None:
        self._plan = data.plan
        group = data.plan.group
        self.record: Record | None = None
        self.line: Line = Alone(self._take)
        self._cohort: Cohort | None = None
        self._signals = Signals(lambda name, status: self.line.ask_stop(Stop(name, status)))

        def opened() -> tuple[str, int, bytes] | None:
            self.record = Record(folder, data.plan, data.shard, configuration)
            if group.size == 1:
                return None
            self.line = Hub(group.size, self._take)
            return self.line.address

        address = group.first(opened)
        if isinstance(self.line, Hub):
            self.line.accept()
        elif address is not None:
            self.line = Spoke(group.rank, address)
        data.stop_when(lambda: self.line.stop is not None)

    @property
    def cohort(self) -> Cohort:
        """What `begin` was given."""
        assert self._cohort is not None, "Lightning calls on_predict_start first"
        return self._cohort

    def begin(self, cohort: Cohort) -> None:
        """The first batch comes next."""
        self._cohort = cohort
        self._signals.hold()

    def end(self) -> int:
        """Finish, wait for the others, and leave the record; the exit status."""
        try:
            summary = self.cohort.close()
        except Exception as error:
            return self.fail(error, closed=True)
        return self._settle(summary)

    def fail(self, exception: BaseException, *, closed: bool = False) -> int:
        """The same, after an error that ends the run in all processes."""
        self.line.ask_stop(Stop(f"rank {self._plan.group.rank}: {type(exception).__name__}: {exception}", BROKEN))
        summary: Message = {"rank": self._plan.group.rank}
        if self._cohort is not None and not closed:
            try:
                summary = self._cohort.close()
            except Exception:
                log.exception("closing failed as well")
        return self._settle(summary)

    def _settle(self, summary: Message) -> int:
        try:
            summaries = self.line.gather(summary)
            return self.line.settle(self._close_record(summaries))
        except RunError as error:
            log.error("%s", error)
            return BROKEN
        finally:
            self._signals.release()

    def _close_record(self, summaries: list[Message]) -> int:
        try:
            return self.record.close(summaries, self.line.stop) if self.record else 0
        except OutputError as error:  # a disk that is full at the very end
            self.line.ask_stop(Stop(str(error), BROKEN))
            return BROKEN

    def _take(self, row: Message) -> None:
        assert self.record is not None, "only rank 0 takes rows"
        self.record.add(Row(**{**row, "outputs": tuple(row["outputs"])}))
