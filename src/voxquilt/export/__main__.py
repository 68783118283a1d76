"""Runs `python -m voxquilt.export`."""

from signal import SIGINT

from voxquilt.distributed.signals import ended_at_once, ended_by

if __name__ == "__main__":
    with ended_by(SIGINT):
        with ended_at_once():
            from voxquilt.export.command import main

        main()
