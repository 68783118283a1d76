"""Can a model of 118 classes label a whole-body CT at full resolution on a laptop?

    python benchmarks/ct.py [--classes 118] [--shape 512 512 600] [--restore scores labels]

A CT made by a script (int16, 0.78 x 0.78 x 1 mm: boxes and noise), a 1x1x1 convolution in a model space of 1.5 mm,
patch 96, overlap 48, gaussian, labels on the CT's own grid, through predict.py in a process of its own. Its peak memory
is the operating system's figure. Labels of a crop are compared with a slow way in float64: model space by scipy's
map_coordinates through the affines, every class interpolated at every native voxel, arg-max. Where the two best classes
are closer than float32 tells, either is right. With restore=labels the share that differs is what nearest neighbour
costs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from common import ROOT, STEP, network
from scipy.ndimage import map_coordinates

from voxquilt.geometry.frame import Frame
from voxquilt.geometry.space import make_space

SPACING, CELL = 1.5, 24
CROP = (96, 64, 48)


def ct(shape: tuple[int, ...], classes: int) -> nib.Nifti1Image:
    """Boxes of 24 voxels, each of one class's value, and a little noise."""
    rng = np.random.default_rng(0)
    values = STEP * rng.integers(0, classes, [n // CELL + 1 for n in shape])
    volume = np.empty(shape, np.int16)
    for k in range(shape[2]):
        plane = values[..., k // CELL].repeat(CELL, 0).repeat(CELL, 1)[: shape[0], : shape[1]]
        volume[..., k] = plane + rng.integers(-1, 2, shape[:2])
    return nib.Nifti1Image(volume, np.diag([-0.78, -0.78, 1.0, 1.0]))


def plain_labels(image: nib.Nifti1Image, classes: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a crop by the slow way, and where they are certain."""
    volume, space = np.asarray(image.dataobj, np.float64), make_space(Frame(image.shape, image.affine), "RAS", SPACING)
    native = np.stack(np.meshgrid(*(np.arange(n) for n in CROP), [1], indexing="ij")).reshape(4, -1).astype(float)
    native[:3] += first[:, None]
    at = (np.linalg.inv(space.model.affine) @ image.affine @ native)[:3]
    at = at.clip(0, np.array(space.model.shape)[:, None] - 1)
    low, high = np.floor(at.min(1)).astype(int), np.ceil(at.max(1)).astype(int) + 1
    model = np.stack(np.meshgrid(*map(np.arange, low, high), [1], indexing="ij")).reshape(4, -1).astype(float)
    source = (np.linalg.inv(image.affine) @ space.model.affine @ model)[:3]
    values = map_coordinates(volume, source, order=1, mode="nearest").reshape(high - low)
    net = network(classes)
    assert isinstance(net, torch.nn.Conv3d)
    assert net.bias is not None
    best = np.full(at.shape[1], -np.inf)
    second, labels = best.copy(), np.zeros(at.shape[1], np.uint8)
    for number, (weight, bias) in enumerate(zip(net.weight.flatten().tolist(), net.bias.tolist(), strict=True)):
        score = map_coordinates(weight * values + bias, at - low[:, None], order=1, mode="nearest")
        labels = np.where(score > best, number, labels).astype(np.uint8)
        second = np.maximum(second, np.minimum(best, score))
        best = np.maximum(best, score)
    return labels.reshape(CROP), (best - second > 1e-4).reshape(CROP)


def main() -> None:
    """Print a table; exit status 1 if a label of interpolated scores is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 600])
    parser.add_argument("--restore", nargs="+", default=["scores", "labels"], choices=["scores", "labels"])
    arguments = parser.parse_args()
    print("| stitch.restore | seconds | peak RSS [GB] | voxels of the crop that differ |\n|---|---|---|---|")
    right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = ct(tuple(arguments.shape), arguments.classes)
        nib.save(image, folder / "ct.nii.gz")
        torch.save(network(arguments.classes).state_dict(), folder / "net.pt")
        first = np.array([n // 2 - c // 2 for n, c in zip(image.shape, CROP, strict=True)])
        first[0] = 0  # at the border too
        labels, certain = plain_labels(image, arguments.classes, first)
        for restore in arguments.restore:
            words = [
                *("data.inputs=ct.nii.gz", "data.patch_size=96", "data.patch_overlap=48", "preprocess.spacing=1.5"),
                *("model=state_dict", "model.net._target_=torch.nn.Conv3d", "+model.net.in_channels=1"),
                *(f"+model.net.out_channels={arguments.classes}", "+model.net.kernel_size=1", "ckpt_path=net.pt"),
                f"stitch.restore={restore}",
            ]
            start = time.perf_counter()
            # A parent of its own, since the peak of children is that of the largest so far.
            program = (
                "import resource, subprocess, sys\n"
                "status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
                "sys.exit(status)"
            )
            command = [sys.executable, "-c", program, sys.executable, ROOT / "predict.py", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            box = tuple(slice(f, f + c) for f, c in zip(first, CROP, strict=True))
            found = np.asarray(nib.load(folder / "outputs/ct_labels.nii.gz").dataobj)[box]
            wrong = np.count_nonzero((found != labels) & certain)
            right &= restore == "labels" or wrong == 0
            share = f"{wrong} of {certain.sum()}, {100 * wrong / certain.sum():.1f} %"
            print(f"| {restore} | {seconds:.0f} | {int(done.stdout) / 2**20:.2f} | {share} |", flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
