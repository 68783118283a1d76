"""Predicts, from a checked configuration to the exit status."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from voxquilt.cli.collector import paused_collector
from voxquilt.cli.exit_status import DONE, FAILED
from voxquilt.cli.inherited_settings import check_images
from voxquilt.cli.instantiate import build, check_classes
from voxquilt.cli.loggers import build_loggers
from voxquilt.cli.model_parts import PARTS
from voxquilt.cli.run_report import report_run
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import GridLoader, make_grids
from voxquilt.distributed.child_processes import SpawnedLogging, attended, quiet
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.models.several_predictors import SeveralPredictors
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.dry_run import DryRun
from voxquilt.prediction.output_lock import locked
from voxquilt.prediction.resume import Resume
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.run_logs import open_loggers
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.stitch import Stitch
from voxquilt.text import leave_stdout


@dataclass(frozen=True)
class _Parts:
    """What a run is made of, beside its trainer."""

    data: GridDataModule
    model: LightningModule
    writer: VolumeWriter
    callbacks: list[Callback]


def run(plain: Mapping[str, Any], inherited: Mapping[str, Any], cases: list[SubjectFiles] | None = None) -> int:
    """Build and predict, or only plan.

    Args:
        plain: The checked configuration.
        inherited: The settings that the checkpoint brought.
        cases: The subjects, if they have been found.

    Returns:
        The exit status.

    Raises:
        VoxquiltError: something cannot be built, does not fit, or was done otherwise; nothing was started.
    """
    options = plain["run"]
    _prepare_process(options)
    if options["selfcheck"]:
        # Here, since it imports what other runs need later or never.
        from voxquilt.cli.selfcheck_run import check_itself

        return check_itself(plain, inherited, cases)
    lock = ExitStack()
    claim_folder = partial(lock.enter_context, locked(_output_folder(plain), _shard(plain)))
    check_classes(inherited, options["checkpoint_targets"])
    with paused_collector():  # classes that the configuration names may import much
        parts = _build_parts(plain, inherited, cases, claim_folder)
    if options["dry_run"]:
        return _plan(plain, parts)
    trainer = _build_trainer(plain, parts)
    with lock:
        if is_first() and not is_external():
            claim_folder()
        has_broken_off = _predict(trainer, parts)
        if not is_first():
            return FAILED if has_broken_off else parts.writer.status
        return report_run(
            parts.data, parts.writer, options["surface_tolerance"],
            has_broken_off=has_broken_off, has_table=options["log"] != "json",
        )  # fmt: skip


def _prepare_process(options: Mapping[str, Any]) -> None:
    quiet()
    if options["log"] == "json":
        leave_stdout()
    if options["seed"] is not None:
        seed_everything(options["seed"], verbose=False)


def _output_folder(plain: Mapping[str, Any]) -> Path:
    return Path(plain["output_dir"]).expanduser().resolve()


def _shard(plain: Mapping[str, Any]) -> tuple[int, int]:
    return plain["shard"]["index"], plain["shard"]["count"]


def _build_parts(
    plain: Mapping[str, Any],
    inherited: Mapping[str, Any],
    cases: list[SubjectFiles] | None,
    claim_folder: Callable[[], Any],
) -> _Parts:
    options = plain["run"]
    # Where a launcher started all processes, rank 0 claims the folder when it can tell the others that it could not.
    claim_later = claim_folder if is_external() and not options["dry_run"] else None
    resume = Resume(
        _output_folder(plain), plain, options["resume"], options["overwrite"], options["content_hash"], claim_later
    )
    preprocess = build(plain["preprocess"], "preprocess")
    found = {} if cases is None else {"inputs": cases, "images": None, "suffixes": None, "extra_images": None}
    stitch = build(plain["stitch"], "stitch")
    models = _build_models(plain["model"], stitch)
    data: GridDataModule = build(
        plain["data"], "data", **found,
        preprocess=preprocess, shard=_shard(plain), distribute=options["distribute"], resume=resume,
        more_models=models.grids[1:],
    )  # fmt: skip
    if is_first() and not is_external():
        check_images(inherited.get("images", []), data.cases)
    nodes = {name: node for name, node in plain["callbacks"].items() if node}
    more = {} if models.combination is None else {"combination": models.combination}
    writer = build(nodes.pop("writer"), "callbacks.writer", stitch=stitch, configuration=dict(plain), **more)
    others = [build(node, f"callbacks.{name}") for name, node in nodes.items()]
    # Logging comes first, since the others log as they are set up.
    return _Parts(data, models.module, writer, [SpawnedLogging(to_stderr=options["log"] == "json"), *others])


@dataclass(frozen=True)
class _Models:
    """The network, or several; with several, the grids of each and how their volumes are combined."""

    module: LightningModule
    grids: Sequence[GridLoader] = ()
    combination: Combination | None = None


def _build_models(node: Mapping[str, Any], stitch: Stitch) -> _Models:
    if node["_target_"] != PARTS:
        return _Models(build(node, "model"))
    predictors, grids, stitches = [], [], []
    for n, part in enumerate(node["parts"]):
        key = f"model.parts[{n}]"
        predictors.append(build(part["model"], f"{key}.model"))
        preprocess = build(part["preprocess"], f"{key}.preprocess")
        grids.append(make_grids(preprocess, **part["data"]))
        stitches.append(build(part["stitch"], f"{key}.stitch"))
    numbers = tuple(tuple(part["numbers"] or ()) for part in node["parts"])
    return _Models(SeveralPredictors(predictors), grids, Combination(stitch, tuple(stitches), numbers))


def _plan(plain: Mapping[str, Any], parts: _Parts) -> int:
    """Only print what the run would need, and how long it would take."""
    options = plain["run"]
    parts.data.detailed = True
    planner = DryRun(parts.writer.options, timed=options["dry_run"] == "time", as_json=options["log"] == "json")
    logging, *others = parts.callbacks
    trainer: Trainer = build(plain["trainer"], "trainer", callbacks=[logging, planner, *others], logger=False)
    with attended(trainer):
        trainer.predict(parts.model, datamodule=parts.data, return_predictions=False)
    return DONE


def _build_trainer(plain: Mapping[str, Any], parts: _Parts) -> Trainer:
    logging, *others = parts.callbacks
    loggers = build_loggers(plain.get("logger"))
    return build(plain["trainer"], "trainer", callbacks=[logging, parts.writer, *others], logger=loggers)


def _predict(trainer: Trainer, parts: _Parts) -> bool:
    """Whether an error ended the run, which is printed.

    Raises:
        ConfigError: nothing was started.
    """
    try:
        with open_loggers(trainer, is_first=is_first()), attended(trainer):
            trainer.predict(parts.model, datamodule=parts.data, return_predictions=False)
    except ConfigError:
        raise
    except VoxquiltError as error:
        if is_first():
            print(f"voxquilt: {error}", file=sys.stderr)
        return True
    return False
