"""How good is a network while it trains? Whole validation volumes, predicted as predict.py does, and compared."""

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
from voxquilt.reporting.overlay import flat, overlay, stacked
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import Outputs, SubjectStitcher

Metrics = dict[str, float]


@dataclass(frozen=True)
class Validated:
    """A subject's whole volume, predicted and compared.

    Args:
        subject: Its id.
        metrics: By name; NaN for a class that neither the label nor the prediction has.
        picture: (H, W, 3) uint8: the prediction above the truth, with captions, in the same planes and greys; or None.
    """

    subject: str
    metrics: Metrics
    picture: np.ndarray | None = None


@dataclass
class Validator:
    """Quilts the patches of validation subjects, in native space, and compares each volume when it is complete.

    Args:
        task: 'segmentation', 'multilabel' or 'image'.
        stitch: Blend, activation, and the classes' names.
        truth: The label of a subject, (L, I, J, K).
        pictures: Of so many subjects, the first ones.
        when: Of the training, such as 'epoch 3', for captions.
    """

    task: str
    stitch: Stitch
    truth: Callable[[SubjectFiles], Tensor]
    pictures: int = 0
    when: str = ""
    found: list[Validated] = field(default_factory=list)
    _open: dict[SubjectWork, SubjectStitcher] = field(default_factory=dict)
    _buffers: BufferPool = field(default_factory=BufferPool)

    def take(self, outputs: Mapping[str, Tensor], batch: PatchBatch) -> None:
        """Feed a batch's outputs to its subjects.

        Raises:
            VoxquiltError: what is wrong with a subject, which is named.
        """
        for run in batch.runs:
            try:
                self._add({name: output[run.start : run.stop] for name, output in outputs.items()}, run)
            except VoxquiltError as error:
                raise type(error)(f"{run.work.task.case.subject}: {error}") from error

    def close(self) -> list[Validated]:
        """What became of the subjects since the last call; those that are not complete are dropped."""
        for quilt in self._open.values():
            quilt.close()
        self._open.clear()
        found, self.found = self.found, []
        return found

    def _add(self, outputs: Outputs, run: SubjectRows) -> None:
        work = run.work
        if work not in self._open:
            self._open[work] = SubjectStitcher(self.stitch, work, work.space, memory=Memory(buffers=self._buffers))
        self._open[work].add(outputs, run.numbers)
        if self._open[work].complete:
            volume = next(iter(self._open.pop(work).volumes().values()))  # of several outputs the first
            channels = next(iter(outputs.values())).shape[1]
            self.found.append(self._compared(work, torch.from_numpy(np.ascontiguousarray(volume)), channels))

    def _compared(self, work: SubjectWork, volume: Tensor, channels: int) -> Validated:
        case, truth = work.task.case, self.truth(work.task.case)
        names = list(self.stitch.class_names or map(str, range(channels)))
        metrics = metrics_of(self.task, volume, truth, names)
        picture = self._picture(work, volume, truth) if len(self.found) < self.pictures else None
        return Validated(case.subject, metrics, picture)

    def _picture(self, work: SubjectWork, volume: Tensor, truth: Tensor) -> np.ndarray:
        """Planes and window are the truth's, so that they show the same of every epoch's prediction."""
        affine, subject = work.space.native.affine, work.task.case.subject
        captions = f"{subject}: prediction{self.when and f', {self.when}'}", f"{subject}: truth"
        if self.task == "image":
            window = truth[0].float().numpy()
            none, bright = np.zeros(window.shape, np.uint8), window > np.nanmean(window)
            drawn = [(image[0].float().numpy(), none) for image in (volume, truth)]
        else:
            window = work.file.read()[0].numpy()
            bright = flat(truth.numpy())
            drawn = [(window, flat(labels.numpy())) for labels in (volume, truth)]
        pictures = [overlay(*pair, affine, planes_of=bright, window_of=window) for pair in drawn]
        return np.asarray(stacked(list(zip(captions, pictures, strict=True))))


def metrics_of(task: str, volume: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    """How a whole volume compares.

    Args:
        task: 'segmentation', 'multilabel' or 'image'.
        volume, truth: (C, I, J, K); classes with C = 1, masks, or an image.
        names: Of the classes or masks.

    Returns:
        'dice' (the mean over those that are there) and 'dice_<name>', without the background of classes; or 'mae' and
        'psnr' in dB, of the truth's span.

    Raises:
        InputError, OutputError: the two do not fit each other.
    """
    if task == "image":
        return _of_images(volume.float(), truth)
    return _of_masks(volume, truth, names) if task == "multilabel" else _of_classes(volume, truth, names)


def mean_metrics(found: Sequence[Validated], task: str) -> Metrics:
    """Means over the subjects that have a metric, and `score`, of which more is better: mean Dice, or PSNR in dB."""
    names = dict.fromkeys(name for one in found for name in one.metrics)
    values = {name: [v for one in found if not isnan(v := one.metrics.get(name, float("nan")))] for name in names}
    means = {name: fmean(some) for name, some in values.items() if some}
    if means:
        means["score"] = means["psnr"] if task == "image" else means.get("dice", 0.0)
    return means


def _of_classes(labels: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    highest = int(truth.max())
    if highest >= len(names):
        raise InputError(
            f"its label has class {highest}; the network gives {len(names)}, 0 to {len(names) - 1}. Set "
            f"model.net.out_channels and stitch.class_names, or change the label."
        )
    # Background is left out, as everywhere: it is large, and nobody asks for it.
    return _of_dice(
        dict(zip(names, class_dice(labels.long(), truth.long(), len(names)).tolist(), strict=True)), names[1:]
    )


def _of_masks(labels: Tensor, truth: Tensor, names: Sequence[str]) -> Metrics:
    if len(truth) != len(labels):
        raise InputError(f"its label has {len(truth)} channels, and the network gives {len(labels)}.")
    pairs = zip(names, labels, truth, strict=True)
    return _of_dice({name: float(class_dice((a > 0).long(), (b > 0).long(), 2)[1]) for name, a, b in pairs}, names)


def _of_dice(dice: Metrics, counted: Sequence[str]) -> Metrics:
    present = [dice[name] for name in counted if not isnan(dice[name])]
    return {"dice": fmean(present) if present else float("nan")} | {f"dice_{name}": dice[name] for name in counted}


def _of_images(image: Tensor, truth: Tensor) -> Metrics:
    if image.shape != truth.shape:
        raise OutputError(f"the network's image has {len(image)} channels, and what is wanted {len(truth)}.")
    span = float(truth.max() - truth.min()) or 1.0
    return {
        "mae": float(mean_absolute_error(image.flatten(), truth.flatten())),
        "psnr": float(peak_signal_noise_ratio(image, truth, data_range=span)),
    }
