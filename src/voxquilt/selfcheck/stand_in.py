"""Provides the predictor that takes the place of the user's in a self-check, and looks at what a network sees."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from voxquilt.data.batch import PatchBatch, SubjectRows
from voxquilt.data.subject_task import SubjectWork
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.grid import Grid
from voxquilt.models.patch_network import Named
from voxquilt.models.predictor import Options, PatchPredictor
from voxquilt.models.several_predictors import SeveralPredictors
from voxquilt.selfcheck.images import Channel
from voxquilt.selfcheck.networks import OutputForm
from voxquilt.selfcheck.reference import SPLINE, AxisWay, Way, axis_ways
from voxquilt.selfcheck.trial import Trial, compare_outputs

ROUNDINGS = 24
"""Roundings of float32 that a value goes through at most: reading it, two interpolations of three axes of which each
rounds a difference, a product and a sum, and weights of a blend that are products of three."""
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Orders:
    """How a model interpolates: images, and scores on their way back; see `voxquilt.data.preprocess.Preprocess`."""

    interpolation: int = 1
    images_per_slice: float | bool | None = None
    order: int = 1
    scores_per_slice: float | bool | None = None


def way_of(work: SubjectWork, orders: Orders, factor: Triple) -> Way:
    """How a subject goes to model space and back, by the frames that the run gave it."""
    space = work.space
    to_model = space.to_model(orders.interpolation, orders.images_per_slice)
    back = space.in_scores(work.padding, factor, orders.order, orders.scores_per_slice)
    by_native = sorted(to_model, key=lambda m: m.axis)
    return Way(
        space.native.affine, space.native.shape, space.model.affine, space.model.shape, work.padding, space.box, factor,
        ([m.order for m in by_native], [m.order for m in back]),
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """The largest error of the positions that a network sees in a ramp, in mm, where, and what was allowed there."""

    error: float = 0.0
    allowed: float = 0.0
    voxel: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def excess(self) -> float:
        """The error as a share of what is allowed."""
        return self.error / self.allowed if self.allowed else self.error


class StandIn(PatchPredictor):
    """Predicts by networks of a self-check, handled as the user's are, on the device and in the precision of the run.

    Args:
        members: The networks.
        folder: Where each process leaves what it found, since processes that Lightning starts return nothing.
        ramps: The channels of subjects whose patches are compared with what model space says that they show.
        orders: See `way_of`.
        form: How outputs lie in patches.
        checked: The user's predictor, which is run once on the trial's patch.
        trial: The patch, and what the predictor has to give for it.
        options: See PatchNetwork.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        folder: Path,
        ramps: Mapping[str, Sequence[Channel]],
        orders: Orders,
        form: OutputForm,
        *,
        checked: LightningModule | None = None,
        trial: Trial | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(members, **options)
        self._folder, self._ramps, self._orders, self._form = folder, dict(ramps), orders, form
        self.checked = checked
        self._trial = trial
        self._seen: dict[str, Seen] = {}
        self._overlaps = 1
        self._ways: dict[str, tuple[Way, list[AxisWay] | None]] = {}

    def setup(self, stage: str) -> None:
        """Prepare the user's predictor too."""
        super().setup(stage)
        if self.checked is not None:
            self.checked.setup(stage)

    def on_predict_start(self) -> None:
        """Run the user's predictor, in every process."""
        if self.checked is None or self._trial is None:
            return
        count = int(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]
        data = self._trial.patch.to(self.device).repeat(count, 1, 1, 1, 1)
        batch = PatchBatch(data, [])
        with torch.no_grad(), self.trainer.precision_plugin.predict_step_context():
            outputs = self.checked.eval().predict_step(batch, 0)
        found = compare_outputs(outputs, self._trial.outputs, count)
        self._save("network", found | {"device": _name_of(self.device)})

    def predict_step(self, batch: PatchBatch, batch_idx: int) -> Named | Exception:
        """Outputs by name; see PatchPredictor."""
        for rows in batch.rows:
            self._look(batch.data[rows.start : rows.stop], rows)
        return super().predict_step(batch, batch_idx)

    def on_predict_end(self) -> None:
        """Leave what was found for the process that reports it."""
        ways = {name: {key: _plain(value) for key, value in vars(way).items()} for name, (way, _) in self._ways.items()}
        ramps = {name: asdict(seen) for name, seen in self._seen.items()}
        self._save("seen", {"ramps": ramps, "ways": ways, "overlaps": self._overlaps})

    def _look(self, patches: Tensor, rows: SubjectRows) -> None:
        work, subject = rows.work, rows.work.task.case.subject
        if subject not in self._ways:
            self._overlaps = max(self._overlaps, overlaps_of(work.grid))
            way = way_of(work, self._orders, self._form.factor)
            try:
                self._ways[subject] = way, axis_ways(way)
            except ValueError:  # which the comparison of files says too
                self._ways[subject] = way, None
        _, ways = self._ways[subject]
        if subject not in self._ramps or ways is None:
            return
        for patch, number in zip(patches, rows.numbers, strict=True):
            location = work.grid.location(number)
            around = zip(location[:3], work.padding, self._form.halo, strict=True)
            # A patch begins a halo before its output, whose location it has.
            first = [start - before - halo for start, (before, _), (halo, _) in around]
            found = _compare_patch(patch.double().cpu().numpy(), first, self._ramps[subject], ways, self._orders)
            if subject in self._seen:
                found.append(self._seen[subject])
            if found:
                self._seen[subject] = max(found, key=lambda seen: seen.excess)

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        (self._folder / f"{name}_{self.trainer.global_rank}.json").write_text(json.dumps(content))


