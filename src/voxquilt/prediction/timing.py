"""Estimates how long a run takes, from a few patches of a process's smallest subject."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from lightning.pytorch import Trainer

from voxquilt.data.batch import PatchBatch, cut_batches
from voxquilt.data.formats.nifti import write
from voxquilt.data.subject_size import SubjectSize
from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import OutputOptions
from voxquilt.reporting.overlay import flat, overlay
from voxquilt.stitching.subject_stitcher import SubjectStitcher
from voxquilt.vocabulary import LABELS

# Timed forward passes, after an untimed one, and the seconds that they may take.
_PASSES, _SECONDS = 5, 20.0


@dataclass(frozen=True)
class Rates:
    """Measured seconds.

    Args:
        read: Seconds per byte of files, unpacked.
        patch: Seconds to cut, predict and add a patch, and to resample its share of scores to native space.
        write: Seconds per native voxel, including a picture.
        begin: Seconds by which the first forward pass takes longer.
        threads: Threads of torch if the network runs on the host, where reading and writing share them; else 0.
    """

    read: float
    patch: float
    write: float
    begin: float
    threads: int

    def subject(self, size: SubjectSize) -> dict[str, float]:
        """Seconds of a subject: reading, patches, writing."""
        return {
            "reading": self.read * size.file,
            "patches": self.patch * size.patches,
            "writing": self.write * prod(size.native),
        }

    def total(self, subjects: Sequence[SubjectSize]) -> float:
        """Seconds of a process for these subjects, with reading ahead and writing in the background."""
        seconds = [self.subject(size) for size in subjects]
        if not seconds:
            return 0.0
        reading, patches, writing = ([parts[key] for parts in seconds] for key in ("reading", "patches", "writing"))
        background = (sum(reading[1:]) + sum(writing[:-1])) / self.threads if self.threads else 0.0
        return self.begin + reading[0] + max(sum(patches) + background, sum(writing[:-1])) + writing[-1]


@torch.inference_mode()
def measure(trainer: Trainer, data: GridDataModule, options: OutputOptions, task: SubjectTask, size: int) -> Rates:
    """Predict a subject with a few real forward passes; its volumes go to a temporary folder.

    Args:
        trainer: Trainer whose network is on its device.
        data: Reads the subject.
        options: What is written; the folder exists.
        task: The subject.
        size: Bytes of its files, unpacked.

    Raises:
        Exception: whatever fails for this subject.
    """
    device = trainer.strategy.root_device
    began = perf_counter()
    loaded = data.load(replace(task, team=()))
    read = perf_counter() - began
    work = loaded.work
    stitcher = SubjectStitcher(
        options.stitch_of(task.model), work, work.space, skipped=work.skipped, layout=data.models[task.model].layout
    )
    passes = _measure_passes(trainer, stitcher, cut_batches([loaded], int(data.batch_size), data.feed), device)
    written = _measure_writing(options, work, stitcher)
    return Rates(
        read / size,
        passes.patch + passes.stitching,
        written / prod(work.space.native.shape),
        passes.extra_of_first,
        torch.get_num_threads() if device.type == "cpu" else 0,
    )


@dataclass(frozen=True)
class _Passes:
    """Measured seconds of forward passes.

    Args:
        patch: Seconds of the forward pass per patch.
        stitching: Seconds to cut and add a patch.
        extra_of_first: Seconds by which the first forward pass takes longer.
    """

    patch: float
    stitching: float
    extra_of_first: float


def _measure_passes(
    trainer: Trainer, stitcher: SubjectStitcher, batches: Iterator[PatchBatch], device: torch.device
) -> _Passes:
    """Add outputs for all batches, of which only a few are predicted and the others take the last outputs."""
    first = next(batches)
    began = perf_counter()
    outputs = _predict(trainer, first.to(device))
    warm_up = perf_counter() - began
    seconds: list[float] = []
    added = cut = 0.0
    patches = 0
    batch, until, start = first, perf_counter() + _SECONDS, perf_counter()
    for batch in chain([first], batches):
        cut += perf_counter() - start if batch is not first else 0.0
        if len(seconds) < _PASSES and perf_counter() < until and len(batch.data) == len(first.data):
            start = perf_counter()
            outputs = _predict(trainer, batch.to(device))
            seconds.append((perf_counter() - start) / len(batch.data))
        start = perf_counter()
        for rows in batch.rows:
            stitcher.add({name: output[rows.start : rows.stop] for name, output in outputs.items()}, rows.numbers)
        _wait(device)
        added += perf_counter() - start
        patches += len(batch.data)
        start = perf_counter()
    while len(seconds) < _PASSES and perf_counter() < until:
        start = perf_counter()
        _predict(trainer, first.to(device))
        seconds.append((perf_counter() - start) / len(first.data))
    patch = median(seconds)
    return _Passes(patch, (cut + added) / patches, max(0.0, warm_up - patch * len(first.data)))


def _measure_writing(options: OutputOptions, work: SubjectWork, stitcher: SubjectStitcher) -> float:
    began = perf_counter()
    volumes, header = stitcher.finished(), work.file.header
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".plan-") as folder:
        for name, volume in volumes.items():
            path = Path(folder) / f"{name}{options.suffix}"
            write(path, volume.array, work.space.native, header=header, slope=volume.slope)
    labels = next((volume.array for volume in volumes.values() if volume.kind == LABELS), None)
    if options.pictures and labels is not None:
        overlay(work.file.read()[0].numpy(), flat(labels, options.stitch.numbers), work.space.native.affine)
    return perf_counter() - began


def _predict(trainer: Trainer, batch: PatchBatch) -> dict[str, torch.Tensor]:
    outputs = batch.named(trainer.strategy.predict_step(batch, 0))
    _wait(batch.data.device)
    return outputs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
