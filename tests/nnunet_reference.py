"""Predicts with a model folder of nnU-Net as nnU-Net 2.8.1 does: plainly, slowly and with whole volumes in memory.

Only networks are the project's own, which other tests hold to nnU-Net's. Sums are float32, and weights of patches are
not rounded to half precision.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from skimage.transform import resize
from torch.nn import functional

from voxquilt.models.nnunet.checkpoint import load_weights
from voxquilt.models.nnunet.folder import read_folder
from voxquilt.models.nnunet.networks import build_network


class Preprocessed(NamedTuple):
    """What the network sees: (C, ...) images, labels that are -1 outside, and what the way back needs."""

    data: np.ndarray
    labels: np.ndarray | None
    spacing: list[float]
    wanted: list[float]
    uncropped: tuple[int, ...]
    cropped: tuple[int, ...]
    box: tuple[slice, ...]


Prediction = tuple[np.ndarray, np.ndarray]
"""Labels (I, J, K) and probabilities (C, I, J, K) in the file's axes."""


class Reference:
    """A model folder."""

    def __init__(self, folder: Path, folds: Sequence[int] | None = None) -> None:
        self.plans = json.loads((folder / "plans.json").read_text())
        self.dataset = json.loads((folder / "dataset.json").read_text())
        model = read_folder(folder, folds=folds)
        self.networks = [load_weights(file, build_network(model)).eval() for file in model.checkpoints]
        first = torch.load(model.checkpoints[0], weights_only=False)
        self.mirrored = first.get("inference_allowed_mirroring_axes") or ()
        self.plan = self._configuration(first["init_args"]["configuration"])
        self.order: list[int] = self.plans["transpose_forward"]

    def _configuration(self, name: str) -> dict[str, Any]:
        own = self.plans["configurations"][name]
        return {**self._configuration(own["inherits_from"]), **own} if "inherits_from" in own else own

    def predict(self, images: Sequence[Path], *, mirror: bool = True, previous: Path | None = None) -> Prediction:
        """Labels and probabilities of a subject.

        Args:
            images: Its files in the order of channels.
            mirror: Whether to predict mirrored patches, too.
            previous: The labels of the stage before.
        """
        seen = self.preprocessed(images, previous)
        data = seen.data
        if seen.labels is not None:
            masks = [(seen.labels == n).astype(np.float32) for n in self._foreground()]
            data = np.concatenate([data, masks])
        logits = self._logits(data, mirror)
        logits = self._resampled("probabilities", logits, seen.cropped, seen.wanted, seen.spacing)
        labels, probabilities = self._labels(logits)
        backgrounds = np.zeros((len(logits), *seen.uncropped), np.float32)
        backgrounds[0] = 0 if self.regions else 1
        backgrounds[:, *seen.box] = probabilities
        whole = np.zeros(seen.uncropped, labels.dtype)
        whole[seen.box] = labels
        back = np.argsort(self.order)
        return self._to_file(whole.transpose(back), images[0]), np.stack(
            [self._to_file(channel.transpose(back), images[0]) for channel in backgrounds]
        )

    def preprocessed(self, images: Sequence[Path], segmentation: Path | None = None) -> "Preprocessed":
        """A subject as nnU-Net's preprocessor leaves it, before it is padded.

        Args:
            images: Its files in the order of channels.
            segmentation: Its labels.
        """
        volumes, spacing = zip(*(self._read(path) for path in images), strict=True)
        data = np.stack(volumes).transpose(0, *(axis + 1 for axis in self.order))
        spacing = [spacing[0][axis] for axis in self.order]
        uncropped = data.shape[1:]
        mask = ndimage.binary_fill_holes((data != 0).any(0))
        found = np.argwhere(mask)
        low, high = (found.min(0), found.max(0) + 1) if len(found) else ((0, 0, 0), uncropped)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        data, inside = np.ascontiguousarray(data[:, *box]), mask[box]
        for n, channel in enumerate(data):
            data[n] = self._normalised(channel, n, inside)
        cropped = data.shape[1:]
        wanted = [*([spacing[0]] if len(self.plan["spacing"]) == 2 else []), *self.plan["spacing"]]
        shape = tuple(round(a / b * n) for a, b, n in zip(spacing, wanted, cropped, strict=True))
        data = self._resampled("data", data, shape, spacing, wanted)
        labels = None
        if segmentation is not None:
            labels = self._read(segmentation)[0].transpose(self.order)[box]
            labels = np.where((labels == 0) & ~inside, -1, labels)
            labels = self._resampled("seg", labels[None], shape, spacing, wanted)[0]
        return Preprocessed(data, labels, spacing, wanted, uncropped, cropped, box)

    def _read(self, path: Path) -> tuple[np.ndarray, list[float]]:
        image = nib.load(path)
        if self.plans["image_reader_writer"].endswith("WithReorient"):
            image = image.as_reoriented(nib.io_orientation(image.affine))
        return np.asarray(image.dataobj).astype(np.float32).T, [float(mm) for mm in image.header.get_zooms()[2::-1]]

    def _to_file(self, volume: np.ndarray, path: Path) -> np.ndarray:
        volume = volume.T
        if self.plans["image_reader_writer"].endswith("WithReorient"):
            ras = nib.orientations.axcodes2ornt("RAS")
            volume = nib.apply_orientation(
                volume, nib.orientations.ornt_transform(ras, nib.io_orientation(nib.load(path).affine))
            )
        return volume

    def _normalised(self, x: np.ndarray, channel: int, inside: np.ndarray) -> np.ndarray:
        scheme = self.plan["normalization_schemes"][channel]
        if scheme == "ZScoreNormalization":
            where = inside if self.plan["use_mask_for_norm"][channel] else np.ones_like(inside)
            values = x[where]
            x[where] = (values - values.mean()) / max(values.std(), 1e-8)
            return x
        if scheme == "CTNormalization":
            key = "foreground_intensity_properties_per_channel"
            given = (self.plans.get(key) or self.plans["foreground_intensity_properties_by_modality"])[str(channel)]
            x = x.clip(given["percentile_00_5"], given["percentile_99_5"])
            return (x - np.float32(given["mean"])) / np.float32(max(given["std"], 1e-8))
        if scheme == "RescaleTo01Normalization":
            x = x - x.min()
            return x / max(x.max(), np.float32(1e-8))
        assert scheme == "NoNormalization"
        return x

    def _foreground(self) -> list[int]:
        values = [value if isinstance(value, list) else [value] for value in self.dataset["labels"].values()]
        return sorted({int(n) for value in values for n in value} - {0})

    def _resampled(
        self, what: str, data: np.ndarray, shape: tuple[int, ...], current: Sequence[float], new: Sequence[float]
    ) -> np.ndarray:
        function, options = self.plan[f"resampling_fn_{what}"], self.plan[f"resampling_fn_{what}_kwargs"]
        if data.shape[1:] == tuple(shape) or function == "no_resampling_hack":
            return data
        is_torch = function == "resample_torch_fornnunet"
        forced = options.get("force_separate_z", None if is_torch else False)
        axis = _separate_axis(current, new, forced, options.get("separate_z_anisotropy_threshold", 3))
        if is_torch:
            assert what != "seg", "not written down"
            return _by_torch(data, shape, axis)
        order = options["order"]
        if what == "seg":
            return np.stack([_resized_labels(channel, shape, axis) for channel in data])
        return np.stack([_resized(channel.astype(float), shape, order, axis).astype(data.dtype) for channel in data])

    def _logits(self, data: np.ndarray, mirror: bool) -> np.ndarray:
        patch: list[int] = self.plan["patch_size"]
        is_flat = len(patch) == 2
        size = [1, *patch] if is_flat else patch
        pads = [max(p - n, 0) for n, p in zip(data.shape[1:], size, strict=True)]
        around = [(d // 2, d - d // 2) for d in pads]
        padded = torch.from_numpy(np.pad(data, [(0, 0), *around])).float()
        extent = tuple(padded.shape[1:])
        axes: list[list[int]] = [
            list(range(extent[0])) if is_flat and n == 0 else _positions(extent[n], p) for n, p in enumerate(size)
        ]
        weights = torch.from_numpy(_gaussian(patch)).float().reshape(size)
        axes_of_batch = [axis + 2 for axis in self.mirrored] if mirror else []
        subsets = list(chain.from_iterable(combinations(axes_of_batch, n) for n in range(len(axes_of_batch) + 1)))
        folds = 0
        for network in self.networks:
            total, count = 0, torch.zeros(extent)
            for start in product(*axes):
                where = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
                batch = padded[:, *where][None]
                batch = batch[:, :, 0] if is_flat else batch
                with torch.inference_mode():
                    result = sum(torch.flip(network(torch.flip(batch, s)), s) for s in subsets) / len(subsets)
                result = result[0][:, None] if is_flat else result[0]
                total = torch.zeros(len(result), *extent) if isinstance(total, int) else total
                total[:, *where] += result * weights
                count[where] += weights
            folds = folds + total / count
        logits = (folds / len(self.networks)).numpy()
        return logits[:, *(slice(a, a + n) for (a, _), n in zip(around, data.shape[1:], strict=True))]

    @property
    def regions(self) -> bool:
        """Whether channels are regions that overlap."""
        return any(isinstance(value, list) and len(value) > 1 for value in self.dataset["labels"].values())

    def _labels(self, logits: np.ndarray) -> Prediction:
        scores = torch.from_numpy(logits)
        if not self.regions:
            return logits.argmax(0).astype(np.uint8), scores.softmax(0).numpy()
        probabilities = scores.sigmoid().numpy()
        labels = np.zeros(logits.shape[1:], np.uint8)
        for present, value in zip(probabilities > 0.5, self.dataset["regions_class_order"], strict=True):
            labels[present] = value
        return labels, probabilities


def _separate_axis(current: Sequence[float], new: Sequence[float], forced: bool | None, threshold: float) -> int | None:
    """The axis across which slices are resampled each by itself."""
    if forced is False:
        return None
    chosen = current
    if forced is None:
        if max(current) / min(current) > threshold:
            chosen = current
        elif max(new) / min(new) > threshold:
            chosen = new
        else:
            return None
    largest = [axis for axis, mm in enumerate(chosen) if mm == max(chosen)]
    return largest[0] if len(largest) == 1 else None


def _resized(x: np.ndarray, shape: Sequence[int], order: int, axis: int | None) -> np.ndarray:
    options: Mapping[str, Any] = {"order": order, "mode": "edge", "anti_aliasing": False}
    if axis is None:
        return resize(x, shape, **options)
    flat = [n for a, n in enumerate(shape) if a != axis]
    slices = [resize(x.take(n, axis), flat, **options) for n in range(x.shape[axis])]
    places = x.shape[axis] / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5
    nearest = ndimage.map_coordinates(np.arange(x.shape[axis]), [places], order=0, mode="nearest")
    return np.stack([slices[n] for n in nearest], axis)


def _resized_labels(labels: np.ndarray, shape: Sequence[int], axis: int | None) -> np.ndarray:
    """By batchgenerators' rule: the label of the largest share; of several, the nearest, or the smallest."""
    values = np.unique(labels)
    shares = np.stack([_resized((labels == value).astype(float), shape, 1, axis) for value in values])
    nearest = _resized(labels.astype(float), shape, 0, axis)
    best = values[shares.argmax(0)]
    for value, share in zip(values, shares, strict=True):
        best = np.where((nearest == value) & (share == shares.max(0)), value, best)
    return best


def _by_torch(data: np.ndarray, shape: Sequence[int], axis: int | None) -> np.ndarray:
    x = torch.from_numpy(data).float()
    if axis is None:
        return functional.interpolate(x[None], tuple(shape), mode="trilinear")[0].numpy()
    slices = x.movedim(axis + 1, 1)
    flat = [n for a, n in enumerate(shape) if a != axis]
    planes = functional.interpolate(slices.flatten(0, 1)[None], flat, mode="bilinear")[0]
    planes = planes.reshape(*slices.shape[:2], *flat)
    stacked = functional.interpolate(planes[None], (shape[axis], *flat), mode="nearest-exact")[0]
    return stacked.movedim(1, axis + 1).numpy()


def _positions(size: int, patch: int) -> list[int]:
    steps = int(np.ceil((size - patch) / (patch * 0.5))) + 1
    return [int(np.round(i * (size - patch) / (steps - 1))) for i in range(steps)] if steps > 1 else [0]


def _gaussian(patch: Sequence[int]) -> np.ndarray:
    peak = np.zeros(patch)
    peak[tuple(p // 2 for p in patch)] = 1
    weights = ndimage.gaussian_filter(peak, [p / 8 for p in patch], mode="constant")
    return weights / weights.max()
