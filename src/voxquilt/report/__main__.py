"""Runs `python -m voxquilt.report`."""

from voxquilt.report.command import main

if __name__ == "__main__":
    main()
