"""From a predict loop to files: an aggregator set per open subject, a thread behind that makes and writes products."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from voxquilt.batch import PatchBatch, Run, Work
from voxquilt.buffers import Buffers
from voxquilt.datamodule import GridDataModule
from voxquilt.errors import ConfigError, OutputError, VoxquiltError
from voxquilt.manifest import Manifest, Row, of_shard
from voxquilt.names import ON_ERROR, check_name
from voxquilt.nifti import read_header, write
from voxquilt.overlay import overlay_png
from voxquilt.quilt import Outputs, Quilt
from voxquilt.stitch import Stitch
from voxquilt.volumes import Scratch

log = logging.getLogger("voxquilt")


class VolumeWriter(Callback):
    """Quilts each subject's outputs and writes its products as `<subject>_<product>.nii.gz`, with a manifest beside.

    A subject that fails becomes a row of the manifest, and the run goes on.

    Args:
        output_dir: Made if it is missing.
        stitch: Blend and products; gaussian and labels (an image for one channel) by default.
        on_error: 'skip' goes on after a failed subject, 'raise' stops at the first.
        overlay: Also write `<subject>_overlay.png`: three planes with the labels' outlines.
        compress: .nii.gz, else .nii.
        in_memory: MiB; a product that is larger waits in an unnamed file in output_dir until it is written. None is an
            eighth of the memory that is free when the writer is made: up to three subjects are held at a time.

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
    ) -> None:
        self.output_dir = Path(output_dir).expanduser().resolve()
        self.stitch = stitch or Stitch()
        self.overlay = overlay
        self.suffix = ".nii.gz" if compress else ".nii"
        self.in_memory = psutil.virtual_memory().available / 8 / 2**20 if in_memory is None else in_memory
        self.rows: list[Row] = []
        """What became of each subject of the last run."""
        self._raise = check_name(on_error, ON_ERROR, "on_error") == "raise"
        self._run: _WriterRun | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the manifest and start the writer thread."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, GridDataModule):
            raise ConfigError(f"VolumeWriter needs a GridDataModule at predict; the trainer has {type(data).__name__}.")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.stitch.restore == "labels":
            log.info(
                "stitch.restore=labels: labels are made in model space and brought back by nearest neighbour; at "
                "another spacing their borders have steps as large as its voxels."
            )
        self._run = _WriterRun(self, data, Manifest(self.output_dir / of_shard("manifest.csv", data.shard)))
        self.rows = self._run.manifest.rows

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
        run = self._running()
        run.take(outputs, batch)
        self._check(run)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until everything is written."""
        run = self._running()
        run.close()
        self._run = None
        self._check(run)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish what is complete; subjects that are not are left out of the manifest, since they did not fail."""
        if self._run is not None:
            self._run.close(complete=False)
            self._run = None

    def _running(self) -> "_WriterRun":
        assert self._run is not None, "Lightning calls on_predict_start first"
        return self._run

    def _check(self, run: "_WriterRun") -> None:
        if self._raise and run.manifest.failed:
            row = run.manifest.failed[0]
            raise OutputError(f"{row.subject}: {row.error} (run.on_error=raise stops here.)")


