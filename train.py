"""Train a patch network on a folder of images and labels: `python train.py --help`."""

from voxquilt.commands.entry_points import train

if __name__ == "__main__":
    train()
