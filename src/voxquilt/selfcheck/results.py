"""Judges the rounds of a self-check by the files that they wrote and by what their processes have seen."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

from voxquilt.models.patch_network import to_activation
from voxquilt.reporting.manifest import Row
from voxquilt.selfcheck.comparison import Rounding, compare_box, compare_geometry, compare_headers, compare_returned
from voxquilt.selfcheck.findings import Finding, Findings, world
from voxquilt.selfcheck.images import CLASSES, CONSTANT, NOISE, RAMPS
from voxquilt.selfcheck.model_space import compare_model_space
from voxquilt.selfcheck.preparation import Prepared
from voxquilt.selfcheck.product_comparison import compare_products
from voxquilt.selfcheck.reference import Way
from voxquilt.selfcheck.stand_in import Seen
from voxquilt.selfcheck.trial import allowed_error, unit_roundoff
from voxquilt.stitching.stitch import Stitch


@dataclass(frozen=True)
class Round:
    """A run that has ended.

    Args:
        folder: Its files.
        rows: Its subjects.
        stitch: How patches became volumes.
        device, precision, processes: What it ran on.
        options: How patches were handled; see PatchNetwork.
        preprocess: The settings of model space.
    """

    folder: Path
    rows: Sequence[Row]
    stitch: Stitch
    device: str
    precision: str
    processes: int
    options: Mapping[str, Any]
    preprocess: Mapping[str, Any]

    @property
    def description(self) -> str:
        """What it ran on, for people."""
        processes = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{self.device}, {self.precision}{processes}"

    @cached_property
    def _seen(self) -> list[dict[str, Any]]:
        return _read(self.folder, "seen")

    @property
    def ends_activated(self) -> bool:
        """Whether the network's outputs are taken for probabilities."""
        return self.stitch.activation == "none"

    @property
    def networks(self) -> list[dict[str, Any]]:
        """What each process found of the user's network."""
        return _read(self.folder, "network")

    def ramp(self, name: str) -> Seen | None:
        """What the network saw of a ramp."""
        ramps = [one["ramps"][name] for one in self._seen if name in one["ramps"]]
        found = [Seen(**ramp | {"voxel": tuple(ramp["voxel"])}) for ramp in ramps]
        return max(found, key=lambda seen: seen.excess, default=None)

    def way(self, subject: str) -> Way:
        """How a subject went to model space and back."""
        values = next(one["ways"][subject] for one in self._seen if subject in one["ways"])
        arrays = {key: np.array(values[key]) for key in ("native", "model")}
        triples = {key: tuple(values[key]) for key in ("shape", "model_shape", "factor")}
        pairs = {key: tuple(map(tuple, values[key])) for key in ("padding", "box") if values[key] is not None}
        return Way(**{**values, **arrays, **triples, **pairs, "orders": tuple(values["orders"])})

    def rounding(self, members: int) -> Rounding:
        """What the run rounds, with so many networks."""
        overlaps = max((one["overlaps"] for one in self._seen), default=1)
        on_cuda = self.device == "cuda"
        unit = 0.0
        if self.precision.startswith(("16", "bf16")):
            # Lightning's 16-mixed is bfloat16 on the host.
            is_bf16 = self.precision.startswith("bf16") or (not on_cuda and self.precision.endswith("mixed"))
            unit = unit_roundoff("bf16" if is_bf16 else "16", on_cuda=on_cuda)
        return Rounding(overlaps + 2 ** len(self.options["flips"]) * members, unit)

    def failed(self, subjects: Sequence[str]) -> dict[str, str]:
        """Why subjects have no files."""
        rows = {row.subject: row for row in self.rows}
        return {
            name: rows[name].error if name in rows else "it has no row"
            for name in subjects
            if name not in rows or rows[name].status == "failed"
        }

    def files_of(self, subject: str, product: str) -> list[Path]:
        """The files of a product, in the order of classes."""
        (row,) = (row for row in self.rows if row.subject == subject)
        ends = (".nii.gz", ".nii")
        exact = [name for name in row.outputs if name in {f"{subject}_{product}{end}" for end in ends}]
        parts = [name for name in row.outputs if name.startswith(f"{subject}_{product}_") and name.endswith(ends)]
        return [self.folder / name for name in exact or parts]