class SeveralStandIns(SeveralPredictors):
    """Hands each batch to the stand-in of its model, as a run of several models does."""

    def on_predict_end(self) -> None:
        """See StandIn."""
        for predictor in self.predictors:
            predictor.on_predict_end()


def _compare_patch(
    patch: np.ndarray,
    starts: Sequence[int],
    channels: Sequence[Channel],
    ways: Sequence[AxisWay],
    orders: Orders,
) -> list[Seen]:
    """The largest error of each channel of a (C, pi, pj, pk) patch of a ramp, whose first model voxel is `starts`."""
    inner, positions = [slice(0)] * 3, [np.zeros(0)] * 3  # of the patch, and what they see, along the model's axes
    native = [0, 0, 0]
    for n, along in enumerate(ways):
        axis = along.axis
        native[axis] = n
        start = starts[axis]
        size = len(along.seen)
        first, stop = max(0, -start), min(patch.shape[axis + 1], size - start)
        seen = along.seen[start + first : start + stop]
        if orders.interpolation == 3:  # near the border a spline bends
            last = along.to_model.shape[1] - 1
            is_far = (seen > SPLINE) & (seen < last - SPLINE) | (seen == seen.round()).all()
            if not is_far.all():
                inside = np.flatnonzero(is_far)
                first, stop = (first + inside[0], first + inside[-1] + 1) if len(inside) else (0, 0)
                seen = along.seen[start + first : start + stop]
        inner[axis], positions[axis] = slice(first, stop), seen
    found = []
    for values, channel in zip(patch[:, inner[0], inner[1], inner[2]], channels, strict=False):
        if not values.size:
            continue
        slopes = [channel.slope[n] for n in native]
        i, j, k = (slope * seen for slope, seen in zip(slopes, positions, strict=True))
        wanted = i[:, None, None] + j[:, None] + k + channel.offset
        allowed = ROUNDINGS * EPS * (np.abs(wanted) + sum(map(abs, slopes))) + channel.unknown(
            orders.interpolation == 3
        )
        nearest = sum(abs(channel.slope[n]) * 0.5 for n in range(3) if orders.interpolation == 0 and not ways[n].copies)
        per_slice = orders.images_per_slice not in (None, False)
        if per_slice:  # across slices the nearest is taken
            nearest += 0.5 * max(map(abs, channel.slope))
        allowed = allowed + nearest
        error = np.abs(values - wanted)
        worst = np.unravel_index(np.nan_to_num(error / allowed, nan=np.inf).argmax(), error.shape)
        voxel = [0.0, 0.0, 0.0]
        for axis in range(3):
            voxel[native[axis]] = float(positions[axis][worst[axis]])
        found.append(
            Seen(
                float(np.nan_to_num(error[worst], nan=np.inf)) / channel.per_mm,
                float(allowed[worst]) / channel.per_mm,
                (voxel[0], voxel[1], voxel[2]),
            )
        )
    return found


def overlaps_of(grid: Grid) -> int:
    """The largest number of patches that cover a voxel."""
    return prod(
        max(sum(abs(other - start) < patch for other in starts) for start in starts)
        for starts, patch in zip(grid.starts, grid.patch_size, strict=True)
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
