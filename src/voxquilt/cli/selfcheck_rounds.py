"""Runs the rounds of a self-check: runs of the user's configuration, but for their networks and their images."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from voxquilt.cli.exit_status import NOT_STARTED
from voxquilt.cli.instantiate import build
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import make_grids
from voxquilt.distributed.child_processes import attended
from voxquilt.distributed.environment import is_first
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.predictor import PatchPredictor
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.manifest import Row
from voxquilt.selfcheck.combined_round import CombinedRound, divided_span
from voxquilt.selfcheck.images import CLASSES, CONSTANT, NOISE, RAMPS
from voxquilt.selfcheck.masks import MASK
from voxquilt.selfcheck.networks import GiveBack, MakeClasses
from voxquilt.selfcheck.preparation import Prepared
from voxquilt.selfcheck.results import Round
from voxquilt.selfcheck.stand_in import Orders, SeveralStandIns, StandIn
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.stitch import Stitch

# What is left out of a stitch, so that what comes back is an image; outside of a crop it is 0 in every channel.
_IMAGE = {
    "products": ["image"], "activation": "none", "threshold": None, "compare": [], "class_names": None,
    "label_values": None, "regions": None, "classes": None, "combine": None, "postprocess": [],
    "temperature": 1, "dtype": "float32", "files": "one", "fill": 0,
}  # fmt: skip
_OF_SUBJECTS = ("inputs", "images", "suffixes", "extra_images", "skip", "within", "margin", "labels")
"""Keys of `data` that concern the user's subjects."""


@dataclass(frozen=True)
class ModelSections:
    """The sections of a configuration that belong to one of its models.

    Args:
        name: What its keys begin with, 'model.parts[0].'; empty for the only model.
        sections: The sections by name.
    """

    name: str
    sections: Mapping[str, Any]
    _weights: list[Tensor] = field(default_factory=list)

    def build(self) -> LightningModule:
        """A new predictor."""
        return build(self.sections["model"], f"{self.name}model")

    @cached_property
    def predictor(self) -> LightningModule:
        """The user's predictor, which is run on a patch as it is configured."""
        return self.build()

    def keep_weights(self) -> None:
        """Remember weights that no file holds, and which another predictor would not have."""
        if self.sections["model"].get("ckpt_path") is None:
            self._weights.extend(tensor.clone() for tensor in _tensors_of(self.predictor))

    def rebuild(self) -> LightningModule:
        """Another predictor, with the same weights."""
        predictor = self.build()
        with torch.no_grad():
            for tensor, kept in zip(_tensors_of(predictor), self._weights, strict=False):
                tensor.copy_(kept)
        return predictor

    @cached_property
    def handling(self) -> dict[str, Any]:
        """How the predictor handles patches; see PatchNetwork. Another module's own way is not known."""
        network = (
            self.predictor.network if isinstance(self.predictor, PatchPredictor) else PatchNetwork([nn.Identity()])
        )
        return {
            "flips": network.flips, "squeeze_axis": network.squeeze_axis, "output": network.layout,
            "offload": network.networks.offload, "compile": network.compiled, "channels_last": network.channels_last,
            "average": network.average, "activation": network.activation,
        }  # fmt: skip

    @property
    def orders(self) -> Orders:
        """How the model interpolates."""
        preprocess, stitch = self.sections["preprocess"], self.sections["stitch"]
        return Orders(
            preprocess.get("interpolation", 1), preprocess.get("per_slice"),
            stitch.get("order", 1), stitch.get("per_slice"),
        )  # fmt: skip


def _tensors_of(predictor: LightningModule) -> list[Tensor]:
    return [*predictor.parameters(), *predictor.buffers()]


