"""Runs a self-check: the user's own run, with synthetic images and with networks that give back what they get."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voxquilt.cli.exit_status import DONE, FAILED
from voxquilt.cli.inherited_settings import check_images
from voxquilt.cli.instantiate import build, check_classes
from voxquilt.cli.model_parts import PARTS
from voxquilt.cli.selfcheck_rounds import ModelSections, StartedProcesses, make_datamodule, run_combined, run_round
from voxquilt.data.discovery import SubjectFiles
from voxquilt.distributed.environment import disarm_observer, is_first
from voxquilt.distributed.signals import ended_by
from voxquilt.reporting.progress import print_event
from voxquilt.selfcheck.combined_round import judge_combined
from voxquilt.selfcheck.findings import Findings, print_findings
from voxquilt.selfcheck.meeting import (
    announce,
    announce_error,
    announce_verdict,
    shared_folder,
    wait_for_first,
    wait_for_verdict,
)
from voxquilt.selfcheck.preparation import Prepared, prepare
from voxquilt.selfcheck.results import judge_classes, judge_images, judge_network


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
    with ended_by(signal.SIGINT, signal.SIGTERM), shared_folder() as folder, _quiet(), StartedProcesses() as processes:
        prepared = _prepared(models, plain, inherited, cases, folder)
        findings = Findings()
        try:
            for model, own in zip(models, prepared, strict=True):
                rounds = {kind: run_round(kind, model, own, plain, processes) for kind in ("images", "classes")}
                if is_first():
                    judge_images(findings, rounds["images"], own, model.name)
                    judge_classes(findings, rounds["classes"], own, model.name)
                    judge_network(findings, rounds["images"], own, model.rebuild, model.name)
                    findings.setup.append(f"{model.name}{own.description}; {rounds['images'].description}")
            if len(models) > 1:
                together = run_combined(models, prepared, plain, folder / "together", processes)
                if is_first():
                    judge_combined(findings, together, prepared)
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


def _models_of(plain: Mapping[str, Any]) -> list[ModelSections]:
    node = plain["model"]
    if node["_target_"] != PARTS:
        return [ModelSections("", plain)]
    return [
        ModelSections(f"model.parts[{n}].", {**part, "data": {**plain["data"], **part["data"]}})
        for n, part in enumerate(node["parts"])
    ]


def _prepared(
    models: Sequence[ModelSections],
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
            data = make_datamodule(
                model.sections, plain, build(model.sections["preprocess"], "preprocess"), cases, folder
            )
            check_images(inherited.get("images", []), data.cases)
            names = model.sections["stitch"].get("class_names")
            _ = model.handling  # before flips are left out
            model.keep_weights()
            kinds = {
                "has_splines": 3 in (model.orders.interpolation, model.orders.order),
                "is_series": model.sections["data"].get("time") == "volumes",
            }
            prepared.append(prepare(model.predictor, data, names, folder / str(n), **kinds))
    except Exception as error:
        announce_error(folder, str(error))
        raise
    announce(folder, {"models": len(prepared)})
    return prepared


def _unchecked(plain: Mapping[str, Any], models: Sequence[ModelSections]) -> list[str]:
    """What of the configuration the check has left out, each with the reason."""
    data, run = plain["data"], plain["run"]
    preprocess = [model.sections["preprocess"] for model in models]
    lines = {
        "preprocess.intensity: left out, since what it changes could not be told from an error": any(
            node.get("intensity") for node in preprocess
        ),
        "preprocess.one_hot: labels of an earlier stage are left out": any(node.get("one_hot") for node in preprocess),
        "data.skip: no patch is left out": data.get("skip") is not None,
        "data.within: what preprocess.crop leaves is predicted": data.get("within") is not None
        and any(node.get("crop") for node in preprocess),
        "data.labels: nothing is evaluated": data.get("labels") is not None,
        "data.time: one volume is predicted in place of a series": data.get("time", "channels") != "channels",
        "stitch.postprocess: left out, since it changes labels": any(
            m.sections["stitch"].get("postprocess") for m in models
        ),
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
