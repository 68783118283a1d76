"""From a predict loop to files: the callback that quilts each subject's outputs and keeps the manifest."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from voxquilt.distributed.control_channel import BROKEN, ControlChannel, LocalChannel, Message, Stop
from voxquilt.distributed.environment import disarm_observer
from voxquilt.distributed.signals import Signals
from voxquilt.distributed.tcp_channel import Hub, Spoke
from voxquilt.errors import ConfigError, OutputError, RunError
from voxquilt.planning.preflight import settled
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.prediction.output_files import Files, Format
from voxquilt.prediction.run_record import Record
from voxquilt.prediction.tensorboard import Events
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress import ProgressDisplay, make_display
from voxquilt.reporting.progress_counts import RunProgress
from voxquilt.stitching.output_volumes import Scratch
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LOGS, ON_ERROR, check_name

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
        tensorboard: Also write numbers of the subjects and pictures of the first ones, in output_dir/tensorboard.
        log: What is shown while the run goes on: 'rich' bars, 'plain' lines, 'json' objects on stdout; 'auto' shows
            bars on a terminal.
        configuration: For run.json.

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
        log: str = "auto",
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser().resolve()
        self.stitch = stitch or Stitch()
        self.form = Format(".nii.gz" if compress else ".nii", overlay)
        self.in_memory = psutil.virtual_memory().available / 8 / 2**20 if in_memory is None else in_memory
        self.tensorboard = tensorboard
        self.rows: list[Row] = []
        """What became of each subject of the last run; with several processes, on rank 0."""
        self.status = 0
        """The exit status of the last run: 0 all done, 1 some failed or it broke off, 128 + n after signal n."""
        self._raise = check_name(on_error, ON_ERROR, "on_error") == "raise"
        self._log = check_name(log, LOGS, "run.log")
        self._configuration = dict(configuration or {})
        self._run: _Run | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot fit, open the manifest on rank 0, and connect the other processes to it.

        Raises:
            ConfigError: too little memory or disk; data that are not a GridDataModule's; a module without predict_step.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, GridDataModule):
            raise ConfigError(f"VolumeWriter needs a GridDataModule at predict; the trainer has {type(data).__name__}.")
        name = type(pl_module).__name__
        if type(pl_module).predict_step is LightningModule.predict_step:
            raise ConfigError(
                f"{name} has no predict_step, and Lightning's own would call it with a batch that is no tensor: use "
                f"PatchPredictor({name}(...)), or give it one that returns self(batch.data)."
            )
        settled(trainer, pl_module, data, self)
        shown: list[_Shown] = []
        if data.plan.group.rank == 0:
            planned = {one: size.patches - 1 for one, size in zip(data.plan.everything, data.plan.sizes, strict=True)}
            events = Events(self.output_dir, data.plan.cases, self.stitch.label_values) if self.tensorboard else None
            shown = [_Shown(make_display(self._log), RunProgress(planned, data.plan.group.size), events)]
        line, record = _connected(self.output_dir, data, self._configuration, shown)
        data.stop_when(lambda: line.stop is not None)
        self.rows = record.rows if record else []
        files = Files(self.output_dir, self.stitch, self.form, data.plan.cases)
        scratch, device = Scratch(self.output_dir, self.in_memory * 2**20), trainer.strategy.root_device
        # Here, since the first subjects are loaded before on_predict_start, and what fails there has to be told.
        cohort = OpenSubjects(data, self.stitch, files, scratch, line, raise_first=self._raise, device=device)
        signals = Signals(lambda name, status: line.ask_stop(Stop(name, status)))
        self._run = _Run(data.plan.group.rank, line, record, cohort, signals, shown)
        for one in shown:
            one.show.start(one.tally)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, once all processes are there."""
        run = self._running()
        if self.stitch.restore == "labels" and run.record is not None:
            log.info(
                "stitch.restore=labels: labels are made in model space and brought back by nearest neighbour; at "
                "another spacing their borders have steps as large as its voxels."
            )
        disarm_observer()
        run.begin()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._running().cohort.begin_batch()

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