def make_datamodule(
    sections: Mapping[str, Any], plain: Mapping[str, Any], preprocess: Any, cases: Any, folder: Path, **more: Any
) -> GridDataModule:
    """The user's subjects, or others in their place."""
    found = {} if cases is None else {"inputs": cases, "images": None, "suffixes": None, "extra_images": None}
    return build(
        sections["data"], "data", **found,
        preprocess=preprocess, shard=(0, 1), distribute=plain["run"]["distribute"], resume=None, output_dir=folder,
        **more,
    )  # fmt: skip


class StartedProcesses(ExitStack):
    """The processes that the first trainer starts, which stay for all rounds."""

    has_started = False

    def attend(self, trainer: Trainer) -> None:
        """Wait for them in the end, if the trainer is the first."""
        if not self.has_started:
            self.has_started = True
            self.enter_context(attended(trainer))


def run_round(
    kind: str, model: ModelSections, own: Prepared, plain: Mapping[str, Any], processes: StartedProcesses
) -> Round:
    """Run the configuration on synthetic images: a run like any other, but for its network and its images.

    Args:
        kind: 'images', whose network gives back what it gets, or 'classes', whose network makes scores.
        model: The model.
        own: What was prepared for it.
        plain: The checked configuration.
        processes: Those that the first trainer starts.

    Raises:
        SystemExit: a signal has stopped the run.
    """
    folder = own.folder / kind
    folder.mkdir(exist_ok=True)
    sections = model.sections
    subjects = [CLASSES] if kind == "classes" else [*RAMPS, CONSTANT, NOISE]
    wanted = _IMAGE if kind == "images" else {"postprocess": [], "combine": None}
    stitch = _build_stitch(sections, wanted)
    module, handling = _stand_in(kind, model, own, folder)
    data = _synthetic(sections, plain, own, subjects, folder)
    trainer, rows = _run(folder, plain, data, module, processes, stitch=stitch)
    return Round(
        folder, rows, stitch, trainer.strategy.root_device.type, str(trainer.precision), trainer.world_size, handling,
        sections["preprocess"],
    )  # fmt: skip


def run_combined(
    models: Sequence[ModelSections],
    prepared: Sequence[Prepared],
    plain: Mapping[str, Any],
    folder: Path,
    processes: StartedProcesses,
) -> CombinedRound:
    """Run all models together on the image of classes, so that their volumes become one.

    Each has its classes in a part of the image's intensities of its own, in the order of the models: with
    `stitch.combine=ordered` all labels of each model are seen, and with 'mean' no two have the same probabilities.

    Args:
        models, prepared: The models, and what was prepared for each.
        plain, processes: See `run_round`.
        folder: Where to write.

    Raises:
        SystemExit: a signal has stopped the run.
    """
    folder.mkdir(exist_ok=True)
    # That of the largest patches holds patches of all.
    largest = max(range(len(prepared)), key=lambda n: prepared[n].voxels)
    image = prepared[largest]
    spans = divided_span(image.span, len(models))
    stand_ins, stitches, grids = [], [], []
    for n, (model, own) in enumerate(zip(models, prepared, strict=True)):
        inner = folder / str(n)
        inner.mkdir(exist_ok=True)
        stand_ins.append(_stand_in("classes", model, replace(own, span=spans[n]), inner)[0])
        stitches.append(_build_stitch(model.sections, {"postprocess": []}))
        grids.append(make_grids(_build_preprocess(model.sections), **plain["model"]["parts"][n]["data"]))
    stitch = _build_stitch(plain, {"postprocess": []})
    numbers = tuple(tuple(part["numbers"] or ()) for part in plain["model"]["parts"])
    data = _synthetic(models[0].sections, plain, image, [CLASSES], folder, more_models=grids[1:])
    combination = Combination(stitch, tuple(stitches), numbers)
    trainer, rows = _run(
        folder, plain, data, SeveralStandIns(stand_ins), processes, stitch=stitch, combination=combination
    )
    rounds = [
        Round(
            folder / str(n), rows, stitches[n], trainer.strategy.root_device.type, str(trainer.precision),
            trainer.world_size, model.handling, model.sections["preprocess"],
        )
        for n, model in enumerate(models)
    ]  # fmt: skip
    return CombinedRound(
        replace(rounds[0], folder=folder, stitch=stitch), rounds, spans, image.channels[CLASSES][0], numbers
    )


