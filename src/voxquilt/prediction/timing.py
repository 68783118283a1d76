"""How long will a run take? A few patches of a process's smallest subject are predicted, and the rest is multiplied."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer

from voxquilt.data.batch import cut_batches
from voxquilt.data.formats.nifti import write
from voxquilt.data.subject_size import SubjectSize
from voxquilt.data.subject_task import SubjectTask
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import OutputOptions
from voxquilt.reporting.overlay import flat, overlay
from voxquilt.stitching.subject_stitcher import SubjectStitcher
from voxquilt.vocabulary import LABELS

# Forward passes that are timed, after one that is not.
_PASSES, _SECONDS = 5, 20.0


@dataclass(frozen=True)
class Rates:
    """Measured seconds.

    Args:
        read: For each byte of files, unpacked.
        patch: To cut, predict and add a patch, and to bring its share back to native space.
        write: For each native voxel, a picture included.
        begin: Once, by which the first forward pass takes longer.
        threads: Of torch, if the network runs on the host and so takes them from reading and writing; else 0.
    """

    read: float
    patch: float
    write: float
    begin: float
    threads: int

    def subject(self, of: SubjectSize) -> dict[str, float]:
        """Seconds of a subject: reading, patches, writing."""
        return {
            "reading": self.read * of.file,
            "patches": self.patch * of.patches,
            "writing": self.write * prod(of.native),
        }

    def total(self, subjects: Sequence[SubjectSize]) -> float:
        """Seconds of a process that does these, reading ahead and writing behind."""
        each = [self.subject(one) for one in subjects]
        if not each:
            return 0.0
        reading, patches, writing = ([one[key] for one in each] for key in ("reading", "patches", "writing"))
        beside = (sum(reading[1:]) + sum(writing[:-1])) / self.threads if self.threads else 0.0
        return self.begin + reading[0] + max(sum(patches) + beside, sum(writing[:-1])) + writing[-1]


@torch.inference_mode()
def measure(trainer: Trainer, data: GridDataModule, options: OutputOptions, task: SubjectTask, size: int) -> Rates:
    """Do a subject with a few real forward passes; its volumes go to a temporary folder.

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
    stream = cut_batches([loaded], int(data.batch_size))
    quilt = SubjectStitcher(options.stitch, work, work.space, skipped=work.skipped, layout=data.layout)
    first = next(stream)
    began = perf_counter()
    outputs = _outputs(trainer, first.to(device))
    warm = perf_counter() - began
    passes: list[float] = []
    added = cut = 0.0
    patches = 0
    batch, until, start = first, perf_counter() + _SECONDS, perf_counter()
    for batch in chain([first], stream):
        cut += perf_counter() - start if batch is not first else 0.0
        if len(passes) < _PASSES and perf_counter() < until and len(batch.data) == len(first.data):
            start = perf_counter()
            outputs = _outputs(trainer, batch.to(device))
            passes.append((perf_counter() - start) / len(batch.data))
        start = perf_counter()
        for run in batch.rows:
            quilt.add({name: made[run.start : run.stop] for name, made in outputs.items()}, run.numbers)
        _wait(device)
        added += perf_counter() - start
        patches += len(batch.data)
        start = perf_counter()
    while len(passes) < _PASSES and perf_counter() < until:
        start = perf_counter()
        _outputs(trainer, first.to(device))
        passes.append((perf_counter() - start) / len(first.data))
    began = perf_counter()
    volumes = quilt.volumes()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".plan-") as place:
        for name, volume in volumes.items():
            write(Path(place) / f"{name}{options.suffix}", volume, work.space.native, header=work.file.header)
    labels = next((volumes[name] for name, kind in quilt.kinds.items() if kind == LABELS), None)
    if options.pictures and labels is not None:
        overlay(work.file.read()[0].numpy(), flat(labels, options.stitch.label_values), work.space.native.affine)
    written = perf_counter() - began
    return Rates(
        read / size,
        median(passes) + (cut + added) / patches,
        written / prod(work.space.native.shape),
        max(0.0, warm - median(passes) * len(first.data)),
        torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _outputs(trainer: Trainer, batch: Any) -> dict[str, torch.Tensor]:
    made = batch.named(trainer.strategy.predict_step(batch, 0))
    _wait(batch.data.device)
    return made


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
