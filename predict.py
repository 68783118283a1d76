"""Predict the volumes of a folder: `python predict.py --help`."""

from voxquilt.commands.entry_points import predict

if __name__ == "__main__":
    predict()