def _build_preprocess(sections: Mapping[str, Any]) -> Any:
    left_out = {key: None for key in ("intensity", "one_hot") if key in sections["preprocess"]}
    return build({**sections["preprocess"], **left_out}, "preprocess")


def _build_stitch(sections: Mapping[str, Any], wanted: Mapping[str, Any]) -> Stitch:
    wanted = {key: value for key, value in wanted.items() if key in sections["stitch"]}
    return build({**sections["stitch"], **wanted}, "stitch")


def _synthetic(
    sections: Mapping[str, Any],
    plain: Mapping[str, Any],
    own: Prepared,
    subjects: Sequence[str],
    folder: Path,
    **more: Any,
) -> GridDataModule:
    images = [SubjectFiles(name, own.files[name]) for name in subjects]
    node = {key: value for key, value in sections["data"].items() if key not in _OF_SUBJECTS}
    node |= {"time": "channels"} if "time" in node else {}
    if sections["data"].get("within") is not None and not sections["preprocess"].get("crop"):
        masks = own.folder / "in" / "{subject}" / MASK
        node |= {"within": str(masks), "margin": sections["data"].get("margin", 0)}
    return make_datamodule(
        {"data": {**node, "inputs": None}}, plain, _build_preprocess(sections), images, folder, **more
    )  # fmt: skip


def _run(
    folder: Path,
    plain: Mapping[str, Any],
    data: GridDataModule,
    module: LightningModule,
    processes: StartedProcesses,
    **options: Any,
) -> tuple[Trainer, list[Row]]:
    """Predict by the user's trainer and writer; the rows of rank 0."""
    own_writer = plain["callbacks"]["writer"]
    switched_off = {key: False for key in ("tensorboard", "overlay", "statistics", "report") if key in own_writer}
    writer: VolumeWriter = build(
        {**own_writer, "output_dir": str(folder), "log": "plain", "on_error": "skip", **switched_off},
        "callbacks.writer", configuration={}, **options,
    )  # fmt: skip
    trainer: Trainer = build(plain["trainer"], "trainer", callbacks=[writer], logger=False)
    processes.attend(trainer)
    trainer.predict(module, datamodule=data, return_predictions=False)
    if writer.status > NOT_STARTED:  # stopped by a signal, which stops the check
        raise SystemExit(writer.status)
    return trainer, writer.rows if is_first() else []


def _stand_in(kind: str, model: ModelSections, own: Prepared, folder: Path) -> tuple[StandIn, dict[str, Any]]:
    """The networks of a round, and how patches are handled around them: as around the user's."""
    form, squeeze, handling = own.form, model.handling["squeeze_axis"], dict(model.handling)
    checked = model.predictor
    count = len(checked.network.networks) if isinstance(checked, PatchPredictor) else 1
    if kind == "classes":
        is_activated = model.sections["stitch"].get("activation") == "none"
        members = [MakeClasses(form, *own.span, squeeze, ends_activated=is_activated) for _ in range(count)]
        return StandIn(members, folder, {}, model.orders, form, **handling), handling
    handling |= {"average": "logits", "activation": None}
    if isinstance(checked, PatchPredictor):
        checked.network.leave_out_flips()
    # From 3/4 to 5/4, so that a member that is left out shows.
    gains = [1 + 0.5 * (n / (count - 1) - 0.5) if count > 1 else 1.0 for n in range(count)]
    members = [GiveBack(form.factor, form.halo, squeeze, gain) for gain in gains]
    ramps = {name: own.channels[name] for name in RAMPS}
    trial = {"checked": checked, "trial": own.trial}
    return StandIn(members, folder, ramps, model.orders, form, **trial, **handling), handling
