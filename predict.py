"""Predict the volumes of a folder: `python predict.py --help`."""

from voxquilt.cli.main import predict

if __name__ == "__main__":
    predict()
