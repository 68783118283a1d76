"""Runs `python -m voxquilt.report`."""

from voxquilt.distributed.signals import start

if __name__ == "__main__":
    start("voxquilt.report.command")
