"""How does a predict run go, from a checked configuration to its exit status?"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything

from voxquilt.cli.inherited_settings import check_images
from voxquilt.cli.instantiate import build, check_classes
from voxquilt.data.discovery import LABEL
from voxquilt.distributed.child_processes import SpawnedLogging, attended, quiet
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.filesystem import read_json
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.dry_run import DryRun
from voxquilt.prediction.output_lock import locked
from voxquilt.prediction.resume import Resume
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.evaluation import Evaluation, write_scores
from voxquilt.reporting.manifest import Row, of_shard, read_rows
from voxquilt.reporting.plots import write_boxes
from voxquilt.reporting.tables import print_scores, print_table
from voxquilt.text import leave_stdout, of_subjects

DONE, FAILED = 0, 1


def run(plain: Mapping[str, Any], inherited: Mapping[str, Any]) -> int:
    """Build and predict, or only plan.

    Args:
        plain: The checked configuration.
        inherited: What of it the checkpoint brought.

    Returns:
        The exit status.

    Raises:
        VoxquiltError: something cannot be built, does not fit, or was done otherwise; nothing was started.
    """
    quiet()
    options = plain["run"]
    as_json, dry = options["log"] == "json", options["dry_run"]
    if as_json:
        leave_stdout()
    if options.get("seed") is not None:
        seed_everything(options["seed"], verbose=False)
    shard = plain["shard"]["index"], plain["shard"]["count"]
    folder = Path(plain["output_dir"]).expanduser().resolve()
    locks = ExitStack()
    claim = partial(locks.enter_context, locked(folder, shard))
    # Where a launcher started all processes, rank 0 claims the folder when it can tell the others that it could not.
    later = claim if is_external() and not dry else None
    resume = Resume(folder, plain, options["resume"], options["overwrite"], options["content_hash"], later)
    check_classes(inherited, options["checkpoint_targets"])
    preprocess = build(plain["preprocess"], "preprocess")
    data: GridDataModule = build(
        plain["data"], "data", preprocess=preprocess, shard=shard, distribute=options["distribute"], resume=resume
    )
    model = build(plain["model"], "model")
    if is_first() and not is_external():
        check_images(inherited.get("images", []), data.cases)
    stitch = build(plain["stitch"], "stitch")
    writer: VolumeWriter = build(
        plain["callbacks"]["writer"], "callbacks.writer", stitch=stitch, configuration=dict(plain)
    )
    others = {name: node for name, node in plain["callbacks"].items() if node and name != "writer"}
    callbacks = [build(node, f"callbacks.{name}") for name, node in others.items()]
    lines = SpawnedLogging(to_stderr=as_json)  # first, since others have something to say as they are set up
    if dry:
        data.detailed = True
        planner = DryRun(writer.options, timed=dry == "time", as_json=as_json)
        trainer: Trainer = build(plain["trainer"], "trainer", callbacks=[lines, planner, *callbacks], logger=False)
        with attended(trainer):
            trainer.predict(model, datamodule=data, return_predictions=False)
        return DONE
    logger = build(plain["logger"], "logger") if plain.get("logger") else False
    trainer = build(plain["trainer"], "trainer", callbacks=[lines, writer, *callbacks], logger=logger)
    with locks:
        if is_first() and not is_external():
            claim()
        return _predict(trainer, model, data, writer, options["surface_tolerance"], table=not as_json)


def _predict(
    trainer: Trainer,
    model: LightningModule,
    data: GridDataModule,
    writer: VolumeWriter,
    tolerance: float,
    *,
    table: bool,
) -> int:
    """Run, and say how it ended; what is on disk tells it, also where the run was in other processes than this."""
    broken = False
    try:
        with attended(trainer):
            trainer.predict(model, datamodule=data, return_predictions=False)
    except ConfigError:
        raise
    except VoxquiltError as error:
        broken = True
        if is_first():
            print(f"voxquilt: {error}", file=sys.stderr)
    if not is_first():
        return FAILED if broken else writer.status
    outcome = read_json(writer.output_dir / of_shard("run.json", data.shard))
    rows = read_rows([writer.output_dir / of_shard("manifest.csv", data.shard)])
    ours = [rows[case.subject] for case in data.cases if case.subject in rows]
    # Where the run broke off, processes that live are stopped by a signal, which is not what ended it.
    status = FAILED if broken else max(writer.status, outcome.get("exit_status") or 0)
    if table:
        print_table(ours, writer.output_dir, outcome.get("subjects", len(ours)))
    if outcome.get("status") == "stopped":
        left = f"{of_subjects(outcome['missing'])} left: the same command goes on."
        # Where the run broke off, the reason was printed as the error that it was.
        print(f"voxquilt: stopped by {outcome['reason']}; {left}" if status > FAILED else left, file=sys.stderr)
    elif data.labels is not None or any(LABEL in case.values for case in data.cases):
        status = max(status, _evaluate(data, writer, ours, tolerance))
    return status


def _evaluate(data: GridDataModule, writer: VolumeWriter, rows: list[Row], tolerance: float) -> int:
    """Compare what is on disk with the true labels: metrics.csv, metrics.png, a table; 1 if some subject cannot be."""
    stitch = writer.stitch
    evaluation = Evaluation(
        writer.output_dir, data.cases, data.labels, stitch.class_names, tolerance, stitch.label_values
    )
    scores = evaluation.scores(rows)
    print_scores(scores, writer.output_dir)
    try:
        write_scores(writer.output_dir / of_shard("metrics.csv", data.shard), scores)
        write_boxes(writer.output_dir / of_shard("metrics.png", data.shard), scores)
    except VoxquiltError as error:  # the run itself was started, and its outputs are there
        print(f"voxquilt: {error}", file=sys.stderr)
        return FAILED
    return FAILED if any(score.failed for score in scores) else DONE