@dataclass(frozen=True)
class _Run:
    """A predict run from its first to its last moment, as one process sees it.

    Args:
        rank: Of the process.
        line: To the others.
        record: Of the run, on rank 0.
        cohort: The process's subjects.
        signals: Ask it to stop.
        shown: What people see of it, on rank 0.
    """

    rank: int
    line: ControlChannel
    record: Record | None
    cohort: OpenSubjects
    signals: Signals
    shown: list["_Shown"]

    def begin(self) -> None:
        """The first batch comes next."""
        self.cohort.begin()
        self.signals.hold()

    def end(self) -> int:
        """Finish, wait for the others, and leave the record; the exit status."""
        try:
            summary = self.cohort.close()
        except BaseException as error:  # whatever ended the writer thread
            return self._broken(error, {"rank": self.rank})
        return self._settle(summary)

    def fail(self, exception: BaseException) -> int:
        """The same, after an error that ends the run in all processes."""
        summary: Message = {"rank": self.rank}
        self.line.ask_stop(self._stop(exception))
        try:
            summary = self.cohort.close()
        except RunError as error:
            log.error("%s", error)
        except Exception:
            log.exception("closing failed as well")
        return self._broken(exception, summary)

    def _broken(self, exception: BaseException, summary: Message) -> int:
        self.line.ask_stop(self._stop(exception))
        return self._settle(summary)

    def _stop(self, exception: BaseException) -> Stop:
        return Stop(f"rank {self.rank}: {type(exception).__name__}: {exception}", BROKEN)

    def _settle(self, summary: Message) -> int:
        status = BROKEN
        try:
            summaries = self.line.gather(summary)
            status = self.line.settle(self._close_record(summaries))
        except RunError as error:
            log.error("%s", error)
        finally:
            for one in self.shown:
                one.show.end(one.tally, status)
            self.signals.release()
        return status

    def _close_record(self, summaries: list[Message]) -> int:
        try:
            status = self.record.close(summaries, self.line.stop) if self.record else 0
            for one in self.shown:
                if one.events is not None:
                    one.events.end(self.record.outcome if self.record else {}, summaries)
            return status
        except OutputError as error:  # a disk that is full at the very end
            self.line.ask_stop(Stop(str(error), BROKEN))
            return BROKEN


@dataclass(frozen=True)
class _Shown:
    """What rank 0 shows of a run."""

    show: ProgressDisplay
    tally: RunProgress
    events: Events | None

    def take(self, row: Row) -> None:
        """A subject is done or has failed."""
        self.tally.row(row)
        self.show.row(row, self.tally)
        if self.events is not None:
            self.events.row(row)

    def news(self, message: Message) -> None:
        """A process got on."""
        self.tally.news(message)
        self.show.moved(self.tally)


def _connected(
    folder: Path, data: GridDataModule, configuration: Mapping[str, Any], shown: Sequence[_Shown]
) -> tuple[ControlChannel, Record | None]:
    """The line between the processes, and on rank 0 the record that it feeds."""
    group, records = data.plan.group, list[Record]()
    hubs: list[Hub] = []

    def take(row: Message) -> None:
        if "news" in row:
            for one in shown:
                one.news(row["news"])
            return
        made = Row(**{**row, "outputs": tuple(row["outputs"])})
        records[0].add(made)
        for one in shown:
            one.take(made)

    def opened() -> tuple[str, int, bytes] | None:
        records.append(Record(folder, data.plan, data.shard, configuration))
        hubs.extend([Hub(group.size, take)] if group.size > 1 else [])
        return hubs[0].address if hubs else None

    address = group.first(opened)
    if address is None:
        return LocalChannel(take), records[0]
    if not hubs:
        return Spoke(group.rank, address), None
    hubs[0].accept()
    return hubs[0], records[0]
