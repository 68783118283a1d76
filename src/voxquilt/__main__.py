"""Runs `python -m voxquilt doctor`."""

from voxquilt.commands.entry_points import doctor

if __name__ == "__main__":
    doctor()
