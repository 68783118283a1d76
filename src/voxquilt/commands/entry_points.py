"""Starts each command: Ctrl-C ends it with one line from here on, while its own code is still being imported."""

from voxquilt.distributed.signals import start


def predict() -> None:
    """`voxquilt-predict`, `python predict.py`."""
    start("voxquilt.cli.main", "predict")


def train() -> None:
    """`voxquilt-train`, `python train.py`."""
    start("voxquilt.cli.main", "train")


def export() -> None:
    """`voxquilt-export`."""
    start("voxquilt.export.command")


def report() -> None:
    """`voxquilt-report`."""
    start("voxquilt.report.command")


def doctor() -> None:
    """`voxquilt doctor`."""
    start("voxquilt.doctor.command")
