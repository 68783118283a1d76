"""Prints how a predict run ended, compares its outputs with true labels, and gives the exit status."""

import logging
import sys
from pathlib import Path

from voxquilt.cli.exit_status import DONE, FAILED
from voxquilt.data.discovery import LABEL
from voxquilt.errors import VoxquiltError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.evaluation import Evaluation, write_scores
from voxquilt.reporting.manifest import Row, of_shard
from voxquilt.reporting.plots import write_boxes
from voxquilt.reporting.tables import print_scores, print_table
from voxquilt.text import of_subjects, reason_of
from voxquilt.vocabulary import CHANNELS

log = logging.getLogger("voxquilt")


def report_run(
    data: GridDataModule, writer: VolumeWriter, tolerance: float, *, has_broken_off: bool, has_table: bool
) -> int:
    """Print the table of subjects and what is left, evaluate, and give the exit status.

    Args:
        data: The subjects of the run.
        writer: The writer of its outputs.
        tolerance: Tolerance of the surface Dice in mm.
        has_broken_off: Whether an error ended the run.
        has_table: Whether the table is printed.
    """
    outcome = writer.outcome
    by_subject = {row.subject: row for row in writer.rows}
    rows = [by_subject[case.subject] for case in data.cases if case.subject in by_subject]
    # Where the run broke off, processes that live are stopped by a signal, which is not what ended it.
    status = FAILED if has_broken_off else writer.status
    if has_table:
        print_table(rows, writer.output_dir, outcome.get("subjects", len(rows)))
    if outcome.get("status") == "stopped":
        left = f"{of_subjects(outcome['missing'])} left: the same command goes on."
        # Where the run broke off, the reason was printed as the error that it was.
        print(f"voxquilt: stopped by {outcome['reason']}; {left}" if status > FAILED else left, file=sys.stderr)
    elif data.grids.time == CHANNELS and (data.labels is not None or any(LABEL in case.values for case in data.cases)):
        status = max(status, _evaluate(data, writer, rows, tolerance))
    if writer.options.report:
        _write_report(writer.output_dir)
    return status


def _write_report(folder: Path) -> None:
    """Write report.html; what fails here is a warning, since the outputs are there."""
    from voxquilt.report.page import write_report  # here, since most of it is a template engine

    try:
        log.info("report: %s", write_report(folder))
    except Exception as error:
        log.warning("no report was written: %s", reason_of(error))


def _evaluate(data: GridDataModule, writer: VolumeWriter, rows: list[Row], tolerance: float) -> int:
    """Compare outputs with true labels: metrics.csv, metrics.png, a table; FAILED if a subject cannot be compared."""
    stitch = writer.stitch
    evaluation = Evaluation(writer.output_dir, data.cases, data.labels, stitch.class_names, tolerance, stitch.numbers)
    scores = evaluation.scores(rows)
    print_scores(scores, writer.output_dir)
    try:
        write_scores(writer.output_dir / of_shard("metrics.csv", data.shard), scores)
        write_boxes(writer.output_dir / of_shard("metrics.png", data.shard), scores)
    except VoxquiltError as error:  # the run itself was started, and its outputs are there
        print(f"voxquilt: {error}", file=sys.stderr)
        return FAILED
    return FAILED if any(score.failed for score in scores) else DONE
