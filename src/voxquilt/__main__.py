"""Runs `python -m voxquilt doctor`."""

from voxquilt.doctor.command import main

if __name__ == "__main__":
    main()
