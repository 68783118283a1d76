"""Predict the volumes of a folder: `python predict.py --help`."""

from voxquilt.app import predict

if __name__ == "__main__":
    predict()
