"""Runs `python -m voxquilt.export`."""

from voxquilt.export.command import main

if __name__ == "__main__":
    main()