def judge_images(findings: Findings, ended: Round, own: Prepared, model: str) -> None:
    """What came back of ramps, a constant and noise, and what the network saw of ramps."""
    kinds = [*RAMPS, CONSTANT, NOISE]
    failed = ended.failed(kinds)
    found = [Finding(f"{name.replace('_', ' along ')}", problem=reason) for name, reason in failed.items()]
    rounding = ended.rounding(1)
    geometry: list[Finding] = []
    headers: list[Finding] = []
    spaces: list[Finding] = []
    boxes: list[Finding] = []
    for kind in kinds:
        if kind in failed:
            continue
        (output,) = ended.files_of(kind, "image")
        source = next(iter(own.files[kind].values()))
        geometry.append(compare_geometry(source, output))
        headers.append(compare_headers(source, output))
        way = ended.way(kind)
        spaces += compare_model_space(way, ended.preprocess)
        is_cropped = bool(ended.preprocess.get("crop"))
        if own.box is not None and (not is_cropped or kind in (CONSTANT, NOISE)):  # a ramp along a flat axis is 0
            boxes.append(compare_box(way, own.box, "preprocess.crop" if is_cropped else "data.within"))
        if kind == NOISE:
            written = [values.numpy() for values in torch.load(own.folder / "noise.pt", weights_only=True)]
            compared = compare_returned(kind, output, way, rounding, written=written)
        else:
            seen = ended.ramp(kind)
            if seen is None and kind != CONSTANT:
                findings.unchecked.append(f"{model}{kind} as the network sees it: cubic splines bend all of it")
            elif seen is not None:
                voxel = tuple(round(x, 2) for x in seen.voxel)
                mm = world(way.native, seen.voxel)
                check = f"{kind.replace('_', ' along ')} as the network sees it"
                found.append(Finding(check, seen.error, seen.allowed, "mm", voxel, mm))
            compared = compare_returned(kind, output, way, rounding, channels=own.channels[kind])
        if compared is None:
            reason = "only linear interpolation and cubic splines have a plain reference for it"
            findings.unchecked.append(
                f"{model}{kind}: {reason if kind == NOISE else 'no voxel is far enough from the borders of splines'}"
            )
        else:
            found.append(compared)
    for several in (geometry, headers, spaces, boxes):
        found += sorted(several, key=lambda one: (bool(one.problem), one.error))[-1:]
    findings.found += [replace(one, model=model.rstrip(".")) for one in found]


def judge_classes(findings: Findings, ended: Round, own: Prepared, model: str) -> None:
    """The products of the configuration, of scores that are linear in the image."""
    problem = ended.failed([CLASSES])
    if problem:
        findings.found.append(Finding("products", problem=problem[CLASSES], model=model.rstrip(".")))
        return
    averages = ended.options.get("average") == "probabilities"
    averaged = to_activation(ended.options.get("activation")) if averages else None
    for output, channels in own.form.channels.items():
        way = replace(ended.way(CLASSES), factor=own.form.factors[output])
        is_bent = averaged is not None or (ended.ends_activated and channels > 1)
        if is_bent and not way.is_all_linear:
            findings.unchecked.append(f"{model}products: probabilities that are not interpolated linearly")
            continue
        files, specs = {}, {}
        for _, of_blend in ended.stitch.specs(output, channels):
            for product, spec in of_blend.items():
                name = f"{output}_{product}" if output else product
                files[name], specs[name] = ended.files_of(CLASSES, name), spec
                findings.found += _misnamed(name, files[name], ended.stitch.class_names or (), model)
        for name, paths in list(files.items()):
            in_model = specs[name].in_model or specs[name].interpolated
            if not paths or (in_model and not way.is_all_linear):
                findings.unchecked.append(f"{model}{name}: it is not interpolated linearly")
                del files[name]
        found = compare_products(
            files, specs, ended.stitch, way, ended.rounding(1), own.channels[CLASSES][0], own.form, output,
            own.form.span(output, own.span),            averaged, ends_activated=ended.ends_activated,
        )  # fmt: skip
        if found is None:
            findings.unchecked.append(f"{model}products: no voxel is far enough from the borders of splines")
        findings.found += [replace(one, model=model.rstrip(".")) for one in found or ()]


def _misnamed(product: str, paths: Sequence[Path], names: Sequence[str], model: str) -> list[Finding]:
    """Whether the file of a class has another class's name, as far as letters and digits tell them apart."""

    def letters(text: str) -> str:
        return re.sub(r"[\W_]", "", text)

    wanted = [letters(str(name)) for name in names]
    if not 1 < len(paths) == len(wanted) == len({*wanted}) or "" in wanted:
        return []
    found = [letters(path.name.removeprefix(f"{CLASSES}_{product}_").partition(".nii")[0]) for path in paths]
    wrong = [path.name for path, ours, theirs in zip(paths, wanted, found, strict=True) if not ours.startswith(theirs)]
    problem = f"{wrong[0]} is the file of another class" if wrong else ""
    return [Finding(f"{product}: the files' names", problem=problem, model=model.rstrip("."))]


def judge_network(
    findings: Findings, ended: Round, own: Prepared, rebuild: Callable[[], LightningModule], model: str
) -> None:
    """The user's network, as configured, against the same on the host in float32."""
    allowed: float | None = None
    for rank, found in enumerate(ended.networks):
        process = f" (process {rank})" if ended.processes > 1 else ""
        check = f"the network, {found['device']}, {ended.precision}, and the host, float32{process}"
        if "failed" in found:
            findings.found.append(Finding(check, problem=found["failed"], model=model.rstrip(".")))
            continue
        if allowed is None and found["error"] > 0:
            allowed = allowed_error(rebuild(), own.trial, ended.precision, on_cuda=ended.device == "cuda")
            if allowed is None:
                findings.unchecked.append(f"{model}the network: it gives other numbers when it is run again")
                break
        voxel = tuple(found["where"][1:])
        findings.found.append(
            Finding(check, found["error"], allowed or 0.0, "", voxel, model=model.rstrip("."))
        )  # fmt: skip
    findings.setup.append(f"{model}the network's patch: {own.where}")


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_*.json"))]
