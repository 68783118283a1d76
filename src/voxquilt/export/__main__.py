"""Runs `python -m voxquilt.export`."""

from voxquilt.distributed.signals import start

if __name__ == "__main__":
    start("voxquilt.export.command")
