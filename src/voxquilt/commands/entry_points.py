"""Starts each command: Ctrl-C ends it with one line from here on, while its own code is still being imported."""

from signal import SIGINT

from voxquilt.distributed.signals import ended_at_once, ended_by


def predict() -> None:
    """`voxquilt-predict`, `python predict.py`."""
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.cli.main import predict

        predict()


def train() -> None:
    """`voxquilt-train`, `python train.py`."""
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.cli.main import train

        train()


def export() -> None:
    """`voxquilt-export`."""
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.export.command import main

        main()


def report() -> None:
    """`voxquilt-report`."""
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.report.command import main

        main()


def doctor() -> None:
    """`voxquilt doctor`."""
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.doctor.command import main

        main()
