"""Runs a self-check: the user's own run, with synthetic images and with networks that give back what they get."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from voxquilt.cli.exit_status import DONE, FAILED, NOT_STARTED
from voxquilt.cli.inherited_settings import check_images
from voxquilt.cli.instantiate import build, check_classes
from voxquilt.cli.model_parts import PARTS
from voxquilt.data.discovery import SubjectFiles
from voxquilt.distributed.child_processes import attended
from voxquilt.distributed.environment import disarm_observer, is_first
from voxquilt.distributed.signals import ended_by
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.predictor import PatchPredictor
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.progress import print_event
from voxquilt.selfcheck.findings import Findings, print_findings
from voxquilt.selfcheck.images import CLASSES, CONSTANT, NOISE, RAMPS
from voxquilt.selfcheck.meeting import (
    announce,
    announce_error,
    announce_verdict,
    shared_folder,
    wait_for_first,
    wait_for_verdict,
)
from voxquilt.selfcheck.networks import GiveBack, MakeClasses
from voxquilt.selfcheck.preparation import Prepared, prepare
from voxquilt.selfcheck.results import Round, judge_classes, judge_images, judge_network
from voxquilt.selfcheck.stand_in import Orders, StandIn
from voxquilt.stitching.stitch import Stitch

# What is left out of a stitch, so that what comes back is an image.
_IMAGE = {
    "products": ["image"], "activation": "none", "threshold": None, "compare": [], "class_names": None,
    "label_values": None, "regions": None, "classes": None, "combine": None, "postprocess": [],
    "temperature": 1, "dtype": "float32", "files": "one",
}  # fmt: skip
_OF_SUBJECTS = ("inputs", "images", "suffixes", "extra_images", "skip", "within", "margin", "labels")
"""Keys of `data` that concern the user's subjects."""


@dataclass(frozen=True)
class _Model:
    """The sections of a configuration that belong to one of its models."""

    name: str
    sections: Mapping[str, Any]
    _weights: list[Tensor] = field(default_factory=list)

    def build(self) -> LightningModule:
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
        preprocess, stitch = self.sections["preprocess"], self.sections["stitch"]
        return Orders(
            preprocess.get("interpolation", 1), preprocess.get("per_slice"),
            stitch.get("order", 1), stitch.get("per_slice"),
        )  # fmt: skip


def check_itself(plain: Mapping[str, Any], inherited: Mapping[str, Any], cases: list[SubjectFiles] | None) -> int:
    """Send synthetic images through a run of the configuration, and the network's own patch through the network.

    Nothing is written into output_dir.

    Args:
        plain, inherited, cases: See `voxquilt.cli.predict_run.run`.

    Returns:
        The exit status: 1 if something is off.

    Raises:
        VoxquiltError: the configuration is wrong.
    """
    check_classes(inherited, plain["run"]["checkpoint_targets"])
    models = _models_of(plain)
    with ended_by(signal.SIGINT, signal.SIGTERM), shared_folder() as folder, _quiet(), _Processes() as processes:
        prepared = _prepared(models, plain, inherited, cases, folder)
        findings = Findings()
        try:
            for model, own in zip(models, prepared, strict=True):
                rounds = {kind: _run_round(kind, model, own, plain, processes) for kind in ("images", "classes")}
                if is_first():
                    judge_images(findings, rounds["images"], own, model.name)
                    judge_classes(findings, rounds["classes"], own, model.name)
                    judge_network(findings, rounds["images"], own, model.rebuild, model.name)
                    findings.setup.append(f"{model.name}{own.description}; {rounds['images'].description}")
        except Exception:
            if is_first():
                announce_verdict(folder, ok=False)
            raise
        if not is_first():
            return DONE if wait_for_verdict(folder) else FAILED
        disarm_observer()  # which would kill this process where another ends with FAILED
        announce_verdict(folder, ok=findings.ok)
    findings.unchecked += _unchecked(plain, models)
    if plain["run"]["log"] == "json":
        print_event("selfcheck", findings.as_json())
    else:
        print_findings(findings)
    return DONE if findings.ok else FAILED


def _tensors_of(predictor: LightningModule) -> list[Tensor]:
    return [*predictor.parameters(), *predictor.buffers()]


def _models_of(plain: Mapping[str, Any]) -> list[_Model]:
    node = plain["model"]
    if node["_target_"] != PARTS:
        return [_Model("", plain)]
    return [
        _Model(f"model.parts[{n}].", {**part, "data": {**plain["data"], **part["data"]}})
        for n, part in enumerate(node["parts"])
    ]


def _prepared(
    models: Sequence[_Model],
    plain: Mapping[str, Any],
    inherited: Mapping[str, Any],
    cases: list[SubjectFiles] | None,
    folder: Path,
) -> list[Prepared]:
    if not is_first():
        content = wait_for_first(folder)
        return [Prepared.read(folder / str(n)) for n in range(content["models"])]
    try:
        prepared = []
        for n, model in enumerate(models):
            data = _datamodule(model.sections, plain, build(model.sections["preprocess"], "preprocess"), cases, folder)
            check_images(inherited.get("images", []), data.cases)
            names = model.sections["stitch"].get("class_names")
            _ = model.handling  # before flips are left out
            model.keep_weights()
            kinds = {
                "has_splines": 3 in (model.orders.interpolation, model.orders.order),
                "is_series": model.sections["data"].get("time") == "volumes",
            }
            prepared.append(prepare(model.predictor, data, names, folder / str(n), **kinds))
    except BaseException as error:
        announce_error(folder, str(error))
        raise
    announce(folder, {"models": len(prepared)})
    return prepared