class _WriterRun:
    """The state of one predict run: open subjects, the manifest, the writer thread."""

    def __init__(self, writer: VolumeWriter, data: GridDataModule, manifest: Manifest) -> None:
        self.manifest = manifest
        self._writer = writer
        self._data = data
        self._inputs = {path.resolve() for case in data.cases for path in case.images.values()}
        self._written: set[Path] = set()
        self._buffers = Buffers()
        self._scratch = Scratch(writer.output_dir, writer.in_memory * 2**20)
        self._open: dict[Work, Quilt] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="voxquilt-writer")
        # One subject being written and one waiting; the loop waits for the thread beyond that, so memory is bounded.
        self._room = BoundedSemaphore(2)
        self._pending: list[Future[None]] = []

    def take(self, outputs: Any, batch: PatchBatch) -> None:
        self._drain()
        for run in batch.runs:
            if not run.work.failed:
                try:
                    self._add(_named(outputs, len(batch.data)), run)
                except Exception as error:
                    self._fail(run.work, error)

    def close(self, *, complete: bool = True) -> None:
        self._open.clear()
        self._pool.shutdown(wait=True)
        self._drain()
        if complete:
            # As after trainer.limit_predict_batches: a subject without a row would seem to be no part of the run.
            known = {row.subject for row in self.manifest.rows}
            for subject in [case.subject for case in self._data.dealt if case.subject not in known]:
                self._record_failure(subject, OutputError("the run ended before all of its patches had come."), 0.0)

    def _add(self, outputs: Outputs, run: Run) -> None:
        work = run.work
        if work not in self._open:
            self._open[work] = Quilt(
                self._writer.stitch,
                work,
                work.space,
                buffers=self._buffers,
                scratch=self._scratch,
                skipped=work.skipped,
            )
        quilt = self._open[work]
        quilt.add({name: output[run.start : run.stop] for name, output in outputs.items()}, run.locations)
        if quilt.complete:
            del self._open[work]
            self._room.acquire()
            self._pending.append(self._pool.submit(self._finish, work, quilt))

    def _drain(self) -> None:
        """Rows for subjects that failed to load; errors of the writer thread itself, such as a full disk's manifest."""
        while not self._data.failures.empty():
            failure = self._data.failures.get()
            self._record_failure(failure.case.subject, failure.error, failure.seconds)
        for future in [f for f in self._pending if f.done()]:
            self._pending.remove(future)
            future.result()

    def _fail(self, work: Work, error: Exception) -> None:
        work.failed = True
        quilt = self._open.pop(work, None)
        if quilt is not None:
            quilt.close()
        self._record_failure(work.case.subject, error, perf_counter() - work.started)

    def _record_failure(self, subject: str, error: Exception, seconds: float) -> None:
        reason = str(error) if isinstance(error, VoxquiltError) else f"{type(error).__name__}: {_gist(error)}"
        log.error("%s: failed: %s", subject, reason)
        self.manifest.add(Row(subject, "failed", seconds=seconds, error=reason))

    def _finish(self, work: Work, quilt: Quilt) -> None:
        try:
            with torch.inference_mode():
                volumes = quilt.volumes()
            row = self._write(work, volumes, quilt.labels)
        except Exception as error:
            self._fail(work, error)
            return
        finally:
            self._room.release()
        self.manifest.add(row)
        log.info("%s: done: %d patches, %.1f s: %s", row.subject, row.patches, row.seconds, ", ".join(row.outputs))

    def _write(self, work: Work, volumes: dict[str, np.ndarray], of_labels: list[str]) -> Row:
        subject, stitch, folder = work.case.subject, self._writer.stitch, self._writer.output_dir
        outputs = []
        for product, data in volumes.items():
            path = self._checked(folder / f"{subject}_{product}{self._writer.suffix}")
            names = list(stitch.class_names) if stitch.class_names and product in of_labels else None
            write(path, data, work.space.native, header=work.file.header, class_names=names)
            outputs.append(path.name)
        labels = volumes[of_labels[0]] if of_labels else None
        if labels is not None and self._writer.overlay:
            path = self._checked(folder / f"{subject}_overlay.png")
            image = read_header(work.file.path).read()[0].numpy()
            overlay_png(image, labels[0], work.space.native.affine, path)
            outputs.append(path.name)
        volume = None
        if labels is not None:
            voxel = abs(float(np.linalg.det(work.space.native.affine[:3, :3])))  # mm3, of sheared voxels too
            volume = int(np.count_nonzero(labels.any(axis=0))) * voxel / 1000
        seconds = perf_counter() - work.started
        patches, skipped = len(work.grid) - len(work.skipped), len(work.skipped)
        return Row(subject, "done", tuple(outputs), patches, seconds, volume_ml=volume, skipped=skipped)

    def _checked(self, path: Path) -> Path:
        if path.resolve() in self._inputs:
            raise OutputError(f"{path} is an input of this run and is not overwritten; choose another output_dir.")
        if path in self._written:  # a's output x_y and a_x's output y
            raise OutputError(f"{path} is another subject's file of this run; rename an output or a subject.")
        self._written.add(path)
        return path


def _named(outputs: Any, patches: int) -> Outputs:
    """What predict_step gave, by name, once it is known to belong to the batch."""
    if isinstance(outputs, Exception):
        raise outputs
    named = outputs if isinstance(outputs, Mapping) else {"": outputs}
    for name, output in named.items():
        if not isinstance(output, Tensor):
            raise OutputError(f"predict_step gave {type(output).__name__}; wanted are tensors (B, C, I, J, K).")
        if output.ndim == 0 or len(output) != patches:
            raise OutputError(f"output {name!r} has shape {tuple(output.shape)} for a batch of {patches} patches.")
    return named


def _gist(error: Exception) -> str:
    """TorchScript puts its own traceback before the message; other messages are kept as they are."""
    text = str(error).strip()
    return text.splitlines()[-1] if "TorchScript" in text.split("\n")[0] else text
