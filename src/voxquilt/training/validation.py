"""Stitches the volumes of validation subjects as predicting does, and compares them with the labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error
from torchmetrics.functional.image import peak_signal_noise_ratio

from voxquilt.data.batch import PatchBatch, SubjectRows
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject_task import SubjectWork
from voxquilt.errors import InputError, OutputError, VoxquiltError
from voxquilt.reporting.metrics import class_dice
from voxquilt.reporting.overlay import flat, overlay
from voxquilt.reporting.pictures import stacked
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.label_values import beyond
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import Outputs, SubjectStitcher

Metrics = dict[str, float]


@dataclass(frozen=True)
class Validated:
    """Metrics and picture of a validation subject.

    Args:
        subject: Its id.
        metrics: Values by name; NaN for a class that neither the label nor the prediction has.
        picture: (H, W, 3) uint8 or None: the prediction above the label, with captions, in the same planes and greys.
    """

    subject: str
    metrics: Metrics
    picture: np.ndarray | None = None


@dataclass
class Validator:
    """Stitches the patches of validation subjects in native space, and compares each volume once it is complete.

    Args:
        task: 'segmentation', 'multilabel' or 'image'.
        stitch: Blend, activation, and names of classes.
        truth: Gives the label of a subject, (L, I, J, K).
        pictures: Number of subjects, the first ones, of which pictures are drawn.
        when: The point of the training for captions, such as 'epoch 3'.
    """

    task: str
    stitch: Stitch
    truth: Callable[[SubjectFiles], Tensor]
    pictures: int = 0
    when: str = ""
    _results: list[Validated] = field(default_factory=list)
    _stitchers: dict[SubjectWork, SubjectStitcher] = field(default_factory=dict)
    _buffers: BufferPool = field(default_factory=BufferPool)

    def take(self, outputs: Mapping[str, Tensor], batch: PatchBatch) -> None:
        """Add a batch of outputs to the volumes of its subjects.

        Raises:
            VoxquiltError: a subject cannot be stitched or compared; it is named.
        """
        for run in batch.rows:
            try:
                self._add({name: output[run.start : run.stop] for name, output in outputs.items()}, run)
            except VoxquiltError as error:
                raise type(error)(f"{run.work.task.case.subject}: {error}") from error

    def close(self) -> list[Validated]:
        """The results since the last call; subjects that are not complete are dropped."""
        for stitcher in self._stitchers.values():
            stitcher.close()
        self._stitchers.clear()
        results, self._results = self._results, []
        return results

    def _add(self, outputs: Outputs, run: SubjectRows) -> None:
        work = run.work
        if work not in self._stitchers:
            self._stitchers[work] = SubjectStitcher(self.stitch, work, work.space, memory=Memory(buffers=self._buffers))
        self._stitchers[work].add(outputs, run.numbers)
        if self._stitchers[work].complete:
            volume = next(iter(self._stitchers.pop(work).volumes().values()))  # the first of several outputs
            channels = next(iter(outputs.values())).shape[1]
            self._results.append(self._compare(work, torch.from_numpy(np.ascontiguousarray(volume)), channels))

    def _compare(self, work: SubjectWork, volume: Tensor, channels: int) -> Validated:
        case, truth = work.task.case, self.truth(work.task.case)
        names = list(self.stitch.class_names or map(str, range(channels)))
        metrics = metrics_of(self.task, volume, truth, names)
        picture = self._draw(work, volume, truth) if len(self._results) < self.pictures else None
        return Validated(case.subject, metrics, picture)

    def _draw(self, work: SubjectWork, volume: Tensor, truth: Tensor) -> np.ndarray:
        """Planes and grey levels are those of the label, so that the pictures of all epochs show the same planes."""
        affine, subject = work.space.native.affine, work.task.case.subject
        captions = f"{subject}: prediction{self.when and f', {self.when}'}", f"{subject}: truth"
        if self.task == "image":
            window = truth[0].float().numpy()
            no_labels, region = np.zeros(window.shape, np.uint8), window > np.nanmean(window)
            drawn = [(image[0].float().numpy(), no_labels) for image in (volume, truth)]
        else:
            window = work.file.read()[0].numpy()
            region = flat(truth.numpy())
            drawn = [(window, flat(labels.numpy())) for labels in (volume, truth)]
        pictures = [overlay(*pair, affine, planes_of=region, window_of=window) for pair in drawn]
        return np.asarray(stacked(list(zip(captions, pictures, strict=True))))


def metrics_of(task: str, volume: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    """Compares a volume with its label.

    Args:
        task: 'segmentation', 'multilabel' or 'image'.
        volume, truth: (C, I, J, K): classes with C = 1, masks, or an image.
        names: Names of the classes or masks.

    Returns:
        'dice' (the mean over the classes that are present) and 'dice_<name>', without background; or 'mae' and 'psnr'
        in dB, relative to the span of the truth.

    Raises:
        InputError, OutputError: the two do not match in classes or channels.
    """
    if task == "image":
        return _image_metrics(volume.float(), truth)
    return (_mask_metrics if task == "multilabel" else _class_metrics)(volume, truth, names)


def mean_metrics(results: Sequence[Validated], task: str) -> Metrics:
    """Means over the subjects that have a metric, and `score` (higher is better): mean Dice, or PSNR in dB."""
    means = {}
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        values = [v for result in results if not isnan(v := result.metrics.get(name, float("nan")))]
        if values:
            means[name] = fmean(values)
    if means:
        means["score"] = means["psnr"] if task == "image" else means.get("dice", 0.0)
    return means


def _class_metrics(labels: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    highest = int(truth.max())
    if highest >= len(names):
        raise InputError(beyond(highest, len(names)))
    dice = class_dice(labels.long(), truth.long(), len(names)).tolist()
    # Background is left out, as everywhere: it is large, and says nothing of the classes.
    return _dice_metrics(dict(zip(names, dice, strict=True)), names[1:])


def _mask_metrics(labels: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    if len(truth) != len(labels):
        raise InputError(f"its label has {len(truth)} channels, and the network has {len(labels)}.")
    pairs = zip(names, labels, truth, strict=True)
    return _dice_metrics({name: float(class_dice((a > 0).long(), (b > 0).long(), 2)[1]) for name, a, b in pairs}, names)


def _dice_metrics(dice: Metrics, averaged: Sequence[str]) -> Metrics:
    present = [dice[name] for name in averaged if not isnan(dice[name])]
    return {"dice": fmean(present) if present else float("nan")} | {f"dice_{name}": dice[name] for name in averaged}


def _image_metrics(image: Tensor, truth: Tensor) -> Metrics:
    if image.shape != truth.shape:
        raise OutputError(f"the network's image has {len(image)} channels, and the image to learn {len(truth)}.")
    span = float(truth.max() - truth.min()) or 1.0
    return {
        "mae": float(mean_absolute_error(image.flatten(), truth.flatten())),
        "psnr": float(peak_signal_noise_ratio(image, truth, data_range=span)),
    }