def _datamodule(
    sections: Mapping[str, Any], plain: Mapping[str, Any], preprocess: Any, cases: Any, folder: Path
) -> GridDataModule:
    """The user's subjects, or others in their place."""
    found = {} if cases is None else {"inputs": cases, "images": None, "suffixes": None, "extra_images": None}
    return build(
        sections["data"], "data", **found,
        preprocess=preprocess, shard=(0, 1), distribute=plain["run"]["distribute"], resume=None, output_dir=folder,
    )  # fmt: skip


class _Processes(ExitStack):
    """The processes that the first trainer starts, which stay for all rounds."""

    has_started = False

    def attend(self, trainer: Trainer) -> None:
        """Wait for them in the end, if the trainer is the first."""
        if not self.has_started:
            self.has_started = True
            self.enter_context(attended(trainer))


def _run_round(kind: str, model: _Model, own: Prepared, plain: Mapping[str, Any], processes: _Processes) -> Round:
    """Run the configuration on synthetic images: a run like any other, but for its network and its images."""
    folder = own.folder / kind
    folder.mkdir(exist_ok=True)
    sections = model.sections
    left_out = {key: value for key, value in (("intensity", None), ("one_hot", None)) if key in sections["preprocess"]}
    preprocess = build({**sections["preprocess"], **left_out}, "preprocess")
    subjects = [CLASSES] if kind == "classes" else [*RAMPS, CONSTANT, NOISE]
    images = [SubjectFiles(name, own.files[name]) for name in subjects]
    node = {key: value for key, value in sections["data"].items() if key not in _OF_SUBJECTS}
    node |= {"time": "channels"} if "time" in node else {}
    data = _datamodule({"data": {**node, "inputs": None}}, plain, preprocess, images, folder)
    wanted = _IMAGE if kind == "images" else {"postprocess": [], "combine": None}
    wanted = {key: value for key, value in wanted.items() if key in sections["stitch"]}
    stitch: Stitch = build({**sections["stitch"], **wanted}, "stitch")
    module, handling = _stand_in(kind, model, own, folder)
    own_writer = plain["callbacks"]["writer"]
    switched_off = {key: False for key in ("tensorboard", "overlay", "statistics", "report") if key in own_writer}
    writer: VolumeWriter = build(
        {**own_writer, "output_dir": str(folder), "log": "plain", "on_error": "skip", **switched_off},
        "callbacks.writer", stitch=stitch, configuration={},
    )  # fmt: skip
    trainer: Trainer = build(plain["trainer"], "trainer", callbacks=[writer], logger=False)
    processes.attend(trainer)
    trainer.predict(module, datamodule=data, return_predictions=False)
    if writer.status > NOT_STARTED:  # stopped by a signal, which stops the check
        raise SystemExit(writer.status)
    device = trainer.strategy.root_device
    rows = writer.rows if is_first() else []
    return Round(
        folder, rows, stitch, device.type, str(trainer.precision), trainer.world_size, handling, sections["preprocess"]
    )  # fmt: skip


def _stand_in(kind: str, model: _Model, own: Prepared, folder: Path) -> tuple[StandIn, dict[str, Any]]:
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


def _unchecked(plain: Mapping[str, Any], models: Sequence[_Model]) -> list[str]:
    """What of the configuration the check has left out, each with the reason."""
    data, run = plain["data"], plain["run"]
    preprocess = [model.sections["preprocess"] for model in models]
    lines = {
        "preprocess.intensity: left out, since what it changes could not be told from an error": any(
            node.get("intensity") for node in preprocess
        ),
        "preprocess.one_hot: labels of an earlier stage are left out": any(node.get("one_hot") for node in preprocess),
        "preprocess.crop: there is nothing to crop around synthetic images": any(
            node.get("crop") for node in preprocess
        ),
        "data.skip: no patch is left out": data.get("skip") is not None,
        "data.within: whole volumes are predicted": data.get("within") is not None,
        "data.labels: nothing is evaluated": data.get("labels") is not None,
        "data.time: one volume is predicted in place of a series": data.get("time", "channels") != "channels",
        "stitch.postprocess: left out, since it changes labels": any(
            m.sections["stitch"].get("postprocess") for m in models
        ),
        "stitch.combine: each model is checked by itself, the combination is not": len(models) > 1,
        "callbacks of your own": any(node for name, node in plain["callbacks"].items() if name != "writer"),
        "logger": bool(plain.get("logger")),
        "shard: the whole run is one": plain["shard"]["count"] > 1,
        "run.resume, since nothing is written into output_dir": bool(run["resume"])
        and Path(plain["output_dir"]).exists(),
    }
    return [line for line, applies in lines.items() if applies]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lines of finished synthetic subjects off the terminal."""
    log = logging.getLogger("voxquilt")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
